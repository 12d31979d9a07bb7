"""The devices of one region in one round of its parent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cloud.dataplane.grpc_fleet import FleetDependencies, GrpcFleet
from cloud.dataplane.open_round import OpenRound
from cloud.state.jobs import JobRow
from edgefl.aggregation.regional import regional_round
from edgefl.config import JobConfig, TrainConfig
from edgefl.errors import JobCancelled
from edgefl.exchange import Terms
from edgefl.protocols.messages import BlobRef, Evaluate, Fit
from edgefl.protocols.tiers import Work
from edgefl.records import Plan
from edgefl.trees import Tree

CLOSED = "the parent has closed the round"


class RegionFleet(GrpcFleet):
    """The devices of one region in one round, asked as the parent says, or from the region's own parameters."""

    def __init__(
        self, job: JobRow, deps: FleetDependencies, work: Work, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(job, deps)
        self._work, self._is_over = work, is_over

    def _open(self, plan: Plan) -> OpenRound:
        opened = super()._open(plan)
        if self._is_over():  # closed before it was open: whoever closed it found nothing to interrupt
            opened.interrupt(JobCancelled(CLOSED))
        return opened

    def _assignment(self, plan: Plan, model: BlobRef) -> Fit | Evaluate:  # noqa: ARG002 - all else is the parent's
        asked = self._work.assignment
        if model != asked.model:
            asked = dataclasses.replace(asked, model=model, model_blake3=self._deps.blobs.check(model.sha256))
        # The parent ends the region's part in a round with the round, so that nothing here can be late.
        return dataclasses.replace(asked, takes_late=False) if isinstance(asked, Fit) else asked

    def _close(self, plan: Plan) -> None:
        """Leave the regions below their work: they keep their answers until the parent has closed the round."""

    def _terms(self, plan: Plan) -> Terms:
        return Terms(deadline_s=plan.deadline_s, offline_grace_s=self._work.offline_grace_s)


def in_region(work: Work, number: int, regional: int, deadline_s: float) -> Work:
    """Return what the devices are asked in one of the regional rounds (from 0) of the parent's round."""
    if work.region_rounds == 1:
        return work
    here = regional_round(number, regional, work.region_rounds)  # also of an evaluation: no other round has the number
    if work.fit is None:
        evaluate = None if work.evaluate is None else dataclasses.replace(work.evaluate, round=here)
        return dataclasses.replace(work, evaluate=evaluate)
    fit = dataclasses.replace(
        work.fit, round=here, deadline_s=deadline_s, evaluate=work.fit.evaluate and regional == 0
    )  # fmt: skip
    return dataclasses.replace(work, fit=fit)


def plan_of(assignment: Fit | Evaluate, devices: tuple[str, ...], parameters: Tree) -> Plan:
    """Return an assignment as the plan of these devices, with parameters of the region's own or the parent's."""
    is_fit = isinstance(assignment, Fit)
    return Plan(
        job=assignment.job, round=assignment.round, parameters=parameters, clients=devices,
        train=assignment.train if isinstance(assignment, Fit) else TrainConfig(seed=assignment.seed),
        deadline_s=assignment.deadline_s, evaluate=not isinstance(assignment, Fit) or assignment.evaluate, fit=is_fit,
    )  # fmt: skip


def job_row(assignment: Fit | Evaluate) -> JobRow:
    """Return what a region knows of a job: how it trains is in the assignment."""
    return JobRow(
        id=assignment.job, state="running", bundle=assignment.bundle, config=JobConfig(), buffers=(), rounds_done=0,
        model=assignment.model, optimizer_sha256=None, cohort=(), parted=assignment.parted, frozen=assignment.frozen,
    )  # fmt: skip
