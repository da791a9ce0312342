"""Structured pruning of a TAEHV: which channels belong together, how important each is, and the model without some.

    layers = layers_of(model)
    scores = by_taylor(model, layers, samples, device)        # or by_magnitude(model, layers)
    kept = choose_channels(model, layers, scores, budget=5_000_000)  # which channels stay
    small = cut(model, layers, kept)
    compensate(model, small, layers, kept, samples, device)   # predicts the removed channels from those that stay

A group is a set of channels that several layers have in common, so that all of them lose the same ones: the residual
stream of a stage, with all layers that read or write it; a memory block's inner maps; the output of a layer that pools
or grows time. The groups of a stage have one width, so each loses the same number of channels, its least important
ones. `samples` are clips as `evaluate` takes them: a list of {"video": uint8 T 3 H W, and, from a latent cache,
"latents": T' C h w}.

This file needs torch, tqdm and model_taehv.py beside it. prune.py is its command.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model_taehv import TAEHV, MemBlock, TGrow, TPool

PARTS = ("encoder", "decoder")
LEAST = 8            # channels that a stage keeps at least
DIRECTIONS = 2       # random directions of the output, per clip, from which importance is estimated
RIDGE = 1e-4         # added to the covariance of the channels that stay, times its mean variance
PIXELS = 600_000     # pixels of the clips that least squares use: their full-size maps are held in memory


class Layer(NamedTuple):
    """A convolution and its groups, which are (part, stage, name); None: pixels or latents."""
    name: str      # of the convolution, as in the state_dict
    writes: tuple  # group of its output channels ...
    frames: int    # ... and how many times it has them: once for each frame that a layer makes of one
    reads: tuple   # group of its input channels ...
    copies: int    # ... and how many times it has them: once for each frame that it reads (in memory blocks and pools)


# ---- what belongs together -----------------------------------------------------------------------------------------


def layers_of(model):
    """The Layers of a TAEHV with a plain decoder, in the order in which they run."""
    layers = []
    for part in PARTS:
        blocks, stage, now = getattr(model, part), -1, None
        for i, block in enumerate(blocks):
            name = f"{part}.{i}"
            if isinstance(block, nn.Conv2d):
                stage += 1
                before, now = now, None if block is blocks[-1] else (part, stage, "stream")
                layers.append(Layer(name, now, 1, before, 1))
            elif isinstance(block, MemBlock):
                first, second = (part, stage, f"{i}.conv.0"), (part, stage, f"{i}.conv.2")
                layers += [Layer(f"{name}.conv.0", first, 1, now, 2), Layer(f"{name}.conv.2", second, 1, first, 1),
                           Layer(f"{name}.conv.4", now, 1, second, 1)]
            elif isinstance(block, (TPool, TGrow)):
                before, now = now, (part, stage, "time")
                frames, copies = (block.stride, 1) if isinstance(block, TGrow) else (1, block.stride)
                layers.append(Layer(f"{name}.conv", now, frames, before, copies))
    return layers


def widths_of(model):
    """{(part, stage): channels}"""
    return {(part, stage): width for part in PARTS
            for stage, width in enumerate(getattr(model, f"{part}_widths"))}


def count(model, layers, widths):
    """Number of parameters of a model like this one with these widths."""
    total = 0
    for layer in layers:
        conv = model.get_submodule(layer.name)
        rows = layer.frames * widths[layer.writes[:2]] if layer.writes else conv.out_channels
        columns = layer.copies * widths[layer.reads[:2]] if layer.reads else conv.in_channels
        total += rows * (columns * math.prod(conv.kernel_size) + (conv.bias is not None))
    return total


def per_row(values, frames):
    """Sums of a weight's values, (frames * C, ...), for each of the C channels that it writes."""
    return values.flatten(1).sum(1).view(frames, -1).sum(0)


def per_column(values, copies):
    """Sums of a weight's values, (rows, copies * C, k, k), for each of the C channels that it reads."""
    return values.sum((0, 2, 3)).view(copies, -1).sum(0)


# ---- importance: {group: (C,)}, comparable between groups ----------------------------------------------------------


@torch.enable_grad()
def by_taylor(model, layers, samples, device):
    """Importance by a Taylor expansion: the mean square of the output's change without a channel, to first order,
    relative to the output's mean square error.

    Without the weights w that read a channel, the output changes by about J w, where J is its derivative by them. For
    random signs v, the square of v J w has the squared length of J w as its mean, and takes one backward pass. (Theis
    et al. 2018 and Molchanov et al. 2019 square derivatives of the loss, clip by clip. These vanish where a model has
    learned its clips.) The output is the video. With a teacher's latents it is the latents for the encoder, and the
    video decoded from the teacher's latents for the decoder.
    """
    model = copy.deepcopy(model).to(device).train()  # in training mode the video is not clamped
    scores, errors, signs = {}, {}, torch.Generator().manual_seed(0)
    for sample in tqdm(samples, desc="importance", unit="clip", leave=False, disable=None):
        for parts, output, target in outputs_of(model, sample, device):
            errors[parts] = errors.get(parts, 0) + F.mse_loss(output.detach(), target).item() * output.numel()
            for i in range(DIRECTIONS):
                model.zero_grad(set_to_none=True)
                v = (torch.randint(2, output.shape, generator=signs) * 2.0 - 1).to(device)
                (output * v).sum().backward(retain_graph=i + 1 < DIRECTIONS)
                changes = {}
                for layer in layers:
                    if layer.reads and layer.reads[0] in parts:
                        weight = model.get_submodule(layer.name).weight
                        change = per_column(weight.detach() * weight.grad, layer.copies)
                        changes[layer.reads] = changes.get(layer.reads, 0) + change
                for group, change in changes.items():
                    score = change.cpu().double().square() / DIRECTIONS
                    scores[parts, group] = scores.get((parts, group), 0) + score
    return {group: score / max(errors[parts], 1e-12) for (parts, group), score in scores.items()}


def outputs_of(model, sample, device):
    """Yields ((the parts, encoder or decoder, that made the output), output, target) of a clip; see `by_taylor`."""
    video = sample["video"][None].to(device).float().div_(255)
    if "latents" not in sample:
        yield PARTS, model(video)[0], model.targets(video)
        return
    latents = sample["latents"][None].to(device).float()
    latents_count, frames_count = model.aligned(video.shape[1], latents.shape[1])
    yield ("encoder",), model.encode(video)[:, :latents_count], latents[:, :latents_count]
    target = model.targets(video, latents.shape[1])[:, :frames_count]
    yield ("decoder",), model.decode(latents)[:, :frames_count], target


@torch.no_grad()
def by_magnitude(model, layers):
    """Importance by the weights' size: a channel's fraction of its group's squared weights, among those that write the
    group, times the same among those that read it."""
    written, read = {}, {}
    for layer in layers:
        squares = model.get_submodule(layer.name).weight.square().double()
        for group, found, sums in ((layer.writes, written, per_row(squares, layer.frames)),
                                   (layer.reads, read, per_column(squares, layer.copies) if layer.reads else None)):
            if group:
                found[group] = found.get(group, 0) + sums / sums.sum().clamp(min=1e-30)
    return {group: written[group] * read[group] for group in written}


def by_chance(model, layers, seed=0):
    """Random importance, to compare with."""
    widths, generator = widths_of(model), torch.Generator().manual_seed(seed)
    return {group: torch.rand(widths[group[:2]], generator=generator) for group in groups_of(layers)}


def groups_of(layers):
    return list(dict.fromkeys(layer.writes for layer in layers if layer.writes))


# ---- choosing and cutting ------------------------------------------------------------------------------------------


def narrower(width, multiple):
    """The next smaller width, or None."""
    lower = max((width - 1) // multiple * multiple, LEAST)
    return lower if lower < width else None


def smallest(model, layers, parts=PARTS):
    """Number of parameters with LEAST channels in each stage of these parts."""
    return count(model, layers, {stage: min(width, LEAST) if stage[0] in parts else width
                                 for stage, width in widths_of(model).items()})


def choose_channels(model, layers, scores, budget, parts=PARTS, multiple=16):
    """{group: the channels that stay, in order} with at most `budget` parameters; the budget must be at least
    `smallest`. The widths of stages that are cut become multiples of `multiple`, or LEAST: a CPU's kernels work on
    blocks of 16 channels, so a stage of 56 decodes no faster than one of 64 (22.7 and 22.2 frames/s), but one of 48
    does (27.5)."""
    widths = widths_of(model)
    ordered = {group: score.argsort(descending=True, stable=True) for group, score in scores.items()}
    while (now := count(model, layers, widths)) > budget:
        prices = {}  # {importance lost for each parameter saved: (stage, its next width)}
        for stage, width in widths.items():
            if stage[0] in parts and (lower := narrower(width, multiple)):
                lost = sum(float(score[ordered[group][lower:width]].sum()) for group, score in scores.items()
                           if group[:2] == stage)
                prices[lost / (now - count(model, layers, {**widths, stage: lower}))] = stage, lower
        stage, lower = prices[min(prices)]
        widths[stage] = lower
    return {group: ordered[group][:widths[group[:2]]].sort().values if group[0] in parts
            else torch.arange(widths[group[:2]]) for group in groups_of(layers)}


def cut(model, layers, kept):
    """A copy of the model, in eval mode, with only the channels `kept`."""
    widths = {part: [len(kept[part, stage, "stream"]) for stage in range(4)] for part in PARTS}
    small = TAEHV(**{**model.config, "encoder_widths": widths["encoder"], "decoder_widths": widths["decoder"]})
    with torch.no_grad():
        for layer in layers:
            conv, own = model.get_submodule(layer.name), small.get_submodule(layer.name)
            rows = channel_indices(kept, layer.writes, layer.frames, conv.out_channels)
            columns = channel_indices(kept, layer.reads, layer.copies, conv.in_channels)
            own.weight.copy_(conv.weight[rows][:, columns])
            if conv.bias is not None:
                own.bias.copy_(conv.bias[rows])
        for name, buffer in small.named_buffers():  # the scale of its latents
            buffer.copy_(model.get_buffer(name))
    return small.eval()


def channel_indices(kept, group, copies, channels):
    """Indices of the kept channels among all `channels` of a layer, which has the group's channels `copies` times."""
    if group is None:
        return torch.arange(channels)
    return torch.cat([kept[group] + i * channels // copies for i in range(copies)])


# ---- what the lost channels carried --------------------------------------------------------------------------------


@torch.no_grad()
def compensate(model, small, layers, kept, samples, device, parts=PARTS):
    """Changes the weights of `small` in place, so that each layer reads a prediction of the full model's channels.

    Both models run side by side, layer after layer, so that a prediction also corrects the errors of the layers before.
    A memory block reads a frame and the one before it: one prediction serves both. The same holds for pooled frames.
    """
    model, small, by_name = copy.deepcopy(model).to(device), small.to(device), {layer.name: layer for layer in layers}
    most = max(1, PIXELS // samples[0]["video"][:, 0].numel())
    some = torch.linspace(0, len(samples) - 1, min(len(samples), most)).round().int().tolist()
    video = torch.stack([samples[i]["video"] for i in some]).to(device).float().div_(255)
    missing = -video.shape[1] % model.time_factor
    video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    for part in parts:
        if part == "encoder":
            x = model._unshuffle(video)
        else:
            x = (torch.stack([samples[i]["latents"] for i in some]).to(device).float() if "latents" in samples[0]
                 else model.encode(video))
            x = model._own(x)
        clips, x = len(x), x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        y = x.clone()
        bar = tqdm(list(enumerate(zip(getattr(model, part), getattr(small, part)))), desc=f"{part}, least squares",
                   unit="layer", leave=False, disable=None)
        for i, (block, own) in bar:
            name = f"{part}.{i}"
            if isinstance(block, MemBlock):
                a, b = (torch.cat([maps, before(maps, clips)], 1) for maps in (x, y))
                fold(by_name[f"{name}.conv.0"], block.conv[0], own.conv[0], x, y, kept)
                for k in (2, 4):
                    a, b = block.conv[k - 2:k](a), own.conv[k - 2:k](b)
                    fold(by_name[f"{name}.conv.{k}"], block.conv[k], own.conv[k], a, b, kept)
                x, y = block.act(block.conv[4](a) + x), own.act(own.conv[4](b) + y)
            else:
                if isinstance(block, (TPool, TGrow)):
                    fold(by_name[f"{name}.conv"], block.conv, own.conv, x, y, kept)
                elif isinstance(block, nn.Conv2d):
                    fold(by_name[name], block, own, x, y, kept)
                x, y = block(x), own(y)
    return small.cpu()


def before(maps, clips):
    """The previous frame for each frame of these clips, zeros for the first: (frames, C, H, W)."""
    maps = maps.unflatten(0, (clips, -1))
    return F.pad(maps, (0, 0) * 3 + (1, 0))[:, :-1].flatten(0, 1)


def fold(layer, conv, own, x, y, kept):
    """Sets the weights of `own` so that its result for y, the small model's channels, is close to that of `conv` for x,
    the full model's. x, y: (frames, C, H, W)."""
    if layer.reads is None:
        return
    stay, x, y = kept[layer.reads], x.flatten(2), y.flatten(2)
    gram = torch.zeros(len(stay), len(stay), dtype=torch.float64)
    cross = torch.zeros(x.shape[1], len(stay), dtype=torch.float64)
    for a, b in zip(x, y):  # frame by frame
        gram += (b @ b.T).cpu().double()
        missing = a.clone()
        missing[stay.to(a.device)] -= b
        cross += (missing @ b.T).cpu().double()
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(stay), dtype=torch.float64)
    maps = torch.linalg.solve(gram, cross.T).T  # (C, kept): predicts what is missing from the channels that stay
    maps[stay, torch.arange(len(stay))] += 1
    rows = channel_indices(kept, layer.writes, layer.frames, conv.out_channels)
    weight = conv.weight.cpu().double()[rows].unflatten(1, (layer.copies, -1))
    own.weight.copy_(torch.einsum("rqckl,cd->rqdkl", weight, maps).flatten(1, 2))
