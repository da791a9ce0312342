"""Initial weights for a fresh TAEHV.

    model = colours(TAEHV(), frames=12)    # the autoencoder that keeps each cell's mean colour in each frame
    model = pytorch_weights(TAEHV())       # as in the published training notebook
    scale_to_teacher(model, latents)       # adapts the model to the scale of a teacher's latents

A cell is the square of pixels that one latent stands for. `colours` overwrites some of the random weights that a TAEHV
has (model_taehv.draw_weights), and draws none itself. This file needs torch and model_taehv.py beside it.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from model_taehv import Clamp, MemBlock, TGrow, TPool, WideMemBlock

REACH = 6.0   # largest |mean| + 2 deviations of latents: the soft clamp at 3 turns 6 into 2.9, and beyond loses them
LEAST = 0.25  # smallest root mean square of latents: below it, AdamW's steps are coarse for the layer that makes them
FLOOR = 0.1   # least deviation of a channel, relative to that of all channels: nearly constant ones are not scaled up


@torch.no_grad()
def colours(model, frames=1):
    """Turn a fresh TAEHV into the autoencoder that keeps each cell's mean colour in each frame. Returns it.

    For each frame of a group (the frames of one latent), six channels carry colours above and below mid-grey through
    all layers (ReLU keeps one sign each), and three latent channels hold twice the difference. All other weights stay
    random. With fewer than three latent channels per frame, the group's first frame stands for all its frames.

    frames: the length of the clips. It matters to CogVideoX alone: an even number of latents is not trimmed, so decoded
    frames then stand for other input frames. At 64 px, weights for the right length start at 17.7 dB. Weights for 17
    frames give 15.9 dB on 16 frames; weights for 16 frames give 17.1 dB on 17 (16 clips of four real videos).
    """
    encoder, decoder, positions = model.encoder, model.decoder, model.frame_positions
    shift = delay(model, model.latent_frames(frames))
    if room_for_colours(encoder, decoder, 1, len(positions)):
        carry_colours(encoder, decoder, model.patch_size ** 2, [position - shift for position in positions])
    if model.output_range == (-1, 1):
        move_range(encoder[0], decoder[-1])
    return model


def pytorch_weights(model):
    """Give a TAEHV the start of the published training notebook: PyTorch's default random weights, and mid-grey as the
    last bias. Returns it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    nn.init.constant_(model.decoder[-1].bias, 0.5)
    return model


@torch.no_grad()
def fits_teacher(model, latents):
    """Whether a TAEHV's layers can work with a teacher's latents at the model's present scale. latents: N T C h w, of
    some hundred clips."""
    channels = model._own(latents.float()).movedim(2, 0).flatten(1)
    reach = channels.mean(1).abs() + 2 * channels.std(1)
    return bool(reach.max() <= REACH and channels.square().mean().sqrt() >= LEAST)


@torch.no_grad()
def scale_to_teacher(model, latents):
    """Lets the layers of a fresh TAEHV see a teacher's latents scaled to mean 0 and deviation 1 in each channel.
    latents: N T C h w, of some hundred clips."""
    channels = latents.double().movedim(2, 0).flatten(1)
    deviation = channels.std(1)
    overall = deviation.square().mean().sqrt().clamp(min=1e-6)
    model.scale_latents(channels.mean(1), deviation.clamp(min=FLOOR * overall))


# ---- which layers, and which frames, for fit_taehv.py too ---------------------------------------------------------


def is_plain(decoder):
    """Whether this is a plain decoder: not the super one, which shuffles channels into pixels, nor the wide one, whose
    convolutions are grouped."""
    return isinstance(decoder[0], Clamp) and not any(isinstance(layer, WideMemBlock) for layer in decoder)


def delay(model, latents):
    """By how many frames decoded frames lag in a clip of `latents` latents: the decoder's frame i, trimmed ones
    counted, stands for input frame i - delay."""
    trimmed = not (model.is_h3 or model.is_cogvideox and latents % 2 == 0)
    return model.time_factor - 1 if trimmed else 0


# ---- the channels of colours -------------------------------------------------------------------------------------


def room_for_colours(encoder, decoder, frames, frames_out):
    """Whether the layers have channels enough to carry the colours of `frames` frames of a group, and to give back
    `frames_out` frames. False for a decoder that is not plain."""
    widths = [[layer.out_channels for layer in blocks[:-1] if isinstance(layer, nn.Conv2d)]
              for blocks in (encoder, decoder)]
    return (is_plain(decoder) and 3 * frames <= max(3, encoder[-1].out_channels) and min(widths[0]) >= 6 * frames
            and widths[1][0] >= 12 * frames - 6 and min(widths[1]) >= 6 * frames_out)


def carry_colours(encoder, decoder, cell, sources):
    """Set the weights so that six channels carry the colours of a frame: red, green and blue above mid-grey, then the
    same below. cell: number of pixels that `patch_size` folds into channels. sources: for each decoded frame of a
    group, the frame that it stands for, counted from the group's first (negative: in the group before)."""
    own = torch.zeros(3, 3)
    own[1, 1] = 1                              # the kernel of the identity
    mean = F.pad(torch.full((2, 2), 0.25), (1, 0, 1, 0))
    smooth = torch.tensor([0.1, 0.8, 0.1])     # 20.9 dB on four real videos; 20.6 for nearest, 20.3 for linear (0.25)
    smooth = smooth[:, None] * smooth
    pools = [layer for layer in encoder if isinstance(layer, TPool)]
    group = math.prod(pool.stride for pool in pools)
    frames = group if room_for_colours(encoder, decoder, group, len(sources)) else 1

    n = 6
    for i in range(6):
        sign, colour = 1 - i // 3 * 2, slice(i % 3 * cell, (i % 3 + 1) * cell)
        encoder[0].weight[i] = 0
        encoder[0].weight[i, colour, 1, 1], encoder[0].bias[i] = sign / cell, -0.5 * sign
        decoder[-1].weight[:, i] = 0
        decoder[-1].weight[colour, i, 1, 1] = sign
    decoder[-1].weight[:, 6:] *= 0.1
    for layer in encoder:
        if isinstance(layer, TPool):
            kept = layer.stride if frames > 1 else 1
            pass_on(layer.conv, [k * layer.conv.out_channels + i for k in range(kept) for i in range(n)])
            n *= kept
        elif isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
            pass_on(layer, range(n), mean)
    encoder[-1].weight[:min(n // 2, encoder[-1].out_channels)] = 0
    decoder[1].weight[:n] = 0
    for i in range(n):
        latent, sign = i // 6 * 3 + i % 3, 1 - i % 6 // 3 * 2
        if latent < encoder[-1].out_channels:
            encoder[-1].weight[latent, i, 1, 1], decoder[1].weight[i, latent, 1, 1] = 2 * sign, 0.5 * sign

    # Some decoded frames stand for frames of the previous latent: the first memory block passes these on. It leaves out
    # that latent's first frame, since no decoded frame stands for it.
    first, second, third = next(b for b in decoder if isinstance(b, MemBlock)).conv[::2]
    pass_on(first, range(first.in_channels // 2 + 6, first.in_channels // 2 + n), own)
    pass_on(second, range(n - 6), own)
    decoder[1].weight[n:2 * n - 6] = 0
    pass_on(third, range(n - 6), own, start=n)
    starts = [0 if frames == 1 else 6 * s if s >= 0 else n + 6 * (frames + s - 1) for s in sources]
    channels = [start + i for start in starts for i in range(6)]
    for layer in decoder:
        if isinstance(layer, TGrow):
            size = len(channels) // layer.stride  # the channels of the first half of the frames, then of the second
            for k in range(layer.stride):
                pass_on(layer.conv, channels[k * size:(k + 1) * size], start=k * layer.conv.in_channels)
            channels = range(size)
        elif isinstance(layer, nn.Conv2d) and layer.bias is None:
            pass_on(layer, channels, smooth)


def move_range(first, last):
    """Adapt layers for pixels in [0, 1] to pixels in [-1, 1]. The results stay the same except at the frames' edges.
    (The last bias is mid-grey in either range.)"""
    first.weight.mul_(0.5)
    first.bias.add_(first.weight.sum((1, 2, 3)))
    last.weight.mul_(2)


def pass_on(layer, channels, kernel=1.0, start=0):
    """Set a convolution's output channels from `start` on to these input channels, filtered by `kernel`."""
    rows = list(range(start, start + len(channels)))
    layer.weight[rows] = 0
    layer.weight[rows, list(channels)] = torch.as_tensor(kernel)
