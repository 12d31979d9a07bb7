"""An update that is complete arrives, whatever becomes of its evaluation: real processes, really killed."""

from __future__ import annotations

import dataclasses
import signal

import pytest

from edgefl.protocols.messages import Evaluate

TASK = """
    import os
    import time
    import numpy as np
    from edgefl import EvalResult, FitResult, Task

    def fit(parameters, config, options):
        with open(options["log"], "a") as log:
            log.write(f"{parameters['w'][0]:g} ")
        return FitResult(tree={"w": np.ones_like(parameters["w"])}, weight=1.0)

    def evaluate_locally(parameters, options):
        open(options["log"] + ".evaluates", "w").close()
        if options["what"] == "hang":
            time.sleep(600)
        elif options["what"] != "fine" and parameters["w"][0] == 1:
            os.kill(os.getpid(), int(options["what"]))
        return EvalResult(metrics={"gain": 2.0}, weight=1.0)

    task = Task(name="t", initial=dict, fit=fit, evaluate_locally=evaluate_locally)
"""


def evaluating(fleet, number=1, **options):
    """A plan whose devices also evaluate."""
    plan = dataclasses.replace(fleet.plan(number, code=TASK, offer=False, **options), evaluate=True)
    fleet.plans.append(plan)
    return plan


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_update_whose_trainer_dies_in_its_evaluation_is_kept_and_says_so(fleet, on_device, number):
    async def run(device):
        for round_number in (1, 2):
            device.participant.handle(evaluating(fleet, round_number))
            await device.until(lambda key=("j1", round_number): key in fleet.updates)
        assert device.fits() == "1 2"  # not again

    on_device(run, what=str(int(number)))
    (lost, _), (next_one, _) = fleet.updates["j1", 1], fleet.updates["j1", 2]
    assert lost.evaluation.fault.startswith(f"the trainer was killed by {number.name}")
    assert lost.evaluation.fault.endswith("while it evaluated")
    assert fleet.tree("j1", 1)["w"].tolist() == [1.0] * 4
    assert dict(next_one.evaluation.metrics) == {"gain": 2.0}
    assert fleet.failures == {}


def test_an_evaluation_that_lasts_too_long_costs_no_update(fleet, on_device):
    async def run(device):
        device.participant.handle(evaluating(fleet, deadline_s=4))
        await device.until(lambda: ("j1", 1) in fleet.updates)
        pid = device.trainer.pid
        device.participant.handle(fleet.plan(2, code=TASK))
        await device.until(lambda: ("j1", 2) in fleet.updates)
        assert device.trainer.pid == pid  # it was only asked to stop

    on_device(run, what="hang")
    fault = fleet.updates["j1", 1][0].evaluation.fault
    assert fault == "the evaluation was stopped shortly before the round's deadline"
    assert fleet.failures == {}


def test_a_round_that_closes_while_its_update_is_evaluated_frees_the_trainer(fleet, home, on_device):
    async def run(device):
        plan = evaluating(fleet)
        device.participant.handle(plan)
        await device.until((home / "fits.evaluates").exists)
        pid = device.trainer.pid
        device.participant.reconcile([], plan, 0)
        await device.until(lambda: device.participant.current is None)
        device.participant.handle(fleet.plan(2, code=TASK))
        await device.until(lambda: ("j1", 2) in fleet.updates)
        assert device.trainer.pid == pid

    on_device(run, what="hang")
    assert ("j1", 1) not in fleet.updates


def test_a_trainer_that_dies_whenever_it_evaluates_alone_is_given_up(fleet, on_device):
    async def run(device):
        fit = fleet.plan(1, code=TASK, offer=False)
        names = {one.name for one in dataclasses.fields(Evaluate)} & {one.name for one in dataclasses.fields(fit)}
        asked = Evaluate(**{name: getattr(fit, name) for name in names - {"kind"}}, seed=0)
        fleet.plans.append(asked)
        device.participant.handle(asked)
        await device.until(lambda: ("j1", 1) in fleet.failures)

    on_device(run, what=str(int(signal.SIGKILL)))
    assert fleet.failures["j1", 1].endswith("while it evaluated")
