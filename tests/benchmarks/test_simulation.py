import os

import pytest
from click.testing import CliRunner

from benchmarks import simulation, simulation_contest
from benchmarks.simulation_contest import Outcome
from benchmarks.simulation_workloads import DATA_VARIABLE

ROUND_S = {  # by hand, of the rounds after the first
    "edgefl": 0.2, "centralised SGD": 0.18, "Flower on Ray": 2.0, "pfl-research in 2 processes": 0.4, "others": 0.5,
}  # fmt: skip
PEAK_MB = {"edgefl": 500.0, "Flower on Ray": 2000.0}


@pytest.fixture
def turns(monkeypatch, tmp_path):
    """Contestants that answer by hand, all of them installed and with all data."""
    seen = []

    def run(contestant, rounds, *, memory=False):
        seen.append((contestant.name, memory))
        each_s = ROUND_S.get(contestant.name, ROUND_S["others"])
        return Outcome(
            round_s=(9.0, *[each_s] * (rounds - 1)), accuracy=0.9, detail={}, command_s=2.5,
            peak_mb=PEAK_MB.get(contestant.name, 1000.0) if memory else None,
        )  # fmt: skip

    (tmp_path / "cifar10").mkdir()
    (tmp_path / "mnist10k.npz").touch()
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(simulation, "decode_cifar", lambda _folder: None)
    monkeypatch.setattr(simulation_contest, "run", run)
    monkeypatch.setattr(simulation_contest, "installed", lambda _package: "1.0")
    return seen


def rows(part, **options):
    found = simulation.measure(quick=False, only=[part], **options)
    return {(row.metric, (row.rival or "").removesuffix(" 1.0")): row for row in found}


def test_the_table_of_a_workload_by_hand(turns) -> None:
    table = rows("digits-cnn")
    central = table["clients a second", "centralised SGD"]
    assert (central.ours, central.ratio, central.met) == (pytest.approx(500), pytest.approx(0.9), True)
    flower = table["clients a second", "Flower on Ray"]
    assert (flower.ratio, flower.limit, flower.met) == (pytest.approx(10), pytest.approx(100 / 0.18), True)
    assert flower.detail["Flower on Ray 1.0"]["peak_mb"] == 2000.0
    assert str(table["clients a second", "pfl-research in 2 processes"].targets[0]) == "ratio >= 1.9"
    compiled = table["clients a second, compiled steps", "centralised SGD"]
    assert (compiled.ours, compiled.met) == (pytest.approx(200), False)
    assert table["accuracy after 16 rounds", "plain loop"].theirs == 0.9
    assert ("accuracy after 16 rounds", "centralised SGD") not in table
    assert table["peak RSS", "Flower on Ray"].ratio == 4.0


def test_who_decides_takes_all_its_turns_and_memory_one_of_its_own(turns) -> None:
    list(simulation.measure(quick=False, only=["digits-cnn"]))
    counts = {name: turns.count((name, False)) for name, _ in turns}
    assert counts["edgefl"] == counts["Flower on Ray"] == counts["centralised SGD"] == simulation.REPEATS
    assert counts["plain loop"] == counts["edgefl pool"] == 1
    assert [name for name, memory in turns if memory] == ["edgefl", "pfl-research in 2 processes", "Flower on Ray"]


def test_memory_is_a_target_of_cifar(turns) -> None:
    memory = rows("cifar")["peak RSS", "Flower on Ray"]
    assert (str(memory.targets[0]), memory.met) == ("ratio >= 2", True)
    assert simulation.DECODED_VARIABLE not in os.environ


def test_a_hundred_rounds_with_our_first_and_without_theirs(turns) -> None:
    table = rows("mnist-lr")
    row = table["100 rounds", "Flower on Ray"]
    assert (row.ours, row.theirs) == (pytest.approx(9 + 99 * 0.2), pytest.approx(200))
    assert not table["100 rounds", "centralised SGD"].met
    assert table["whole command", "Flower on Ray"].met


def test_the_other_parts_by_hand(turns) -> None:
    app = rows("flower-app")["clients a second in the median round", "Flower on Ray"]
    assert (app.ours, app.theirs, app.met) == (pytest.approx(500), pytest.approx(50), True)
    table = rows("population")
    assert table["a round", "edgefl, 1,000 clients"].met
    assert (table["more RSS", ""].ours, table["more RSS", ""].met) == (0.0, True)


def test_data_that_are_not_there_skip_their_rows(turns, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "none"))
    table = rows("cifar")
    assert turns == []
    assert all("there is no cifar10" in row.skipped and not row.met for row in table.values())


def test_quick_takes_one_turn_of_few_rounds(turns) -> None:
    found = list(simulation.measure(quick=True, only=["digits-mlp"]))
    assert turns.count(("edgefl", False)) == 1
    assert any(row.metric == "accuracy after 4 rounds" for row in found)


def test_the_command_writes_json_and_the_readme(turns, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda _pid, _cores: None)
    readme, report = tmp_path / "README.md", tmp_path / "report.json"
    readme.write_text("before\n<!-- simulation-table -->\nold\n<!-- /simulation-table -->\nafter\n")
    options = ["--only", "flower-app", "--readme", str(readme), "--json", str(report)]
    result = CliRunner().invoke(simulation.main, options)
    assert result.exit_code == 0, result.output
    assert "Flower on Ray 1.0" in report.read_text()
    assert "| 10 | >= 4 ✓ |" in readme.read_text()
    assert readme.read_text().startswith("before\n<!-- simulation-table -->\nOn ")
    assert "old" not in readme.read_text()
