"""Language models as releases: rolled out to a device at the cloud and to one below a region, replaced, rolled back."""

from __future__ import annotations

import json
import os
import signal

import pytest

from edge_agent.generation.supervisor import MAX_DEATHS
from edgefl.errors import ProcessFailed
from tests.e2e.test_generation import START_S, TextFleet, streamed
from tests.language_models import write_stages

openai = pytest.importorskip("openai", reason="the client of OpenAI's API is not installed")


class ReleaseFleet(TextFleet):
    """A cloud with a tail, a device, and another one below a region; they have no model of their own."""

    def __enter__(self):
        super().__enter__()
        self.start()
        self.start_tail()
        self.start_region("north")
        for name, region in (("near", ""), ("far", "north")):
            self.enroll(name, region=region)
            self.start_agent(name).wait_for("mqtt.up")
        write_stages(self.models / "second", None, seed=5)
        return self

    def publish(self, folder, *options) -> str:
        release = json.loads(self.command("offload", "publish-decoder", folder, *options, "--json", "-"))
        return f"{release['model']}:{release['version']}"

    def publish_head(self) -> str:
        return self.publish(self.models / "head", "--tail", f"127.0.0.1:{self.tail_port}", "--format", "fp32")

    def roll_out(self, model, *options) -> None:
        self.command("rollout", "start", model, *options, "--wait", 200, timeout_s=START_S)

    def generated(self, name, num=20) -> str:
        return "".join(one.choices[0].text for one in streamed(self.client(name), num))

    def second_text(self) -> str:
        """What the whole model of the other weights generates."""
        return self.text_of(20, models=self.models / "second")

    def served(self, name) -> dict[str, int]:
        return json.loads(self.command("agent", "status", "--home", self.folder / name, "--json", "-"))["models"]


@pytest.fixture
def releases(tmp_path):
    with ReleaseFleet(tmp_path) as fleet:
        yield fleet


@pytest.mark.timeout(1200)
def test_a_head_is_rolled_out_replaced_and_rolled_back(releases) -> None:
    with pytest.raises(openai.NotFoundError, match="this device generates no texts: roll out a language model"):
        releases.generated("near")
    assert releases.publish_head() == "tiny:1"
    releases.roll_out("tiny")
    for name in ("near", "far"):
        assert releases.generated(name) == releases.text_of(20)
        assert releases.served(name) == {"tiny": 1}

    # a text that is generated ends as it began; the next one is the new model's
    stream = streamed(releases.client("near"), 200)
    pieces = [next(stream).choices[0].text]
    assert releases.publish(releases.models / "second" / "whole") == "tiny:2"
    releases.roll_out("tiny", "--to", "name:near")
    pieces += [one.choices[0].text for one in stream]
    assert "".join(pieces) == releases.text_of(200)
    assert releases.generated("near") == releases.second_text()
    assert releases.generated("far") == releases.text_of(20)

    near = releases.agents["near"]
    os.kill(releases.child_of("near", "generation_main").pid, signal.SIGKILL)
    near.wait_for("generation.up", START_S, after=near.num_lines())
    assert releases.generated("near") == releases.second_text()
    near.kill()
    releases.start_agent("near").wait_for("generation.up", START_S)
    assert releases.generated("near") == releases.second_text()
    releases.roll_out("tiny", "--version", 1, "--rollback", "--to", "name:near")
    assert releases.generated("near") == releases.text_of(20)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_another_model_replaces_it_and_what_does_not_fit_changes_nothing(releases) -> None:
    releases.publish_head()
    releases.roll_out("tiny")
    assert releases.publish(releases.models / "second" / "whole", "--name", "other") == "other:1"
    releases.roll_out("other", "--to", "name:near")
    assert releases.generated("near") == releases.second_text()
    assert releases.served("near") == {"other": 1}
    releases.agents["near"].stop()
    agent = releases.start_agent("near", "--generate-memory-mb", 64)  # too little for the next release
    agent.wait_for("mqtt.up")
    assert releases.publish(releases.models / "whole", "--name", "other") == "other:2"
    with pytest.raises(ProcessFailed, match="rollout start failed"):
        releases.roll_out("other", "--to", "name:near")
    agent.wait_for("needs about", START_S)
    assert releases.served("near") == {"other": 1}

    # what cannot be published is said at once
    for options, words in (
        ((releases.models / "head",), "its tail is needed, --tail HOST:PORT"),
        ((releases.models / "tail",), "a device takes the folder `head`, or `whole`"),
        ((releases.models / "whole", "--tail", "h:1"), "which needs no tail: leave out --tail"),
        ((releases.models / "head", "--tail", "h"), "expected HOST:PORT"),
        ((releases.models / "whole", "--name", "No Name"), "cannot be a model's name"),
        ((releases.models,), "is not a stage of a language model"),
    ):
        with pytest.raises(ProcessFailed, match=words):
            releases.publish(*options)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_release_whose_process_ends_again_and_again_gives_way_to_the_one_before(releases) -> None:
    releases.publish_head()
    releases.roll_out("tiny")
    releases.publish(releases.models / "second" / "whole")
    releases.roll_out("tiny", "--to", "name:near")
    assert releases.generated("near") == releases.second_text()
    near, seen = releases.agents["near"], 0
    for _ in range(MAX_DEATHS):
        os.kill(releases.child_of("near", "generation_main").pid, signal.SIGKILL)
        seen = near.wait_for("generation.up", START_S, after=max(seen, near.num_lines()))
    near.wait_for("release.failing", START_S)
    assert releases.generated("near") == releases.text_of(20)
    assert releases.served("near") == {"tiny": 1}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_an_agent_with_a_model_of_its_own_serves_no_release(releases) -> None:
    releases.publish(releases.models / "second" / "whole")
    releases.agents["near"].stop()
    agent = releases.start_agent("near", "--generate", releases.models / "whole")
    agent.wait_for("generation.up", START_S)
    with pytest.raises(ProcessFailed, match="rollout start failed"):
        releases.roll_out("tiny", "--to", "name:near")
    agent.wait_for("this agent was started with --generate", START_S)
    assert releases.generated("near") == releases.text_of(20)
