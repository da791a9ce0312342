"""The entries that leaderboard.py compares, with one interface: models of ours, teachers, codecs and baselines.

    entry = load("runs/mine", context)                  # or taehv:FILE ..., bicubic, pca16, h264@200, av1@crf40
    entry.returned(17)                                  # the numbers of the frames that come back of 17
    result = entry.run(video, fps, clip, timed=True)    # 1 T 3 H W in [0, 1] -> a Result

Each has `name`, `words` (a description), `fingerprint` (differs for different weights), `parameters` (how many, or
None), `weight_bytes`, and `group(frames)`: (how many frames a latent stands for, the position of the clip's first frame
in its group) if `frames` frames come back, as in evaluate.py's `group_of`.
"""
import functools
import math
import os
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

import model_taehv
import models
import quantize
from codec import InputError
from compare import factors, padded
from device import to_device, time_call
from evaluate import group_of, time_halves
from rate import Result, VideoCodec, parse_codec
from teachers import is_spec, load_teacher

BASELINE = re.compile(r"bicubic|pca([1-9]\d{0,2})")


class Context(NamedTuple):
    """What entries need to be loaded. fit: a protocols.Clips to fit principal components to, or None: then each half of
    `clips` is coded with components of the other half."""
    device: torch.device
    dtype: torch.dtype
    clips: object
    fit: object = None


def load(name, context, levels=0):
    """The entry of a name. levels: how many levels of a residual tokenizer to use, from the coarsest on; 0: all.
    InputError, TeacherError or CheckpointError, of one line, if it cannot be loaded."""
    if codec := parse_codec(name):
        return VideoCodec(name, *codec)
    if baseline := BASELINE.fullmatch(name):
        return PCA(name, int(baseline[1]), context) if baseline[1] else Bicubic(name, context)
    return ByTeacher(name, context) if is_spec(name) else Own(name, context, levels)


def check_name(name):
    """InputError for a name that is neither a file nor one of the known names."""
    if not (parse_codec(name) or BASELINE.fullmatch(name) or is_spec(name) or os.path.exists(name)
            or name in model_taehv.PUBLISHED):
        known = [*model_taehv.PUBLISHED, "bicubic", "pca16", "h264@crf30", "av1@crf40"]
        raise InputError(f"{name!r} is no run, no weights, no teacher, no codec and no baseline"
                         f"{model_taehv.nearest(name, known)}")


def is_fitted(name):
    """Whether an entry of this name must be fitted to clips first."""
    return bool((baseline := BASELINE.fullmatch(name)) and baseline[1])


def size_of(*modules):
    """(number of parameters, bytes of parameters and buffers) of modules; (None, 0) without modules."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    count = sum(tensor.numel() for module in modules for tensor in module.parameters())
    return count if modules else None, sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Own:
    """A run folder, a checkpoint, or published weights: what `models.load_model` takes."""

    def __init__(self, name, context, levels=0):
        model, words = models.load_model(name)
        self.most_levels = quantize.levels_of(model)
        about = f"levels {levels}" if levels else ""
        self.name, self.words = f"{name} {about}".strip(), f"{words}, {about}".strip(", ")
        self.fingerprint = models.fingerprint(model, f"{sorted(model.config.items())} {about}")
        self.device, self.dtype = context.device, context.dtype
        self.parameters, self.weight_bytes = size_of(model)
        self.model = models.fast(to_device(model, context.device, context.dtype).requires_grad_(False))
        if levels:
            quantize.use_levels(self.model, levels)

    def group(self, frames):
        return group_of(self.model, frames)

    def returned(self, frames):
        """Numbers of the returned frames: the model's `targets` of a clip in which each frame's pixels are its number.
        """
        size = self.model.space_factor
        ramp = torch.arange(frames, dtype=torch.float32).view(1, -1, 1, 1, 1).expand(-1, -1, 3, size, size)
        targets = self.model.targets(ramp)
        if targets.shape[-2:] != ramp.shape[-2:]:
            raise InputError(f"{self.name}: a preview decoder: its frames are smaller than its input's")
        return targets[0, :, 0, 0, 0].long().tolist()

    @torch.no_grad()
    def run(self, video, fps, clip, timed=False):
        height, width = video.shape[-2:]
        fed = padded(video.to(self.device), self.model.space_factor).to(self.dtype)
        output, info = self.model(fed)
        codes = info.get("codes")
        output = output.float().clamp(0, 1)[..., :height, :width]
        seconds = time_halves(self.model, fed, self.device) if timed else None
        return Result(output, seconds, None if codes else info["latents"].numel(), None, codes)

    @property
    def codebook_sizes(self):
        """The number of codes of each tensor in a Result's codes."""
        return self.model.codebook_sizes


class ByTeacher:
    """A teacher, see teachers.py."""

    def __init__(self, name, context):
        self.teacher = load_teacher(name, context.device, context.dtype)
        if not self.teacher.can_decode:
            raise InputError(f"{name} has no decode")
        self.time_factor, self.space_factor = factors(self.teacher)
        self.name, self.words, self.fingerprint = name, self.teacher.name, self.teacher.fingerprint
        source = self.teacher.source
        modules = [source] if isinstance(source, torch.nn.Module) else [
            part for part in getattr(source, "__dict__", {}).values() if isinstance(part, torch.nn.Module)]
        self.parameters, self.weight_bytes = size_of(*modules)

    def group(self, frames):
        """As for a causal video VAE, whose first frame has a latent of its own."""
        return self.time_factor, self.time_factor - 1

    def returned(self, frames):
        """The first frames that come back stand for the first that went in; a small clip tells how many come back."""
        side = max(64, self.space_factor)
        output = self.code(torch.zeros(1, frames, 3, side, side))[0]
        return list(range(min(frames, output.shape[1])))

    def code(self, video):
        """(reconstruction, latents, {"encode": seconds, "decode": seconds}) of video 1 T 3 H W."""
        device, frames = self.teacher.device, self.teacher.filled(video.shape[1], self.time_factor)
        latents, there = time_call(self.teacher.encode, padded(video.to(device), self.space_factor, frames), device)
        output, back = time_call(self.teacher.decode, latents, device)
        return output, latents, {"encode": there, "decode": back}

    def run(self, video, fps, clip, timed=False):
        height, width = video.shape[-2:]
        output, latents, seconds = self.code(video)
        output = output[:, :video.shape[1], :, :height, :width]
        if output.shape[-2:] != (height, width):
            raise InputError(f"{self.name}: frames of {output.shape[-2]}x{output.shape[-1]} came back for "
                             f"{height}x{width}")
        return Result(output, seconds, latents.numel())


class Bicubic:
    """Baseline: bicubic downsampling by 8 (anti-aliased), and bicubic upsampling again."""

    parameters, weight_bytes, fingerprint = None, 0, "bicubic by 8"

    def __init__(self, name, context):
        self.name, self.words, self.device = name, "down by 8, up again", context.device

    def group(self, frames):
        return 1, 0

    def returned(self, frames):
        return list(range(frames))

    def run(self, video, fps, clip, timed=False):
        height, width = video.shape[-2:]
        fed = padded(video.to(self.device), 8)[0]
        small, there = time_call(
            lambda x: F.interpolate(x, scale_factor=1 / 8, mode="bicubic", antialias=True), fed, self.device)
        output, back = time_call(
            lambda x: F.interpolate(x, size=fed.shape[-2:], mode="bicubic").clamp(0, 1)[None], small, self.device)
        return Result(output[..., :height, :width], {"encode": there, "decode": back}, small.numel())


class PCA:
    """Baseline: the best linear code. A block of 8x8 pixels and 4 frames becomes `numbers` coefficients of principal
    components, which are fitted to other clips' blocks.

    These clips are context.fit. Without it, each half of the videos is coded with components of the other half;
    InputError if there is only one video.
    """

    def __init__(self, name, numbers, context):
        if numbers > 768:
            raise InputError(f"{name}: a block of 8x8 pixels and 4 frames has 768 numbers")
        self.name, self.numbers, self.device, self.sources = name, numbers, context.device, context.clips.sources
        self.clips, self.halves = context.fit, [None]
        self.words = f"{numbers} principal components of "
        if self.clips:
            self.words += f"the {len(self.clips)} clips of --fit"
        else:
            self.clips, videos = context.clips, sorted(set(self.sources))
            if len(videos) < 2:
                raise InputError(f"{name} wants other clips to fit to: --fit FOLDER, or two videos in --data")
            self.halves = [set(videos[0::2]), set(videos[1::2])]
            self.words += "the other half of the clips"
        self.fingerprint = f"pca {numbers} {self.clips.fingerprint} {len(self.halves)}"
        self.parameters = len(self.halves) * 768 * (numbers + 1)
        self.weight_bytes = 4 * self.parameters

    @functools.cached_property
    def bases(self):
        """[(the videos of a half, or None for all; mean (768,); components (768, numbers))]: what its clips are coded
        with."""
        found = []
        for half in self.halves:
            others = [i for i in range(len(self.clips)) if not half or self.clips.sources[i] not in half]
            found.append((half, *self.fit(self.clips, others, self.numbers)))
        return found

    def group(self, frames):
        return 4, 0

    @staticmethod
    def blocks(video):
        """1 T 3 H W -> blocks (n, 768) of 4 frames x 3 colours x 8 x 8 pixels, edges padded."""
        x = padded(video, 8, video.shape[1] + -video.shape[1] % 4)[0]
        t, c, h, w = x.shape
        x = x.reshape(t // 4, 4, c, h // 8, 8, w // 8, 8)
        return x.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, 768)

    @classmethod
    def fit(cls, clips, chosen, numbers):
        """(mean (768,), components (768, numbers)) of the blocks of the clips whose indices are in `chosen`."""
        count, total, products = 0, torch.zeros(768, dtype=torch.float64), torch.zeros(768, 768, dtype=torch.float64)
        for i in chosen:
            rows = cls.blocks(clips.video(i)).double()
            count, total = count + len(rows), total + rows.sum(0)
            products.addmm_(rows.t(), rows)
        mean = total / count
        vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)[1]  # largest eigenvalue last
        return mean.float(), vectors[:, -numbers:].float()

    def returned(self, frames):
        return list(range(frames))

    def run(self, video, fps, clip, timed=False):
        frames, height, width = video.shape[1], *video.shape[-2:]
        mean, basis = next((mean, basis) for half, mean, basis in self.bases if not half or self.sources[clip] in half)
        mean, basis, video = mean.to(self.device), basis.to(self.device), video.to(self.device)
        t, h, w = math.ceil(frames / 4), math.ceil(height / 8), math.ceil(width / 8)

        def decode(code):
            rows = (code @ basis.t() + mean).view(t, h, w, 4, 3, 8, 8)
            return rows.permute(0, 3, 4, 1, 5, 2, 6).reshape(1, 4 * t, 3, 8 * h, 8 * w)

        code, there = time_call(lambda x: (self.blocks(x) - mean) @ basis, video, self.device)
        output, back = time_call(decode, code, self.device)
        seconds = {"encode": there, "decode": back}
        return Result(output[:, :frames, :, :height, :width].clamp(0, 1), seconds, code.numel())
