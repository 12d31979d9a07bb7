"""Write a model into Triton's model repository, so that a Triton server can stand in for ours.

    FOLDER/NAME/config.pbtxt       the text form of Triton's ModelConfig
    FOLDER/NAME/VERSION/model.onnx      an empty folder for an ensemble, which passes tensors between other models

https://github.com/triton-inference-server/server/tree/main/docs/user_guide: model_repository, model_configuration
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.models.tensors import TensorInfo
from edgefl.process.home import replace_file
from edgefl.protocols.inference.service import REQUEST_DIGEST

MODEL_FILE, CONFIG_FILE = "model.onnx", "config.pbtxt"


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryModel:
    """A model as a repository describes it."""

    name: str
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    version: int = 1
    digest: str = ""  # SHA-256 of its file, or of the release that it is a part of
    max_batch: int = 0  # rows that may be one batch; 0 = requests are not merged
    max_wait_us: int = 0  # for other requests to merge with

    def __post_init__(self) -> None:
        if not self.name or self.name != Path(self.name).name or self.name.startswith("."):
            raise ConfigError(f"{self.name!r} cannot be the name of a folder; choose another name for the model")
        if self.version < 1:
            raise ConfigError(f"version {self.version} of model {self.name} is invalid; expected 1 or more")
        fixed = [one for one in (*self.inputs, *self.outputs) if one.shape[:1] != (-1,)]
        if self.max_batch and fixed:
            raise ConfigError(
                f"model {self.name} cannot have max_batch={self.max_batch}: the first dimension of {fixed[0]} is not "
                "free. Export it with a free number of rows, or use max_batch=0"
            )


def write_repository(folder: Path, model: RepositoryModel, file: Path) -> Path:
    """Write a model's folder, replacing files of this version, and return it. Weights beside the file are copied."""
    target = folder / model.name
    version = target / str(model.version)
    version.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, version / MODEL_FILE)
    for weights in external_files(file):
        shutil.copyfile(weights, version / weights.name)
    replace_file(target / CONFIG_FILE, config_text(model).encode())
    return target


def write_ensemble(folder: Path, name: str, steps: Sequence[RepositoryModel]) -> RepositoryModel:
    """Write a model that runs others one after the other, and return it.

    It takes what the steps take and none before them returns; it returns what the last one does, and what no later
    step takes.
    """
    made = {one.name for step in steps for one in step.outputs}
    taken = {one.name for step in steps for one in step.inputs}
    inputs = {one.name: one for step in steps for one in step.inputs if one.name not in made}
    outputs = {one.name: one for step in steps for one in step.outputs if step is steps[-1] or one.name not in taken}
    whole = RepositoryModel(
        name=name, version=steps[0].version, inputs=[*inputs.values()], outputs=[*outputs.values()],
        digest=steps[0].digest, max_batch=min(step.max_batch for step in steps),
    )  # fmt: skip
    target = folder / name
    (target / str(whole.version)).mkdir(parents=True, exist_ok=True)
    replace_file(target / CONFIG_FILE, config_text(whole, steps).encode())
    return whole


def config_text(model: RepositoryModel, steps: Sequence[RepositoryModel] = ()) -> str:
    """Return the content of config.pbtxt; with `steps`, of an ensemble of these models."""
    batched = model.max_batch > 0
    kind = 'platform: "ensemble"' if steps else 'backend: "onnxruntime"'
    parts = [f"name: {_quoted(model.name)}", kind, f"max_batch_size: {model.max_batch}"]
    parts += [_tensor("input", one, batched=batched) for one in model.inputs]
    parts += [_tensor("output", one, batched=batched) for one in model.outputs]
    if batched and not steps:
        parts.append(f"dynamic_batching {{\n  max_queue_delay_microseconds: {model.max_wait_us}\n}}")
    if steps:
        parts.append("ensemble_scheduling {\n" + "".join(map(_step, steps)) + "}")
    if model.digest:
        value = f"value {{\n    string_value: {_quoted(model.digest)}\n  }}"
        parts.append(f"parameters {{\n  key: {_quoted(REQUEST_DIGEST)}\n  {value}\n}}")
    return "\n".join(parts) + "\n"


def _step(model: RepositoryModel) -> str:
    """Return one step; the ensemble's tensors have the names that they have in the models."""
    sides: Mapping[str, Sequence[TensorInfo]] = {"input_map": model.inputs, "output_map": model.outputs}
    maps = "".join(
        f"    {side} {{\n      key: {_quoted(one.name)}\n      value: {_quoted(one.name)}\n    }}\n"
        for side, infos in sides.items()
        for one in infos
    )
    return f"  step {{\n    model_name: {_quoted(model.name)}\n    model_version: {model.version}\n{maps}  }}\n"


def _tensor(kind: str, info: TensorInfo, *, batched: bool) -> str:
    """Return one input or output. Triton adds the first dimension itself, and has no tensors without dimensions."""
    shape = info.shape[1:] if batched else info.shape
    dims = ", ".join(map(str, shape or (1,)))
    reshape = "" if shape else "\n  reshape {\n  }"
    datatype = f"TYPE_{'STRING' if info.datatype == 'BYTES' else info.datatype}"
    return f"{kind} {{\n  name: {_quoted(info.name)}\n  data_type: {datatype}\n  dims: [ {dims} ]{reshape}\n}}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def external_files(file: Path) -> list[Path]:
    """Return the files with weights that the writer of a large model puts beside it."""
    return [one for one in file.parent.glob(f"{file.name}*") if one != file and one.is_file()]
