"""`edgefl offload`: where a model can be divided between a device and the cloud."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgefl.errors import ConfigError
from edgefl.operator.connection import CloudConnection, connected
from edgefl.terminal.output import Output, counted, example, json_option

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def offload() -> None:
    """Models that are too large for a device: split between device and cloud."""


def of_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument MODEL and the options that say which one is meant."""
    for option in (
        click.argument("model"),
        click.option("--version", type=click.IntRange(min=1), help="Of a release; by default the newest."),
        click.option("--parameters", type=_FILE, help="Of a task: trained parameters; else the initial ones."),
        click.option("--sample", type=_FILE, help="An .npz file with an array for each input, to run the model on."),
    )[::-1]:  # fmt: skip
        command = option(command)
    return command


@offload.command(
    epilog=example(
        "edgefl offload cuts examples/digits",
        "edgefl offload cuts digits --version 3 --single",
    )
)
@of_model
@click.option("--single", is_flag=True, help="Only cuts that one tensor alone crosses.")
@connected
@json_option
def cuts(  # noqa: PLR0913 - one a flag
    *, model: str, version: int | None, parameters: Path | None, sample: Path | None, single: bool,
    connection: CloudConnection, output: Output,
) -> None:  # fmt: skip
    """List where MODEL can be split: an .onnx file, a task, or the name of a release.

    For each cut: the bytes that cross it for the sample's first inputs (usually one row), how many tensors these are,
    and the bytes of the weights on both sides. Weights that both sides need are counted on both.
    """
    from edgefl.offload.cuts import all_tensors, find_cuts
    from edgefl.offload.graph import read_graph
    from edgefl.operator.splitting import open_source

    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as folder:
        source = open_source(
            model, Path(folder), connection, version=version, parameters=parameters, sample=sample
        )  # fmt: skip
        graph = read_graph(source.path)
        found = [one for one in find_cuts(graph, all_tensors(graph, source.feeds)) if one.is_single or not single]
    if not found:
        raise ConfigError(f"{source.who} cannot be split: it has {counted(len(graph.layers), 'layer')}, and no cut")
    rows = [
        (
            one.name, one.operator, one.num_bytes, "single" if one.is_single else f"{len(one.tensors)} tensors",
            one.device_parameter_bytes, one.cloud_parameter_bytes, "inputs" if one.sends_inputs else "activations",
            ", ".join(map(str, one.tensors)),
        )
        for one in found
    ]  # fmt: skip
    output.line(f"{source.who}: {counted(len(found), 'cut')}, {sum(one.is_single for one in found)} single")
    if shared := max(one.shared_parameter_bytes for one in found):
        output.line(f"weights that both sides of a cut need, such as tied ones, are in both: up to {shared} bytes")
    output.table(
        ("cut", "operator", "bytes", "crosses", "device weights", "cloud weights", "leaves", "tensors"),
        rows, "", whole=("cut",), spare=("tensors", "operator"),
    )  # fmt: skip
    inputs = {name: list(array.shape) for name, array in source.feeds.items()}
    output.result({"model": source.who, "inputs": inputs, "cuts": [one.as_json() for one in found]})
