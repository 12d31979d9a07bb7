"""How sure a small model is of each row: the largest probability of its scores.

Scores are the model's first output of floats with at least two classes in its last dimension. If each row is already a
distribution, its largest value counts; otherwise it is a softmax. NaN is never confident.
(Cascades by a threshold on the maximum softmax probability: Wang et al. 2018, IDK Cascades; Hendrycks and Gimpel 2017.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.trees import Tree

_CLOSE = 1e-3


def confident_rows(outputs: Tree, threshold: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return (rows,) booleans: whether the confidence of each row is at least the threshold.

    Of a row with several decisions, the least sure counts. Raises ProtocolError if there are no scores.
    """
    scores = next(
        (one for one in outputs.values() if one.dtype.kind == "f" and one.ndim > 1 and one.shape[-1] > 1), None
    )
    if scores is None:
        raise ProtocolError("a cascade needs scores of at least two classes; the small model returns none")
    if not len(scores):
        return np.zeros(0, np.bool_)
    values = scores.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        is_distribution = (values >= 0).all(-1) & (np.abs(values.sum(-1) - 1) < _CLOSE)
        shifted = np.exp(values - values.max(-1, keepdims=True))
        soft = shifted.max(-1) / shifted.sum(-1)
        best = np.where(is_distribution, values.max(-1), soft)
        sure: np.ndarray[Any, np.dtype[np.bool_]] = best.reshape(len(best), -1).min(1, initial=np.inf) >= threshold
    return sure
