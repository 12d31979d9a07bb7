"""deploy/kubernetes: its commands are ours, as the documentation has them; there is no cluster to run them on."""

from __future__ import annotations

import shlex
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from tests.docs.pages import blocks, written

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
FILE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "tail.yaml"


def containers():
    """Return the containers by name, and the labels of their pods."""
    found = {}
    for one in yaml.safe_load_all(FILE.read_text()):
        if one["kind"] == "StatefulSet":
            template = one["spec"]["template"]
            names = {volume["name"] for volume in template["spec"]["volumes"]}
            names |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= names
                found[container["name"]] = container
    return found


def test_the_commands_of_edgefl_are_understood(tmp_path) -> None:
    [cloud] = [one.load() for one in entry_points(group="edgefl.commands") if one.name == "cloud"]
    for name in ("cloud", "generate"):
        program, group, command, *words = containers()[name]["command"]
        assert (program, group) == ("edgefl", "cloud")
        words = [str(tmp_path) if one == "/models/large/tail" else one for one in words]
        with click.Context(cloud) as parent:
            cloud.commands[command].make_context(command, words, parent=parent)


def test_torchrun_s_options_are_those_of_the_documentation() -> None:
    from torch.distributed.run import get_args_parser

    [block] = [one for one in blocks({"chat.md": written()["chat.md"]}, "sh") if "cloud.generation.ranks" in one.text]
    for line, name in zip(block.text.splitlines()[1:], ("first", "rank"), strict=True):
        setting, program, *words = shlex.split(line)
        container = containers()[name]
        assert program == container["command"][0] == "torchrun"
        assert dict([setting.split("=")]).items() <= {one["name"]: one["value"] for one in container["env"]}.items()
        documented, ours = (vars(get_args_parser().parse_args(one)) for one in (words, container["command"][1:]))
        assert ours.pop("rdzv_endpoint").split(":")[1] == documented.pop("rdzv_endpoint").split(":")[1]
        chosen = [one.pop("training_script_args") for one in (ours, documented)]
        assert ours == documented
        assert [word.partition("=")[0] for word in chosen[0]] == [word for word in chosen[1] if word.startswith("--")]


def test_only_pods_of_the_tail_reach_its_processes() -> None:
    found = [one for one in yaml.safe_load_all(FILE.read_text()) if one["kind"] == "NetworkPolicy"]
    [ranks] = [one["spec"] for one in found if one["metadata"]["name"] == "edgefl-tail"]
    assert ranks["ingress"] == [{"from": [{"podSelector": {"matchLabels": {"edgefl": "tail"}}}]}]
    [service] = [
        one["spec"]["ports"]
        for one in yaml.safe_load_all(FILE.read_text())
        if one["kind"] == "Service" and one["metadata"]["name"] == "edgefl-cloud"
    ]
    [policy] = [one["spec"]["ingress"] for one in found if one["metadata"]["name"] == "edgefl-cloud"]
    open_ports = {one["port"] for rule in policy for one in rule.get("ports", [])}
    assert {one["port"] for one in service} - open_ports == {29400}  # the rendezvous is for the tail alone
