"""What travels between a pool and its workers survives the pipe."""

import pickle

from edgefl.process.workers.messages import Ready, Reply, WorkerLost


def test_what_workers_say_is_the_same_on_the_other_side():
    for said in (Ready(), Ready("why not"), Reply({"a": 1}, 12.5)):
        assert pickle.loads(pickle.dumps(said)) == said  # noqa: S301 - our own
    assert str(WorkerLost("was ended by SIGKILL")) == "was ended by SIGKILL"
