import numpy as np
import torch

from benchmarks.simulation_rivals.common import Finished, Work
from benchmarks.simulation_rivals.plain import Trainer
from benchmarks.simulation_workloads import WORKLOADS
from edgefl import simulate

LR = WORKLOADS["digits-lr"]


def test_cohorts_are_those_of_edgefl() -> None:
    seen = []
    work = Work(LR, rounds=2)

    def population(_task):
        class Everybody:
            def names(self):
                return work.names

            def samples(self, client):
                seen.append(work.names.index(client))
                from edgefl.training.samples import Samples

                return Samples(*work.samples(work.names.index(client)))

        return Everybody()

    simulate(LR.task, engine="loop", config=LR.config(2), population=population)
    assert seen == [client for cohort in work.cohorts for client in cohort]


def test_the_plain_loop_gives_what_edgefl_gives() -> None:
    """So partition, cohorts, initial weights and order are the same for both."""
    work, threads = Work(LR, rounds=2), torch.get_num_threads()
    trainer, state = Trainer(work), work.initial()
    for number, cohort in enumerate(work.cohorts, start=1):
        total = trainer.total(number, state, cohort)
        state = {name: tensor / len(cohort) for name, tensor in total.items()}
    torch.set_num_threads(threads)
    result = simulate(LR.reference, engine="loop", clients=LR.clients, config=LR.config(2))
    for name, array in result.parameters.items():
        np.testing.assert_allclose(state[name].numpy(), array, atol=1e-6)
    assert work.accuracy(state) == result.final["accuracy"]


def test_of_several_processes_one_speaks(capsys, monkeypatch) -> None:
    finished = Finished([1.0, 2.0], 0.5, {"torch": "2"})
    monkeypatch.setenv("RANK", "1")
    finished.tell()
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    finished.tell()
    assert capsys.readouterr().out == '{"round_s": [1.0, 2.0], "accuracy": 0.5, "detail": {"torch": "2"}}\n'
