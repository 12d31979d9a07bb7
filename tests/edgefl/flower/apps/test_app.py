"""An app's folder is read as Flower reads it; what is wrong in it is said with file and line."""

import subprocess
import sys

import pytest

from edgefl import flower
from edgefl.errors import ConfigError, TaskError
from edgefl.flower import is_flower_app, load_flower_app, parse_run_config
from edgefl.flower.apps.app import fuse_run_config, own_supernodes


def test_the_door_shows_what_it_says():
    assert all(callable(getattr(flower, name)) for name in flower.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flower.nothing


def test_the_folder_is_recognised_and_its_config_is_flat(make_app, tmp_path):
    folder = make_app()
    app = load_flower_app(folder)
    assert (app.name, app.folder, app.num_supernodes) == ("adder", folder, 2)
    assert app.config == {"rounds": 2, "nested.rate": 0.5}
    assert is_flower_app(folder)
    assert not is_flower_app(tmp_path)


def test_nothing_is_imported_to_recognise_a_folder(make_app):
    code = (
        "import sys; from edgefl.flower import is_flower_app; print(is_flower_app(sys.argv[1]), 'flwr' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, make_app()], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.split() == ["True", "False"]


def test_flower_is_told_to_phone_nobody_before_it_is_imported():
    code = (
        "import edgefl.flower.run, edgefl.flower.tasks, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout.split() == ["0"]


def test_the_default_federation_gives_the_number_of_nodes(make_app):
    text = (make_app(name="before") / "pyproject.toml").read_text().replace("before", "{name}")
    text += '[tool.flwr.federations]\ndefault = "local"\n[tool.flwr.federations.local]\noptions.num-supernodes = 4\n'
    assert own_supernodes(make_app(name="silent")) is None
    folder = make_app(pyproject=text)
    assert (own_supernodes(folder), load_flower_app(folder).num_supernodes) == (4, 4)


def test_each_load_starts_afresh_and_two_apps_keep_apart(make_app):
    first, second = make_app(name="one"), make_app(name="two")
    loaded = load_flower_app(first)
    assert load_flower_app(second).server_app is not loaded.server_app
    assert load_flower_app(first).server_app is not loaded.server_app


def test_an_import_error_names_file_and_line(make_app):
    folder = make_app(client="import numpy\nimport no_such_module\n")
    with pytest.raises(TaskError, match=r"Flower app 'adder'.*no_such_module.*client_app\.py:2\)"):
        load_flower_app(folder)


def test_a_syntax_error_names_file_and_line(make_app):
    folder = make_app(server="x = 1\ndef main(:\n")
    with pytest.raises(TaskError, match=r"SyntaxError.*server_app\.py:2\)"):
        load_flower_app(folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{name}.server_app:app", "{name}.server_app", "serverapp is 'adder.server_app'; expected"),
        ('serverapp = "{name}.server_app:app"', "", "serverapp is missing"),
        ("{name}.server_app:app", "other.server_app:app", "has no module 'other'"),
        ("{name}.server_app:app", "{name}.server_app:main", "is of type function, not a ServerApp"),
        ("{name}.server_app:app", "{name}.server_app:nothing", "has no attribute 'nothing'"),
        ("{name}.client_app:app", "{name}.server_app:app", "is of type ServerApp, not a ClientApp"),
        ("rounds = 2", "rounds = [2]", r"rounds=\[2\] must be a number"),
        ("tool.flwr", "tool.other", "so it is not a Flower app"),
        ("[project]", "[project", "is not a valid pyproject.toml"),
    ],
)
def test_a_wrong_pyproject_says_what_is_wanted(make_app, old, new, said):
    text = (make_app(name="before") / "pyproject.toml").read_text().replace("before", "{name}")
    with pytest.raises(ConfigError, match=said):
        load_flower_app(make_app(pyproject=text.replace(old, new)))


def test_an_unknown_run_config_key_names_the_known_ones(make_app):
    app = load_flower_app(make_app())
    with pytest.raises(ConfigError, match=r"no run-config key 'round'; known: nested\.rate, rounds"):
        fuse_run_config(app, {"round": 3})
    assert fuse_run_config(app, {"rounds": 3}) == {"rounds": 3, "nested.rate": 0.5}


def test_settings_are_toml_values_or_bare_words():
    assert parse_run_config(["a-b=1", "c.d=0.5", "e=true", "f=word", 'g="1"']) == {
        "a-b": 1,
        "c.d": 0.5,
        "e": True,
        "f": "word",
        "g": "1",
    }
    with pytest.raises(ConfigError, match="key=value"):
        parse_run_config(["rounds"])
    with pytest.raises(ConfigError, match="must be a number"):
        parse_run_config(["rounds=[1]"])
