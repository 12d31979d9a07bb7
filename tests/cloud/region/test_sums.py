"""Partial sums: by hand, in every dtype, by the law that tiers do not change the mean, and against hostile regions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.jobs.answers import AnswerRow
from cloud.region.sums import Folding, answers_of, partial_of, sum_fault, wrong_kind
from edgefl.aggregation import make_rule
from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, ProtocolError
from edgefl.guards import partial_spec
from edgefl.protocols.messages import BlobRef, Evaluate, Signed
from edgefl.protocols.tiers import RegionPart, SumNote
from edgefl.records import DeviceEvaluation, Evaluated, Failure, Plan, RegionRound
from edgefl.testing import make_update
from edgefl.trees import TensorSpec, spec_of
from tests.cloud.dataplane.rounds import opened

PARAMETERS = {"w": np.zeros(2, np.float32)}


def plan_for(parameters=PARAMETERS, clients=("a", "b", "c"), **changes):
    facts = {"job": "job", "round": 1, "parameters": parameters, "clients": clients, "train": TrainConfig(),
             "deadline_s": 5.0}  # fmt: skip
    return Plan(**{**facts, **changes})


def update(device, weight, metrics=None, **tensors):
    return make_update(device, weight=weight, metrics=metrics or {}, **tensors)


def folded(answers, plan=None):
    folding = Folding(plan or plan_for())
    for answer in answers:
        folding.add(answer)
    return folding


def test_a_sum_of_two_devices_by_hand():
    folding = folded([
        update("a", 1.0, {"loss": 4.0}, w=np.array([2.0, 0.0], np.float32)),
        update("b", 3.0, {"loss": 2.0}, w=np.array([6.0, 4.0], np.float32)),
        Failure(job="job", round=1, device="c", reason="no disk"),
    ])  # fmt: skip
    note, mean = folding.note(), folding.mean()
    assert mean["w"].tolist() == [5.0, 3.0]  # (1*2 + 3*6) / 4, (1*0 + 3*4) / 4
    assert mean["w"].dtype == np.float32
    assert (note.weights, note.failed, note.rejected) == ({"a": 1.0, "b": 3.0}, {"c": "no disk"}, {})
    assert note.metrics == {"loss": [10.0, 4.0]}  # 1*4 + 3*2
    partial = partial_of(note, mean)
    assert partial.total["w"].tolist() == [5.0, 3.0]
    assert (partial.is_mean, partial.weight, partial.contributors) == (True, 4.0, ("a", "b"))


def test_a_sum_of_sums_is_the_sum():
    below = folded([update("a", 1.0, {"loss": 4.0}, w=np.array([2.0, 0.0], np.float32)),
                    update("b", 3.0, {"loss": 2.0}, w=np.array([6.0, 4.0], np.float32))])  # fmt: skip
    above = folded([partial_of(below.note(), below.mean()), update("c", 4.0, {"loss": 8.0}, w=np.zeros(2, np.float32))])
    assert above.mean()["w"].tolist() == [2.5, 1.5]
    assert above.note().weights == {"a": 1.0, "b": 3.0, "c": 4.0}
    assert above.note().metrics == {"loss": [42.0, 8.0]}


DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.int64, np.bool_]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda one: np.dtype(one).name)
def test_every_dtype_through_two_tiers_is_the_flat_mean(dtype, shape):
    """Devices send their deltas in the dtype of the parameters, whatever it is and however small the tensor."""
    rng = np.random.default_rng(5)
    parameters = {"t": np.zeros(shape, dtype)}
    trees = [{"t": rng.integers(0, 2, shape).astype(dtype)} for _ in range(4)]
    plan = plan_for(parameters, ("a", "b", "c", "d"))
    updates = [
        make_update(name, weight=weight, **tree)
        for name, weight, tree in zip("abcd", (1.0, 2.0, 0.5, 7.0), trees, strict=True)
    ]
    flat = make_rule("mean", parameters)
    for one in updates:
        flat.add(one)
    regions = [folded(updates[:2], plan), folded(updates[2:], plan)]
    above = folded([partial_of(one.note(), one.mean()) for one in regions], plan)
    assert above.rejected == {}
    sent = above.mean()
    assert sum_fault(above.note(), spec_of(sent), spec_of(parameters)) == ""
    top = make_rule("mean", parameters)
    top.merge(partial_of(above.note(), sent))
    result, expected = top.result()["t"], flat.result()["t"]
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(result.astype(np.float64), expected.astype(np.float64), rtol=1e-6, atol=1e-6)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(-1e4, 1e4, width=32), st.integers(0, 3)), min_size=1,
             max_size=12),
)  # fmt: skip
def test_tiers_do_not_change_the_mean(devices):
    """By law: weighted means of regions, each in float32, and of regions of regions, are the flat mean to 1e-6."""
    names = tuple(f"d{number:02}" for number in range(len(devices)))
    plan = plan_for({"w": np.zeros(1, np.float32)}, names)
    updates = [
        update(name, weight, {"m": value}, w=np.array([value], np.float32))
        for name, (weight, value, _) in zip(names, devices, strict=True)
    ]
    groups = [
        [u for u, (_, _, region) in zip(updates, devices, strict=True) if region == number] for number in (0, 1, 2)
    ]
    direct = [u for u, (_, _, region) in zip(updates, devices, strict=True) if region == 3]
    sums = [folded(group, plan) for group in groups if group]
    middle = folded([partial_of(one.note(), one.mean()) for one in sums[:2]], plan)
    top = folded([*([partial_of(middle.note(), middle.mean())] if middle.weights else []),
                  *(partial_of(one.note(), one.mean()) for one in sums[2:]), *direct], plan)  # fmt: skip
    weights = np.array([weight for weight, _, _ in devices])
    values = np.array([np.float32(value) for _, value, _ in devices], np.float64)
    expected = float((weights * values).sum() / weights.sum())
    size = float((weights * np.abs(values)).sum() / weights.sum())  # what rounding is relative to
    assert abs(float(top.mean()["w"][0]) - expected) <= 1e-6 * max(size, 1e-30)
    assert top.note().weights == {name: weight for name, (weight, _, _) in zip(names, devices, strict=True)}
    total, weight = top.note().metrics["m"]
    np.testing.assert_allclose([total, weight], [(weights * [v for _, v, _ in devices]).sum(), weights.sum()],
                               rtol=1e-9, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (update("b", 1.0, w=np.array([np.nan, 0.0], np.float32)), "NaN"),
        (update("b", float("nan"), w=np.zeros(2, np.float32)), "weight nan"),
        (update("b", 0.0, w=np.zeros(2, np.float32)), "weight 0"),
        (update("b", 1.0, w=np.zeros(3, np.float32)), "tensor 'w'"),
        (update("b", 1.0, w=np.zeros(2, np.float64)), "tensor 'w'"),
        (update("b", 1.0, v=np.zeros(2, np.float32)), "tensors missing: w"),
        (update("b", 1.0, {"loss": float("inf")}, w=np.zeros(2, np.float32)), "metric 'loss'"),
        (update("a", 1.0, w=np.zeros(2, np.float32)), "already admitted"),
    ],
)
def test_a_device_that_sends_nonsense_costs_itself_alone(odd, reason):
    good = update("a", 2.0, w=np.ones(2, np.float32))
    folding = folded([good, odd])
    assert folding.mean()["w"].tolist() == [1.0, 1.0]
    assert folding.note().weights == {"a": 2.0}
    assert reason in folding.note().rejected[odd.device]


def test_a_sum_of_a_region_below_that_is_no_sum_costs_its_devices_alone():
    below = folded([update("a", 1.0, w=np.ones(2, np.float32)), update("b", 1.0, w=np.ones(2, np.float32))])
    poisoned = partial_of(below.note(), {"w": np.array([np.inf, 0.0], np.float32)})
    above = folded([poisoned, update("c", 1.0, w=np.full(2, 3.0, np.float32))])
    assert above.mean()["w"].tolist() == [3.0, 3.0]
    assert above.note().rejected.keys() == {"a", "b"}


def test_an_evaluation_has_a_note_and_no_tensors():
    plan = plan_for(fit=False, evaluate=True)
    folding = folded(
        [
            Evaluated(
                job="job", round=1, device="a", evaluation=DeviceEvaluation(metrics={"accuracy": 0.5}, weight=4.0)
            ),
            Evaluated(job="job", round=1, device="b", evaluation=DeviceEvaluation(fault="no samples")),
            Failure(job="job", round=1, device="c", reason="no disk"),
        ],
        plan,
    )
    note = folding.note()
    assert folding.mean() == {}
    assert note.evaluations == {"a": {"accuracy": 0.5}}
    assert note.evaluation_weights == {"a": 4.0}
    assert note.evaluation_faults == {"b": "no samples"}
    assert note.devices == {"a", "b", "c"}
    again = folded([partial_of(note, {})], plan).note()
    assert (again.evaluations, again.evaluation_faults) == (note.evaluations, note.evaluation_faults)


def took(parent, seconds):
    return RegionRound(parent=parent, seconds=seconds, up_bytes=10, down_bytes=20)


def test_a_sum_says_which_region_has_answered_for_whom_and_what_is_learnt_of_each_device():
    below = folded([update("a", 1.0, {"train_loss": 4.0}, w=np.zeros(2, np.float32)),
                    Failure(job="job", round=1, device="b", reason="no disk")])  # fmt: skip
    below.part = ("oslo", took("norway", 2.0))
    sent = partial_of(below.note(), below.mean())
    above = Folding(plan_for())
    above.part = ("norway", took("cloud", 3.0))
    for answer in (
        sent, Failure(job="job", round=1, device="b", reason="no disk"),
        update("c", 2.0, {"train_loss": 1.0}, w=np.zeros(2, np.float32)),
    ):  # fmt: skip
        above.add(answer)
    note = above.note()
    assert note.losses == {"a": 4.0, "c": 1.0}
    parts = note.regions.items()
    assert {name: (one.parent, list(one.admitted), dict(one.failures), one.seconds) for name, one in parts} == {
        "oslo": ("norway", ["a"], {"b": "no disk"}, 2.0), "norway": ("cloud", ["c"], {}, 3.0),
    }  # fmt: skip
    mean = above.mean()
    assert sum_fault(note, spec_of(mean), spec_of(PARAMETERS)) == ""
    partial = partial_of(note, mean)
    assert (partial.losses, partial.regions["norway"].admitted) == ({"a": 4.0, "c": 1.0}, ("c",))
    again = Folding(plan_for(), part=above.part)  # without c, and without the failure of b
    again.add(sent)
    assert sum_fault(again.note(), spec_of(again.mean()), spec_of(PARAMETERS)) == ""


def test_only_a_rule_that_merges_has_sums():
    with pytest.raises((ProtocolError, ConfigError), match="median"):
        Folding(plan_for(), rule_name="median").add(update("a", 1.0, w=np.zeros(2, np.float32)))


WANTED = {"w": TensorSpec((2,), np.dtype(np.float32)), "n": TensorSpec((), np.dtype(np.int64))}
GOOD = {"w": TensorSpec((2,), np.dtype(np.float32)), "n": TensorSpec((), np.dtype(np.float64))}


@pytest.mark.parametrize(
    ("note", "spec", "fault"),
    [
        (SumNote(weights={"a": 1.0, "b": 2.0}, metrics={"loss": [1.0, 3.0]}), GOOD, ""),
        (SumNote(weights={"a": 1.0}, metrics={"loss": [1.0, 0.5]}), GOOD, ""),
        (SumNote(weights={}, failed={"a": "x"}), {}, ""),
        (SumNote(weights={"a": 0.0}), GOOD, "not finite and above 0"),
        (SumNote(weights={"a": 1.0, "b": -1.0}), GOOD, "not finite and above 0"),
        (SumNote(weights={}), GOOD, "no contributor"),
        (SumNote(weights={"a": 1.0}), {}, "tensor 'n' is None"),
        (SumNote(weights={"a": 1.0}), GOOD | {"x": GOOD["w"]}, "tensor 'x'"),
        (SumNote(weights={"a": 1.0}), GOOD | {"w": TensorSpec((1,), np.dtype(np.float32))}, "tensor 'w'"),
        (SumNote(weights={"a": 1.0}), GOOD | {"n": TensorSpec((1,), np.dtype(np.float64))}, "tensor 'n'"),
        (SumNote(weights={"a": 1.0}), GOOD | {"w": TensorSpec((2,), np.dtype(np.float64))}, "tensor 'w'"),
        (
            SumNote(weights={"a": 1.0, "b": 2.0}, metrics={"loss": [1.0, 3.1]}),
            GOOD,
            "has a weight of 3.1, its contributors have 3",
        ),
        (SumNote(weights={"a": 1.0}, metrics={"loss": [1.0, 0.0]}), GOOD, "metric 'loss'"),
        (SumNote(weights={"a": 1.0}, metrics={"loss": [1.0, -1.0]}), GOOD, "metric 'loss'"),
        (SumNote(weights={"a": 1.0}, metrics={"loss": [1.0]}), GOOD, "metric 'loss'"),
        (SumNote(weights={"a": 1.0}, metrics={"loss": []}), GOOD, "metric 'loss'"),
        (SumNote(weights={"a": 1.0}, failed={"a": "x"}), GOOD, "a is both"),
        (SumNote(weights={"a": 1.0}, rejected={"b": "x"}, failed={"b": "y"}), GOOD, "b is both"),
        (SumNote(weights={"a": 1.0}, evaluations={"b": {"acc": 1.0}}, evaluation_weights={"b": 1.0}), GOOD, "'b'"),
        (SumNote(weights={"a": 1.0}, evaluation_faults={"b": "x"}), GOOD, "'b'"),
        (SumNote(weights={"a": 1.0}, losses={"b": 1.0}), GOOD, "a loss of 'b', which is not a contributor"),
        (SumNote(weights={"a": 1.0}, regions={"r": RegionPart(parent="cloud", admitted=["a"])}), GOOD, ""),
        (SumNote(weights={"a": 1.0}, regions={"r": RegionPart(parent="cloud", admitted=["b"])}), GOOD, "name 'b'"),
        (
            SumNote(weights={"a": 1.0}, regions={name: RegionPart(parent="r", admitted=["a"]) for name in "rs"}),
            GOOD,
            "name 'a' twice",
        ),
    ],
)
def test_what_is_wrong_with_a_sum(note, spec, fault):
    found = sum_fault(note, spec, WANTED)
    assert (fault in found) if fault else (found == "")


def test_a_sum_is_an_answer_of_each_of_its_devices():
    note = SumNote(weights={"a": 2.0}, failed={"b": "no disk"}, rejected={"c": "NaN"})
    assert answers_of(note, "r1", "job/1/r1+1") == [
        AnswerRow(device="a", file="job/1/r1+1", weight=2.0, region="r1"),
        AnswerRow(device="b", reason="no disk", region="r1"),
        AnswerRow(device="c", reason="NaN", region="r1", refused=True),
    ]


def test_a_sum_of_an_evaluation_has_no_training():
    training = opened(cohort=("a",)).assignment
    evaluation = Evaluate(
        job="job", round=1, model=BlobRef(sha256="0" * 64, size=1), model_blake3="00",
        bundle=Signed(text="", key_id="", signature=""), seed=1, deadline_s=1.0, max_update_bytes=10,
    )  # fmt: skip
    note = SumNote(weights={"a": 1.0}, metrics={"loss": [1.0, 1.0]})
    assert "only evaluates" in wrong_kind(note, evaluation)
    assert wrong_kind(note, training) == wrong_kind(SumNote(weights={"a": 1.0}), evaluation) == ""


@pytest.mark.parametrize(
    ("dtype", "deltas", "stepped", "travels"),
    [
        (np.float32, (1.0, 4.0), 3.0, 3.0),  # weights 1 and 2
        (np.float64, (1.0, 4.0), 3.0, 3.0),
        (ml_dtypes.bfloat16, (1.0, 4.0), 3.0, 3.0),
        (np.int64, (1, 2), 2, 2.0),  # 5/3, rounded in each round, as a cloud does
        (np.int8, (-1, -2), -2, -2.0),
        (np.bool_, (False, True), True, 1.0),  # more than half of the weight has changed
    ],
)
def test_a_regional_round_keeps_the_dtypes(dtype, deltas, stepped, travels) -> None:
    """Devices get the parameters of a region's second round in the dtypes of the first, also as scalars."""
    first = {"w": np.zeros((), dtype)}

    def one_round():
        answers = [
            update(name, own, w=np.array(delta, dtype))
            for name, own, delta in zip("ab", (1.0, 2.0), deltas, strict=True)
        ]
        return folded(answers, plan_for(first))

    second = one_round().step(first)
    assert (second["w"].dtype, second["w"].shape, second["w"].item()) == (dtype, (), stepped)
    last = one_round()
    last.base = (first, first)
    mean = last.mean()
    assert (mean["w"].shape, float(mean["w"])) == ((), travels)
    assert {name: one.dtype for name, one in mean.items()} == {
        name: one.dtype for name, one in partial_spec(spec_of(first), is_mean=True).items()
    }


def test_the_evaluation_of_a_device_that_left_between_two_regional_rounds_is_not_in_the_sum() -> None:
    """It is no contributor: the parent would refuse the whole sum."""
    first = folded([update("a", 1.0, w=np.ones(2, np.float32)), update("b", 1.0, w=np.ones(2, np.float32))])
    for device in ("a", "b"):
        first._add_evaluation(device, DeviceEvaluation(metrics={"accuracy": 0.5}, weight=2.0))
    last = folded([update("a", 3.0, w=np.ones(2, np.float32))])
    last.evaluated = first
    note, mean = last.note(), last.mean()
    assert (set(note.evaluations), set(note.evaluation_weights), note.weights) == ({"a"}, {"a"}, {"a": 3.0})
    assert sum_fault(note, spec_of(mean), spec_of(PARAMETERS)) == ""
