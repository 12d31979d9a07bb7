import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError
from edgefl.flower.internals import give_id, task_identity
from edgefl.flower.nodes import Delivery, Nodes
from edgefl.flower.runners import Runners
from edgefl.testing import ManualClock
from edgefl.training.own_randomness import OwnRandomness


class App:
    """The parts of an app that a runner uses."""

    name = "app"
    clients_randomness = OwnRandomness()

    def __init__(self):
        self.client_app = ClientApp()

        @self.client_app.train()
        def train(message, _context):
            return Message(RecordDict(), reply_to=message)


def test_zero_workers_means_this_process():
    nodes = Nodes(1, 3, {})
    with task_identity(1), Runners(App(), 0, ManualClock()) as runners:
        deliveries = []
        for node in nodes.ids():
            message = Message(RecordDict(), node, "train")
            give_id(message, str(node))
            deliveries.append(Delivery(message, nodes.context(node)))
        answers = list(runners.run(deliveries, 60.0))
        assert [answer.node_id for answer in answers] == [1000, 1001, 1002]
        assert (runners.num_workers, runners.workers_peak_rss_mb) == (0, 0.0)


def test_fewer_than_none_is_refused():
    with pytest.raises(ConfigError, match="workers=-1 must be 0"):
        Runners(App(), -1, ManualClock())
