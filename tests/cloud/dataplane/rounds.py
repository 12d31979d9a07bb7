"""An open round of two devices, and a link that a test is the other end of."""

import io

import numpy as np

from cloud.dataplane.open_round import OpenRound, Presence, Surroundings
from edgefl.config import TrainConfig
from edgefl.exchange import Terms
from edgefl.protocols.messages import BlobRef, Fit, RoundClosed, Signed
from edgefl.trees import write_tree

TERMS = Terms(deadline_s=100.0, offline_grace_s=5.0, quorum=1, return_s=20.0)


def opened(job="job", number=1, cohort=("a", "b"), terms=TERMS, owed=(), **around):
    blob = BlobRef(sha256="0" * 64, size=1)
    plan = Fit(
        job=job, round=number, model=blob, model_blake3="00", bundle=Signed(text="", key_id="", signature=""),
        train=TrainConfig(), deadline_s=1.0, max_update_bytes=10,
    )  # fmt: skip
    return OpenRound(plan, cohort, terms, Surroundings(**around), owed)


def small_update(value=1.0):
    """Return the bytes of an update that is received in one chunk."""
    file = io.BytesIO()
    write_tree({"w": np.full(1000, value, np.float32)}, file)
    return file.getvalue()


def ignore(_answer):
    pass


def nobody_is_gone():
    return Presence(frozenset(), frozenset(), is_connected=False)


class FakeLink:
    """Presence that a test sets, and what was sent."""

    def __init__(self):
        self.here, self.gone, self.reason, self.told = {"a", "b"}, set(), "", []
        self.withdrawn = []  # devices that no region is asked for any more

    def online(self):
        return frozenset(self.here)

    def offline(self):
        return frozenset(self.gone)

    def send_job(self, device, message):
        self.told.append((device, message))

    def close_round(self, job, number):
        pass

    def withdraw(self, device, job, number):
        self.withdrawn.append((device, number))

    def closed(self):
        return [(device, one.round, one.job_ended) for device, one in self.told if isinstance(one, RoundClosed)]
