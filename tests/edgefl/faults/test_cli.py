"""The command: totals, the file of results, and what it says of a seed that fails."""

from __future__ import annotations

import json
from collections import Counter

from click.testing import CliRunner

from edgefl.faults import cli
from edgefl.faults.plan import draw
from edgefl.faults.run import Verdict


def verdict(seed, wrong=()):
    return Verdict(
        settings=draw(seed), wrong=tuple(wrong), digest="00", virtual_s=3600.0, num_steps=10, num_messages=5,
        num_trained=4, faults=Counter(kill=1), trace=("line",),
    )  # fmt: skip


def test_a_seed_is_run_and_counted(tmp_path):
    file = tmp_path / "result.json"
    done = CliRunner().invoke(cli.main, ["--seed", "0", "--topology", "flat", "--json", str(file), "--trace"])
    assert done.exit_code == 0, done.output
    assert "job.done" in done.output
    said = json.loads(file.read_text())
    assert said["seeds"] == 1
    assert said["failed"] == {}
    assert said["updates"] > 0


def test_a_failing_seed_is_told_with_its_command_and_the_faults_that_it_takes(monkeypatch):
    monkeypatch.setattr(cli, "run_seeds", lambda seeds, *_: (verdict(one, ["it is lost"]) for one in seeds))
    monkeypatch.setattr(cli, "shrink", lambda one, *_: one.settings.faults[:1])
    seed = next(one for one in range(100) if len(draw(one).faults) > 3)
    done = CliRunner().invoke(cli.main, ["--seed", str(seed), "--mutant", "early-drop"])
    assert done.exit_code == 1
    assert f"python -m edgefl.faults --seed {seed} --trace --mutant early-drop" in done.output
    assert "it is lost" in done.output
    assert f"seed {seed} takes 1 of its {len(draw(seed).faults)} faults to fail" in done.output


def test_totals_add_up():
    total = cli.Total(0.0)
    for seed in range(3):
        total.add(verdict(seed, ["wrong"] if seed == 1 else []))
    said = total.as_json()
    assert (said["seeds"], said["updates"], said["messages"], said["virtual_s"]) == (3, 12, 15, 10800.0)
    assert said["failed"] == {"1": ["wrong"]}
    assert said["faults"] == {"kill": 3}
    assert "fault: kill" in total.table()
