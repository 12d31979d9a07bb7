"""The sample of a release: inputs, and the outputs that its publisher saw for them.

A device runs a release on its sample before it serves it. The file is in safetensors format (`edgefl.trees`):

    N/inputs/NAME, N/outputs/NAME   the tensors of case N = 0, 1, ...; the first is the smallest, usually one row
    allowed/NAME                    F64: by how much a float of this output may differ, or what fraction of other
                                    values may; infinite = the output is random, so its values are not compared

The publisher chooses `allowed`, since only it knows how exact the model's arithmetic is: see `allowed_difference`.
Invariant: a `Sample` has at least one case, and all its outputs are finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError, ProtocolError
from edgefl.models.tensors import NUMPY_TYPES, TensorInfo, listed
from edgefl.trees import Array, Tree, encoded_bytes, read_tree, write_tree

MAX_SAMPLE_BYTES = 64 << 20  # as of one request to a device
MAX_CASES_BYTES = 16 << 20  # of all cases, if there are several
BATCHES = (1, 3)  # rows in the cases of an exported model
_INPUTS, _OUTPUTS, _ALLOWED = "inputs", "outputs", "allowed"
# Relative to the largest value: other processors, and other versions of ONNX Runtime, add in another order.
_RELATIVE: Mapping[str, float] = {"FP16": 1e-2, "FP32": 1e-3, "FP64": 1e-4}
_QUANTISED = 0.1  # relative, for a model in integers: rounding up instead of down is a whole step
_OTHERS, _QUANTISED_OTHERS = 0.01, 0.34  # the fraction of integers, such as classes, that may be others: near a tie
_MARKS = (b"QuantizeLinear", b"QLinear", b"MatMulInteger", b"ConvInteger", b"MatMulNBits")  # of such a model

Run = Callable[[Mapping[str, Array]], Sequence[Any]]  # inputs by name -> outputs in the model's order


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs by name, and the outputs for them."""

    inputs: Tree
    outputs: Tree


@dataclass(frozen=True, slots=True)
class Sample:
    """What a release carries."""

    cases: tuple[Case, ...]
    allowed: Mapping[str, float]  # by output, see above


def allowed_difference(info: TensorInfo, outputs: Sequence[Array], *, quantised: bool) -> float:
    """Return by how much an output may differ on a device: floats in the output's unit, others as a fraction."""
    relative = _RELATIVE.get(info.datatype)
    if relative is None:
        return _QUANTISED_OTHERS if quantised else _OTHERS
    largest = max(float(np.abs(one).max(initial=0.0)) for one in outputs)
    return (_QUANTISED if quantised else relative) * max(1.0, largest)


def is_quantised(path: Path) -> bool:
    """Whether an ONNX file computes in integers of a few bits."""
    import mmap

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return any(text.find(mark) >= 0 for mark in _MARKS)


def write_sample(sample: Sample, path: Path) -> None:
    """Write a sample as one file."""
    with path.open("wb") as file:
        write_tree(_tree(sample), file)


def sample_bytes(cases: Sequence[Case]) -> int:
    """Return the size of a sample with these cases."""
    return encoded_bytes(_tree(Sample(tuple(cases), {})))


def read_sample(path: Path, who: str) -> Sample:
    """Read what `write_sample` wrote; raises ProtocolError for anything else."""
    if (size := path.stat().st_size) > MAX_SAMPLE_BYTES:
        raise ProtocolError(f"the sample of {who} has {size} bytes, allowed: {MAX_SAMPLE_BYTES}")
    cases: dict[int, Case] = {}
    allowed: dict[str, float] = {}
    try:
        for key, array in read_tree(path.read_bytes()).items():
            number, _, rest = key.partition("/")
            if number == _ALLOWED:
                allowed[rest] = float(array)
                continue
            kind, _, name = rest.partition("/")
            case = cases.setdefault(int(number), Case({}, {}))
            {_INPUTS: case.inputs, _OUTPUTS: case.outputs}[kind][name] = array  # type: ignore[index]  # made here
    except (ProtocolError, ValueError, TypeError, KeyError) as cause:
        raise ProtocolError(f"the sample of {who} cannot be read: {cause}. Publish the model again") from cause
    if not cases or any(math.isnan(one) for one in allowed.values()):
        raise ProtocolError(f"the sample of {who} has {len(cases)} cases and allows {allowed}. Publish the model again")
    return Sample(tuple(cases[number] for number in sorted(cases)), allowed)


def read_npz(path: Path, flag: str = "--sample") -> Tree:
    """Return the arrays of an .npz file by name; raises ConfigError for anything else."""
    import zipfile

    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ConfigError(f"{flag} {path} holds one array without a name; make it with numpy.savez")
        with found as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as cause:
        if isinstance(cause, ConfigError):
            raise
        raise ConfigError(
            f"{flag} {path} is not an .npz file of arrays: {cause}. Make it with numpy.savez(FILE, INPUT=array, ...)"
        ) from cause


def check_inputs(who: str, inputs: Tree, infos: Sequence[TensorInfo]) -> None:
    """Raise ProtocolError unless arrays are the inputs of a model, in names, types and shapes."""
    wanted = {one.name: one for one in infos}
    if inputs.keys() != wanted.keys():
        raise ProtocolError(
            f"the sample does not fit {who}: it has the inputs {', '.join(sorted(inputs)) or 'none'}, "
            f"the model takes {listed(infos)}"
        )
    for name, info in wanted.items():
        array = inputs[name]
        if array.dtype != np.dtype(NUMPY_TYPES[info.datatype]) or not info.fits(array.shape):
            raise ProtocolError(
                f"the sample does not fit {who}: input {name!r} is {array.dtype}{list(array.shape)}, the model takes "
                f"{info.type_text} (-1 = any), which is numpy's {np.dtype(NUMPY_TYPES[info.datatype])}"
            )


def check_sample(who: str, sample: Sample, run: Run, inputs: Sequence[TensorInfo], names: Sequence[str]) -> None:
    """Raise ProtocolError unless a model takes a sample's inputs and returns its outputs (names, in `run`'s order)."""
    for case in sample.cases:
        check_inputs(who, case.inputs, inputs)
        seen = dict(zip(names, run(case.inputs), strict=True))
        if case.outputs.keys() != seen.keys():
            raise ProtocolError(
                f"the sample does not fit {who}: it has the outputs {', '.join(sorted(case.outputs))}, the model "
                f"returns {', '.join(names)}"
            )
        for name, wanted in case.outputs.items():
            if fault := _difference(wanted, np.asarray(seen[name]), sample.allowed.get(name, 0.0)):
                raise ProtocolError(
                    f"{who} does not compute here what its publisher saw: output {name!r} {fault}. The release is not "
                    "served. Compare the versions of onnxruntime, or publish it again"
                )


def _difference(wanted: Array, seen: Array, allowed: float) -> str:
    """Return in words how an output differs from the sample's; empty if it does not."""
    if seen.dtype != wanted.dtype or seen.ndim != wanted.ndim:
        return f"is {seen.dtype}{list(seen.shape)}, expected {wanted.dtype}{list(wanted.shape)}"
    if math.isinf(allowed):  # random values, so perhaps a random number of them
        return ""
    if seen.shape != wanted.shape:
        return f"has shape {list(seen.shape)}, expected {list(wanted.shape)}"
    if wanted.dtype.kind != "f":
        wrong = int((seen != wanted).sum())
        return f"differs in {wrong} of {wanted.size} values" if wrong > wanted.size * allowed else ""
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(seen.astype(np.float64) - wanted).max(initial=0.0))
    return "" if difference <= allowed else f"differs by {difference:.3g}, allowed: {allowed:.3g}"  # also if it is NaN


def _tree(sample: Sample) -> dict[str, Array]:
    tree = {f"{_ALLOWED}/{name}": np.array(value, np.float64) for name, value in sample.allowed.items()}
    for number, case in enumerate(sample.cases):
        tree |= {f"{number}/{_INPUTS}/{name}": array for name, array in case.inputs.items()}
        tree |= {f"{number}/{_OUTPUTS}/{name}": array for name, array in case.outputs.items()}
    return tree
