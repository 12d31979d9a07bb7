"""The direction of a metric by its name: whether a higher value is better, for the names that are in common use."""

from __future__ import annotations

import re

_HIGHER = {
    "accuracy", "acc", "auc", "auroc", "ap", "map", "dice", "f1", "iou", "jaccard", "kappa", "ndcg", "precision",
    "psnr", "r2", "recall", "specificity", "ssim", "top",
}  # fmt: skip
_LOWER = {"loss", "cer", "err", "error", "mae", "mape", "mse", "nll", "perplexity", "rmse", "wer"}


def direction_of_name(name: str) -> bool | None:
    """Return whether higher is better, by the words of a name; None if they do not say so."""
    words = set(re.findall(r"[a-z]+\d?", name.lower()))
    if words & _LOWER:
        return False
    return True if words & _HIGHER else None
