"""Training losses. This file works alone: torch only."""
import torch.nn.functional as F

PIXEL_LOSSES = ("l1", "l2", "charbonnier")


def pixel_loss(kind, output, target):
    """Mean pixel distance, a scalar. output, target: equal shapes, any layout, [0, 1] (output may exceed it).

    "l2" is the squared distance; "charbonnier" is sqrt(d^2 + 1e-6), a smooth l1 (Charbonnier et al. 1994).
    """
    if output.shape != target.shape:
        raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} differ in shape")
    if kind == "l1":
        return F.l1_loss(output, target)
    if kind == "l2":
        return F.mse_loss(output, target)
    if kind == "charbonnier":
        return (output - target).square().add(1e-6).sqrt().mean()
    raise ValueError(f"unknown pixel loss {kind!r}; there are {', '.join(PIXEL_LOSSES)}")
