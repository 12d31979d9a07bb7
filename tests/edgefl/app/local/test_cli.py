"""`edgefl local`: what the commands say and how they end; test_holder.py has the fleet itself."""

import json

from click.testing import CliRunner

from edgefl.app.cli import cli


def edgefl(monkeypatch, folder, *words):
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return CliRunner().invoke(cli, list(words))


def test_without_a_fleet_status_says_how_to_start_one(monkeypatch, tmp_path):
    said = edgefl(monkeypatch, tmp_path, "local", "status")
    assert said.exit_code == 3
    assert said.output == "no local fleet is running; `edgefl local start` starts one\n"


def test_stopping_nothing_is_no_error(monkeypatch, tmp_path):
    said = edgefl(monkeypatch, tmp_path, "local", "stop", "--json", str(tmp_path / "a.json"))
    assert (said.exit_code, said.output) == (0, "no local fleet is running\n")
    assert json.loads((tmp_path / "a.json").read_text()) == {"stopped": False}


def test_run_local_excludes_another_cloud(monkeypatch, tmp_path):
    said = edgefl(monkeypatch, tmp_path, "run", "task", "--local", "1", "--cloud", "https://cloud:9480")
    assert "--local is a fleet of its own on this machine" in str(said.exception)
