"""The words of an app, and of Flower on anything but rounds, are shown; the logger stays as it was."""

import logging
from logging import DEBUG, INFO

from flwr.app import ArrayRecord
from flwr.common import log
from flwr.common.logger import ConsoleHandler, update_console_handler
from flwr.serverapp.strategy import FedAvg, strategy_utils

from edgefl.flower.apps.app_log import app_log


class NoGrid:
    calls = 0

    def get_node_ids(self):
        self.calls += 1
        return [1, 2] if self.calls > 1 else [1]


def test_an_apps_words_are_shown_and_reports_of_rounds_are_not(capsys, monkeypatch):
    monkeypatch.setattr(strategy_utils, "sleep", lambda _s: None)
    with app_log():
        log(INFO, "Final accuracy: %.2f", 0.5)
        log(DEBUG, "quiet")
        FedAvg().summary()
        strategy_utils.sample_nodes(NoGrid(), min_available_nodes=2, sample_size=1)
        FedAvg(fraction_evaluate=0.0, min_evaluate_nodes=0)
    said = capsys.readouterr().err
    assert "Final accuracy: 0.50" in said
    assert "Waiting for nodes to connect: 1 connected (minimum required: 2)" in said
    assert "fraction_evaluate is set to 0.0" in said  # a warning
    assert "Sampling" not in said
    assert "\x1b" not in said  # no colours where there is no terminal
    assert "quiet" not in said


def test_a_subclass_of_the_apps_says_what_it_says(capsys):
    class Mine(FedAvg):
        def summary(self):
            log(INFO, "mine: %s", ArrayRecord)

    with app_log():
        Mine().summary()
    assert "mine:" in capsys.readouterr().err


def test_a_level_that_the_app_chose_holds_and_ends_with_the_run(capsys):
    logger = logging.getLogger("flwr")
    consoles = [one for one in logger.handlers if isinstance(one, ConsoleHandler)]
    before = list(logger.filters), [(one.level, one.stream, one.colored) for one in consoles]
    with app_log():
        update_console_handler(DEBUG, False, False)
        log(DEBUG, "stage 0")
    log(DEBUG, "afterwards")
    said = capsys.readouterr().err
    assert "stage 0" in said
    assert "afterwards" not in said
    update_console_handler(timestamps=False)
    assert (list(logger.filters), [(one.level, one.stream, one.colored) for one in consoles]) == before
