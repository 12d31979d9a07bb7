"""The model in fewer bits: its blob is there while its round is open, and the exact one stays."""

import numpy as np

from cloud.dataplane.grpc_fleet import HEADER_SLACK_BYTES
from cloud.jobs.answers import AnswerRow
from edgefl.config import TrainConfig
from edgefl.settings.server import ServerConfig
from edgefl.trees import SpooledTree, encoded_bytes, in_form
from tests.cloud.dataplane.test_grpc_fleet import PARAMETERS, centre, in_thread

__all__ = ["centre"]  # the fixture

LARGE = {"w": np.linspace(0, 1, 2048, dtype=np.float32), "v": np.ones(2, np.float32)}


def ask(centre, parameters):
    """Open a round, have its device fail, and return what was asked of it."""
    fleet = centre.fleet(server=ServerConfig(wire="bf16"))
    plan = centre.plan(parameters=parameters, clients=("a",), train=TrainConfig(round=1, wire="int8"))
    answers = in_thread(lambda: fleet.collect(plan))
    fit = centre.devices["a"].next()
    seen = SpooledTree(centre.blobs.path(fit.model.sha256))
    values, narrow = {name: np.array(seen[name]) for name in seen}, set(seen.narrow)
    centre.rounds.get(centre.job, 1).accept(AnswerRow(device="a", reason="no data"), lambda _answer: None)
    answers()
    return fit, values, narrow


def test_devices_get_fewer_bits_while_the_round_is_open(centre):
    kept = centre.blobs.put_tree(LARGE)
    fit, values, narrow = ask(centre, SpooledTree(centre.blobs.path(kept.sha256)))
    assert narrow == {"w"}
    assert np.array_equal(values["w"], in_form(LARGE, "bf16")["w"])
    assert fit.model.size == encoded_bytes(in_form(LARGE, "bf16")) < 0.6 * encoded_bytes(LARGE)
    assert fit.max_update_bytes == encoded_bytes(LARGE) + HEADER_SLACK_BYTES  # a device may send it as it is
    assert fit.train.wire == "int8"
    assert not centre.blobs.has(fit.model.sha256)
    assert centre.blobs.has(kept.sha256)


def test_a_model_without_large_tensors_is_sent_as_it_is_and_stays(centre):
    fit, values, narrow = ask(centre, PARAMETERS)
    assert not narrow
    assert np.array_equal(values["w"], PARAMETERS["w"])
    assert centre.blobs.has(fit.model.sha256)
