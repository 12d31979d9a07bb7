"""torch's tracing logs nothing inside, and as before outside; with --debug it logs inside, too."""

import logging
import warnings

import torch

from edgefl.training.quiet import quiet_stacks, quiet_tracing

LOG = logging.getLogger("torch._subclasses.fake_tensor")


def test_what_torch_logs_of_its_tracing(monkeypatch):
    before = LOG.level
    with quiet_tracing():
        assert not LOG.isEnabledFor(logging.CRITICAL)
    assert LOG.level == before
    monkeypatch.setenv("EDGEFL_DEBUG", "1")
    with quiet_tracing():
        assert LOG.isEnabledFor(logging.CRITICAL)


def test_what_torch_says_of_an_operation_that_is_slow_over_a_stack(monkeypatch):
    def warned():
        lengths, steps = torch.tensor([3, 3]), torch.ones(4, 2, 3, 2)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            quiet_stacks()
            torch.func.vmap(lambda one: torch.nn.utils.rnn.pack_padded_sequence(one, lengths, batch_first=True)[0])(
                steps
            )
        return [str(one.message) for one in found]

    assert warned() == []
    monkeypatch.setenv("EDGEFL_DEBUG", "1")
    assert "performance drop" in " ".join(warned())
