"""A tail on two machines, by torchrun and its rendezvous, as docs/chat.md has it: tokens are the whole model's."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys

import psutil
import pytest

from edgefl.local_fleet import free_ports
from tests.docs.pages import blocks
from tests.docs.pages import written as written_pages
from tests.e2e.test_generation import START_S, TextFleet, streamed

PAGE = "chat.md"


class TwoMachines(TextFleet):
    """A cloud, and a tail of which each of two machines has some blocks."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.socket, self.rendezvous = self.models / "tail.sock", free_ports(1)[0]
        self.machines = {}
        [block] = [one for one in blocks({PAGE: written_pages()[PAGE]}, "sh") if "cloud.generation.ranks" in one.text]
        *_, self.first, self.second = [shlex.split(line) for line in block.text.replace("\\\n", "").splitlines()]

    def start_tail(self, *options) -> None:
        if self.tail is not None:
            self.tail.kill()
        self.tail = self.spawn(
            "tail.log", "cloud", "generate", self.models / "tail", "--home", self.home, "--port", self.tail_port,
            "--join", self.socket,
        )  # fmt: skip
        self.tail.wait_for("tail.waits", START_S)

    def start_machine(self, name) -> None:
        """Start one of the two documented commands."""
        changed = {
            "cloud.example.org:29400": f"127.0.0.1:{self.rendezvous}", "large/tail": self.models / "tail",
            "/run/edgefl/tail.sock": self.socket, "torchrun": f"{sys.executable} -m torch.distributed.run",
        }  # fmt: skip
        words = [str(changed.get(one, one)) for one in (self.first if name == "first" else self.second)]
        assert words[0] == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", words[0].partition("=")[0]: "1"}
        command = f"while true; do {' '.join(words[1:])}; sleep 0.2; done"  # as systemd and Kubernetes do
        with (self.folder / f"{name}.log").open("a") as log:
            self.machines[name] = subprocess.Popen(
                ["sh", "-c", command], stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def kill(self, name) -> None:
        """Kill all processes of a machine; it starts again."""
        for one in psutil.Process(self.machines[name].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def __exit__(self, *details) -> None:
        for name, process in self.machines.items():
            process.send_signal(signal.SIGSTOP)  # it starts nothing again
            self.kill(name)
            process.kill()
            process.wait()
        super().__exit__(*details)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_text_goes_on_when_a_machine_is_killed_and_when_the_server_is(tmp_path) -> None:
    with TwoMachines(tmp_path) as fleet:
        fleet.start()
        fleet.start_tail()
        for name in ("first", "second"):
            fleet.start_machine(name)
        fleet.tail.wait_for("tail.ready", START_S)
        client = fleet.start_device("cam", "--generate-format", "fp32")
        assert "".join(one.choices[0].text for one in streamed(client, 40)) == fleet.text_of(40)
        for name in ("second", "first"):
            stream = streamed(client, 60)
            pieces = [next(stream).choices[0].text for _ in range(5)]
            fleet.kill(name)
            pieces += [one.choices[0].text for one in stream]
            assert "".join(pieces) == fleet.text_of(60), name
        stream = streamed(client, 60)
        pieces = [next(stream).choices[0].text for _ in range(5)]
        fleet.start_tail()
        pieces += [one.choices[0].text for one in stream]
        assert "".join(pieces) == fleet.text_of(60)
