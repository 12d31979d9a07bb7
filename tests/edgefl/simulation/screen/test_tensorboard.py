"""Event files, read back by TensorBoard's own reader."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edgefl.errors import ConfigError
from edgefl.simulation.screen.tensorboard import event_file, run_folder, scalars
from edgefl.testing import make_report


def outcome(number, **more):
    said = {"seconds": 0.5, "up_bytes": 10, "down_bytes": 20, "metrics": {"accuracy": number / 10}} | more
    return make_report(round=number, admitted=8, rejected=1, failed=2, missing=3, **said)


def read(folder):
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(one.step, pytest.approx(one.value)) for one in events.Scalars(tag)] for tag in tags}


def test_a_scalar_a_round_and_figure(tmp_path):
    with event_file(tmp_path / "new") as events:
        events.write(outcome(1))
        events.write(outcome(2, virtual_end_s=60.0))
    assert read(tmp_path / "new") == {
        "accuracy": [(1, 0.1), (2, 0.2)], "clients/admitted": [(1, 8), (2, 8)], "clients/rejected": [(1, 1), (2, 1)],
        "clients/failed": [(1, 2), (2, 2)], "clients/missing": [(1, 3), (2, 3)], "bytes/up": [(1, 10), (2, 10)],
        "bytes/down": [(1, 20), (2, 20)], "seconds": [(1, 0.5), (2, 0.5)], "virtual_seconds": [(2, 60.0)],
    }  # fmt: skip


def test_the_last_model_has_a_point_of_its_own_after_those_of_the_rounds(tmp_path):
    with event_file(tmp_path) as events:
        events.write_last({"devices/accuracy": 0.0})  # no round: nothing to show
        for number in (1, 2):
            events.write(outcome(number, metrics={"devices/accuracy": number / 10}))
        events.write_last({"devices/accuracy": 0.5})
    assert read(tmp_path)["devices/accuracy"] == [(0, 0.1), (1, 0.2), (2, 0.5)]


def test_rounds_done_again_take_the_place_of_the_old(tmp_path):
    with event_file(tmp_path) as events:
        for number in (1, 2, 3):
            events.write(outcome(number))
    with event_file(tmp_path) as events:
        events.write(outcome(2, metrics={"accuracy": 0.9}))
    assert read(tmp_path)["accuracy"] == [(1, 0.1), (2, 0.9)]


def test_a_variants_folder_can_be_one(tmp_path):
    assert run_folder(tmp_path, 'a.b=1, c.d={"x": 2}/..').name == "a.b=1,_c.d=_x_2_.."


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write --tensorboard"), event_file(tmp_path / "file"):
        pass


def test_time_is_virtual_where_there_is_any():
    assert scalars(outcome(1, virtual_end_s=7.0))["virtual_seconds"] == 7.0
    assert "virtual_seconds" not in scalars(outcome(1))
