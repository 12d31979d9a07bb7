"""Which extra provides a module, and the command that installs it from the source of this edgefl.

PyPI's `edgefl` is another project with the same import name, so a hint never names it. pip records the origin
of a package from a folder, a file or a repository in direct_url.json (PEP 610); without this file, it came
from an index.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "edgefl-fleet"

# The extras of each command; a command that is not listed needs only edgefl's own requirements.
OF_COMMANDS: Mapping[str, str] = {
    "agent": "agent",
    "cloud": "cloud",
    "demo": "agent,train,cloud,examples",
    "local": "agent,cloud",
    "offload": "train",
    "region": "cloud",
}
# Import name -> the extras that provide it, the smallest first.
OF_MODULES: Mapping[str, tuple[str, ...]] = {
    "PIL": ("examples",),
    "aiomqtt": ("agent", "cloud"),
    "blake3": ("agent", "cloud"),
    "fastapi": ("cloud",),
    "flwr": ("flower",),
    "google": ("agent", "cloud"),
    "grpc": ("agent", "cloud"),
    "jinja2": ("generate",),
    "matplotlib": ("sim",),
    "onnx": ("train", "stages"),
    "onnxmltools": ("examples",),
    "onnxruntime": ("agent", "stages", "train"),
    "onnxscript": ("train",),
    "pandas": ("sim",),
    "psutil": ("agent", "cloud"),
    "pyarrow": ("examples",),
    "ray": ("ray",),
    "skl2onnx": ("examples",),
    "sklearn": ("examples",),
    "sqlalchemy": ("cloud",),
    "starlette": ("agent", "cloud"),
    "tensorboard": ("tensorboard",),
    "tokenizers": ("generate",),
    "torch": ("train", "sim"),
    "transformers": ("offload",),
    "uvicorn": ("agent", "cloud"),
    "xgboost": ("examples",),
}


def install_command(extras: str) -> str:
    """Return the shell command that adds extras (such as "agent,train") to this installation."""
    return f"{sys.executable} -m pip install {_requirement(_origin(), extras)}"


def extra_of(module: str | None, command: str = "") -> str | None:
    """Return the extra that provides a module; of several, the one for `command`."""
    extras = OF_MODULES.get((module or "").partition(".")[0], ())
    asked = OF_COMMANDS.get(command, "")
    return asked if asked and set(extras) & set(asked.split(",")) else next(iter(extras), None)


def running_command() -> str:
    """Return the name of the edgefl command that runs, such as `simulate`; empty in a program that imports edgefl."""
    import click

    context = click.get_current_context(silent=True)
    while context is not None and context.parent is not None and context.parent.parent is not None:
        context = context.parent
    return "" if context is None or context.parent is None else context.info_name or ""


def missing_modules(extras: str) -> list[str]:
    """Return the modules of these extras that are not installed; imports nothing."""
    asked = set(extras.split(","))
    return [module for module, brought_by in OF_MODULES.items() if asked & set(brought_by) and not find_spec(module)]


def _requirement(origin: Mapping[str, Any], extras: str) -> str:
    url = str(origin.get("url", ""))
    parts = urlsplit(url)
    if "dir_info" in origin:
        folder = Path(unquote(parts.path))
        if not (folder / "pyproject.toml").exists():
            return f"'.[{extras}]' (in a clone of edgefl; the one at {folder} is gone)"
        return f"{'-e ' if origin['dir_info'].get('editable') else ''}'{folder}[{extras}]'"
    if "vcs_info" in origin:
        info = origin["vcs_info"]
        return f"'{DISTRIBUTION}[{extras}] @ {info['vcs']}+{url}@{info['commit_id']}'"
    return f"'{DISTRIBUTION}[{extras}]{f' @ {url}' if url else ''}'"


def _origin() -> Mapping[str, Any]:
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
    except PackageNotFoundError:  # runs from a clone that was never installed
        return {"url": Path(__file__).parents[2].as_uri(), "dir_info": {}}
    found: Mapping[str, Any] = json.loads(text) if text else {}
    return found
