"""The cloud's parts of a round become the next round's: averaged as the devices' parts are, by the same rule.

    new = old + server.lr * rule({the part after device d's training - old: d was admitted in the round})

Of a matrix of adapters, a device's result is the change (`edgefl.trees.factors`).
A device's part in the cloud counts if, and only if, its update was admitted: the round's outcome says who. `shared`:
the part that all devices have trained. Runs in the cloud's own process: numpy, no code of the user.
"""

from __future__ import annotations

import logging

import numpy as np

from cloud.split.results import SplitFolder
from edgefl.aggregation import make_rule
from edgefl.aggregation.schedules import of_round, server_factor
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig
from edgefl.errors import StepFailed
from edgefl.guards import not_finite_tree, wrong_spec
from edgefl.logs import event
from edgefl.protocols.messages import Division
from edgefl.records import RoundOutcome, Update
from edgefl.settings.split import SHARED
from edgefl.trees import SpooledTree, Tree, spec_of, subtract
from edgefl.trees.factors import is_low_rank
from edgefl.trees.views import joined, renamed

_log = logging.getLogger(__name__)


def folded(
    folder: SplitFolder, config: JobConfig, division: Division, before: Tree, outcome: RoundOutcome
) -> Tree:  # fmt: skip
    """Return all tensors that devices do not send, after a round.

    `before` are those before it. Raises StepFailed if there is no usable part of any admitted device.
    """
    names = division.in_cloud
    old = renamed(before, {one: one for one in names.values()})
    new = (
        _shared(folder, old, outcome)
        if config.train.split.cloud_part == SHARED
        else _mean(folder, config, division, old, outcome)
    )
    return joined(before, renamed(new, names))


def _shared(folder: SplitFolder, old: Tree, outcome: RoundOutcome) -> Tree:
    if not folder.shared.exists():
        raise StepFailed(
            f"round {outcome.round} of job {outcome.job}: no device has trained the shared part in the cloud"
        )
    found = SpooledTree(folder.shared)
    tensors = {name: found[name] for name in old if name in found}
    if fault := wrong_spec(spec_of(tensors), spec_of(old)) or not_finite_tree(tensors):
        raise StepFailed(
            f"round {outcome.round} of job {outcome.job}: the shared part in the cloud is not usable: {fault}"
        )
    return tensors


def _mean(folder: SplitFolder, config: JobConfig, division: Division, old: Tree, outcome: RoundOutcome) -> Tree:
    rule, count = make_rule(config.aggregation.rule, old), 0
    for device in sorted(outcome.admitted):
        found = folder.result(outcome.round, device)
        fault = (
            "it has not finished there"
            if found is None
            else (wrong_spec(spec_of(found[0]), spec_of(old)) or not_finite_tree(found[0]))
        )
        if found is None or fault:
            event(_log, logging.WARNING, "split.part_missing", job=outcome.job, round=outcome.round, device=device,
                  reason=fault)  # fmt: skip
            continue
        changed = {
            name: np.asarray(subtract(np.asarray(found[0][name]), np.asarray(old[name])))
            for name in old
            if not is_low_rank(name)
        }
        tree = joined(changed, renamed(found[0], {name: name for name in old if is_low_rank(name)}))
        rule.add(Update(job=outcome.job, round=outcome.round, device=device, tree=tree, weight=float(found[1])))
        count += 1
    if not count:
        raise StepFailed(
            f"round {outcome.round} of job {outcome.job}: none of the {len(outcome.admitted)} admitted devices has "
            "finished its part in the cloud"
        )
    step = ServerOptimizer(config.server, gradient=False, buffers=division.buffers)
    return step.step(old, rule.result(), lr_factor=server_factor(config, of_round(config, outcome.round)))
