"""Training losses: distances of pixels, of changes in time and of wavelets, and LPIPS.

This file works alone with torch; LPIPS needs the package lpips.
"""
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_LOSSES = ("l1", "l2", "l1+l2", "charbonnier")
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}  # torchvision's files


def pixel_loss(kind, output, target):
    """Mean pixel distance, a scalar. output, target: equal shapes, any layout, [0, 1] (output may exceed it).
    ValueError for unequal shapes or an unknown kind.

    "l2" is the squared distance. "charbonnier" is sqrt(d^2 + 1e-6), a smooth l1 (Charbonnier et al. 1994). "l1+l2" is
    |d| + 2 d^2, which is half of the l1 + l2 of trainers on [-1, 1]: their distance is 2 d.
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


def temporal_loss(output, target):
    """Mean absolute error of the changes from frame to frame, a scalar, as `metrics.flicker`. output, target: N T 3 H W
    in [0, 1]. 0 for T = 1. An error that is the same in all frames does not count here, but in the pixel loss."""
    error = output - target
    return error.diff(dim=1).abs().mean() if error.shape[1] > 1 else error.sum() * 0


def wavelet_loss(output, target, levels=2):
    """Mean absolute error of the details in an orthonormal Haar transform in space and time, a scalar. output, target:
    N T 3 H W in [0, 1].

    A level splits each 2 x 2 pixels of two frames into their mean and seven details. The next level splits the means.
    All levels have the same weight. The last level's means are not compared: the pixel loss does that. An axis of one
    frame or pixel is not split, and an axis of odd length is padded with its last frame, row or column.
    """
    means, total = output - target, 0
    for _ in range(levels):
        bands = [means]
        for axis in (1, -2, -1):
            bands = [part for band in bands for part in haar(band, axis)]
        means, *details = bands
        total = total + (sum(band.abs().mean() for band in details) / len(details) if details else means.sum() * 0)
    return total / levels


def haar(x, axis):
    """[sums, differences] of pairs of neighbours along an axis, divided by sqrt(2); [x] if the axis has one entry."""
    size = x.shape[axis]
    if size == 1:
        return [x]
    if size % 2:
        x = torch.cat([x, x.narrow(axis, size - 1, 1)], axis)
    first, second = x.unflatten(axis, (-1, 2)).unbind(axis + 1 if axis >= 0 else axis)
    return [(first + second) * 0.5 ** 0.5, (first - second) * 0.5 ** 0.5]


def lpips_network(net):
    """The lpips package's network, frozen, in eval mode: a module, (a, b) in [-1, 1], N 3 H W -> distance per image.

    The package contains its own small weights, and downloads its backbone ("alex" or "vgg") on first use. OSError, in
    one line, if the backbone cannot be loaded; ImportError without the package; ValueError for another backbone.
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
    """LPIPS (Zhang et al. 2018) of some frames of each clip, as a scalar. Errors as in `lpips_network`.

    net: "vgg" (the usual choice for training) or "alex". frames: number of frames of each clip that are compared, drawn
    anew at every call from PyTorch's CPU generator (whose state is in checkpoints); 0: all of them.
    Inside autocast the backbone's convolutions run in the autocast type. The rest stays in float32, since in bf16 the
    norms of features vanish. (Measured with a VGG with random weights on 128 px: bf16 takes a third of float32's time
    on a core with AMX; the cosine between the two gradients is 0.99 for noise of 0.1, and 0.98 for 0.02; their lengths
    agree within 1 %.)
    """

    def __init__(self, net="vgg", frames=2):
        super().__init__()
        self.network, self.frames = lpips_network(net).to(memory_format=torch.channels_last), frames

    def forward(self, output, target):
        """output, target: N T 3 H W in [0, 1]. The gradient flows to `output` only."""
        count = output.shape[1]
        if 0 < self.frames < count:
            chosen = [torch.randperm(count)[:self.frames].tolist() for _ in output]
            output, target = (torch.stack([torch.stack([clip[t] for t in some]) for clip, some in zip(v, chosen)])
                              for v in (output, target))
        with torch.no_grad():
            theirs = self.features(target)
        ours = self.features(output)
        with torch.autocast(output.device.type, enabled=False):
            return sum(layer((unit(x) - unit(y)).square()).mean()
                       for layer, x, y in zip(self.network.lins, ours, theirs))

    def features(self, video):
        """N T 3 H W in [0, 1] -> features (N T, C, h, w) of each of the backbone's layers."""
        x = self.network.scaling_layer(video.flatten(0, 1).float() * 2 - 1)
        return self.network.net(x.contiguous(memory_format=torch.channels_last))

    def train(self, mode=True):
        """Stays in eval mode: its dropout would make the distance noisy."""
        return super().train(False)


def unit(features):
    """Normalise the features at every position to length 1, in float32. Features that are all zero stay zero (and get
    no gradient, which the ReLU before them stops)."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
