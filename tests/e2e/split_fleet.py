"""A fleet with a split training's server beside its cloud."""

import contextlib
import time

import psutil

from edgefl.local_fleet import free_ports

WAIT_S = 300.0
SPLIT = {"train.mode": "split", "train.split.cut": "first", "train.batch_size": 16, "train.epochs": 2, "train.lr": 0.05}


class SplitServerProcess:
    """`edgefl cloud train-stage` of a fleet, on a port that stays."""

    def __init__(self, fleet):
        self.fleet, self.process = fleet, None
        [self.port] = free_ports(1)

    def start(self, *options):
        self.process = self.fleet.spawn(
            "split.log", "cloud", "train-stage", "--home", self.fleet.home, "--port", self.port, "--threads", 1,
            *options,
        )  # fmt: skip
        self.process.wait_for("split.ready")

    @property
    def folder(self):
        """Where the jobs in parts have their files."""
        return self.fleet.home / "split"

    def wait_for_checkpoint(self, round_number):
        """Wait until some device has kept a state in this round, or a later one."""

        def is_kept():
            found = self.folder.glob("*/kept/*/*")
            return any(int(one.parent.name) >= round_number and one.suffix[1:].isdecimal() for one in found)

        _wait(is_kept, lambda: f"no checkpoint in round {round_number}")

    def wait_until_empty(self):
        """Wait until the files of the jobs that are over are deleted."""
        _wait(
            lambda: not self.folder.exists() or not any(self.folder.iterdir()),
            lambda: f"{self.folder} still has {[one.name for one in self.folder.iterdir()]}",
        )

    def trainers(self):
        """Return the training processes."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in found if "cloud.split.trainer_main" in " ".join(one.cmdline())]

    def settings(self, **more):
        chosen = SPLIT | {"train.split.server": f"127.0.0.1:{self.port}"} | {f"train.{k}": v for k, v in more.items()}
        return [f"{name}={value}" for name, value in chosen.items()]


@contextlib.contextmanager
def split_server(fleet, *options):
    server = SplitServerProcess(fleet)
    server.start(*options)
    try:
        yield server
    finally:
        server.process.stop()


def _wait(condition, fault):
    end_s = time.monotonic() + WAIT_S
    while not condition():  # files of another process: there is no event
        assert time.monotonic() < end_s, fault()
        time.sleep(0.05)
