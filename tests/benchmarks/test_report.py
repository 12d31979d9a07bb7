import json

import pytest
from click.testing import CliRunner

from benchmarks.report import Row, Target, command, machine, median, shown, write_json


def row(**facts) -> Row:
    return Row(**{"workload": "2 x 0.1 MB", "metric": "a round", "unit": "s", **facts})


def test_ratio_by_hand() -> None:
    assert row(ours=0.05, rival="other 1.0", theirs=5.0).ratio == pytest.approx(100)
    assert row(ours=300.0, theirs=100.0, more_is_better=True).ratio == pytest.approx(3)
    assert row(ours=0.05, limit=0.02).over_limit == pytest.approx(2.5)


def test_no_ratio_without_both_values() -> None:
    assert row(ours=1.0).ratio is None
    assert row(theirs=1.0).ratio is None
    assert row(ours=0.0, theirs=1.0).ratio is None
    assert row(theirs=1.0).over_limit is None


def test_met_needs_every_target() -> None:
    targets = (Target(of="ratio", at_least=100), Target(of="ours", at_most=0.1))
    assert row(ours=0.1, theirs=10.0, targets=targets).met
    assert not row(ours=0.11, theirs=20.0, targets=targets).met
    assert not row(ours=0.1, theirs=9.0, targets=targets).met
    assert not row(ours=0.1, targets=targets).met


def test_a_skipped_row_is_not_met() -> None:
    skipped = row(ours=0.1, skipped="the rival is not installed")
    assert not skipped.met
    assert skipped.as_json()["skipped"] == "the rival is not installed"


@pytest.mark.parametrize(
    "wrong", [{"of": "theirs", "at_most": 1.0}, {"of": "ours"}, {"of": "ours", "at_least": 1.0, "at_most": 2.0}]
)
def test_a_target_is_one_bound_on_ours_or_the_ratio(wrong) -> None:
    with pytest.raises(ValueError, match="one of at_least and at_most"):
        Target(**wrong)


def test_json_holds_the_keys_of_the_contract(tmp_path) -> None:
    file = tmp_path / "report.json"
    write_json([row(ours=0.05, rival="other 1.0", theirs=5.0, targets=(Target(of="ratio", at_least=100),))], str(file))
    report = json.loads(file.read_text())
    only = report["rows"][0]
    contract = {"workload", "metric", "unit", "ours", "rival", "theirs", "limit", "ratio", "target", "met", "skipped"}
    assert contract <= set(only)
    assert (only["ratio"], only["target"], only["met"]) == (pytest.approx(100), "ratio >= 100", True)
    assert set(report) == {"rows", "machine"}


def test_machine_names_no_host_and_no_path() -> None:
    import platform

    described = json.dumps(machine())
    assert {"cpu", "cores", "ram_gb", "python", "versions"} <= set(machine())
    assert "/" not in machine()["python"]
    assert "/home" not in described
    assert platform.node() == "" or f'"{platform.node()}"' not in described


def test_median_and_figures() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([]) is None
    assert [shown(value) for value in (None, 0.01234, 12.345, 12345.6)] == ["-", "0.0123", "12.3", "12346"]


def test_the_command_prints_a_table_and_writes_json(tmp_path) -> None:
    file = tmp_path / "report.json"
    result = CliRunner().invoke(command(lambda *, quick: [row(ours=1.0)], "What."), ["--json", str(file)])
    assert result.exit_code == 0
    assert "2 x 0.1 MB" in result.output
    assert json.loads(file.read_text())["rows"][0]["ours"] == 1.0


def test_json_to_standard_output_is_json_alone() -> None:
    result = CliRunner().invoke(command(lambda *, quick: [row(ours=1.0)], "What."), ["--json", "-"])
    assert json.loads(result.output)["rows"][0]["met"] is True


def test_a_row_that_failed_fails_the_command_unless_quick() -> None:
    main = command(lambda *, quick: [row(skipped=f"quick={quick}")], "What.")
    whole, quick = CliRunner().invoke(main, []), CliRunner().invoke(main, ["--quick"])
    assert (whole.exit_code, quick.exit_code) == (1, 0)
    assert "quick=False" in whole.output
