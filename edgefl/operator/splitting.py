"""The model of `edgefl offload`: an ONNX file, a task, or a release at the cloud with its sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgefl.errors import ConfigError, NotFound
from edgefl.models.sample import read_sample
from edgefl.offload.source import ModelSource, release_text, source_of_file, source_of_task
from edgefl.operator.client import CloudClient
from edgefl.operator.connection import CloudConnection
from edgefl.operator.run import download


def open_source(
    reference: str, folder: Path, connection: CloudConnection, *, version: int | None = None,
    parameters: Path | None = None, sample: Path | None = None,
) -> ModelSource:  # fmt: skip
    """Return what MODEL names: a file, a task (a folder, or module:attribute), else a release; `folder` is for files.

    Raises ConfigError for options that do not fit it, NotFound for a release that the cloud does not have.
    """
    file = Path(reference).expanduser()
    is_task = file.is_dir() or ":" in reference
    is_file = not is_task and (file.is_file() or file.suffix == ".onnx")
    useless = {
        "--version": version is not None and (is_file or is_task),
        "--parameters": parameters is not None and not is_task,
        "--sample": sample is not None and is_task,
    }
    if named := [flag for flag, is_useless in useless.items() if is_useless]:
        kind = "file" if is_file else "task" if is_task else "release"
        raise ConfigError(
            f"{named[0]} would do nothing here: {reference} is a {kind}. --version is of a release, --parameters "
            "of a task; a task has its sample from its own data"
        )
    if is_file:
        if not file.is_file():
            raise ConfigError(f"{reference}: there is no such file; give an ONNX file, a task or the name of a release")
        return source_of_file(file, sample)
    if is_task:
        from edgefl.task import load_task

        return source_of_task(load_task(reference), folder, parameters)
    with connection.open() as client:
        return _release(client, reference, version, folder, sample)


def open_fallback(reference: str, folder: Path, connection: CloudConnection) -> tuple[Path, str]:
    """Return the file of a small model and, of a release, NAME:VERSION; raises ConfigError or NotFound."""
    file = Path(reference).expanduser()
    if file.suffix == ".onnx" or file.is_file():
        if not file.is_file():
            raise ConfigError(f"{reference}: there is no such file; give an ONNX file, or a release as NAME:VERSION")
        return file, ""
    name, _, version = reference.partition(":")
    if version and not version.isdecimal():
        raise ConfigError(f"{reference!r} names no release; expected NAME or NAME:VERSION, such as small:3")
    own = folder / "fallback"
    own.mkdir()
    with connection.open() as client:
        source = _release(client, name, int(version) if version else None, own, None)
    return source.path, f"{name}:{source.version}"


def _release(client: CloudClient, model: str, version: int | None, folder: Path, sample: Path | None) -> ModelSource:
    releases = client.model(model)
    found = next((one for one in releases if version in {None, one["version"]}), None)
    if found is None:
        known = ", ".join(str(one["version"]) for one in releases)
        raise NotFound(f"model {model!r} has no version {version}; there are: {known}")
    release, path = (model, int(found["version"])), folder / "model.onnx"
    who = release_text(*release)
    download(client, found["blob"]["sha256"], path)
    if sample is not None or found.get("sample") is None:
        made = source_of_file(path, sample, release=release)
        return dataclasses.replace(made, metrics=found["metrics"])
    download(client, found["sample"]["sha256"], folder / "sample.safetensors")
    return ModelSource(
        who=who, name=model, version=release[1], path=path, metrics=found["metrics"],
        sample=read_sample(folder / "sample.safetensors", who),
    )  # fmt: skip
