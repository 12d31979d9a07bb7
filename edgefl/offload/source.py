"""What is split: an ONNX file with its sample, from a file, a task or a release."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.errors import ConfigError, ProtocolError
from edgefl.models.made_inputs import in_batches
from edgefl.models.sample import Sample, check_inputs, read_npz
from edgefl.models.trial import Trial, make_sample, open_trial
from edgefl.trees import Tree

if TYPE_CHECKING:
    from edgefl.task import Task

SAMPLE_WITHIN_S = 60.0  # for inputs made from the declared types and shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model to split."""

    who: str  # in messages: a file's name, a task's, or `digits version 3`
    name: str  # of the model: the file's, the task's or the release's
    version: int = 1  # of a release
    path: Path
    sample: Sample
    task: Task | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # of a release

    @property
    def sha256(self) -> str:
        """The digest of the model's file, in hex; of a release, its own."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def feeds(self) -> Tree:
        """The smallest inputs of the sample, usually one row."""
        return self.sample.cases[0].inputs

    @property
    def cases(self) -> list[Tree]:
        """The inputs of all cases."""
        return [case.inputs for case in self.sample.cases]


def release_text(name: str, version: int) -> str:
    """Return how messages call a release."""
    return f"{name} version {version}"


def source_of_file(
    path: Path, given: Path | None = None, *, release: tuple[str, int] | None = None, task: Task | None = None,
    cases: Sequence[Tree] = (),
) -> ModelSource:  # fmt: skip
    """Return an ONNX file with a sample: of an .npz file, of given cases, or made from its types and shapes.

    It may be that of a `release`, a name and a version, or of a task.

    Raises ConfigError for a file that is no model, or does not run on the sample.
    """
    who = path.name if task is None else task.name
    if release is not None:
        who = release_text(*release)
    try:
        trial = open_trial(who, path)
        inputs = list(cases) if given is None else _cases(trial, read_npz(given))
        sample, _notes = make_sample(trial, inputs, SAMPLE_WITHIN_S)
    except ProtocolError as cause:
        raise ConfigError(str(cause)) from cause
    name, version = release or (path.stem if task is None else task.name, 1)
    return ModelSource(who=who, name=name, version=version, path=path, sample=sample, task=task)


def source_of_task(task: Task, folder: Path, parameters: Path | None = None) -> ModelSource:
    """Export a task's model, with the parameters of a file or the initial ones; raises as `export_task` does."""
    from edgefl.models.export import export_task
    from edgefl.training import initial_parameters
    from edgefl.trees import SpooledTree

    path = folder / "model.onnx"
    try:
        tree = initial_parameters(task) if parameters is None else SpooledTree(parameters)
    except (OSError, ProtocolError) as cause:
        raise ConfigError(f"{parameters} does not hold parameters in safetensors format: {cause}") from cause
    return source_of_file(path, task=task, cases=export_task(task, tree, path))


def task_inputs(task: Task, num: int) -> Tree:
    """Return inputs of a task's held-out samples, or of its training samples, by the names in its exported file."""
    from edgefl.models.dtypes import array_for_file
    from edgefl.training.local import make_model
    from edgefl.training.samples import test_samples, train_samples
    from edgefl.training.structures import INPUT, argument_names, named

    if task.model is None:
        return {}
    samples = test_samples(task, {}) if task.test_data is not None else train_samples(task, {})
    inputs = samples.first(num).inputs
    found = named(inputs, INPUT, argument_names(make_model(task), inputs))
    return {name: array_for_file(one) for name, one in found.items()}


def _cases(trial: Trial, inputs: Tree) -> list[Tree]:
    """Return the first rows of a file's inputs, in small batches: a sample may have thousands of rows."""
    check_inputs(trial.who, inputs, trial.inputs)
    return in_batches(inputs, trial.inputs) or [inputs]
