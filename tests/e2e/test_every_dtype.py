"""Every dtype and shape that the wire carries, by real agents, by workers of a pool and in a loop: one model."""

from pathlib import Path

import numpy as np
import pytest

from edgefl.config import from_dict
from edgefl.simulation.simulate import simulate
from edgefl.simulation.world.settings import SimulationConfig
from edgefl.trees import is_float

pytestmark = pytest.mark.soak
TASK = Path(__file__).parent / "tasks" / "every_dtype"
CLOSE = {"bfloat16": 2e-2, "float16": 2e-3}


def assert_close(seen, wanted):
    assert set(seen) == set(wanted)
    for name, array in wanted.items():
        assert (seen[name].dtype, seen[name].shape) == (array.dtype, array.shape), name
        within = CLOSE.get(array.dtype.name, 1e-5) if is_float(array.dtype) else 0
        one, other = (np.asarray(tree, float) if is_float(array.dtype) else tree for tree in (seen[name], array))
        np.testing.assert_allclose(one, other, rtol=0, atol=within, err_msg=name)


def test_devices_and_engines_agree(embedded_fleet):
    config = from_dict(SimulationConfig, {"rounds": {"count": 2}, "population": {"clients": 2}})
    wanted = simulate(TASK, engine="loop", config=config).parameters
    assert int(wanted["count"]) == 2**60 + 3  # a batch a round
    assert wanted["u8"].tolist() == [252, 3]
    assert_close(simulate(TASK, engine="pool", config=config).parameters, wanted)
    for number in range(2):
        embedded_fleet.add_agent(f"client-{number}", part=number, parts=2)
    said, parameters = embedded_fleet.run_task("every_dtype", rounds=2)
    assert [one["admitted"] for one in said["rounds"]] == [2, 2]
    assert_close(parameters, wanted)
