"""What commands print: tabs off a terminal, JSON where it is asked for, and nothing else beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgefl.errors import ConfigError
from edgefl.terminal.output import (
    Output,
    ago_text,
    counted,
    example,
    json_option,
    metrics_text,
    refuse_no_folder,
    stdout_for_results,
    time_text,
)  # fmt: skip
from edgefl.terminal.text import is_safe


@click.command(epilog=example("first --line", "second"))
@json_option
def tell(output):
    """Tell."""
    output.table(("name", "value"), [("a", 1), ("b", None)], "nothing")
    output.line("done")
    output.result({"value": float("nan"), "list": [1.5, float("inf")]})


def test_lines_for_people_without_json():
    done = CliRunner().invoke(tell)
    assert done.output == "name\tvalue\na\t1\nb\t-\ndone\n"


def test_json_on_stdout_is_alone_there():
    done = CliRunner(mix_stderr=False).invoke(tell, ["--json", "-"])
    assert json.loads(done.stdout) == {"value": None, "list": [1.5, None]}
    assert "done" in done.stderr


def test_json_on_stdout_is_alone_there_whoever_else_prints():
    program = (
        "import os, subprocess, sys, click; from edgefl.terminal.output import json_option\n"
        "@click.command()\n"
        "@json_option\n"
        "def tell(output):\n"
        "    print('the app'); os.write(1, b'its library '); sys.stdout.write('again ')\n"
        "    subprocess.run([sys.executable, '-c', 'print(\"its child\")'], check=True)\n"
        "    output.result({'alone': True})\n"
        "tell(standalone_mode=False); print('afterwards')"
    )
    done = subprocess.run([sys.executable, "-c", program, "--json", "-"], capture_output=True, text=True, check=True)
    assert done.stdout == '{\n "alone": true\n}\nafterwards\n'
    assert [word in done.stderr for word in ("the app", "its library", "again", "its child")] == [True] * 4


def test_stdout_is_everybodys_again_after_an_error(capfd):
    @stdout_for_results()
    def fail():
        sys.stdout.write("aside\n")
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    sys.stdout.write("in front\n")
    assert capfd.readouterr() == ("in front\n", "aside\n")


def test_json_in_a_file(tmp_path):
    done = CliRunner().invoke(tell, ["--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text())["list"] == [1.5, None]
    assert "done" in done.output


def test_a_file_that_cannot_be_is_refused_before_the_work(tmp_path):
    done = CliRunner().invoke(tell, ["--json", str(tmp_path / "no" / "x.json")])
    assert isinstance(done.exception, ConfigError)
    assert done.output == ""


def test_a_folder_in_the_files_place_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot write --json"):
        Output(str(tmp_path)).result({})


def test_the_example_stands_as_it_is_written():
    assert "Example:\n    first --line\n    second\n" in CliRunner().invoke(tell, ["--help"]).output


def test_things_are_counted():
    assert [counted(number, "device") for number in (0, 1, 2)] == ["0 devices", "1 device", "2 devices"]


def test_an_empty_table_says_so(capsys):
    Output().table(("a",), [], "nothing here")
    assert capsys.readouterr().out == "nothing here\n"


def test_a_table_on_a_terminal_is_drawn(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    Output().table(("name", "value"), [("a", "[red]")], "nothing")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["name", "value"], ["a", "[red]"]]


def test_times_and_metrics():
    assert time_text(None) == "-"
    assert len(time_text(0)) == len("1970-01-01 00:00:00")
    assert metrics_text({"loss": 0.123456, "accuracy": 0.97}) == "accuracy=0.97 loss=0.1235"


def test_no_folder_is_named(tmp_path):
    refuse_no_folder(None, "--out")
    refuse_no_folder(tmp_path / "x", "--out")
    with pytest.raises(ConfigError, match=r"--out .*there is no folder"):
        refuse_no_folder(tmp_path / "a" / "x", "--out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_is_anothers_is_refused_before_the_work():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents only root can enter
        folder = Path(name)
        folder.chmod(0o755)
        os.setresuid(65534, 65534, 0)  # nobody; access(2) asks for the real one
        try:
            with pytest.raises(
                ConfigError, match=rf"--out .*: no permission to write in {folder}; choose another folder"
            ):
                refuse_no_folder(folder / "x", "--out")
        finally:
            os.setresuid(0, 0, 0)


def test_nothing_that_is_printed_moves_a_cursor(capsys):
    output = Output("-")
    output.line("job \x1b[2J failed: [red]no\x9b\x07")
    output.table(("name", "tags"), [("cam-1\nforged\trow", "\x1b]0;title\x07")], "none")
    output.result({"reason": "\x1b[2J\x7f\n", "\x1b": 1})
    shown = capsys.readouterr()
    assert shown.err == "job \\x1b[2J failed: [red]no\\x9b\\x07\nname\ttags\ncam-1 forged row\t\\x1b]0;title\\x07\n"
    assert is_safe(shown.out.replace("\n", ""))
    assert json.loads(shown.out) == {"reason": "\x1b[2J\x7f\n", "\x1b": 1}


def test_a_metric_that_json_had_no_number_for_is_a_dash():
    assert metrics_text({"loss": None, "\x1b": 1.0}) == "\\x1b=1 loss=-"


def test_on_a_narrow_terminal_what_is_copied_stays_whole_and_spare_columns_are_left_out(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")  # the width of a dumb one is not asked
    columns, row = ("id", "text", "error"), ("job-0123456789abcdef", "a text of many words", "broken " * 20)
    for width, left_out in ((80, False), (30, True), (12, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        Output().table(columns, [row], "nothing", whole=("id",), spare=("error",))
        shown = capsys.readouterr().out
        assert "job-0123456789abcdef" in shown
        assert ("no room for: error" in shown) is left_out


def test_how_long_ago():
    said = [ago_text(seconds) for seconds in (-5, 59, 60, 7199, 7200, 172_799, 172_800)]
    assert said == ["0 s ago", "59 s ago", "1 min ago", "119 min ago", "2 h ago", "47 h ago", "2 d ago"]


def test_metrics_of_devices_are_short() -> None:
    metrics = {
        "devices/count": 3.0, "devices/loss": 0.5, "devices/loss/std": 0.1, "devices/loss/worst_tenth": 0.7,
        "accuracy": 0.95, "devices/accuracy": 0.9, "devices/accuracy/std": 0.05, "devices/accuracy/worst_tenth": 0.8,
        "devices/gain": 1.0, "devices/gain/std": 0.0, "train_loss": 0.4,
    }  # fmt: skip
    assert metrics_text(metrics) == (
        "accuracy=0.95 train_loss=0.4 devices/accuracy=0.9±0.05 (worst tenth 0.8) devices/gain=1±0"
    )
    loss = {name: value for name, value in metrics.items() if name.startswith("devices/loss")}
    assert metrics_text(loss) == "devices/loss=0.5±0.1 (worst tenth 0.7)"
