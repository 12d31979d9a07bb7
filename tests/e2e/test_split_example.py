"""The commands of docs/split-training.md over real agents, one of them below a region."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from edgefl.task import load_task
from edgefl.training.evaluation import Judge
from edgefl.training.local import initial_parameters
from edgefl.trees import SpooledTree
from edgefl.trees.factors import is_low_rank
from tests.docs.pages import blocks, written
from tests.e2e.split_fleet import split_server

ROOT = Path(__file__).parents[2]
PAGE = "split-training.md"


def documented():
    """Return the words of each `edgefl run` of the page."""
    found = [one for one in blocks({PAGE: written()[PAGE]}, "sh") if "edgefl run" in one.text]
    return [shlex.split(line) for one in found for line in one.text.splitlines()]


@pytest.mark.soak
def test_the_documented_commands_train_in_parts(embedded_fleet, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fleet, results = embedded_fleet, {}
    fleet.start_region("hall")
    fleet.enroll("device-0")
    fleet.enroll("device-1", region="hall")
    agents = [fleet.restart_agent(f"device-{part}", part=part) for part in range(2)]
    with split_server(fleet) as server:
        for number, words in enumerate(documented()):
            assert words[:2] == ["edgefl", "run"]
            out, report = tmp_path / f"{number}.safetensors", tmp_path / f"{number}.json"
            words[words.index("--out") + 1] = str(out)
            if "lora" in words[2]:
                for part, agent in enumerate(agents):
                    agent.stop()
                    fleet.restart_agent(f"device-{part}", part=part, parts=2, lora_rank=2 + part)
            fleet.command(
                *words[1:], "--cloud", fleet.url, "--json", report, "--set",
                f"train.split.server=127.0.0.1:{server.port}", timeout_s=900,
            )  # fmt: skip
            results[words[words.index("--config") + 1]] = words[2], out, json.loads(report.read_text())
    assert len(results) == 4
    for config, (folder, out, report) in results.items():
        assert [one["admitted"] for one in report["rounds"]] == [2, 2], config
        task, found = load_task(folder), SpooledTree(out)
        begin = initial_parameters(task)
        assert set(found) == set(begin)
        seen = Judge(task)(found)
        assert seen["loss"] < Judge(task)(begin)["loss"], config
        if "digits" in config:
            assert seen["accuracy"] > 0.8, config
        if "lora" in config:
            moved = {name for name in found if is_low_rank(name) and np.abs(found[name]).max() > 0}
            assert {name.split(".")[3] for name in moved} == {"0", "1"}, moved  # the device's block, and the cloud's
            assert all(np.array_equal(found[name], begin[name]) for name in found if not is_low_rank(name))
        if "frozen" in config:
            assert np.array_equal(found["eyes.0.weight"], begin["eyes.0.weight"])
            up = [one["metrics"]["train_cut_up_bytes"] for one in report["rounds"]]
            assert up[1] < up[0] / 3  # the second round names samples alone
