"""LoRA adapters in a task's model (Hu et al. 2021), made by peft: found, trained, sent as products, put into the base.

What is federated is the change of the base's weights, D = sum over rounds of the mean of s B A, not the factors:

    a device begins a round with the weights W + D, and with new adapters: A drawn from (seed, round), B = 0
    it trains A and B, and sends s B and A as the factors of its change (`edgefl.trees.factors`)
    the mean of the products is the round's change; the server's step is taken with it, on D

So W stays as it came, D is float32 whatever W is, and ranks may differ between devices and between layers.
Of a layer whose A is frozen (FFA-LoRA, Sun et al. 2024), B is an ordinary parameter: its plain mean is exact, as the
product is linear in it.
"""

from edgefl.training.adapters.layers import Adapter, adapters_of, restart, with_factors, without_adapters
from edgefl.training.adapters.ranks import loader_options, rank_of
from edgefl.training.adapters.settings import refuse_settings

__all__ = [
    "Adapter", "adapters_of", "loader_options", "rank_of", "refuse_settings", "restart", "with_factors",
    "without_adapters",
]  # fmt: skip
