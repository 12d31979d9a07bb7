"""Static quantisation to int8, under a gate.

Pre-processing first (shapes inferred, batch norm folded), then QDQ with unsigned activations and
signed weights per channel: x86 has kernels for this form (S8S8 is fused far less often). Weights use 7 of the 8 bits:
x86 without VNNI adds pairs of products in 16 bits, which saturate with 8, and then outputs differ between CPUs
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8).
The caller's function (`edgefl.models.gate`) measures the loss in quality before anything is published.
Invariant: the target file exists only if the drop was within `max_drop`.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgefl.errors import AccuracyGateFailed, ConfigError, MissingExtra
from edgefl.models.session import input_name, open_session
from edgefl.trees import Array, Tree

CALIBRATION_BATCH = 32
_ROUNDING = 1e-9  # 0.97 - 0.96 is above 0.01 in floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The measure that a gate uses."""

    name: str = "accuracy"
    drop: Callable[[float, float], float] = field(default=lambda before, after: before - after)  # the fraction lost
    unit: str = ""  # in words: what the drop is a fraction of


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressReport:
    """Sizes and quality before and after compression."""

    source_bytes: int
    target_bytes: int
    measure: str  # what the gate measured: a metric of the task, accuracy or loss
    before: float
    after: float
    drop: float  # the fraction lost; for accuracy before - after; negative if the compressed model is better
    seconds: float
    accuracy_before: float | None = None  # if that is the measure
    accuracy_after: float | None = None


def parse_max_drop(max_drop: float | str) -> tuple[float, bool]:
    """Return what `--max-drop` allows, and whether it is relative: 0.01 is absolute, "1%" is of the value before.

    Raises ConfigError for a value that is not a fraction.
    """
    text = str(max_drop)
    relative = text.endswith("%")
    try:
        value = float(text.removesuffix("%")) / (100 if relative else 1)
    except ValueError:
        raise ConfigError(f"--max-drop {text!r} is not a number; expected one such as 0.01, or 1%") from None
    if not 0 <= value <= 1:  # also if it is NaN
        raise ConfigError(f"--max-drop {max_drop} must be in 0..1; 0.01 is one percentage point of accuracy")
    return value, relative


def compress(
    source: Path, target: Path, *, calibration: Array | Tree, evaluate: Callable[[Path], float], max_drop: float,
    measure: Measure | None = None,
) -> CompressReport:  # fmt: skip
    """Quantise an ONNX file to int8, with ranges measured on the calibration inputs: by name, or of its only input.

    `evaluate` maps an ONNX file to its accuracy, or to another measure. Raises AccuracyGateFailed if more than
    `max_drop` of it is lost; then no file is left.
    """
    measure = measure or Measure()
    feeds = calibration if isinstance(calibration, Mapping) else {input_name(open_session(source)): calibration}
    if any(len(one) == 0 for one in feeds.values()):
        raise ConfigError("compression needs at least one calibration input, got 0")
    parse_max_drop(max_drop)
    start_s = time.monotonic()
    before = evaluate(source)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        half = _quantise(source, Path(folder), feeds)
        after = evaluate(half)
        drop = measure.drop(before, after)
        if not drop <= max_drop + _ROUNDING:  # also if it is NaN
            raise AccuracyGateFailed(
                f"{source.name}: {measure.name} goes from {before:.4f} to {after:.4f} in int8, by {drop:.4f}"
                f"{measure.unit}; allowed: {max_drop:g}. Allow more with --max-drop, or publish it uncompressed "
                "with --compress none."
            )
        half.replace(target)
    is_accuracy = measure.name == "accuracy"
    return CompressReport(
        source_bytes=source.stat().st_size,
        target_bytes=target.stat().st_size,
        measure=measure.name,
        before=before,
        after=after,
        drop=drop,
        seconds=time.monotonic() - start_s,
        accuracy_before=before if is_accuracy else None,
        accuracy_after=after if is_accuracy else None,
    )


def _quantise(source: Path, folder: Path, calibration: Tree) -> Path:
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as cause:
        raise MissingExtra("compression", "train") from cause

    count = max(len(one) for one in calibration.values())

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._starts = iter(range(0, count, CALIBRATION_BATCH))

        def get_next(self) -> dict[str, Array] | None:
            start = next(self._starts, None)
            if start is None:
                return None
            return {name: np.asarray(one[start : start + CALIBRATION_BATCH]) for name, one in calibration.items()}

    prepared, quantised = folder / "prepared.onnx", folder / "int8.onnx"
    with _silence():
        # The exporter has written every shape; inferring them again fails on some models, such as adaptive max pooling.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantised),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    return quantised


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the quantiser, which warns and logs to the root logger about normal steps."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
