"""Training losses: pixel distance and LPIPS. This file works alone: torch, and lpips where LPIPS is asked for."""
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_LOSSES = ("l1", "l2", "l1+l2", "charbonnier")
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}  # torchvision's files


def pixel_loss(kind, output, target):
    """Mean pixel distance, a scalar. output, target: equal shapes, any layout, [0, 1] (output may exceed it).

    "l2" is the squared distance; "charbonnier" is sqrt(d^2 + 1e-6), a smooth l1 (Charbonnier et al. 1994); "l1+l2" is
    |d| + 2 d^2: what trainers on [-1, 1] count as l1 + l2, whose distance is 2 d, and half of it.
    """
    if output.shape != target.shape:
        raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} differ in shape")
    if kind == "l1":
        return F.l1_loss(output, target)
    if kind == "l2":
        return F.mse_loss(output, target)
    if kind == "l1+l2":
        return F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    if kind == "charbonnier":
        return (output - target).square().add(1e-6).sqrt().mean()
    raise ValueError(f"unknown pixel loss {kind!r}; there are {', '.join(PIXEL_LOSSES)}")


def lpips_network(net):
    """The lpips package's network, frozen, in eval mode: module of (a, b) in [-1, 1] -> distance per image.

    The package brings its own small weights, and downloads its backbone ("alex" or "vgg") on first use. OSError, in one
    line, if that cannot be had; ImportError without the package.
    """
    if net not in BACKBONES:
        raise ValueError(f"unknown LPIPS backbone {net!r}; there are {', '.join(BACKBONES)}")
    import lpips
    try:
        with warnings.catch_warnings():  # lpips calls torchvision by an old name
            warnings.simplefilter("ignore", UserWarning)
            return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
    except OSError as error:  # URLError is one: no network
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise OSError(f"its backbone is not here. Place {BACKBONES[net]} (torchvision's) in {folder} "
                      f"({error})") from None


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) of some frames of each clip, as a scalar.

    net: "vgg" (the usual choice for training) or "alex". frames: how many frames of a clip are compared, the same ones
    of all clips, drawn anew at every call from PyTorch's CPU generator (which a checkpoint holds); 0: all of them.
    Computed in float32 also inside autocast: its normalisation divides by norms that vanish in bf16. Errors as in
    `lpips_network`.
    """

    def __init__(self, net="vgg", frames=2):
        super().__init__()
        self.network, self.frames = lpips_network(net), frames

    def forward(self, output, target):
        """output, target: N T 3 H W, [0, 1]; the gradient goes to `output`."""
        count = output.shape[1]
        if 0 < self.frames < count:
            chosen = torch.randperm(count)[:self.frames].tolist()
            output, target = (torch.stack([v[:, t] for t in chosen], 1) for v in (output, target))
        a, b = (v.flatten(0, 1).float() * 2 - 1 for v in (output, target))
        with torch.autocast(output.device.type, enabled=False):
            return self.network(a, b).mean()

    def train(self, mode=True):
        """Stays in eval mode: its dropout would make the distance noisy."""
        return super().train(False)
