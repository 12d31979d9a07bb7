"""What a page takes for granted: the commands that its reader has run before, on this page's own words or another's.

`BEFORE[page]` has commands by the line before which they are needed; "" is before the first. They are written like the
page's, with the same placeholders. `FILES[page]` are files of the reader's own, made by Python code.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

_NEW_TOKEN = "edgefl cloud token --home /srv/edgefl"  # noqa: S105 - a command
_CLOUD = ("edgefl cloud start --home /srv/edgefl",)


def _device(home: str, name: str, part: int, parts: int, *options: str) -> tuple[str, ...]:
    enrolled = f"--cloud https://CLOUD:9480 --token-file token.txt --name {name} --tag site=oslo"
    data = " ".join((f"--data part={part} --data parts={parts}", *options))
    return (
        _NEW_TOKEN,
        f"edgefl agent enroll --home {home} {enrolled}",
        f"edgefl agent start --home {home} {data}",
    )  # fmt: skip


_FLEET = (*_CLOUD, *_device("/var/lib/edgefl", "cam-3", 0, 2), *_device("~/edgefl", "cam-4", 1, 2))
_SHORT_RUN = "edgefl run examples/digits --config examples/digits/config.toml --rounds 2"
_ENROLLED = _device("~/edgefl", "cam-4", 1, 2)[:2]

BEFORE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "README.md": {"edgefl run examples/digits": _device("~/edgefl", "cam-4", 1, 2)},
    "deploy.md": {"edgefl agent start --home ~/edgefl": _ENROLLED},
    "operate.md": {
        "": _FLEET,
        "edgefl jobs compare": (f'{_SHORT_RUN} --name "second try"',),
        "edgefl cloud tokens list": (_NEW_TOKEN,),
        "_EDGEFL_COMPLETE=fish_source": ("mkdir -p ~/.config/fish/completions",),
    },
    "publish.md": {
        "": (*_FLEET, "edgefl run examples/digits --config examples/digits/config.toml"),
        "edgefl models publish digits --task examples/digits --parameters": (
            "edgefl simulate examples/digits --clients 2 --rounds 2 --out digits.safetensors",
        ),
        "edgefl models publish digits --onnx": ("python make_onnx.py",),
    },
    "offload.md": {
        "": (
            "edgefl local start --devices 1",
            "edgefl simulate examples/digits --clients 2 --rounds 2 --out digits.safetensors",
            "edgefl models publish digits --task examples/digits --parameters digits.safetensors --compress none",
        ),
    },
    "lora.md": {"edgefl models publish turned --task examples/lora --untrained": ("edgefl local start --devices 1",)},
    "flower.md": {"edgefl run examples/flower-app": ("edgefl local start --devices 2",)},
    "examples/digits/README.md": {
        "edgefl agent start --home device0": (*_CLOUD, *_device("device0", "d0", 0, 3)[:2]),
        "edgefl run": _device("device1", "d1", 1, 3),
    },
    "examples/cifar10/README.md": {
        "edgefl agent start --home device0": ("python make_pictures.py", *_CLOUD, *_device("device0", "d0", 0, 10)[:2]),
        "CIFAR10_PATH": _device("device1", "d1", 1, 10, "--data path=/data/cifar10"),
    },
    "examples/flower-app/README.md": {"edgefl run": ("edgefl local start --devices 2",)},
    "examples/sklearn-app/README.md": {"edgefl run": ("edgefl local start --devices 2",)},
    "examples/keras-app/README.md": {"edgefl run": ("edgefl local start --devices 2",)},
    "examples/tabular/README.md": {"edgefl run": ("edgefl local start --devices 3",)},
}  # fmt: skip

FILES: Mapping[str, Mapping[str, str]] = {
    "publish.md": {
        "make_onnx.py": """
            from pathlib import Path
            import numpy
            from edgefl.models.export import export_task
            from edgefl.task import load_task
            from edgefl.trees import SpooledTree

            task = load_task("examples/digits")
            export_task(task, SpooledTree(Path("digits.safetensors")), Path("digits.onnx"))
            numpy.savez("digits.npz", input=task.test_data()[0][:4])
            """,
    },
    "examples/cifar10/README.md": {
        "make_pictures.py": """
            import io
            import os
            from pathlib import Path
            import numpy
            import pyarrow
            import pyarrow.parquet
            from PIL import Image

            def picture(label, rng):
                pixels = rng.integers(0, 64, (32, 32, 3)) + 16 * label
                file = io.BytesIO()
                Image.fromarray(pixels.astype(numpy.uint8)).save(file, "png")
                return {"bytes": file.getvalue(), "path": None}

            folder = Path(os.environ["PAGE_ROOT"], "data/cifar10")
            folder.mkdir(parents=True)
            for split, count in (("train", 200), ("test", 100)):
                rng = numpy.random.default_rng(count)
                labels = [number % 10 for number in range(count)]
                table = pyarrow.table({"img": [picture(one, rng) for one in labels], "label": labels})
                pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
            """,
    },
}


def commands_before(page: str, line: str) -> tuple[str, ...]:
    """Return what is to be run before a line of a page; "" for the page itself."""
    known = BEFORE.get(page, {})
    return known.get("", ()) if not line else next((known[one] for one in known if one and line.startswith(one)), ())


def files_of(page: str) -> dict[str, str]:
    return {name: textwrap.dedent(text) for name, text in FILES.get(page, {}).items()}
