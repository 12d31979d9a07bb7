"""The end of a log on a screen."""

from edgefl.app.commands.log_text import print_log
from edgefl.terminal.output import Output


def test_lines_stay_as_they_are_and_what_is_left_out_is_said(capsys):
    print_log({"lines": ["one", "    trace \x1b"], "cut": True}, Output())
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("(earlier entries are left out")
    assert lines == ["one", "    trace \\x1b"]


def test_an_empty_log_says_so(capsys):
    print_log({"lines": [], "cut": False}, Output())
    assert capsys.readouterr().out == "the log has no entry\n"
