"""`edgefl offload split-decoder`: a language model as a head for devices and a tail for the cloud."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from edgefl.operator.connection import CloudConnection, connected
from edgefl.terminal.output import Output, example, json_option

_MB = 1e6


@click.command(
    epilog=example(
        "edgefl offload split-decoder SmolLM2-135M-Instruct.Q4_1.gguf --cut 6 --out smollm2",
        "edgefl offload split-decoder ./Qwen2.5-0.5B-Instruct --cut 4 --name qwen --out qwen",
        "edgefl offload split-decoder SmolLM2-135M-Instruct.Q4_1.gguf --parameters adapted.safetensors --cut 6 "
        "--out adapted",
    )
)
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--cut", type=click.IntRange(min=0), help="Blocks in the head. [default: do not split; write the whole]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the stages.")
@click.option("--name", default="", help="The model's name for clients. [default: the file's or folder's]")
@click.option("--parameters", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="What a job has made of this model: the file of `edgefl run --out`.")  # fmt: skip
@click.option("--adapter", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Adapters for this model, in peft's format, as `edgefl models adapter` writes them.")  # fmt: skip
@json_option
def split_decoder(model: Path, cut: int | None, out: Path, name: str, output: Output, **learnt: Path | None) -> None:
    """Split a language MODEL behind some of its blocks: a .gguf file, or a folder of Hugging Face transformers.

    Writes OUT/head for devices (embedding and the first blocks, with the tokenizer) and OUT/tail for the cloud. Before
    they can be used, both together are compared with the whole model.
    """
    from edgefl.offload.generation.adapted import with_learnt
    from edgefl.offload.generation.language_model import open_language_model
    from edgefl.offload.generation.splitting import split_language_model

    whole = with_learnt(open_language_model(model, name), **learnt)
    infos = split_language_model(whole, cut, out)
    folders = [out / part for part in (["whole"] if cut is None else ["head", "tail"])]
    rows = [
        (str(folder), f"{one.start} to {one.end} of {one.spec.num_blocks}", f"{one.weight_bytes / _MB:.0f} MB",
         f"{one.cache_bytes / 1e3:.1f} kB", one.digest[:12])
        for folder, one in zip(folders, infos, strict=True)
    ]  # fmt: skip
    output.line(f"{infos[0].name}: the stages compute what the whole model does")
    output.table(("folder", "blocks", "weights", "cache of a token", "digest"), rows, "", whole=("folder",))
    if cut is not None:
        output.line(f"in the cloud: edgefl cloud generate {folders[1]} --home HOME")
        output.line(f"on a device:  edgefl agent start --home HOME --generate {folders[0]} --generate-tail HOST:9460")
    stages = [{"folder": str(folder), **dataclasses.asdict(one)} for folder, one in zip(folders, infos, strict=True)]
    output.result({"model": infos[0].name, "stages": stages})


@click.command(
    epilog=example(
        "edgefl offload publish-decoder smollm2/head --tail cloud.example.org:9460",
        "edgefl offload publish-decoder tiny/whole --name assistant",
        "edgefl offload publish-decoder adapted/head --base 1 --tail cloud.example.org:9461",
    )
)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--name", default="", help="The release's name. [default: that of the model]")
@click.option("--tail", default="", metavar="HOST:PORT", help="Where devices reach `edgefl cloud generate`.")
@click.option("--format", "form", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16", "bf16"]),
              help="Wire format of what crosses the cut.")  # fmt: skip
@click.option("--base", type=click.IntRange(min=1), metavar="VERSION",
              help="Version without these adapters: a device that has it fetches them alone.")  # fmt: skip
@connected
@json_option
def publish_decoder(folder: Path, connection: CloudConnection, output: Output, **given: Any) -> None:
    """Publish the stage in FOLDER as a release: devices that get it generate texts.

    FOLDER is `head` or `whole` of `edgefl offload split-decoder`. The release is signed, rolled out and rolled back
    like any other. A device generates texts with one language model at a time, the last that was rolled out to it.
    """
    from edgefl.operator.publishing.texts import TextRelease, publish_text

    release = TextRelease(folder=folder, **given)
    with connection.open() as client:
        found = publish_text(client, release)
    info = release.info
    if found["note"]:
        output.line(found["note"])
    output.line(f"{found['model']} version {found['version']}: {info.what}; clients name the model {info.name!r}")
    if release.tail:
        output.line(f"serve its tail there: edgefl cloud generate FOLDER/tail --home HOME, at {release.tail}")
    output.line(f"deliver it to the devices: edgefl rollout start {found['model']} --version {found['version']}")
    output.result(found)
