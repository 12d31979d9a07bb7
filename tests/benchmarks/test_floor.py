import json

import numpy as np
import pytest

from benchmarks import floor
from benchmarks.workload import RunFailedError, Workload

SMALL = Workload(clients=2, megabytes=0.1)


def test_two_real_clients_over_mutual_tls() -> None:
    result = floor.run(SMALL, rounds=3, deadline_s=60)
    assert len(result.round_s) == 3
    assert 0 < min(result.round_s) <= max(result.round_s) < 10


def test_a_round_has_a_deadline() -> None:
    with pytest.raises(RunFailedError, match="did not end within"):
        floor.run(SMALL, rounds=10_000, deadline_s=0.05)


def test_the_fold_is_the_mean(tmp_path) -> None:
    centre = floor.Centre(tmp_path, SMALL)
    before = centre.model.copy()
    for index in range(SMALL.clients):
        (tmp_path / str(index)).write_bytes((before + index).tobytes())
        centre.add(tmp_path / str(index))
    centre.step()
    np.testing.assert_allclose(centre.model, before + 0.5, atol=1e-6)


def test_its_command_has_a_row_a_workload(monkeypatch) -> None:
    from click.testing import CliRunner

    monkeypatch.setattr(floor, "WORKLOADS", (SMALL,))
    result = CliRunner().invoke(floor.main, ["--quick", "--json", "-"])
    (row,) = json.loads(result.output)["rows"]
    assert (row["workload"], row["ours"]) == ("2 x 0.1 MB", None)
    assert row["limit"] > 0
