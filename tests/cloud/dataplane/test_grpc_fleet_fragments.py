"""The blob of what a round before has changed: it is there while its round is open."""

import numpy as np

from cloud.dataplane.grpc_fleet import HEADER_SLACK_BYTES
from cloud.jobs.answers import AnswerRow
from edgefl.config import TrainConfig
from edgefl.trees import SpooledTree
from tests.cloud.dataplane.test_grpc_fleet import PARAMETERS, centre, in_thread

__all__ = ["centre"]  # the fixture


def test_a_fragment_is_there_while_its_round_is_open(centre):
    """Round 2 of two fragments: devices lack what round 1 has changed, and send the other part."""
    fleet = centre.fleet()
    parameters = {"w": np.arange(4, dtype=np.float32), "v": np.ones(2, np.float32)}
    plan = centre.plan(round=2, parameters=parameters, clients=("a",), train=TrainConfig(round=2, fragments=2))
    answers = in_thread(lambda: fleet.collect(plan))
    fit = centre.devices["a"].next()
    assert set(SpooledTree(centre.blobs.path(fit.fragment.sha256))) == {"w"}
    assert fit.fragment_blake3 == centre.blobs.check(fit.fragment.sha256)
    assert set(SpooledTree(centre.blobs.path(fit.model.sha256))) == {"w", "v"}
    assert fit.max_update_bytes < fit.model.size + HEADER_SLACK_BYTES  # the room of one part
    centre.rounds.get(centre.job, 2).accept(AnswerRow(device="a", reason="no data"), lambda _answer: None)
    assert [answer.reason for answer in answers()] == ["no data"]
    assert not centre.blobs.has(fit.fragment.sha256)
    assert centre.blobs.has(fit.model.sha256)


def test_the_first_round_and_one_without_fragments_have_no_fragment(centre):
    fleet = centre.fleet()
    for train in (TrainConfig(round=1, fragments=2), TrainConfig(round=1)):
        plan = centre.plan(parameters={**PARAMETERS, "v": np.ones(2, np.float32)}, clients=("a",), train=train)
        answers = in_thread(lambda plan=plan: fleet.collect(plan))
        assert centre.devices["a"].next().fragment is None
        centre.rounds.get(centre.job, 1).accept(AnswerRow(device="a", reason="no data"), lambda _answer: None)
        answers()
