"""A language model learns from texts that stay on devices, in parts, and generates there: job, release, patch."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

import pytest

from benchmarks.generation_model import model_file
from edgefl.local_fleet import free_ports
from edgefl.task import load_task
from edgefl.training.evaluation import Judge
from edgefl.training.local import initial_parameters
from edgefl.trees import SpooledTree
from tests.docs.pages import blocks
from tests.docs.pages import written as written_pages
from tests.e2e.split_fleet import split_server
from tests.e2e.test_generation import START_S
from tests.e2e.test_text_releases import ReleaseFleet
from tests.language_models import byte_tokenizer, smollm2

torch = pytest.importorskip("torch", reason="needs the [train] extra")
transformers = pytest.importorskip("transformers", reason="needs the [offload] extra")
pytest.importorskip("peft", reason="needs the [lora] extra")
ROOT, PAGE = Path(__file__).parents[2], "chat.md"
SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
TASK = """
    import os
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from edgefl import Task
    from edgefl.offload.training.bare import structure_only

    def make_model():
        if structure_only():
            base = LlamaForCausalLM(LlamaConfig(**{sizes}))
        else:
            base = LlamaForCausalLM.from_pretrained(os.environ["BASE"])
        return get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))

    def texts(part="0"):
        tokens = torch.randint(97, 123, (32, 17), generator=torch.Generator().manual_seed(int(part)))
        return tokens[:, :-1], tokens[:, 1:]

    def loss(outputs, targets):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())

    task = Task(name="letters", model=make_model, loss=loss, train_data=texts,
                optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr))
"""


class AdaptedFleet(ReleaseFleet):
    """A fleet whose language model is one of transformers, in `base`."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        from tokenizers import Tokenizer

        self.base = folder / "base"
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(self.base)
        transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_tokenizer())).save_pretrained(
            self.base
        )
        for options in (("--cut", 1), ()):
            self.split(self.models, *options)

    def split(self, out, *options) -> None:
        self.command("offload", "split-decoder", self.base, "--name", "tiny", "--out", out, *options, timeout_s=START_S)


def written(folder):
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "letters"\n[tool.edgefl]\ntask = "task:task"\n')
    (folder / "task.py").write_text(textwrap.dedent(TASK).replace("{sizes}", repr(SIZES)))
    return folder


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_adapters_that_were_trained_in_parts_reach_the_texts_of_devices(tmp_path, monkeypatch) -> None:
    with AdaptedFleet(tmp_path) as fleet:
        monkeypatch.setenv("BASE", str(fleet.base))
        assert fleet.publish_head() == "tiny:1"
        fleet.roll_out("tiny")
        before = fleet.text_of(20)
        assert [fleet.generated(name) for name in ("near", "far")] == [before, before]

        learnt, adapted = tmp_path / "learnt.safetensors", tmp_path / "adapted"
        with split_server(fleet) as server:
            more = ("train.split.cut=1", "train.split.last_cut=3", "rounds.clients=2", "rounds.quorum=2")
            chosen = (*server.settings(batch_size=8, epochs=1, lr=0.05), *more)
            settings = [part for one in chosen for part in ("--set", one)]
            fleet.command(
                "run", written(tmp_path / "letters"), "--cloud", fleet.url, "--rounds", 1, "--out", learnt, *settings,
                timeout_s=START_S,
            )  # fmt: skip
        for options in (("--cut", 1), ()):
            fleet.split(adapted, "--parameters", learnt, *options)
        tail_port = free_ports(1)[0]
        tail = fleet.spawn(
            "adapted.log", "cloud", "generate", adapted / "tail", "--home", fleet.home, "--port", tail_port,
            "--engine", "numpy",
        )  # fmt: skip
        tail.wait_for("tail.ready", START_S)
        options = ("--tail", f"127.0.0.1:{tail_port}", "--format", "fp32")
        assert fleet.publish(adapted / "head", *options, "--base", 1) == "tiny:2"
        released = {one["version"]: one for one in json.loads(fleet.command("models", "show", "tiny", "--json", "-"))}
        assert released[2]["base"] == released[1]["blob"]
        assert released[2]["patch"]["size"] < released[2]["blob"]["size"] / 4
        fleet.roll_out("tiny")
        after = fleet.text_of(20, models=adapted)
        assert after != before
        for name in ("near", "far"):
            fleet.agents[name].wait_for("release.patched", 10)
            assert fleet.generated(name) == after
        fleet.roll_out("tiny", "--version", 1, "--rollback")
        assert fleet.generated("near") == before
        tail.stop()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_documented_commands_adapt_smollm2(tmp_path, monkeypatch) -> None:
    model = smollm2(model_file)
    commands = [
        shlex.split(line)
        for one in blocks({PAGE: written_pages()[PAGE]}, "sh")
        if "--parameters learnt" in one.text
        for line in one.text.splitlines()
    ]
    monkeypatch.setenv("SMOLLM2", str(model))
    monkeypatch.chdir(tmp_path)  # where the commands write, beside the examples
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "model").symlink_to(model.parent)
    with ReleaseFleet(tmp_path) as fleet:
        whole = ("offload", "split-decoder", model, "--cut", 6, "--name", "smollm2", "--out", "smollm2")
        fleet.command(*whole, timeout_s=900)
        ports = dict(zip(("9460", "9461"), free_ports(2), strict=True))
        tails = [_tail(fleet, "smollm2/tail", ports["9460"])]
        fleet.publish("smollm2/head", "--tail", f"127.0.0.1:{ports['9460']}")
        for name in ("near", "far"):
            fleet.agents[name].stop()
            options = ("--data", f"part={int(name == 'far')}", "--data", "parts=2", "--data", "num=8")
            fleet.start_agent(name, *options, "--data", f"tokenizer={tmp_path / 'smollm2/head/tokenizer.json'}")
            fleet.agents[name].wait_for("mqtt.up")
        fleet.roll_out("smollm2")
        question = {"model": "smollm2", "prompt": "The function returns", "max_tokens": 12, "temperature": 0}
        before = {name: fleet.client(name).completions.create(**question).choices[0].text for name in ("near", "far")}
        assert before["near"] == before["far"]
        with split_server(fleet) as server:
            for words in commands:
                words[:] = [one.replace("cloud.example.org:9461", f"127.0.0.1:{ports['9461']}") for one in words]
                match words[1:3]:
                    case ["run", _]:
                        report = tmp_path / "run.json"
                        server_at = f"train.split.server=127.0.0.1:{server.port}"
                        more = ("--set", server_at, "--set", "rounds.clients=2", "--set", "rounds.quorum=2")
                        fleet.command(*words[1:], "--cloud", fleet.url, "--json", report, *more, timeout_s=2400)
                        said = json.loads(report.read_text())
                    case ["cloud", "generate"]:
                        tails.append(_tail(fleet, words[3], ports["9461"]))
                    case ["rollout", _]:
                        fleet.roll_out("smollm2")
                    case _:
                        fleet.command(*words[1:], timeout_s=900)
        assert [one["admitted"] for one in said["rounds"]] == [2, 2]
        task = load_task("examples/adapt_text")
        judge, begin = Judge(task), initial_parameters(task)
        assert judge(SpooledTree(tmp_path / "learnt.safetensors"))["loss"] < judge(begin)["loss"]
        for name in ("near", "far"):
            fleet.agents[name].wait_for("release.patched", 10)
        after = {name: fleet.client(name).completions.create(**question).choices[0].text for name in ("near", "far")}
        assert after["near"] == after["far"]
        for one in tails:
            one.stop()


def _tail(fleet, folder, port):
    name = str(folder).replace("/", "-")
    tail = fleet.spawn(f"{name}.log", "cloud", "generate", folder, "--home", fleet.home, "--port", port)
    tail.wait_for("tail.ready", START_S)
    return tail
