"""A real worker process: started, asked, killed, ended."""

import os
import pickle
import signal
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready, WorkerLost
from edgefl.process.workers.process import WorkerProcess, wait_for_processes

# A module of its own, as the worker has to import it.
MODULE = """
import os
from edgefl.errors import ConfigError

class Start:
    def __init__(self, fault=""):
        self.fault = fault
    def begin(self):
        if self.fault:
            raise ConfigError(self.fault)
        return answer

def answer(message):
    if message == "quiet":
        return None
    if message == "leave":
        os._exit(3)
    return {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "said": message}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "scripted_start.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import scripted_start

    yield lambda **options: pickle.dumps(scripted_start.Start(**options))
    __import__("sys").modules.pop("scripted_start")


def alive(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.fixture
def worker(start):
    process = WorkerProcess(start())
    yield process
    process.end()


def test_it_says_that_it_is_ready_and_answers_in_order(worker):
    assert wait_for_processes([worker], 60.0) == [worker]
    assert worker.receive() == Ready()
    for message in ("quiet", "a", "b"):
        worker.ask(message)
    first, second = worker.receive(), worker.receive()
    assert (first.answer["said"], second.answer["said"]) == ("a", "b")
    assert (first.answer["pid"], first.answer["threads"]) == (worker.pid, "1")
    assert first.peak_rss_mb > 1
    assert wait_for_processes([worker], 0.0) == []
    worker.end(kindly=True)
    assert worker.how_ended() == "ended with status 0"


@pytest.mark.parametrize(("message", "how"), [("leave", "ended with status 3"), (None, "was ended by SIGKILL")])
def test_one_that_is_gone_says_how(worker, message, how):
    worker.receive()
    if message is None:
        os.kill(worker.pid, signal.SIGKILL)
    worker.ask(message or "a")
    assert wait_for_processes([worker], 60.0) == [worker]
    with pytest.raises(WorkerLost, match=how):
        worker.receive()
    worker.ask("into the void")
    worker.end()
    assert not alive(worker.pid)


def test_one_that_cannot_start_says_why(start):
    worker = WorkerProcess(start(fault="no such thing"))
    with pytest.raises(ConfigError, match="a worker process cannot start: no such thing"):
        worker.receive()
    worker.end()


def test_what_it_inherits_is_there(start, tmp_path):
    file = tmp_path / "inherited"
    file.touch()
    with file.open() as one, closing(WorkerProcessHere(start(), one.fileno())) as worker:
        assert worker.process.receive() == Ready()
        assert Path(f"/proc/{worker.process.pid}/fd/{one.fileno()}").resolve() == file


@dataclass
class WorkerProcessHere:
    start: bytes
    descriptor: int

    def __post_init__(self):
        self.process = WorkerProcess(self.start, descriptors=(self.descriptor,))

    def close(self):
        self.process.end()
