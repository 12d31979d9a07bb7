"""What a session refuses, while others go on: wrong steps, shapes, kinds, NaN, another job's parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgefl.errors import EdgeflError, ProtocolError
from edgefl.offload import wire
from edgefl.offload.training.crossing import packed, packed_targets
from edgefl.offload.training.layout import layout_of
from edgefl.protocols.split.messages import (
    BeginTraining,
    FinishTraining,
    Forward,
    Frame,
    Gradients,
    Keep,
    Kept,
    SampleStep,
    Wanted,
    parse_frame,
)
from tests.cloud.split.bench import Bench, settings
from tests.edgefl.offload.training.models import picture_task, pictures

INPUTS, TARGETS = pictures()[0][:8], pictures()[1][:8]
FIRST = Forward(
    step=0, number=0, of=1, share=1.0, inputs=layout_of(INPUTS), targets=layout_of(TARGETS), differentiable=["conv2d"]
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(picture_task(), settings(), tmp_path)


def begun(bench: Bench, name: str = "device-1") -> Any:
    loop = bench.device(name)
    session = bench.cloud.session(bench.spec(loop, name))
    session.handle(Frame(loop.run.begin))
    return session


def crossing() -> dict[str, torch.Tensor]:
    return {"conv2d": torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))}


def send(session: Any, message: Any, *sections: bytes) -> Any:
    return parse_frame(session.handle(Frame(message, [memoryview(one) for one in sections]))[4:])


def test_a_good_step_after_each_bad_message(bench: Bench) -> None:
    """Each bad message is refused in words; the session of another device is not touched."""
    other = begun(bench, "device-2")
    good = packed(crossing(), "fp32"), packed_targets(TARGETS)
    nan = crossing()["conv2d"].numpy().copy()
    nan[0, 0, 0, 0] = np.inf
    bad: list[tuple[Any, tuple[bytes, ...], str]] = [
        (FIRST, (wire.encode({"conv2d": nan}, "fp32"), good[1]), "'conv2d' .* is not finite"),
        (FIRST, (good[0][:-3], good[1]), "ends 3 bytes too early"),
        (FIRST, (b"nothing", good[1]), "no message of tensors at a cut"),
        (
            FIRST,
            (packed({"other": torch.ones(1)}, "fp32"), good[1]),
            "what crossed is other; the cloud's part reads conv2d",
        ),
        (FIRST, (packed({"conv2d": torch.ones(8, 3, 8, 8)}, "fp32"), good[1]), "split training raised RuntimeError"),
        (FIRST, (good[0],), "has 1 sections; expected 2"),
        (FIRST, (good[0], packed_targets(TARGETS[:3])), r"the layout says int64\[8\]"),
        (Forward(step=1, number=0, of=1, share=1.0, inputs=FIRST.inputs), good, "the next one is 0 of step 0"),
        (Forward(step=0, number=1, of=2, share=0.5, inputs=FIRST.inputs), good, "the next one is 0 of step 0"),
        (Gradients(step=0, number=0), good, "which is not in flight"),
        (Keep(step=5), (), "is before step 5, and the cloud's part before 0"),
        (FinishTraining(), (), "is before step 8, and the cloud's part before 0"),
        (Kept(step=0), (), "which only the cloud sends"),
        (Wanted(), (), "the device's part is trained in this job"),
        (SampleStep(step=0), (), "the device's part is trained in this job"),
    ]
    for message, sections, reason in bad:
        session = begun(bench)
        with pytest.raises(EdgeflError, match=reason):
            send(session, message, *sections)
        bench.cloud.drop("device-1")
    assert send(other, FIRST, *good).message.kind == "returned"
    session = begun(bench)
    answer = send(session, FIRST, *good)
    assert answer.message.loss > 0
    assert set(wire.decode(answer.sections[0])) == {"conv2d"}


def test_gradients_of_a_hostile_device_are_refused(tmp_path: Path) -> None:
    bench = Bench(picture_task(), settings({"last_cut": "norm"}), tmp_path)
    for gradients, reason in (
        (wire.encode({"group_norm": np.full((8, 8, 4, 4), np.inf, np.float32)}, "fp32"), "is not finite"),
        (packed({"group_norm": torch.ones(8, 8, 4)}, "fp32"), r"has shape \[8, 8, 4\]; expected \[8, 8, 4, 4\]"),
        (packed({"other": torch.ones(1)}, "fp32"), "expected no such value"),
    ):
        session = begun(bench)
        answer = send(session, FIRST, packed(crossing(), "fp32"))
        assert answer.message.kind == "outputs"
        with pytest.raises(ProtocolError, match=reason):
            send(session, Gradients(step=0, number=0), gradients)
        bench.cloud.drop("device-1")


def test_no_more_than_a_window_is_in_flight(tmp_path: Path) -> None:
    bench = Bench(picture_task(), settings({"last_cut": "norm", "micro_batches": 8}), tmp_path)
    session, one = begun(bench), INPUTS[:1]
    for number in range(bench.cloud.window + 1):
        message = Forward(step=0, number=number, of=8, share=0.125, inputs=layout_of(one), differentiable=["conv2d"])
        values = packed({"conv2d": torch.ones(1, 4, 8, 8)}, "fp32")
        if number < bench.cloud.window:
            send(session, message, values)
        else:
            with pytest.raises(ProtocolError, match="4 micro-batches may be in flight"):
                send(session, message, values)


def test_a_training_of_other_steps_is_refused(bench: Bench) -> None:
    loop = bench.device()
    session = bench.cloud.session(bench.spec(loop, "device-1"))
    begin = loop.run.begin
    other = BeginTraining(
        version=1, job="job-1", round=1, bundle="", samples=begin.samples, steps=99, inputs=begin.inputs
    )
    with pytest.raises(ProtocolError, match="begins with 99 steps on 64 samples; its round has 8 on 64"):
        session.handle(Frame(other))


def test_a_frozen_job_takes_no_forward_and_names_only_its_own_samples(tmp_path: Path) -> None:
    bench = Bench(picture_task(), settings({"device_part": "frozen"}), tmp_path)
    session = begun(bench)
    with pytest.raises(ProtocolError, match="send `wanted` and `rows`, not `forward`"):
        send(session, FIRST, b"", b"")
    with pytest.raises(ProtocolError, match=r"the keys of samples are no uint8 \(64, 16\)"):
        send(session, Wanted(), wire.encode({"keys": np.zeros((3, 16), np.uint8)}, "fp32"))
    send(session, Wanted(), wire.encode({"keys": np.zeros((64, 16), np.uint8)}, "fp32"))
    for positions in ([64], [-1]):
        with pytest.raises(ProtocolError, match="from 0 to 63"):
            send(session, SampleStep(step=0), wire.encode({"positions": np.array(positions, "<i4")}, "fp32"))
    with pytest.raises(ProtocolError, match="whose activations were not sent"):
        send(session, SampleStep(step=0), wire.encode({"positions": np.array([0], "<i4")}, "fp32"))


def test_rounds_that_are_over_are_forgotten(bench: Bench) -> None:
    session = begun(bench)
    bench.cloud.forget(2)
    assert bench.cloud.sessions == {}
    assert begun(bench) is not session
