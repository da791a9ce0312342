"""Fits the weights of a fresh TAEHV to clips in closed form: a few seconds replace the first hundreds of steps.

    fit(model, video)                           # the autoencoder of the clips' principal components
    fit(model, video, latents)                  # linear maps to a teacher's latents, and back from them
    start_from_clips(model, batches, frames)    # the same, with clips from a training loader

The layers are fitted one after the other, each to the outputs of the fitted layers before it: by principal components
in the encoder, by reduced-rank regression of the pixels in the decoder. Two channels carry a *feature*, since ReLU
keeps one sign each. The decoder's first memory block adds features of the previous latent; all other memory blocks pass
on their input, as in any fresh TAEHV. Weights that no feature needs stay random, so that all weights can learn.

This file needs torch, model_taehv.py and init_taehv.py beside it.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import init_taehv
from model_taehv import MemBlock, TGrow, TPool

SAMPLES = 40_000    # positions, over all clips, that a regression uses
CLIPS = 48          # number of clips to fit to: 21.59 dB on unseen clips; 96 clips give 21.49
RIDGE = 1e-3        # added to covariances, times their mean variance: 20.67 dB on unseen clips; 1e-4 gives 20.58
LEAST_DETAIL = 1e-3  # clips whose mean change from pixel to pixel is lower are flat: a fit to them diverges, to 1e7
LATENT_DEVIATION = 0.5  # deviation of latents fitted without a teacher: small enough for the soft clamp at 3


class Features(NamedTuple):
    """What a layer's channels carry."""
    values: torch.Tensor  # N T k h w
    plus: list            # for each of the k features, the channel that holds its positive part ...
    minus: list           # ... and the one that holds its negative part
    gain: float = 1.0     # (plus - minus) / feature: above 1 after a LeakyReLU, which also lets the other sign through


def can_fit(model, with_teacher=False):
    """Whether `fit` can fit this model. It cannot fit a super or wide decoder, previews, very narrow models, and H3
    (whose clips come in chunks) with a teacher."""
    widths = [layer.out_channels for blocks in (model.encoder, model.decoder) for layer in blocks[:-1]
              if isinstance(layer, nn.Conv2d)]
    return (init_taehv.is_plain(model.decoder) and model.space_upscale == model.space_factor and min(widths) >= 6
            and not (model.is_h3 and with_teacher))


@torch.no_grad()
def fit(model, video, latents=None):
    """Fits a fresh TAEHV that `can_fit`, on the CPU, and returns it.

    video: N T 3 H W in [0, 1], some dozens of clips; H and W are multiples of the space factor. latents: the teacher's
    latents of these clips, N T' C h w; None: the model's become principal components, of LATENT_DEVIATION.
    """
    missing = -video.shape[1] % model.time_factor
    pixels = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1) - 0.5
    pixels = F.pixel_unshuffle(pixels, model.patch_size) if model.patch_size > 1 else pixels
    if latents is not None:
        latents = model._own(latents[:, :model.latent_frames(video.shape[1])])
    slope = 0.2 if model.activation == "leaky_relu" else 0.0
    latents = fit_encoder(model.encoder, pixels, latents, slope)

    shift = init_taehv.delay(model, latents.shape[1])
    index = [model.time_factor * i + position - shift for i in range(latents.shape[1])
             for position in model.frame_positions]
    target = pixels[:, [max(i, 0) for i in index]]
    # The decoder drops most frames of the first latent, which lie before the clip: leave this latent out.
    skipped = 1 if shift and latents.shape[1] > 1 else 0
    fit_decoder(model.decoder, latents, target.unflatten(1, (latents.shape[1], -1)), skipped, slope)
    if model.output_range == (-1, 1):
        init_taehv.move_range(model.encoder[0], model.decoder[-1])
        model.decoder[-1].bias.mul_(2).sub_(1)
    return model


def start_from_clips(model, batches, frames):
    """Fits a fresh TAEHV, on the CPU, to about the first CLIPS clips of `batches`, an iterator over {"video": uint8
    N T 3 H W, "latents": if there is a teacher}. Of each clip it uses a square of at most 8 x 8 latents. A model that
    cannot be fitted starts from `init_taehv.colours` for clips of `frames` frames. Returns a text for the log that says
    which start it was."""
    video, latents = [], []
    for batch in batches:
        if not can_fit(model, with_teacher="latents" in batch):
            init_taehv.colours(model, frames)
            return ""
        cells = min(8, batch["video"].shape[-1] // model.space_factor)
        size = cells * model.space_factor
        video.append(batch["video"][..., :size, :size].float().div_(255))
        latents += [batch["latents"][..., :cells, :cells].float()] if "latents" in batch else []
        if sum(map(len, video)) >= CLIPS:
            break
    clips = torch.cat(video)
    if max(clips.diff(dim=dim).abs().mean() for dim in (-2, -1)) < LEAST_DETAIL:  # nothing to regress on
        init_taehv.colours(model, frames)
        return ", from mean colours, as its first clips are flat"
    fit(model, clips, torch.cat(latents) if latents else None)
    return f", fitted to {len(clips)} clips"


# ---- encoder -------------------------------------------------------------------------------------------------------


def fit_encoder(encoder, pixels, latents, slope):
    """Fits the layers to pixels around 0, N T C H W. Returns the latents to fit the decoder to: the given ones, or, if
    None, those that this encoder makes."""
    first, last = encoder[0], encoder[-1]
    values = pixels
    for layer in encoder:
        if layer is first:
            maps = components(columns(values.flatten(0, 1)), layer.out_channels // 2)
            features = write(layer, maps[..., None, None], values, 1 + slope)
            layer.bias[:2 * len(maps)] = torch.cat([-maps.sum(1), maps.sum(1)]) / 2  # pixels are in [0, 1] there
        elif isinstance(layer, TPool):
            k = features.values.shape[2]
            layer.conv.weight[:layer.stride * k] = 0
            for frame in range(layer.stride):
                read(layer.conv, range(frame * k, (frame + 1) * k), features, start=frame * layer.conv.out_channels)
            values = features.values.unflatten(1, (-1, layer.stride)).flatten(2, 3)
        elif isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            squares = F.pixel_unshuffle(values.flatten(0, 1), 2)
            maps = components(columns(squares), layer.out_channels // 2)
            maps = F.pad(maps.unflatten(1, (-1, 2, 2)), (1, 0, 1, 0))
            features = write(layer, maps, values, 1 + slope ** 3)  # three memory blocks follow
    values = features.values.flatten(0, 1)
    last.weight.zero_()
    if latents is None:
        maps = components(columns(values), min(last.out_channels, values.shape[1]), deviation=LATENT_DEVIATION)
        mean = maps @ columns(values).mean(0)
        read(last, range(len(maps)), features, maps[..., None, None])
        last.bias[:len(maps)] = -mean
        latents = torch.einsum("lk,nkhw->nlhw", maps, values) - mean[:, None, None]
        latents = F.pad(latents, (0, 0, 0, 0, 0, last.out_channels - len(maps)))
        return latents.unflatten(0, (len(pixels), -1))
    maps, bias = regression(windows(values), columns(latents.flatten(0, 1)))
    read(last, range(len(maps)), features, maps.unflatten(1, (-1, 3, 3)))
    last.bias.copy_(bias)
    return latents


# ---- decoder -------------------------------------------------------------------------------------------------------


def fit_decoder(decoder, latents, target, skipped, slope):
    """Fits the layers to latents N T C h w and the pixels around 0 that they stand for, N T frames C H W. The first
    `skipped` latents of each clip serve only as the past of the next one."""
    features = fit_first_layers(decoder, decoder[0](latents), target, skipped, slope)
    target, cell = target[:, skipped:], target.shape[-1] // latents.shape[-1]
    last = decoder[-1]
    enlarging = [layer for layer in decoder if isinstance(layer, nn.Conv2d) and layer.bias is None]
    for layer in decoder:
        if isinstance(layer, TGrow):
            target = target.unflatten(2, (layer.stride, -1))  # N T stride frames C H W
            features = fit_growth(layer, features, target, cell)
            target = target.flatten(1, 2)
        elif layer in enlarging:
            cell //= 2
            values = features.values.flatten(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
            aim = target if layer is not enlarging[-1] else neighbours(target)  # the last layer looks at neighbours too
            samples = sample(values, aim, cell)
            maps = reduced_rank(*samples, layer.out_channels // 2).unflatten(1, (-1, 3, 3))
            gain = 1 + slope ** (1 if layer is enlarging[-1] else 3)
            features = write(layer, maps, values.unflatten(0, features.values.shape[:2]), gain)
    maps, bias = regression(*sample(features.values.flatten(0, 1), target, 1))
    last.weight.zero_()
    read(last, range(len(maps)), features, maps.unflatten(1, (-1, 3, 3)))
    last.bias.copy_(bias + 0.5)


def fit_first_layers(decoder, latents, target, skipped, slope):
    """Lets the first convolution pass on the latents, and the first memory block add the features of 3 x 3 latents, and
    of the previous 3 x 3, that best predict the pixels. Returns the features of all but the skipped latents."""
    layer, width = decoder[1], decoder[1].out_channels
    count = min(layer.in_channels, width // 4)  # half of the channels are for what the memory block adds
    maps = torch.eye(count) if count == layer.in_channels else components(columns(latents.flatten(0, 1)), count)
    mean = maps @ columns(latents.flatten(0, 1)).mean(0)
    layer.weight.zero_()
    own = write(layer, maps[..., None, None], latents, 1 + slope)
    layer.bias[:2 * count] = torch.cat([-mean, mean])
    own = own._replace(values=own.values - mean[:, None, None])
    both = torch.cat([own.values, F.pad(own.values, (0, 0) * 3 + (1, -1))], 2)[:, skipped:]

    added = (width - 2 * count) // 2
    inputs, outputs = sample(both.flatten(0, 1), target[:, skipped:], target.shape[-1] // latents.shape[-1])
    maps = reduced_rank(inputs - inputs.mean(0), outputs, added)
    mean, maps = maps @ inputs.mean(0), maps.unflatten(1, (2, count, 3, 3))
    block = next(block for block in decoder if isinstance(block, MemBlock))
    first, second, third = block.conv[::2]
    added = len(maps)
    first.weight[:2 * added] = second.weight[:2 * added] = 0
    for rows, sign in ((range(added), 1), (range(added, 2 * added), -1)):
        read(first, rows, own, sign * maps[:, 0])
        read(first, rows, own, sign * maps[:, 1], start=width)
        first.bias[list(rows)] = -sign * mean
    rows = torch.arange(2 * added)
    second.weight[rows, rows, 1, 1] = third.weight[2 * count + rows, rows, 1, 1] = 1
    new = F.conv2d(both.flatten(0, 1), maps.flatten(1, 2), padding=1) - mean[:, None, None]
    start = 2 * count
    return Features(torch.cat([own.values[:, skipped:], new.unflatten(0, both.shape[:2])], 2),
                    own.plus + [*range(start, start + added)], own.minus + [*range(start + added, start + 2 * added)],
                    1 + slope ** 4)


def fit_growth(layer, features, target, cell):
    """A TGrow gives each new frame the features that tell most about its own pixels, in the same channels for all."""
    g, width = layer.stride, layer.conv.in_channels
    if g == 1:
        k = features.values.shape[2]
        layer.conv.weight[:k] = 0
        read(layer.conv, range(k), features)
        return Features(features.values, [*range(k)], [])
    inputs, maps = features.values.flatten(0, 1), []
    for frame in range(g):
        samples = sample(inputs, target[:, :, frame], cell, window=1)
        maps.append(regression(*samples)[0])
    root = power(samples[0], 0.5)
    directions, sizes, _ = torch.linalg.svd(torch.cat([m @ root for m in maps], 1), full_matrices=False)
    count = min(width, int((sizes > 1e-4 * sizes[0]).sum()))
    scale = sizes[:count] ** -0.5 * sizes[:count].square().mean() ** -0.25
    maps = [scale[:, None] * (directions[:, :count].T @ m) for m in maps]
    for frame in range(g):
        rows = range(frame * width, frame * width + count)
        layer.conv.weight[list(rows)] = 0
        read(layer.conv, rows, features, maps[frame][..., None, None])
    values = torch.einsum("grk,ntkhw->ntgrhw", torch.stack(maps), features.values).flatten(1, 2)
    return Features(values, [*range(count)], [])


# ---- features in channels ------------------------------------------------------------------------------------------


def write(layer, maps, values, gain):
    """Sets a convolution's first output channels to features: the results of `maps`, kernels k c a a, for `values`,
    N T c H W, which are its first c input channels. k channels hold one sign, then k the other. Returns the Features.
    """
    k, c, size, _ = maps.shape
    padding = (layer.kernel_size[0] - size) // 2
    layer.weight[:2 * k] = 0
    layer.weight[:2 * k, :c] = F.pad(torch.cat([maps, -maps]), (padding,) * 4)
    flat = values.flatten(0, 1)
    result = torch.cat([F.conv2d(piece, maps, stride=layer.stride, padding=size // 2) for piece in flat.split(32)])
    return Features(result.unflatten(0, values.shape[:2]), [*range(k)], [*range(k, 2 * k)], gain)


def read(layer, rows, features, maps=None, start=0):
    """Sets a convolution's output channels `rows` to `maps`, kernels (rows, k, a, a), of the features, which are its
    input channels from `start` on. maps=None: to the features themselves. The rows' other weights stay."""
    k, rows = features.values.shape[2], torch.tensor([*rows])[:, None]
    maps = torch.eye(k)[..., None, None] if maps is None else maps
    padding = (layer.kernel_size[0] - maps.shape[-1]) // 2
    maps = F.pad(maps, (padding,) * 4) / features.gain
    layer.weight[rows, torch.tensor(features.plus) + start] = maps
    if features.minus:
        layer.weight[rows, torch.tensor(features.minus) + start] = -maps


# ---- samples and regressions ---------------------------------------------------------------------------------------


def columns(x):
    """n c h w -> n*h*w c."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def windows(x):
    """n c h w -> n*h*w c*9: each position with its neighbours."""
    return F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)


def neighbours(target):
    """N T 1 C H W -> N T 1 9*C H W: each pixel with its neighbours."""
    flat = target.flatten(0, 2)
    near = F.unfold(F.pad(flat, (1,) * 4, mode="replicate"), 3)
    return near.view(*target.shape[:3], -1, *target.shape[-2:])


def sample(values, target, cell, window=3):
    """(inputs of a convolution with a kernel of `window`, (samples, c*window*window); the squares of `cell` pixels at
    the same positions, (samples, frames*C*cell*cell)) at about SAMPLES random positions, the same ones for the same
    shapes. values: n c h w; target: N T frames C H W, N T = n."""
    target = target.flatten(0, 1).flatten(1, 2)
    each, generator, parts = max(1, SAMPLES // len(values)), torch.Generator().manual_seed(0), []
    for some, aims in zip(values, target):
        chosen = torch.randperm(some[0].numel(), generator=generator)[:each]
        seen = windows(some[None]) if window == 3 else columns(some[None])
        squares = F.pixel_unshuffle(aims[None], cell) if cell > 1 else aims[None]
        parts.append((seen[chosen], columns(squares)[chosen]))
    return tuple(map(torch.cat, zip(*parts)))


def covariance(a, b):
    return (a.T @ b).double() / len(a)


def power(inputs, exponent):
    """A power of the covariance of inputs, (samples, c). First its diagonal grows by RIDGE of its mean, by more if
    there are few samples."""
    matrix, ridge = covariance(inputs, inputs), RIDGE * (1 + 100 * inputs.shape[1] / len(inputs))
    matrix = matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    values, directions = torch.linalg.eigh(matrix)
    return (directions * values.clamp(min=values[-1] * 1e-12) ** exponent @ directions.T).float()


def regression(inputs, outputs):
    """(maps (d, c), bias (d,)) of the linear regression from inputs, (samples, c), to outputs, (samples, d)."""
    mean_in, mean_out = inputs.mean(0), outputs.mean(0)
    inputs = inputs - mean_in
    maps = covariance(outputs - mean_out, inputs).float() @ power(inputs, -1)
    return maps, mean_out - maps @ mean_in


def components(inputs, count, deviation=None):
    """The first principal components of inputs, (samples, c), as maps (count, c): each of length 1, or, given a
    `deviation`, scaled so that its outputs have that deviation."""
    values, directions = torch.linalg.eigh(covariance(inputs, inputs))
    maps = directions.flip(1).T[:count]
    return (maps if deviation is None else maps * deviation / values.flip(0)[:count, None].sqrt()).float()


def reduced_rank(inputs, outputs, count):
    """The `count` linear maps of inputs, (samples, c), from which outputs, (samples, d), can best be predicted: (k, c),
    k <= count (reduced-rank regression, Izenman 1975). A map is scaled by the root of the deviation that it explains.
    """
    whiten = power(inputs, -0.5)
    explained = whiten @ covariance(inputs, outputs).float()
    values, directions = torch.linalg.eigh((explained @ explained.T).double())
    values, directions = values.flip(0)[:count], directions.flip(1)[:, :count]
    keep = values > 1e-9 * values[0]
    values, directions = values[keep], directions[:, keep].float()
    return (values / values.mean()).float()[:, None] ** 0.25 * (directions.T @ whiten)
