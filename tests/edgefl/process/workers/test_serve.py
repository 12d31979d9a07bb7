"""A worker's life, in this process: its pipe is all that it sees of the pool."""

import signal
import threading
from dataclasses import dataclass
from multiprocessing import Pipe

import pytest

from edgefl.errors import TaskError
from edgefl.process.workers import serve
from edgefl.process.workers.messages import Ready


@dataclass
class Start:
    fault: str = ""

    def begin(self):
        if self.fault:
            raise TaskError(self.fault)
        return lambda message: None if message == "quiet" else message * 2


@pytest.fixture
def served(monkeypatch):
    """Serve a start in a thread; give the pool's end of the pipe, and wait for the end."""
    ignored, threads = [], []
    monkeypatch.setattr(serve.signal, "signal", lambda *what: ignored.append(what))  # only a main thread may

    def begin(start):
        ours, theirs = Pipe()
        ours.send(start)
        threads.append((threading.Thread(target=serve.main, args=(theirs.fileno(),)), theirs))
        threads[-1][0].start()
        return ours

    yield begin
    for thread, theirs in threads:
        thread.join(30.0)
        assert not thread.is_alive()
        theirs._handle = None  # closed by the thread's own
    assert ignored == [(signal.SIGINT, signal.SIG_IGN)] * len(threads)


def test_it_answers_until_its_pipe_ends(served):
    with served(Start()) as pipe:
        assert pipe.recv() == Ready()
        for message in ("quiet", 3, "ab"):
            pipe.send(message)
        assert [pipe.recv().answer for _ in range(2)] == [6, "abab"]


def test_a_fault_at_the_start_is_its_only_word(served):
    with served(Start("nothing to train")) as pipe:
        assert pipe.recv() == Ready("nothing to train")
        with pytest.raises(EOFError):
            pipe.recv()
