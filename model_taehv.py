"""TAEHV: tiny video autoencoders that speak the latent space of a big video VAE.

    model = load_taehv("taew2_1.pth")                # published or own weights; the variant is recognised
    model = load_taehv("taew2_1")                    # published weights by name: downloaded once
    latents = model.encode(video)                    # N T 3 H W in [0, 1]  ->  N T/4 16 H/8 W/8
    video = model.decode(latents)                    # ... and back, clamped to [0, 1]

This file works alone: it needs torch, and tqdm only for progress bars. It can replace the published taehv.py:
TAEHV("taew2_1.pth"), encode_video, decode_video and StreamingTAEHV are called the same way. State_dict names, shapes
and results are those of github.com/madebyollin/taehv (taehv.py). What differs: one routine runs whole clips and
streams, everything is channels-last, temporal growth runs before the nearest upsampling (the two commute, and growth
then costs a quarter), and `targets()` gives the input frames that the output frames stand for. This file imports no
other: `step_taehv.speed_up` (training) and `fast_taehv.fast` (inference on a CPU) make the model faster from outside,
and `fit_taehv.fit` and `init_taehv.colours` give fresh weights a better start than random ones.

Conventions: video is N T C H W, RGB, in [0, 1]; latents are N T C H W, exactly what the diffusion model consumes.

Sections: variants, blocks, the model, streaming, arguments, loading, published weights.
"""
import contextlib
import difflib
import hashlib
import http.client
import json
import math
import os
import socket
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Variant(NamedTuple):
    """The shape of a published model."""
    patch_size: int            # side of the squares of pixels that are folded into channels
    latent_channels: int
    pooling: tuple             # how many frames each of the encoder's three stages joins into one
    growth: tuple              # how many frames each of the decoder's three stages makes of one
    arch_variant: str = None   # the decoder's architecture: None, "super" or "wide"


VARIANTS = {
    "taehv":          Variant(1, 16, (2, 2, 1), (1, 2, 2)),          # Hunyuan Video
    "taew2_1":        Variant(1, 16, (2, 2, 1), (1, 2, 2)),          # Wan 2.1, Qwen Image
    "taeos1_3":       Variant(1, 16, (2, 2, 1), (1, 2, 2)),          # Open-Sora 1.3
    "taecvx":         Variant(1, 16, (2, 2, 1), (1, 2, 2)),          # CogVideoX: even latent counts are not trimmed
    "taew2_2":        Variant(2, 48, (2, 2, 1), (1, 2, 2)),          # Wan 2.2 5B
    "taew2_2_super":  Variant(2, 48, (2, 2, 1), (1, 2, 2), "super"),
    "taehv1_5":       Variant(2, 32, (2, 2, 1), (1, 2, 2)),          # Hunyuan Video 1.5
    "taehv1_5_super": Variant(2, 32, (2, 2, 1), (1, 2, 2), "super"),
    "taeltx_2":       Variant(4, 128, (2, 2, 2), (2, 2, 2)),         # LTX-2
    "taeltx2_3":      Variant(4, 128, (2, 2, 2), (2, 2, 2)),         # LTX-2.3
    "taeltx2_3_wide": Variant(4, 128, (2, 2, 2), (2, 2, 2), "wide"),
    "taeh3":          Variant(2, 24, (2, 2, 1), (1, 2, 2)),          # MiniMax H3: chunks of 17 frames <-> 5 latents
    "lighttaew2_1":   Variant(1, 16, (2, 2, 1), (1, 2, 2)),          # LightX2V's: see RELATIVES
    "lighttaew2_2":   Variant(2, 48, (2, 2, 1), (1, 2, 2)),
    "lighttaehy1_5":  Variant(2, 32, (2, 2, 1), (1, 2, 2)),
}
ENCODER_WIDTHS = (64, 64, 64, 64)
DECODER_WIDTHS = {None: (256, 128, 64, 64), "super": (512, 256, 128, 64), "wide": (1024, 512, 256, 64)}

H3_FRAMES, H3_LATENTS, H3_DROPPED = 17, 5, 3  # per chunk; the last three latents of a clip are dropped


# ---- blocks --------------------------------------------------------------------------------------------------------


def conv(n_in, n_out, **kwargs):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


def activate(name):
    """The activation of that name: "relu", or "leaky_relu" with slope 0.2."""
    return nn.LeakyReLU(0.2, inplace=True) if name == "leaky_relu" else nn.ReLU(inplace=True)


class Clamp(nn.Module):
    """Soft clamp of the latents to (-3, 3)."""

    def forward(self, x):
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Residual block that sees a frame and the one before it. x, past: (frames, C, H, W)."""

    def __init__(self, n_in, n_out, activation="relu"):
        super().__init__()
        self.conv = nn.Sequential(conv(n_in * 2, n_out), activate(activation),
                                  conv(n_out, n_out), activate(activation), conv(n_out, n_out))
        self.skip = nn.Conv2d(n_in, n_out, 1, bias=False) if n_in != n_out else nn.Identity()
        self.act = activate(activation)

    def forward(self, x, past):
        return self.act(self.conv(torch.cat([x, past], 1)) + self.skip(x))


class WideMemBlock(nn.Module):
    """The wide decoder's memory block: 3x3 convolutions in groups of 64 channels, 1x1 convolutions between them."""

    def __init__(self, n_f, activation="relu"):
        super().__init__()
        groups = max(1, n_f // 64)
        self.conv = nn.Sequential(nn.Conv2d(n_f * 2, n_f, 1), activate(activation),
                                  conv(n_f, n_f, groups=groups), activate(activation),
                                  nn.Conv2d(n_f, n_f, 1), activate(activation), conv(n_f, n_f, groups=groups))
        self.act = activate(activation)

    def forward(self, x, past):
        return self.act(self.conv(torch.cat([x, past], 1)) + x)


class SuperMemBlock(nn.Module):
    """The super decoder's memory block: 7x7 depthwise convolution, then an inverted bottleneck."""

    def __init__(self, n_f, activation="relu"):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(n_f * 2, n_f * 2, 7, padding=3, groups=n_f * 2, bias=False),
                                  nn.Conv2d(n_f * 2, n_f * 4, 1), activate(activation),
                                  nn.Conv2d(n_f * 4, n_f, 1, bias=False))

    def forward(self, x, past):
        return self.conv(torch.cat([x, past], 1)) + x


MEMORY_BLOCKS = (MemBlock, WideMemBlock, SuperMemBlock)


class TPool(nn.Module):
    """Joins `stride` consecutive frames into one: (frames, C, H, W) -> (frames / stride, C, H, W)."""

    def __init__(self, n_f, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(n_f * stride, n_f, 1, bias=False)

    def forward(self, x):
        return self.conv(torch.cat([x[i::self.stride] for i in range(self.stride)], 1))


class TGrow(nn.Module):
    """Splits one frame into `stride`: (frames, C, H, W) -> (frames * stride, C, H, W)."""

    def __init__(self, n_f, stride):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(n_f, n_f * stride, 1, bias=False)

    def forward(self, x):
        x = self.conv(x)
        if self.stride == 1:
            return x
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.stride, -1))  # F H W s C: a plain reshape would lose
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)  # the channels-last layout


# ---- the model -----------------------------------------------------------------------------------------------------


def build_encoder(patch_size, latent_channels, pooling, widths, activation):
    layers = [conv(3 * patch_size ** 2, widths[0]), activate(activation)]
    for n_in, n_out, stride in zip(widths, widths[1:], pooling):
        layers += [TPool(n_in, stride), conv(n_in, n_out, stride=2, bias=False),
                   *(MemBlock(n_out, n_out, activation) for _ in range(3))]
    return nn.Sequential(*layers, conv(widths[-1], latent_channels))


def build_decoder(patch_size, latent_channels, growth, space, widths, activation, wide=False):
    layers = [Clamp(), conv(latent_channels, widths[0]), activate(activation)]
    for n_in, n_out, time, scale in zip(widths, widths[1:], growth, space):
        blocks = (WideMemBlock(n_in, activation) if wide else MemBlock(n_in, n_in, activation) for _ in range(3))
        layers += [*blocks, nn.Upsample(scale_factor=scale), TGrow(n_in, time), conv(n_in, n_out, bias=False)]
    return nn.Sequential(*layers, activate(activation), conv(widths[-1], 3 * patch_size ** 2))


def build_super_decoder(patch_size, latent_channels, growth, space, widths, activation):
    layers = [nn.Conv2d(latent_channels, widths[0], 1, bias=False)]
    for n_in, n_out, time, scale in zip(widths, widths[1:], growth, space):
        layers += [*(SuperMemBlock(n_in, activation) for _ in range(3)), conv(n_in, n_out * scale ** 2),
                   activate(activation), nn.PixelShuffle(scale), TGrow(n_out, time)]
    return nn.Sequential(*layers, conv(widths[-1], 3 * patch_size ** 2))


class TAEHV(nn.Module):
    """One autoencoder of the family.

    variant: the name of a row of VARIANTS, for fresh weights; or the path of a weights file, which checkpoint_path
    takes too, as in the published file. Arguments that are not given are then read off the weights, as in
    `load_taehv`, and the model is in eval mode. The published TAEHV() reads "taehv.pth"; here, without a path, the
    weights are random.
    The other arguments override those of the variant or the file: patch_size, latent_channels,
    encoder_time_downscale and decoder_time_upscale (three strides or booleans; two mean "not in the first stage"),
    decoder_space_upscale (three booleans), arch_variant (None, "super" or "wide": the decoder), encoder_widths and
    decoder_widths (four channel counts each, from the first layer to the last), activation ("relu", or "leaky_relu"
    with slope 0.2), output_range ((0, 1) or (-1, 1): the range of the pixels inside; outside, video is in [0, 1]),
    scaled_latents (whether the layers see latents * latents_scale + latents_shift: for a teacher whose latents the
    soft clamp at 3 would cut. `scale_latents` sets these two buffers, which have a number for each channel).
    A decoder that upscales less than the encoder downscales gives a cheaper preview of the same latents. ValueError
    for a combination that makes no sense.
    """

    def __init__(self, variant=None, encoder_time_downscale=None, decoder_time_upscale=None, decoder_space_upscale=None,
                 patch_size=None, latent_channels=None, arch_variant=None, encoder_widths=None, decoder_widths=None,
                 activation=None, output_range=None, checkpoint_path=None, scaled_latents=None):
        given = dict(patch_size=patch_size, latent_channels=latent_channels, arch_variant=arch_variant,
                     encoder_time_downscale=encoder_time_downscale, decoder_time_upscale=decoder_time_upscale,
                     decoder_space_upscale=decoder_space_upscale, encoder_widths=encoder_widths,
                     decoder_widths=decoder_widths, activation=activation, output_range=output_range,
                     scaled_latents=scaled_latents)
        path_first = isinstance(variant, (str, os.PathLike)) and variant not in VARIANTS and os.path.isfile(variant)
        if checkpoint_path is None and path_first:
            checkpoint_path, variant = variant, None
        if checkpoint_path is not None:
            path = find_weights(checkpoint_path)
            state_dict = read_weights(path)
            found = arguments_of(state_dict, path, variant)
            TAEHV.__init__(self, **{**found, **{name: value for name, value in given.items() if value is not None}})
            put_weights(self, state_dict, path)
            self.eval()
            return
        super().__init__()
        shape = settle(variant or "taehv", **given)
        self.variant, self.patch_size, self.latent_channels = shape.variant, shape.patch_size, shape.latent_channels
        self.arch_variant, self.activation, self.output_range = shape.arch_variant, shape.activation, shape.output_range
        self.encoder_widths, self.decoder_widths = shape.encoder_widths, shape.decoder_widths
        self.frame_positions, self.image_channels = shape.frame_positions, 3
        self.time_factor, self.space_factor = math.prod(shape.pooling), 8 * self.patch_size
        self.t_downscale, self.t_upscale = self.time_factor, math.prod(shape.growth)  # the published names
        self.frames_to_trim = self.t_upscale - 1
        self.space_upscale = math.prod(shape.space) * self.patch_size
        self.is_h3, self.is_cogvideox = self.variant == "taeh3", self.variant == "taecvx"
        for name, values in (("latents_scale", shape.scale), ("latents_shift", shape.shift)):
            values = values and torch.tensor(values).view(-1, 1, 1)  # a published state_dict has neither
            self.register_buffer(name, values, persistent=shape.scaled_latents)
        self.encoder = build_encoder(self.patch_size, self.latent_channels, shape.pooling, self.encoder_widths,
                                     self.activation)
        decoder = (self.patch_size, self.latent_channels, shape.growth, shape.space, self.decoder_widths,
                   self.activation)
        self.decoder = (build_super_decoder(*decoder) if self.arch_variant == "super"
                        else build_decoder(*decoder, wide=self.arch_variant == "wide"))
        self.fresh_weights()
        self.gradient_checkpointing = False
        self.run_with_gradients = None  # set by `step_taehv.speed_up`: runs instead of `run_blocks` in training
        self.config = config_of(shape)

    def forward(self, video):
        """Returns (reconstruction N T' 3 H W, {"latents": ...}); compare it with `targets(video)`."""
        latents = self.encode(video)
        return self.decode(latents), {"latents": latents}

    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T' C H/s W/s. ValueError if H or W is no multiple of s."""
        if video.ndim != 5 or video.shape[2] != 3 or 0 in (video.shape[0], *video.shape[3:]):
            raise ValueError(f"expected video as N T 3 H W, got shape {tuple(video.shape)}")
        check_floats(video)
        if any(size % self.space_factor for size in video.shape[-2:]):
            raise ValueError(f"height and width must be multiples of {self.space_factor}, got "
                             f"{video.shape[-2]}x{video.shape[-1]}: crop, or pad with torch.nn.functional.pad")
        return self._encode(video)

    def decode(self, latents):
        """Latents N T C h w -> video N T' 3 s*h s*w, clamped to [0, 1] except in training mode."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise ValueError(f"expected latents as N T {self.latent_channels} H W, got shape {tuple(latents.shape)}")
        check_floats(latents)
        video = self._decode(latents)
        return video if self.training else video.clamp(0, 1)

    def _encode(self, video, progress=None):
        n, frames = video.shape[:2]
        if frames == 0:
            raise ValueError("a clip of 0 frames cannot be encoded")
        chunk = H3_FRAMES if self.is_h3 else self.time_factor
        if frames % chunk:  # pad with the last frame
            video = torch.cat([video, video[:, -1:].expand(-1, -frames % chunk, -1, -1, -1)], 1)
        if self.is_h3:  # every chunk is a clip of its own, led by three black frames
            lead = H3_LATENTS * self.time_factor - H3_FRAMES
            video = F.pad(video.unflatten(1, (-1, chunk)).flatten(0, 1), (0, 0, 0, 0, 0, 0, lead, 0))
        latents = self._normalised(self._run(self.encoder, self._unshuffle(video), progress=progress))
        if self.is_h3:
            latents = latents.unflatten(0, (n, -1)).flatten(1, 2)[:, :-H3_DROPPED]
        return latents

    def _decode(self, latents, progress=None):
        video = self._run(self.decoder, self._own(latents), progress=progress)
        if self.is_h3:
            size = H3_LATENTS * self.t_upscale
            video = F.pad(video, (0, 0, 0, 0, 0, 0, 0, -video.shape[1] % size))
            video = video.unflatten(1, (-1, size))[:, :, self.frames_to_trim:].flatten(1, 2)
            video = video[:, :video.shape[1] - H3_DROPPED * self.t_upscale]
        elif not (self.is_cogvideox and latents.shape[1] % 2 == 0):
            video = video[:, self.frames_to_trim:]
        return self._shuffle(video)

    def _run(self, blocks, x, memory=None, progress=None):
        if self.run_with_gradients and torch.is_grad_enabled() and memory is None and progress is None:
            return self.run_with_gradients(blocks, x, self.gradient_checkpointing)
        return run_blocks(blocks, x, memory, self.gradient_checkpointing and torch.is_grad_enabled(), progress)

    def _frames(self, blocks, x, memory):
        """Like `_run`, but yields the frames one by one, N 1 C H W."""
        yield from self._run(blocks, x, memory).split(1, 1)

    # Conversions at the borders of the layers: from pixels in [0, 1] to the encoder's input, and back from the
    # decoder's output; from the encoder's latents to the diffusion model's, and back to the decoder's.

    def _unshuffle(self, video):
        video = video * 2 - 1 if self.output_range == (-1, 1) else video
        return F.pixel_unshuffle(video, self.patch_size) if self.patch_size > 1 else video

    def _shuffle(self, video):
        video = F.pixel_shuffle(video, self.patch_size) if self.patch_size > 1 else video
        return (video + 1) / 2 if self.output_range == (-1, 1) else video

    def _normalised(self, latents):
        return latents if self.latents_scale is None else (latents - self.latents_shift) / self.latents_scale

    def _own(self, latents):
        return latents if self.latents_scale is None else latents * self.latents_scale + self.latents_shift

    def scale_latents(self, mean, deviation):
        """From now on the layers see latents scaled to mean 0 and deviation 1. mean, deviation: those of the latents
        that come in, two lists of `latent_channels` numbers. ValueError if the variant has a scale of its own."""
        if self.latents_scale is not None and not self.config.get("scaled_latents"):
            raise ValueError(f"variant {self.variant} has a scale of its latents already")
        mean, deviation = (torch.as_tensor(values, dtype=torch.float32).view(self.latent_channels, 1, 1)
                           for values in (mean, deviation))
        self.register_buffer("latents_scale", 1 / deviation)
        self.register_buffer("latents_shift", -mean / deviation)
        self.config["scaled_latents"] = True

    def fresh_weights(self):
        """Draw new random weights (`draw_weights`); init_taehv.py turns them into a better start."""
        draw_weights(self.encoder, self.decoder, grey=0.5 if self.output_range == (0, 1) else 0.0)

    # ---- frame counts and alignment: here, and nowhere else --------------------------------------------------------

    def check_frames(self, frames):
        """ValueError if the big VAE of these latents does not take clips of `frames` frames."""
        if self.is_cogvideox:
            check_cogvideox_frames(frames)

    def latent_frames(self, frames):
        """How many latents `frames` input frames give."""
        if self.is_h3:
            return H3_LATENTS * math.ceil(frames / H3_FRAMES) - H3_DROPPED
        return math.ceil(frames / self.time_factor)

    def frame_index(self, frames, latents=None):
        """For each output frame of a clip of `frames` frames, the input frame (from 0) that it stands for.

        Numbers past the clip's end (H3 and CogVideoX give such frames) stand for repetitions of its last frame.
        `latents`: how many latents are decoded; None: as many as `encode` makes of `frames` frames.
        """
        latents = latents or self.latent_frames(frames)
        positions = [self.time_factor * k + p for k in range(latents) for p in self.frame_positions]
        if self.is_h3:
            chunk = H3_LATENTS * self.time_factor  # 3 blank frames and 17 of the clip
            positions = [self.time_factor * k + p for k in range(-(-latents // H3_LATENTS) * H3_LATENTS)
                         for p in self.frame_positions]
            size = H3_LATENTS * self.t_upscale
            kept = [p for i, p in enumerate(positions) if i % size >= self.frames_to_trim]
            kept = kept[:len(kept) - H3_DROPPED * self.t_upscale]
            return [p // chunk * H3_FRAMES + p % chunk - (chunk - H3_FRAMES) for p in kept]
        if self.is_cogvideox and latents % 2 == 0:
            return positions
        return [p - (self.time_factor - 1) for p in positions[self.frames_to_trim:]]

    def aligned(self, frames, latents):
        """How `latents` latents that a teacher made of `frames` frames line up with this model's, as two counts.

        The first: how many of the teacher's latents, from the start, `encode` should reproduce (latent k of the family
        ends with input frame k * time_factor, as in causal video VAEs). The second: how many frames of
        `decode(teacher's latents)`, from the start, stand for input frames, which are `targets(video)[:, :count]`.
        A teacher that repeats the last frame to fill up a group (12 frames as 13) may give one latent more than
        `encode`. ValueError for counts that do not belong together, or that the big VAE does not take.
        """
        self.check_frames(frames)
        own = self.latent_frames(frames)
        repeats_last = latents == own + 1 and own * self.time_factor == frames and not self.is_cogvideox
        if latents != own and not repeats_last:
            raise ValueError(f"the teacher gives {latents} latents for {frames} frames, and variant {self.variant} "
                             f"{own}: they do not belong together")
        return own, sum(i < frames for i in self.frame_index(frames, latents))

    def targets(self, video, latents=None):
        """The frames that `forward(video)` reconstructs: N T C H W -> N T' C H' W' (a view where possible).

        12 frames give the first 9. For a preview decoder these are fewer or smaller frames too (averaged by area).
        `latents`: how many latents are decoded; None: as many as `encode` makes of the video.
        """
        index = self.frame_index(video.shape[1], latents)
        if index == list(range(len(index))) and len(index) <= video.shape[1]:
            target = video[:, :len(index)]
        else:
            # Stacked, since indexing by a list makes the host wait for the GPU.
            target = torch.stack([video[:, min(i, video.shape[1] - 1)] for i in index], 1)
        if self.space_upscale != self.space_factor:
            size = [s * self.space_upscale // self.space_factor for s in video.shape[-2:]]
            target = F.interpolate(target.flatten(0, 1), size=size, mode="area").unflatten(0, target.shape[:2])
        return target

    # ---- piece by piece, and the published calls -------------------------------------------------------------------

    def stream(self, memory_limit=None, total_latents=None):
        """A TAEHVStream: the same results, piece by piece. See there for `memory_limit` (bytes) and `total_latents`."""
        return TAEHVStream(self, memory_limit, total_latents)

    def encode_video(self, x, parallel=True, show_progress_bar=True):
        """The published call: like `encode`, but takes any height and width that the patch size divides.

        parallel=False runs a few frames at a time, in memory that does not grow with the clip, and without gradients.
        """
        return self._published(x, self._encode, TAEHVStream.encode, TAEHVStream.flush_encoder, parallel,
                               show_progress_bar)

    def decode_video(self, x, parallel=True, show_progress_bar=True):
        """The published call: like `decode`, but always clamped to [0, 1]; parallel as in `encode_video`."""
        return self._published(x, self._decode, TAEHVStream.decode, TAEHVStream.flush_decoder, parallel,
                               show_progress_bar).clamp(0, 1)

    def _published(self, x, whole, step, flush, parallel, show_progress_bar):
        if x.ndim != 5:
            raise ValueError(f"TAEHV takes N T C H W tensors, got {x.ndim} dimensions")
        if not x.shape[1]:
            raise ValueError("a clip of 0 frames cannot be encoded, nor decoded")
        bar = None
        if show_progress_bar:
            from tqdm.auto import tqdm as bar
        if parallel:
            return whole(x, progress=bar).contiguous()
        stream = TAEHVStream(self, total_latents=x.shape[1])
        pieces = [step(stream, frame) for frame in (bar or iter)(x.split(1, 1))]
        return torch.cat([*pieces, flush(stream)], 1)


def check_floats(x):
    if not x.is_floating_point():
        raise ValueError(f"expected floats, video in [0, 1], got {x.dtype}: divide the bytes of a video by 255")


def running_order(blocks):
    """[(index, block)] in the order to run: temporal growth goes before upsampling (same results, less work)."""
    order = list(enumerate(blocks))
    for i in range(len(order) - 1):
        if isinstance(blocks[i], nn.Upsample) and isinstance(blocks[i + 1], TGrow):
            order[i], order[i + 1] = order[i + 1], order[i]
    return order


def run_blocks(blocks, video, memory=None, checkpointing=False, progress=None):
    """Run encoder or decoder blocks over N T C H W frames; returns N T' C' H' W'.

    `memory`, a dict that is filled in place, holds the last input frame of every memory block, N C H W, so that a later
    call can run the next piece of the same clips. None or empty: the clips begin here, after a frame of zeros.
    """
    n = video.shape[0]
    x = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    # Between memory blocks, layers see single frames (a pool: one group of frames). On a CPU without gradients such a
    # stretch of layers runs piece by piece, so that full-size maps of 64 channels exist for one or two frames, not all.
    piecewise = not torch.is_grad_enabled() and x.device.type == "cpu"
    stretches = []
    for i, block in running_order(blocks):
        if stretches and not any(isinstance(b, MEMORY_BLOCKS) for b in (block, stretches[-1][1][-1])):
            stretches[-1][1].append(block)
        else:
            stretches.append((i, [block]))
    for i, stretch in stretches if progress is None else progress(stretches):
        block = stretch[0]
        if isinstance(block, MEMORY_BLOCKS):
            first = memory.get(i) if memory else None
            if first is None:
                first = torch.zeros_like(x[:n])  # channels-last as x is, or the concatenations below lose the layout
            t = x.shape[0] // n
            past = torch.cat([p for k in range(n) for p in (first[k:k + 1], x[k * t:(k + 1) * t - 1])])
            if memory is not None:
                memory[i] = x[t - 1::t]
            x = checkpoint(block, x, past, use_reentrant=False) if checkpointing else block(x, past)
        else:
            unit = math.prod(b.stride for b in stretch if isinstance(b, TPool)) if piecewise else len(x)
            pieces = []
            for piece in x.split(unit):
                for block in stretch:
                    piece = block(piece)
                pieces.append(piece)
            x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return x.unflatten(0, (n, -1))


def draw_weights(encoder, decoder, grey):
    """Draw random weights with which all layers keep a signal's size (He et al. 2015; PyTorch's default shrinks it to
    a hundredth over the encoder). At first memory blocks pass on their input, and output pixels are around `grey`."""
    for blocks in (encoder, decoder):
        for layer, following in zip(blocks, [*blocks[1:], None]):
            block = isinstance(layer, MEMORY_BLOCKS)
            for module in layer.modules():
                if isinstance(module, nn.Conv2d):
                    gain = 2 if block or isinstance(following, (nn.ReLU, nn.LeakyReLU)) else 1
                    nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            if block:
                nn.init.zeros_(layer.conv[-1].weight)
    nn.init.constant_(decoder[-1].bias, grey)  # as the published training notebook starts


# ---- streaming -----------------------------------------------------------------------------------------------------


class TAEHVStream:
    """Encodes and decodes clips piece by piece, however the pieces are cut.

        stream = model.stream()
        for frames in pieces:                      # N t 3 H W, any t
            show(stream.decode(stream.encode(frames)))
        show(stream.flush())

    The stream works on fixed groups of frames, counted from the clip's start, so the results are bit for bit the same
    however the pieces are cut. `encode` and `decode` return what is complete so far, possibly N 0 C H W. A group is one
    latent, or as many as keep the activations under about `memory_limit` bytes (larger groups keep a GPU busy; on a CPU
    one is fastest). Memory does not grow with the clip, with one exception: CogVideoX (taecvx) trims its first frames
    only if the number of latents is odd, so a stream that was not told `total_latents` keeps all latents until `flush`.
    """

    def __init__(self, model, memory_limit=None, total_latents=None):
        self.model, self.memory_limit = model, memory_limit
        self.total_latents = self._total_given = total_latents
        self._frames, self._latents = [], []   # input that waits for a full group, as pieces N t C H W
        self._last_frame = None
        self._encoder_memory, self._decoder_memory = {}, {}
        self._held_latents, self._held_frames = None, []  # H3 drops its last outputs, so the newest are held back
        self._empty_latents = self._empty_frames = None
        self._decoded = 0                      # raw decoder frames so far
        self._decoding = False

    def _group(self, height, width, itemsize):
        if self.memory_limit is None:
            return 1
        width = width * max(self.model.encoder_widths[0], self.model.decoder_widths[-1])
        frame = 4 * itemsize * height * width // self.model.patch_size ** 2  # about four live maps of full size
        return max(1, int(self.memory_limit // (frame * self.model.time_factor)))

    @torch.no_grad()
    def encode(self, frames):
        """Take N t 3 H W frames, return the latents N t' C h w that are complete. ValueError for another shape, or
        another size than before."""
        model = self.model
        before = self._last_frame
        if frames.ndim != 5 or frames.shape[2] != 3 or before is not None and frames[:, :1].shape != before.shape:
            raise ValueError(f"expected frames as N T 3 H W{'' if before is None else ', of the size before'}, got "
                             f"{tuple(frames.shape)}")
        check_floats(frames)
        if self._empty_latents is None:
            n, _, _, *size = frames.shape
            size = [side // model.patch_size for side in size]
            for _ in range(3):  # as the stride-2 convolutions round; multiples of space_factor come out exact
                size = [-(-side // 2) for side in size]
            self._empty_latents = frames.new_empty(n, 0, model.latent_channels, *size)
        if frames.shape[1]:
            self._frames.append(frames)
            self._last_frame = frames[:, -1:]
        group = H3_FRAMES if model.is_h3 else model.time_factor * self._group(*frames.shape[-2:], frames.element_size())
        return join(self._empty_latents, [self._encode_group(piece) for piece in take(self._frames, group)])

    def _encode_group(self, frames):
        model = self.model
        if not model.is_h3:
            return model._normalised(model._run(model.encoder, model._unshuffle(frames), self._encoder_memory))
        lead = H3_LATENTS * model.time_factor - H3_FRAMES
        latents = model._run(model.encoder, model._unshuffle(F.pad(frames, (0, 0, 0, 0, 0, 0, lead, 0))))
        if self._held_latents is not None:
            latents = torch.cat([self._held_latents, latents], 1)
        self._held_latents = latents[:, -H3_DROPPED:]
        return latents[:, :-H3_DROPPED]

    @torch.no_grad()
    def flush_encoder(self):
        """End of the clip: pad the last group with the last frame, return the remaining latents."""
        if self._last_frame is None:
            return self._empty_latents
        done = []
        if self._frames:
            rest = torch.cat(self._frames, 1)
            chunk = H3_FRAMES if self.model.is_h3 else self.model.time_factor
            pad = self._last_frame.expand(-1, -rest.shape[1] % chunk, -1, -1, -1)
            done.append(self._encode_group(torch.cat([rest, pad], 1)))
        self._frames, self._last_frame, self._encoder_memory = [], None, {}
        return join(self._empty_latents, done)

    @torch.no_grad()
    def decode(self, latents):
        """Take N t C h w latents, return the frames N t' 3 H W that are complete, in [0, 1]."""
        done = [*self.frames(latents)]
        return join(self._empty_frames, done)

    @torch.no_grad()
    def frames(self, latents):
        """Like `decode`, but yields frames N 1 3 H W one by one, so that they never all exist. Exhaust the iterator."""
        n, _, _, h, w = latents.shape
        self._decoding = True
        if self._empty_frames is None:
            self._empty_frames = latents.new_empty(n, 0, 3, h * self.model.space_upscale, w * self.model.space_upscale)
        if latents.shape[1]:
            self._latents.append(latents)
        if not self.model.is_cogvideox or self.total_latents is not None:
            yield from self._waiting_frames()

    def _waiting_frames(self):
        height, width = self._empty_frames.shape[-2:]
        scale = self.model.space_factor // self.model.space_upscale
        group = self._group(height * scale, width * scale, self._empty_frames.element_size())
        for piece in take(self._latents, group):
            yield from self._decode_group(piece)

    def _decode_group(self, latents):
        model, trim = self.model, self.model.frames_to_trim
        for frame in model._frames(model.decoder, model._own(latents), self._decoder_memory):
            position, self._decoded = self._decoded, self._decoded + 1
            if model.is_h3:
                if position % (H3_LATENTS * model.t_upscale) < trim:
                    continue
                self._held_frames.append(frame)
                if len(self._held_frames) <= H3_DROPPED * model.t_upscale:
                    continue
                frame = self._held_frames.pop(0)
            elif position < trim and not (model.is_cogvideox and self.total_latents % 2 == 0):
                continue
            yield model._shuffle(frame).clamp(0, 1)

    @torch.no_grad()
    def flush_decoder(self):
        """End of the clip: return the remaining frames."""
        if self._empty_frames is None:
            return None
        model, done = self.model, []
        if model.is_cogvideox and self.total_latents is None:
            self.total_latents = sum(piece.shape[1] for piece in self._latents)
            done += self._waiting_frames()
        if self._latents:
            done += self._decode_group(torch.cat(self._latents, 1))
            self._latents = []
        if self._held_frames:  # as published: blank frames fill the last chunk, then 3 latents' frames are dropped
            blank = -self._decoded % (H3_LATENTS * model.t_upscale) - H3_DROPPED * model.t_upscale
            held, self._held_frames = torch.cat(self._held_frames, 1), []
            held = F.pad(held, (0, 0, 0, 0, 0, 0, 0, blank)) if blank > 0 else held[:, :held.shape[1] + blank]
            done.append(model._shuffle(held).clamp(0, 1))
        return join(self._empty_frames, done)

    def flush(self):
        """End of the clip: the remaining frames if this stream was decoding, else the remaining latents. The stream is
        as new afterwards. ValueError if nothing was streamed."""
        if self._empty_latents is None and self._empty_frames is None:
            raise ValueError("flush() of a stream that was given nothing")
        rest = self.flush_encoder()
        if self._decoding:
            frames = [] if rest is None else [self.decode(rest)]
            rest = torch.cat([*frames, self.flush_decoder()], 1)
        self.__init__(self.model, self.memory_limit, self._total_given)
        return rest


class StreamingTAEHV(nn.Module):
    """The published wrapper for live video, one frame or latent out at a time. Decoding a world model's latents:

        streaming = StreamingTAEHV(model)
        frame = streaming.decode(latent)           # N 1 3 H W in [0, 1], or None if there is none yet
        while frame is not None:
            show(frame)
            frame = streaming.decode()             # the latent's other frames

    Video to video: `streaming.decode(streaming.encode(frame))` for each frame, then `streaming.flush()`. As published,
    nothing is trimmed for CogVideoX. What differs: no gradients, and H3's chunks are those of `encode` and `decode`.
    """

    def __init__(self, taehv):
        super().__init__()
        self.taehv = taehv
        self.reset()

    def __getstate__(self):  # copy.deepcopy and pickle cannot copy a generator: make its frames now
        self._pending = iter([*self._pending])
        return self.__dict__.copy()

    def reset(self):
        """Forget everything: the next frame or latent begins a new clip."""
        self._stream = TAEHVStream(self.taehv, total_latents=0)  # an even number: CogVideoX is not trimmed
        self._frames, self._latents = [], []         # what waits to be encoded and decoded, each T = 1
        self._encoded, self._pending = [], iter(())  # what waits to be handed out
        self._last_frame, self.n_frames_encoded = None, 0

    @property
    def n_frames_decoded(self):
        """Number of frames that the decoder has made, including the first ones, which are dropped."""
        return self._stream._decoded

    def encode(self, x=None):
        """Take N T 3 H W frames in [0, 1], any T, or None; return the next latent, N 1 C h w, or None if it needs more
        frames."""
        if x is not None:
            if x.ndim != 5 or x.shape[2] != 3:
                raise ValueError(f"expected frames as N T 3 H W, got shape {tuple(x.shape)}")
            self._frames += x.split(1, 1)
            self._last_frame = x[:, -1:]
            self.n_frames_encoded += x.shape[1]
        while self._frames and not self._encoded:
            latents = self._stream.encode(self._frames.pop(0))
            self._encoded += latents.split(1, 1) if latents.shape[1] else []
        return self._encoded.pop(0) if self._encoded else None

    def decode(self, x=None):
        """Take N T C h w latents, any T, or None; return the next frame, N 1 3 H W in [0, 1], or None if it needs more
        latents."""
        if x is not None:
            if x.ndim != 5 or x.shape[2] != self.taehv.latent_channels:
                raise ValueError(f"expected latents as N T {self.taehv.latent_channels} H W, got shape "
                                 f"{tuple(x.shape)}")
            self._latents += x.split(1, 1)
        frame = next(self._pending, None)
        while frame is None and self._latents:
            self._pending = self._stream.frames(self._latents.pop(0))
            frame = next(self._pending, None)
        return frame

    def flush_encoder(self):
        """Fill up the last group with the last frame; return the remaining latents, a list of N 1 C h w."""
        group = H3_FRAMES if self.taehv.is_h3 else self.taehv.time_factor
        latents = [self.encode(self._last_frame) for _ in range(-self.n_frames_encoded % group)]
        return [latent for latent in latents if latent is not None] + [*iter(self.encode, None)]

    def flush_decoder(self):
        """Return the remaining frames, a list of N 1 3 H W."""
        frames = [*iter(self.decode, None)]
        rest = self._stream.flush_decoder() if self.taehv.is_h3 else None
        return frames + ([] if rest is None or not rest.shape[1] else [*rest.split(1, 1)])

    def flush(self):
        """End of the clip: encode and decode what is left; return the remaining frames, a list of N 1 3 H W."""
        frames = [self.decode(latent) for latent in self.flush_encoder()]
        return [frame for frame in frames if frame is not None] + self.flush_decoder()


def take(pieces, size):
    """Yield pieces of `size` frames, cut off the front of a list of N t C H W; the rest stays in the list."""
    while sum(piece.shape[1] for piece in pieces) >= size:
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        pieces[:] = [joined[:, size:]] if joined.shape[1] > size else []
        yield joined[:, :size]


def join(empty, pieces):
    """The pieces N t C H W as one tensor; `empty`, N 0 C H W, if there are none."""
    return pieces[0] if len(pieces) == 1 else torch.cat([empty, *pieces], 1)


# ---- arguments -----------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """All arguments of a TAEHV: those that were given, and the row of VARIANTS for the others."""
    variant: str
    patch_size: int
    latent_channels: int
    pooling: tuple
    growth: tuple
    space: tuple            # factor by which each of the decoder's stages enlarges height and width
    arch_variant: str
    encoder_widths: tuple   # channels, from the first layer to the last
    decoder_widths: tuple
    activation: str
    output_range: tuple     # range of the pixels that the layers see
    scale: list             # the layers see latents * scale + shift, channel by channel; None: the latents themselves
    shift: list
    scaled_latents: bool    # whether scale and shift are saved with the weights, not given by the variant
    frame_positions: list   # which of the time_factor frames that a latent stands for the decoder gives (in a preview,
                            # not all)


def settle(variant, patch_size, latent_channels, encoder_time_downscale, decoder_time_upscale, decoder_space_upscale,
           arch_variant, encoder_widths, decoder_widths, activation, output_range, scaled_latents=None):
    """The Shape for these arguments of TAEHV; ValueError for a combination that makes no sense."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown TAEHV variant or file {str(variant)!r}{nearest(variant, VARIANTS)}; there are "
                         f"{', '.join(VARIANTS)}, and paths of weights")
    row, relative = VARIANTS[variant], RELATIVES.get(variant, {})
    patch_size, latent_channels = patch_size or row.patch_size, latent_channels or row.latent_channels
    for name, value in (("patch_size", patch_size), ("latent_channels", latent_channels)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r}: a whole number from 1 on is wanted")
    pooling = strides(encoder_time_downscale, "encoder_time_downscale") or row.pooling
    growth = strides(decoder_time_upscale, "decoder_time_upscale") or row.growth
    space = strides(decoder_space_upscale, "decoder_space_upscale") or (2, 2, 2)
    arch_variant = arch_variant or row.arch_variant
    if arch_variant not in DECODER_WIDTHS:
        raise ValueError(f"unknown arch_variant {arch_variant!r}; there are None, 'super' and 'wide'")
    encoder_widths = widths_of(encoder_widths, "encoder_widths") or ENCODER_WIDTHS
    decoder_widths = widths_of(decoder_widths, "decoder_widths") or DECODER_WIDTHS[arch_variant]
    if arch_variant == "wide" and any(n > 64 and n % (n // 64) for n in decoder_widths[:3]):
        raise ValueError(f"decoder_widths {decoder_widths}: a wide decoder has groups of 64 channels, so that "
                         "multiples of 64 are wanted")
    activation = activation or relative.get("activation", "relu")
    if activation not in ("relu", "leaky_relu"):
        raise ValueError(f"unknown activation {activation!r}; there are 'relu' and 'leaky_relu'")
    output_range = output_range or relative.get("output_range", (0, 1))
    output_range = tuple(output_range) if isinstance(output_range, list) else output_range
    if output_range not in ((0, 1), (-1, 1)):
        raise ValueError(f"output_range {output_range}: (0, 1) or (-1, 1) is wanted")
    scale, shift = relative.get("deviation"), relative.get("mean")
    if scale and len(scale) != latent_channels:
        raise ValueError(f"variant {variant} has {len(scale)} latent channels, not {latent_channels}")
    if scaled_latents not in (None, True, False):
        raise ValueError(f"scaled_latents={scaled_latents!r}: true or false is wanted")
    if scale and scaled_latents:
        raise ValueError(f"variant {variant} has a scale of its latents already: leave out scaled_latents")
    if scaled_latents:
        scale, shift = [1.0] * latent_channels, [0.0] * latent_channels
    time_factor = math.prod(pooling)
    # A preview decoder switches off some strides of `full`, and gives the last frame of each group it does not split.
    full = growth if math.prod(growth) == time_factor else row.growth
    if math.prod(full) != time_factor or any(g > f for g, f in zip(growth, full)):
        raise ValueError(f"the encoder joins {time_factor} frames into a latent, which decoder_time_upscale {growth} "
                         f"cannot undo: the strides must multiply to {time_factor}, or switch off some of {row.growth} "
                         "for a preview")
    frame_positions = [0]
    for g, f in zip(growth, full):
        frame_positions = [p * f + k for p in frame_positions for k in range(f - g, f)]
    return Shape(variant, patch_size, latent_channels, pooling, growth, space, arch_variant, encoder_widths,
                 decoder_widths, activation, output_range, scale, shift, bool(scaled_latents), frame_positions)


def config_of(shape):
    """The arguments of TAEHV that give this Shape, as values that JSON can hold."""
    config = dict(variant=shape.variant, patch_size=shape.patch_size, latent_channels=shape.latent_channels,
                  encoder_time_downscale=list(shape.pooling), decoder_time_upscale=list(shape.growth),
                  decoder_space_upscale=[s == 2 for s in shape.space], arch_variant=shape.arch_variant)
    # Only values that differ from the variant's. Older checkpoints, from before these arguments, have none of them.
    relative = RELATIVES.get(shape.variant, {})
    for name, default in (("encoder_widths", ENCODER_WIDTHS), ("decoder_widths", DECODER_WIDTHS[shape.arch_variant]),
                          ("activation", relative.get("activation", "relu")),
                          ("output_range", relative.get("output_range", (0, 1))), ("scaled_latents", False)):
        value = getattr(shape, name)
        if value != default:
            config[name] = list(value) if isinstance(value, tuple) else value
    return config


def strides(value, name):
    """(True, True, False) or (2, 2, 1) or two values for the last two stages -> three strides; None stays None."""
    if value is None:
        return None
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    value = tuple(2 if v is True else 1 if v is False else v for v in value)
    value = (1, *value) if len(value) == 2 else value
    if len(value) != 3 or any(v not in (1, 2) for v in value):
        raise ValueError(f"{name} takes three booleans or strides of 1 and 2, got {value}")
    return value


def widths_of(value, name):
    """Four channel counts; None stays None."""
    if value is None:
        return None
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(value) != 4 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in value):
        raise ValueError(f"{name} takes four channel counts, such as {','.join(map(str, ENCODER_WIDTHS))}; got {value}")
    return value


def check_cogvideox_frames(frames):
    """ValueError for a number of frames that CogVideoX's VAE does not take: it takes 8k and 8k + 1.

    It halves time twice. An odd number keeps its first frame alone, as Wan's VAE does: 9 frames give latents of frame
    0, frames 1-4 and 5-8. An even number is halved from the start: 8 frames give latents of frames 0-3 and 4-7. Its
    decoder goes by the number of latents alone, so that 12 frames (latents of 0-3, 4-7 and 8-11) come back as 9 frames
    that are up to three frames off. Measured on diffusers' AutoencoderKLCogVideoX, one input frame perturbed at a time.
    """
    if frames % 8 > 1:
        lower = frames // 8 * 8 + 1
        raise ValueError(f"CogVideoX's VAE takes 8k or 8k + 1 frames, say {lower} or {lower + 7}, not {frames}")


# ---- loading -------------------------------------------------------------------------------------------------------


def load_taehv(path, variant=None, **overrides):
    """Build the TAEHV that a .pth or .safetensors file of plain weights describes; runs no code from the file.

    `path`: a file, or a name in PUBLISHED (see `published_weights`). `variant` decides where shapes cannot (see
    `recognise`); `overrides` are TAEHV's other arguments, say decoder_time_upscale=(False, False) for a preview.
    ValueError if the weights do not fit; OSError if they cannot be read or downloaded.
    """
    path = find_weights(path)
    state_dict = read_weights(path)
    model = TAEHV(**{**arguments_of(state_dict, path, variant), **overrides})
    put_weights(model, state_dict, path)
    return model.eval()


def read_weights(path):
    """The state_dict in a .pth or .safetensors file; runs no code from it."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file  # pip install safetensors
        return load_file(path)
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state_dict, dict) and "model_config" in state_dict:
        raise ValueError(f"{path} is a checkpoint of a run: load the model.pth beside it")
    return state_dict


def read_about(path):
    """{"model_name": ..., "model_config": {...}} from the metadata of a .safetensors file that export.py wrote; {} for
    other files. ValueError if the model_config is no JSON object."""
    if not path.endswith(".safetensors"):
        return {}
    from safetensors import safe_open  # pip install safetensors
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if not {"model_name", "model_config"} <= about.keys():
        return {}
    try:
        config = json.loads(about["model_config"][:1 << 20])
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: model_config in its metadata is no JSON object")
    return {"model_name": about["model_name"], "model_config": config}


def arguments_of(state_dict, path, variant=None):
    """The arguments that `recognise` finds, but with the given variant, or else the one in the file's metadata.
    ValueError if the weights cannot be of that variant."""
    arguments, told = recognise(state_dict, path), {}
    about = {} if variant else read_about(path)
    if about.get("model_name") == "taehv":
        told = about["model_config"]  # its shape may differ from the variant's
        arguments.update({key: told[key] for key in ("activation", "output_range") if key in told})
        variant = str(told.get("variant", "taehv"))
    if variant is not None:
        names = "patch_size", "latent_channels", "encoder_time_downscale", "decoder_time_upscale", "arch_variant"
        found, usual = tuple(arguments[name] for name in names), VARIANTS.get(variant)
        wanted = [told.get(name, value) for name, value in zip(names, usual or found)]
        if usual and tuple(tuple(value) if isinstance(value, list) else value for value in wanted) != found:
            raise ValueError(f"these weights (patch size {found[0]}, {found[1]} latent channels, {found[4] or 'plain'} "
                             f"decoder) are not of variant {variant}")
        arguments["variant"] = variant
    return arguments


def put_weights(model, state_dict, path):
    """Load weights into a model, which may have a preview decoder. ValueError, naming the file, if they do not fit."""
    adapted, own = adapt_state_dict(state_dict, model), model.state_dict()
    problems = [f"{k} is {tuple(adapted[k].shape)}, not {tuple(own[k].shape)}"
                for k in own if k in adapted and adapted[k].shape != own[k].shape]
    problems += [f"{k} is missing" for k in own if k not in adapted]
    problems += [f"{k} is unknown" for k in adapted if k not in own]
    if problems:
        raise ValueError(f"{path} does not fit TAEHV variant {model.variant}: {problems[0]}"
                         + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    model.load_state_dict(adapted)


def recognise(state_dict, name=""):
    """The TAEHV arguments that fit a state_dict, from its names and shapes: {"variant": ..., "patch_size": ..., ...}.

    The weights of some variants look alike (`look_alikes`). Then `name`, the file's path, decides: the last part of it
    that contains the name of a variant. If none does, the first fitting row of VARIANTS is taken. ValueError if these
    are no TAEHV weights.
    """
    def shape(key):
        if key not in state_dict:
            raise ValueError(f"no TAEHV weights: {key} is missing")
        return state_dict[key].shape

    arch = "super" if "decoder.0.weight" in state_dict else None
    if arch is None and shape("decoder.3.conv.0.weight")[-1] == 1:
        arch = "wide"
    patch = math.isqrt(shape("encoder.0.weight")[1] // 3)
    channels = shape("encoder.17.weight")[0]
    pooling = tuple(shape(f"encoder.{i}.conv.weight")[1] // shape(f"encoder.{i}.conv.weight")[0] for i in (2, 7, 12))
    grow = [f"decoder.{i}.conv.weight" for i in ((7, 14, 21) if arch == "super" else (7, 13, 19))]
    growth = tuple(shape(key)[0] // shape(key)[1] for key in grow)
    encoder_widths = tuple(shape(f"encoder.{i}.weight")[0] for i in (0, 3, 8, 13))
    decoder_widths = ((shape("decoder.0.weight")[0], *(shape(key)[1] for key in grow)) if arch == "super"
                      else (*(shape(key)[1] for key in grow), shape("decoder.20.weight")[0]))
    found = dict(patch_size=patch, latent_channels=channels, encoder_time_downscale=pooling,
                 decoder_time_upscale=growth, arch_variant=arch, encoder_widths=encoder_widths,
                 decoder_widths=decoder_widths)
    if "latents_scale" in state_dict:
        found["scaled_latents"] = True
    fitting = [v for v, row in VARIANTS.items() if row == (patch, channels, pooling, growth, arch)]
    named = []
    for part in reversed(os.path.normpath(name).split(os.sep)):  # the file's name decides, then the folder's, ...
        plain = "".join(filter(str.isalnum, part.lower()))  # LightX2V also writes lighttae_hy1_5
        named = named or [v for v in sorted(fitting, key=len, reverse=True) if v.replace("_", "") in plain]
    return dict(variant=(named or fitting or ["taehv"])[0], **found)


def look_alikes(variant):
    """The other variants whose weights have the same names and shapes: a file's name or `variant=` tells them apart."""
    return [v for v, row in VARIANTS.items() if row == VARIANTS[variant] and v != variant]


def adapt_state_dict(state_dict, model):
    """Fit published weights to a preview decoder: where the model grows time less, take the weights of the last frame
    (as the published code does); where a super decoder enlarges space less, average the sub-pixels."""
    adapted = dict(state_dict)
    for key, own in model.state_dict().items():
        given = adapted.get(key)
        if given is None or given.shape == own.shape or not key.startswith("decoder."):
            continue
        layer = model.decoder[int(key.split(".")[1])]
        if given.shape[0] % own.shape[0] == 0 and given.shape[1:] == own.shape[1:]:
            if isinstance(layer, TGrow):
                adapted[key] = given[-own.shape[0]:]
            elif model.arch_variant == "super" and given.shape[0] == 4 * own.shape[0]:
                adapted[key] = given.unflatten(0, (-1, 4)).mean(1)
    return adapted


def nearest(word, known):
    """For a message: " (did you mean ...?)" with the known word that is most like this one, or ""."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Facts about LightX2V's weights that shapes do not tell (github.com/ModelTC/LightX2V: tae.py, vae_tiny.py,
# lighttae_hy15.py): the activation, the range of the pixels, and the mean and deviation of the big VAE's raw latents.
# LightX2V's models were trained on the raw latents, the others of the family on the diffusion model's, which are
# (raw - mean) / deviation. ComfyUI multiplies lighttaehy1_5's latents by 1.03682; its authors divide the diffusion
# model's latents by that number. This file does the same.
RELATIVES = {
    "lighttaew2_1": dict(
        mean=[-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
              0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        deviation=[2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                   3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]),
    "lighttaew2_2": dict(
        mean=[-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
              0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
              -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
              -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        deviation=[0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
                   0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                   0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
                   0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]),
    "lighttaehy1_5": dict(activation="leaky_relu", output_range=(-1, 1),
                          mean=[0.0] * 32, deviation=[1 / 1.03682] * 32),
}


# ---- published weights by name -------------------------------------------------------------------------------------


# Published weights: name.pth at github.com/madebyollin/taehv, and the id that git gives to its contents (`blob_id`).
# The environment variable TAEHV_URL sets another address with the same files.
URL = "https://raw.githubusercontent.com/madebyollin/taehv/1f14a568f24bf8811e0a0ac601613e04fc1581e8"
WIDE_URL = "https://raw.githubusercontent.com/madebyollin/taehv/32ac0146b11007cda5a57b60a3b35653361fb8a4"
PUBLISHED = {
    "taehv":          "e1409542548a72fe9259cc6dc92f0504555616c4",
    "taew2_1":        "d6ffa27358914606153bbb790bd1da1c5cf822fd",
    "taeos1_3":       "932cae63cf7c1f0cbfb37a35cce233e154dd044b",
    "taecvx":         "faf18249d011f1188d28ac3dbcca7d91316baef2",
    "taew2_2":        "4b51ee2578346051cb091d6280213927b9403d61",
    "taew2_2_super":  "88641133a999bd6a9f4aa17a41d2bc9b6241d077",
    "taehv1_5":       "73960d2af787dd8e05c9e1df93da27dc0c32deb3",
    "taehv1_5_super": "b69a23b4db996fe47ca75371a0f840b5def1ce83",
    "taeltx_2":       "415c1d34395097beed07efe5b3b9432771b02d70",
    "taeltx2_3":      "d1b7ab9b7e106aed3b1ca907dc3ec02ef8e61005",
    "taeltx2_3_wide": "1da8954033693369aa34de1840dc0fad00fe7d46",
    "taeh3":          "8c459d15868be182ca52f95c82410767e06ef510",
}


def find_weights(path):
    """The path of a weights file, from a path or a name in PUBLISHED. ValueError if there is no such file; OSError and
    ValueError as in `published_weights`."""
    path = str(path)
    if os.path.isfile(path):
        return path
    if os.path.exists(path):
        raise ValueError(f"{path!r} is not a regular file"
                         + ": load the model.pth in it" * os.path.isfile(os.path.join(path, "model.pth")))
    if path in PUBLISHED:
        return published_weights(path)
    name = os.path.basename(path).removesuffix(".pth")
    if name in PUBLISHED:
        raise ValueError(f"{path!r} does not exist; {name} alone is found or downloaded")
    if name.removesuffix(".safetensors") in RELATIVES:
        raise ValueError(f"{path!r} does not exist: LightX2V's weights are at huggingface.co/lightx2v/Autoencoders; "
                         "load them by their path")
    raise ValueError(f"{path!r} does not exist{nearest(path, PUBLISHED)}")


def published_weights(name):
    """The path of published weights: NAME.pth in the current folder, else in PyTorch's hub cache. If it is in neither,
    it is downloaded into the cache, and kept only if its contents are the published ones. OSError without a network,
    ValueError for other contents; both say where to put the file by hand."""
    file = f"{name}.pth"
    if os.path.isfile(file):
        return file
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path, source = os.path.join(folder, file), f"{WIDE_URL if name.endswith('wide') else URL}/{file}"
    url = f"{os.environ['TAEHV_URL'].rstrip('/')}/{file}" if os.environ.get("TAEHV_URL") else source
    by_hand = f"get {source} by hand and put it there as {path}, or into the present folder"
    temporary, timeout = f"{path}.{os.getpid()}.part", socket.getdefaulttimeout()
    with locked(folder, by_hand):
        if os.path.isfile(path):
            if blob_id(path) != PUBLISHED[name]:
                raise ValueError(f"{path} is damaged, or not the published {name}: remove it, or load it by its path")
            return path
        try:
            socket.setdefaulttimeout(30)  # a network that drops all packets would block for minutes
            torch.hub.download_url_to_file(url, temporary, progress=os.environ.get("LOCAL_RANK", "0") == "0")
            if blob_id(temporary) == PUBLISHED[name]:
                os.replace(temporary, path)
                return path
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no URL
            reason = getattr(error, "reason", None) or error
            raise OSError(f"{url} cannot be downloaded ({reason}): {by_hand}") from None
        finally:
            socket.setdefaulttimeout(timeout)
            if os.path.exists(temporary):
                os.remove(temporary)
        raise ValueError(f"{url} is not the published {name}, and was removed: {by_hand}")


def blob_id(path):
    """The id that git gives to a file's contents: SHA-1 of "blob", their size and themselves."""
    digest = hashlib.sha1(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder, by_hand):
    """Make the folder, and let one process at a time run the block (the ranks of a run on one machine take turns).
    OSError, ending with the advice `by_hand`, if the folder cannot be made."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror}): {by_hand}") from None
    try:
        import fcntl  # absent from Windows: there each process downloads for itself
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: the same there
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
