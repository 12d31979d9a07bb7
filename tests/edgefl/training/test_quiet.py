"""torch's tracing logs nothing inside, and as before outside; with --debug it logs inside, too."""

import logging

from edgefl.training.quiet import quiet_tracing

LOG = logging.getLogger("torch._subclasses.fake_tensor")


def test_what_torch_logs_of_its_tracing(monkeypatch):
    before = LOG.level
    with quiet_tracing():
        assert not LOG.isEnabledFor(logging.CRITICAL)
    assert LOG.level == before
    monkeypatch.setenv("EDGEFL_DEBUG", "1")
    with quiet_tracing():
        assert LOG.isEnabledFor(logging.CRITICAL)
