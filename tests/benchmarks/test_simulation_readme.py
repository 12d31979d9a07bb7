import pytest

from benchmarks.report import Row, Target
from benchmarks.simulation_readme import table, write_readme

RATE = {"workload": "w", "metric": "clients a second", "unit": "1/s", "more_is_better": True}


def test_rows_by_hand() -> None:
    rows = [
        Row(**RATE, ours=500.0, rival="other 1.0", theirs=250.0, targets=(Target(of="ratio", at_least=2),)),
        Row(**RATE, ours=500.0, rival="third", theirs=1000.0, targets=(Target(of="ratio", at_least=2),)),
        Row(**RATE, ours=500.0, rival="absent", skipped="it is not installed"),
        Row(workload="w", metric="accuracy after 2 rounds", unit="1", ours=0.9, rival="other 1.0", theirs=0.875),
        Row(workload="w", metric="peak RSS", unit="MB", ours=100.0, rival="other 1.0", theirs=300.0),
    ]
    assert table(rows).splitlines()[2:] == [
        "| w | clients a second | 500 | other 1.0 | 250 | 2 | >= 2 ✓ | 90.0% / 87.5% |",
        "| w | clients a second | 500 | third | 1000 | 0.5 | >= 2 ✗ |  |",
        "| w | clients a second | 500 | absent | not run |  |  |  |",
        "| w | peak RSS, MB | 100 | other 1.0 | 300 | 3 |  |  |",
    ]


def test_a_file_without_the_markers_is_left_alone(tmp_path) -> None:
    file = tmp_path / "README.md"
    file.write_text("<!-- simulation-table -->")
    with pytest.raises(ValueError, match="once each"):
        write_readme([], file)
    assert file.read_text() == "<!-- simulation-table -->"
