"""Texts on a real device: agent, cloud and tail as processes over TLS, the unmodified openai client, and kill -9."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgefl.local_fleet import LocalFleet, free_ports
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import read_stage
from tests.language_models import write_stages

openai = pytest.importorskip("openai", reason="the client of OpenAI's API is not installed")
PROMPT = list(b"hello world")
START_S = 400.0
CHAT = Path(__file__).parents[2] / "examples" / "chat" / "chat.py"


class TextFleet(LocalFleet):
    """A cloud with a tail, and a device with its head."""

    def __init__(self, folder, broker="builtin") -> None:
        super().__init__(folder / "fleet", broker=broker)
        self.models, self.tail_port, self.tail = folder / "model", free_ports(1)[0], None
        write_stages(self.models, 2)
        write_stages(self.models, None)

    def start_tail(self, *options) -> None:
        if self.tail is not None:
            self.tail.kill()
        self.tail = self.spawn(
            "tail.log", "cloud", "generate", self.models / "tail", "--home", self.home, "--port", self.tail_port,
            "--engine", "numpy", *options,
        )  # fmt: skip
        self.tail.wait_for("tail.ready", START_S)

    def __exit__(self, *details) -> None:
        if self.tail is not None:
            self.tail.stop()
        super().__exit__(*details)

    def start_device(self, name, *options, region=""):
        """Start a device with the head; return a client of its API."""
        self.enroll(name, region=region)
        agent = self.start_agent(
            name, "--generate", self.models / "head", "--generate-tail", f"127.0.0.1:{self.tail_port}", *options
        )
        agent.wait_for("generation.up", START_S)
        return self.client(name)

    def client(self, name, key="-"):
        url = (self.folder / name / "serving").read_text()
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=START_S)

    def child_of(self, name, module):
        """Return the process of an agent, or of the tail's server, that runs a module."""
        import psutil

        parent = self.tail if name == "tail" else self.agents[name]
        return next(one for one in psutil.Process(parent.pid).children() if module in " ".join(one.cmdline()))

    def text_of(self, num, sampling=None, models=None):
        """Return what the whole model generates after PROMPT."""
        from edge_agent.generation.text import TextCodec

        folder = (models or self.models) / "whole"
        stream = TextCodec(folder, read_stage(folder)).decoding()
        tokens = generate([load_part(folder, numpy_engine())], PROMPT, num, sampling or Sampling())
        return "".join([stream.add(one) for one in tokens]) + stream.rest()


@pytest.fixture
def texts(tmp_path):
    with TextFleet(tmp_path) as fleet:
        fleet.start()
        fleet.start_tail()
        yield fleet


def streamed(client, num, **more):
    given = {"model": "tiny", "prompt": PROMPT, "max_tokens": num, "temperature": 0, "stream": True} | more
    return client.completions.create(**given)


@pytest.mark.soak
def test_the_openai_client_and_whatever_is_killed(texts) -> None:
    client = texts.start_device("cam", "--generate-format", "fp32")
    assert [one.id for one in client.models.list().data] == ["tiny"]
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0)
    assert whole.choices[0].text == texts.text_of(40)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 40)
    drawn = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    expected = texts.text_of(40, Sampling(temperature=0.9, top_p=0.9, seed=7))
    assert "".join(one.choices[0].text for one in streamed(client, 40, **drawn)) == expected
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert list(chat)[-1].usage.completion_tokens == 5
    url = (texts.folder / "cam" / "serving").read_text()
    command = [sys.executable, CHAT, "hi", "--url", f"{url}/v1", "--max-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=START_S)
    assert done.stdout.endswith("\n[tiny: 20 + 5 tokens]\n")
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist; this device has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        client.completions.create(model="tiny", prompt=[1] * 300)

    # the tail's process, ten times in one text
    for sampling, parameters in ((None, {}), (Sampling(temperature=0.9, top_p=0.9, seed=7), drawn)):
        pieces, kills = [], 0
        for chunk in streamed(client, 200, **parameters):
            pieces.append(chunk.choices[0].text)
            if len(pieces) % 6 == 0 and kills < 10:
                with contextlib.suppress(StopIteration):  # it has not started again yet
                    os.kill(texts.child_of("tail", "tail_main").pid, signal.SIGKILL)
                    kills += 1
        assert "".join(pieces) == texts.text_of(200, sampling)
        assert kills == 10

    # its server: a text goes on when it is started again
    stream = streamed(client, 100)
    pieces = [next(stream).choices[0].text for _ in range(5)]
    texts.tail.kill()
    again = threading.Thread(target=texts.start_tail)
    again.start()
    pieces += [one.choices[0].text for one in stream]
    again.join()
    assert "".join(pieces) == texts.text_of(100)

    # the cloud: nothing of a text needs it
    texts.cloud.kill()
    assert "".join(one.choices[0].text for one in streamed(client, 20)) == texts.text_of(20)
    texts.start_cloud()

    # the device's process: an error, and the next text is whole again
    stream = streamed(client, 200)
    next(stream)
    os.kill(texts.child_of("cam", "generation_main").pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the generation process of this device ended"):
        list(stream)
    texts.agents["cam"].wait_for("generation.up", START_S, after=texts.agents["cam"].num_lines())
    assert "".join(one.choices[0].text for one in streamed(client, 20)) == texts.text_of(20)


def test_a_tail_of_another_split_and_a_full_one(tmp_path) -> None:
    with TextFleet(tmp_path) as fleet:
        fleet.start()
        fleet.start_tail("--cache-mb", "1", "--lease-s", "30")
        client = fleet.start_device("cam")
        streams = [iter(streamed(client, 245)) for _ in range(4)]
        assert [bool(next(one).model) for one in streams] == [True] * 4
        for one in streams:
            one_text = list(one)
            assert one_text[-1].choices[0].finish_reason == "length"
        write_stages(fleet.models, 2, seed=9)  # another split, of other weights
        fleet.start_tail()
        with pytest.raises(openai.InternalServerError, match="the tail does not fit this head") as refused:
            client.completions.create(model="tiny", prompt=PROMPT)
        assert refused.value.body["code"] == "tail_of_another_split"


def test_access_is_the_serving_port_s(texts, tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    texts.start_device("cam", "--serve-token-file", token)
    with pytest.raises(openai.AuthenticationError, match="send the token of this device"):
        texts.client("cam").models.list()
    assert texts.client("cam", token.read_text()).models.list().data[0].id == "tiny"


@pytest.mark.soak
def test_a_device_below_a_region_generates_with_the_cloud_s_tail(texts) -> None:
    texts.start_region("north")
    client = texts.start_device("cam", region="north")
    assert "".join(one.choices[0].text for one in streamed(client, 20)) == texts.text_of(20)
