"""Tries a model as a device will, in a process of its own: loads it, makes its sample, and checks it on a new session.

    python -P -m edgefl.models.trial --model FILE --given FILE --out FOLDER --within-s N

`--given` holds the inputs of the sample's cases, written by `write_sample`; without it, inputs are made. It writes
`sample.safetensors` and `answer.json` into FOLDER. A crash in a native kernel ends this process only; so does time.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import EdgeflError, ProtocolError
from edgefl.models.made_inputs import candidates, in_batches
from edgefl.models.sample import (
    MAX_CASES_BYTES,
    MAX_SAMPLE_BYTES,
    Case,
    Sample,
    allowed_difference,
    check_inputs,
    check_sample,
    is_quantised,
    read_sample,
    sample_bytes,
    write_sample,
)
from edgefl.models.session import new_session, run_errors
from edgefl.models.tensors import TensorInfo, described, listed
from edgefl.trees import Array, Tree

SAMPLE, ANSWER = "sample.safetensors", "answer.json"


@dataclass(frozen=True, slots=True)
class Trial:
    """A model that is open."""

    who: str
    path: Path
    session: Any
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def run(self, feeds: Mapping[str, Array]) -> list[Any]:
        """Compute all outputs; raises ONNX Runtime's errors."""
        outputs: list[Any] = self.session.run(None, dict(feeds))
        return outputs

    def case(self, inputs: Tree) -> Case:
        """Run the model; raises ProtocolError if it does not run, or if an output is not finite."""
        try:
            outputs = [np.asarray(one) for one in self.run(inputs)]
        except run_errors() as cause:
            raise ProtocolError(f"{self.who} does not run on {_shapes(inputs)}: {cause}") from cause
        for info, one in zip(self.outputs, outputs, strict=True):
            if one.dtype.kind == "f" and not np.isfinite(one).all():
                wrong = int((~np.isfinite(one)).sum())
                raise ProtocolError(
                    f"{self.who}: output {info.name!r} {list(one.shape)} is not finite in {wrong} of {one.size} values "
                    f"for {_shapes(inputs)}; a model whose sample outputs are NaN or infinite is not published"
                )
        return Case(inputs, {info.name: one for info, one in zip(self.outputs, outputs, strict=True)})


def open_trial(who: str, path: Path) -> Trial:
    """Open a model as a device does; raises ProtocolError if it cannot serve it."""
    try:
        session = new_session(path, keeps_memory=False)
    except run_errors() as cause:
        raise ProtocolError(f"{who} is not a model that ONNX Runtime can open: {cause}") from cause
    return Trial(who, path, session, described(who, session.get_inputs()), described(who, session.get_outputs()))


def make_sample(trial: Trial, given: Sequence[Tree], within_s: float) -> tuple[Sample, list[str]]:
    """Return a model's sample, with notes for people. Raises ProtocolError if the model cannot have one."""
    notes: list[str] = []
    cases = _given(trial, given, notes) if given else _made(trial, within_s, notes)
    if len(cases) > 1 and sample_bytes(cases) > MAX_CASES_BYTES:
        cases = cases[:1]
    if (size := sample_bytes(cases)) > MAX_SAMPLE_BYTES:
        raise ProtocolError(
            f"{trial.who}: its sample has {size} bytes, allowed: {MAX_SAMPLE_BYTES}. Give a smaller one"
        )
    quantised = is_quantised(trial.path)
    allowed = {
        info.name: allowed_difference(info, [case.outputs[info.name] for case in cases], quantised=quantised)
        for info in trial.outputs
    }
    for name in _random_outputs(trial, cases, allowed):
        allowed[name] = math.inf
        notes.append(f"output {name!r} is different in every run, so devices do not compare its values")
    return Sample(tuple(cases), allowed), notes


def _given(trial: Trial, given: Sequence[Tree], notes: list[str]) -> list[Case]:
    """Return the cases for given inputs; those of one array are also tried in batches of 1 and 3."""
    for inputs in given:
        check_inputs(trial.who, inputs, trial.inputs)
    if len(given) > 1:
        return [trial.case(inputs) for inputs in given]
    (whole,) = given
    cases = [trial.case(whole)]
    for inputs in in_batches(whole, trial.inputs):
        if _shapes(inputs) != _shapes(whole):
            cases += _tried(trial, inputs, notes)
    return sorted(cases, key=lambda case: sum(one.size for one in case.inputs.values()))


def _made(trial: Trial, within_s: float, notes: list[str]) -> list[Case]:
    reason = "there is no input of a size that can be made"
    end_s = time.monotonic() + within_s
    for inputs in candidates(trial.inputs):
        try:
            first = trial.case(inputs)
        except ProtocolError as error:
            reason = str(error)
            if time.monotonic() > end_s:
                break
            continue
        _, *more = in_batches(inputs, trial.inputs) or [inputs]
        return [first, *(case for batch in more for case in _tried(trial, batch, notes))]
    raise ProtocolError(
        f"{trial.who} does not run on inputs made from its declared types and shapes ({reason}). Give inputs that it "
        f"can process: --sample FILE.npz with one array for each of: {listed(trial.inputs)} (-1 = any size)"
    )


def _tried(trial: Trial, inputs: Tree, notes: list[str]) -> list[Case]:
    try:
        return [trial.case(inputs)]
    except ProtocolError as error:
        notes.append(f"no sample of another number of rows: {error}")
        return []


def _random_outputs(trial: Trial, cases: Sequence[Case], allowed: Mapping[str, float]) -> list[str]:
    """Return the outputs that are others in a second run, in this session or in a new one."""
    sessions = [trial.session, open_trial(trial.who, trial.path).session]
    return [
        info.name
        for info in trial.outputs
        if not all(_repeats(trial, session, cases, info.name, allowed) for session in sessions)
    ]


def _repeats(trial: Trial, session: Any, cases: Sequence[Case], name: str, allowed: Mapping[str, float]) -> bool:
    alone = Sample(tuple(Case(case.inputs, {name: case.outputs[name]}) for case in cases), allowed)
    try:
        check_sample(trial.who, alone, lambda feeds: session.run([name], dict(feeds)), trial.inputs, [name])
    except ProtocolError:
        return False
    return True


def _shapes(inputs: Tree) -> str:
    return ", ".join(f"{name} {one.dtype}{list(one.shape)}" for name, one in inputs.items()) or "no inputs"


def main() -> None:
    """Try the model, write the answer, and exit."""
    parser = argparse.ArgumentParser(prog="edgefl-models-trial", description="Tries a model as a device does.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--given", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--within-s", type=float, required=True)
    arguments = parser.parse_args()
    signal.setitimer(signal.ITIMER_REAL, arguments.within_s + 1)  # ends this process even if its parent is gone
    answer: dict[str, Any]
    who = arguments.model.name
    try:
        given = [case.inputs for case in read_sample(arguments.given, who).cases] if arguments.given else []
        trial = open_trial(who, arguments.model)
        sample, notes = make_sample(trial, given, arguments.within_s / 2)
        write_sample(sample, arguments.out / SAMPLE)
        answer = {
            "inputs": {one.name: one.type_text for one in trial.inputs},
            "outputs": {one.name: one.type_text for one in trial.outputs},
            "notes": notes,
        }
    except (EdgeflError, OSError) as error:
        answer = {"error": str(error)}
    (arguments.out / ANSWER).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
