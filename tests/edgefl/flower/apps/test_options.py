"""What Flower's users write is taken as in Flower, or refused with what to write instead."""

import pytest

from edgefl.errors import ConfigError
from edgefl.flower.apps.options import Federation, federation_at_home, read_federation, read_run_config


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))

    def write(text):
        (tmp_path / "config.toml").write_text(text)

    return write


def test_a_run_config_is_words_of_toml_values_or_one_file(tmp_path):
    said = read_run_config(["a=1 b=0.5  c=true", "name='x y' a=2 text=\"q\" bare=word n.rate=1e-3"])
    assert said == {"a": 2, "b": 0.5, "c": True, "name": "x y", "text": "q", "bare": "word", "n.rate": 1e-3}
    assert read_run_config([]) == read_run_config([""]) == {}
    file = tmp_path / "over.toml"
    file.write_text("rounds = 3\n[nested]\nrate = 0.25\n")
    assert read_run_config([str(file)]) == {"rounds": 3, "nested.rate": 0.25}


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (
            ["a = 1"],
            "'a = 1' is not of the form key=value; expected --run-config \"key=value key=value\", without spaces",
        ),
        (["a=1 b"], "'b' is not of the form"),
        (["over.toml", "a=1"], "give either one TOML file or key=value pairs"),
        (["no-such.toml"], "--run-config: cannot read no-such.toml"),
    ],
)
def test_what_is_no_run_config_is_refused(texts, reason):
    with pytest.raises(ConfigError, match=reason):
        read_run_config(texts)


def test_a_federation_is_nodes_and_the_cores_of_a_client():
    said = read_federation(["num-supernodes=4 client-resources-num-cpus=2"])
    assert said == Federation(num_supernodes=4, client_cpus=2)
    assert read_federation(["options.num-supernodes=4 options.backend.client-resources.num-cpus=2.0"]) == said
    assert read_federation(["num_supernodes=4"]) == Federation(num_supernodes=4)
    assert read_federation(["client-resources-num-gpus=0.0"]) == Federation()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("num-supernodes=0", "num-supernodes=0; expected a whole number of 1 or more"),
        ("num-supernodes=many", "num-supernodes='many'; expected a whole number"),
        ("num-nodes=3", "there is no 'num-nodes'; known: num-supernodes, client-resources-num-cpus"),
        ("client-resources-num-gpus=0.5", "does not divide a GPU.*Drop the setting; --engine loop"),
        ("backend=ray", "for Ray, which does not run Flower apps here"),
    ],
)
def test_what_a_federation_cannot_have_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        read_federation([text])


def test_what_stands_at_home_is_taken_and_what_it_has_for_ray_is_left(home):
    assert federation_at_home() == Federation()
    home(
        '[superlink]\ndefault = "mine"\n[superlink.other]\noptions.num-supernodes = 9\n[superlink.mine]\n'
        "options.num-supernodes = 7\noptions.backend.client-resources.num-cpus = 1\n"
        "options.backend.client-resources.num-gpus = 0.25\noptions.backend.init-args.num-cpus = 3\n"
    )
    found = federation_at_home()
    assert (found.num_supernodes, found.client_cpus) == (7, 1)
    assert found.ignored == ("client-resources-num-gpus", "init-args-num-cpus")
    home('[superlink]\ndefault = "far"\n[superlink.far]\naddress = "example.org"\n')
    assert federation_at_home() == Federation()
    home("superlink = ")
    with pytest.raises(ConfigError, match=r"config\.toml is not TOML"):
        federation_at_home()


@pytest.mark.parametrize(("cpus", "workers"), [(None, None), (1, None), (2, 4), (3, 2), (5, 0), (100, 0)])
def test_clients_with_more_cores_of_their_own_are_fewer_at_once(cpus, workers):
    assert Federation(client_cpus=cpus).workers(cores=8) == workers
