"""What each layer of a model costs: measured with ONNX Runtime's profiler on the machine that it runs on.

ONNX Runtime does not run the file's nodes but what its optimiser made of them. The time of an optimised node belongs to
all layers that it replaces: it is divided among these as they cost without the optimiser. Then everything is scaled to
the whole model's time without the profiler.
A device's times are measured there (`edgefl offload profile`), or this machine's times a factor.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgefl.errors import ConfigError
from edgefl.measure import num_cores
from edgefl.models.session import new_session, profiled
from edgefl.offload.cuts import save
from edgefl.offload.graph import ModelGraph, tensors_read
from edgefl.trees import Tree

FORMAT = 1
REPEATS = 20
_FACTOR = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds of each layer of a model, in order; their sum is the time of one whole run."""

    machine: str
    layers_ms: tuple[float, ...]

    def scaled(self, factor: float, machine: str) -> LayerTimes:
        """Return the times of a machine that is slower by a factor."""
        return LayerTimes(machine, tuple(one * factor for one in self.layers_ms))


def machine_name() -> str:
    """Return what this machine's processor is called, and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {num_cores()} cores"


def measure_layers(
    graph: ModelGraph, feeds: Tree, machine: str, *, repeats: int = REPEATS, threads: int = 0
) -> LayerTimes:
    """Run a model and return its layers' times on this machine; `threads` as of `edgefl.models.session`."""
    with tempfile.TemporaryDirectory(prefix="edgefl-timing-") as folder:
        named = Path(folder) / "named.onnx"
        save(_with_numbers(graph), named, external=graph.has_external_data)
        plain, _ = profiled(named, feeds, Path(folder), repeats=repeats, threads=threads, optimised=False)
        found, nodes = profiled(named, feeds, Path(folder), repeats=repeats, threads=threads, optimised=True)
    alone = [plain.get(f"layer/{at}", 0.0) for at in range(len(graph.layers))]
    shares = _shares(graph, alone, found, nodes)
    whole_ms = measure_ms(graph.path, feeds, repeats=repeats, threads=threads)
    total = sum(shares)
    return LayerTimes(machine, tuple(one / total * whole_ms if total else whole_ms / len(shares) for one in shares))


def measure_ms(path: Path, feeds: Tree, *, repeats: int = REPEATS, threads: int = 0) -> float:
    """Return the median milliseconds of one run of a model, after a run that warms up."""
    session = new_session(path, threads=threads)
    session.run(None, dict(feeds))
    return median_ms(lambda: session.run(None, dict(feeds)), repeats)


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of a call."""
    found = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(found)


def times_of_profile(
    heads_ms: Mapping[int, float], here: LayerTimes, machine: str
) -> LayerTimes:  # fmt: skip
    """Return a device's times from the times of some heads on it, by their numbers of layers.

    Between two heads each layer is as many times slower than here as these layers together; behind the largest one, as
    many times as that head. Raises ConfigError if no head was measured.
    """
    known = sorted((at, ms) for at, ms in heads_ms.items() if 0 < at <= len(here.layers_ms) and ms > 0)
    if not known:
        raise ConfigError(f"{machine} has measured no part of this model yet: roll it out to the device")
    layers_ms: list[float] = []
    before_ms = 0.0
    for at, ms in known:
        part = here.layers_ms[len(layers_ms) : at]
        factor = max(0.0, ms - before_ms) / sum(part) if sum(part) else 0.0
        layers_ms += [one * factor for one in part]
        before_ms = max(before_ms, ms)
    rest = here.layers_ms[len(layers_ms) :]
    slower = sum(layers_ms) / sum(here.layers_ms[: len(layers_ms)])
    return LayerTimes(machine, (*layers_ms, *(one * slower for one in rest)))


def is_factor(text: str) -> bool:
    """Whether a device is given as a factor, such as 5x."""
    return _FACTOR.fullmatch(text) is not None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_numbers(graph: ModelGraph) -> Any:
    """Return the model with its layers' numbers as names."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    numbers = {layer.writes[0]: at for at, layer in enumerate(graph.layers)}
    for at, node in enumerate(model.graph.node):
        first = next(iter(name for name in node.output if name), "")
        node.name = f"layer/{numbers[first]}" if first in numbers else f"other/{at}"
    return model


def _shares(graph: ModelGraph, alone: Sequence[float], found: Mapping[str, float], nodes: Sequence[Any]) -> list[float]:
    """Divide the times of optimised nodes among the layers that they stand for."""
    shares = [0.0] * len(alone)
    makers = {name: layer for name, layer in graph.made_by.items() if layer >= 0}
    left = 0.0
    for node in nodes:
        took = found.get(node.name, 0.0)
        covered = _covered(graph, makers, node)
        weight = sum(alone[at] for at in covered)
        if not covered:
            left += took  # of a tensor that the optimiser made up, such as another layout's
            continue
        for at in covered:
            shares[at] += took * (alone[at] / weight if weight else 1 / len(covered))
    total = sum(shares)
    return [one + left * (one / total if total else 1 / len(shares)) for one in shares]


def _covered(graph: ModelGraph, makers: Mapping[str, int], node: Any) -> set[int]:
    """Return the layers between an optimised node's outputs and its inputs."""
    given, found = set(tensors_read(node)), set[int]()
    left = [name for name in node.output if name in makers]
    while left:
        at = makers[left.pop()]
        if at not in found:
            found.add(at)
            left += [name for name in graph.layers[at].reads if name in makers and name not in given]
    return found


def as_json(times: LayerTimes, graph: ModelGraph) -> dict[str, Any]:
    """Return a device's times with what they are of."""
    return {
        "format": FORMAT,
        "machine": times.machine,
        "model_sha256": _sha256(graph.path),
        "layers_ms": dict(zip((one.name for one in graph.layers), times.layers_ms, strict=True)),
    }


def device_times(text: str, here: LayerTimes, graph: ModelGraph) -> LayerTimes:
    """Return a device's times: `5x` = five times slower than this machine, else a file of `as_json`.

    Raises ConfigError for a file of another model, and for anything else.
    """
    if factor := _FACTOR.fullmatch(text):
        if float(factor[1]) == 0:
            raise ConfigError(f"--device {text}: no device takes no time; expected a factor such as 5x")
        return here.scaled(float(factor[1]), f"{text} slower than {here.machine}")
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
        layers = {str(name): float(value) for name, value in found["layers_ms"].items()}
        known, machine, sha256 = found["format"], str(found["machine"]), found["model_sha256"]
    except OSError as cause:
        raise ConfigError(
            f"--device {text}: expected a factor such as 5x, or a file that `edgefl offload profile --json` wrote on "
            f"the device: {cause.strerror}"
        ) from cause
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise ConfigError(f"--device {text} is no file of `edgefl offload profile --json`: {cause!r:.200}") from cause
    if known != FORMAT or sha256 != _sha256(graph.path) or list(layers) != [one.name for one in graph.layers]:
        raise ConfigError(
            f"--device {text} is of another model, or of another version of edgefl: measure {graph.path.name} on the "
            "device, with `edgefl offload profile`"
        )
    if not all(0 <= one < float("inf") for one in layers.values()):
        raise ConfigError(f"--device {text} has times that are negative or not finite")
    return LayerTimes(machine, tuple(layers.values()))
