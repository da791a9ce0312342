"""Rate and distortion: video codecs by PyAV, curves of PSNR over bits per pixel, and the BD-rate between two curves.

    codec = VideoCodec("h264@crf30", *parse_codec("h264@crf30"))
    result = codec.run(video, fps=25, clip=0)            # frames, bits, seconds
    bd_rate([(0.1, 30.0), (0.2, 33.0), ...], [...])      # percent: -20 is a fifth fewer bits for the same PSNR

Codecs need the package av (PyAV). Its wheels include x264, x265 and SVT-AV1.
"""
import fractions
import os
import re
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from codec import InputError

# {codec: (encoder, decoder, encoder's options)}, with each library's middle preset.
CODECS = {"h264": ("libx264", "h264", {"preset": "medium"}),
          "h265": ("libx265", "hevc", {"preset": "medium", "x265-params": "log-level=none"}),
          "av1": ("libsvtav1", "libdav1d", {"preset": "6"})}
# How swscale converts RGB to 4:2:0 and back: bicubic, with all chroma samples and accurate rounding (SWS_BICUBIC,
# _FULL_CHR_H_INT, _FULL_CHR_H_INP, _ACCURATE_RND). Without the last three flags pixels get darker by one of 255 levels,
# and the conversion alone costs 4 dB more: 37.9 dB instead of 42.3 on a frame of a street.
CONVERSION = 0x4 | 0x2000 | 0x4000 | 0x40000
NAME = re.compile(r"(h264|h265|av1)@(crf)?(\d{1,6}(?:\.\d+)?)")


class Result(NamedTuple):
    """The result of an entry of entries.py for a clip. frames: 1 T' 3 H W in [0, 1], float32, the frames that
    `returned` lists. seconds: {"encode", "decode"} or None. numbers: how many numbers the latents have, or None. bits:
    what a codec wrote, or None. codes: a tokenizer's list of tensors, or None."""
    frames: torch.Tensor
    seconds: dict = None
    numbers: int = None
    bits: int = None
    codes: list = None


def parse_codec(name):
    """"h264@200" -> ("h264", "kbps", 200.0), "av1@crf40" -> ("av1", "crf", 40.0); None if it names no codec. InputError
    for a codec without a rate."""
    found = NAME.fullmatch(name)
    if not found and name.partition("@")[0] in CODECS and not os.path.exists(name):
        raise InputError(f"{name}: a rate is wanted, {name.partition('@')[0]}@KBPS or "
                         f"{name.partition('@')[0]}@crfNUMBER, say {name.partition('@')[0]}@crf30")
    return found and (found[1], "crf" if found[2] else "kbps", float(found[3]))


def load_av(name):
    """The module av. InputError, naming the entry, if it is not installed."""
    os.environ.setdefault("SVT_LOG", "1")  # else SVT-AV1 prints all its settings on stderr
    try:
        import av
    except ImportError:
        raise InputError(f"{name} needs a package: pip install av") from None
    return av


class VideoCodec:
    """A codec at one rate, as an entry of entries.py. A clip is one group of pictures, in 4:2:0. Its bits are those of
    its packets, without a container. kind: "kbps", value is the target bit rate, at the clip's frame rate; or "crf",
    value is the encoder's quality. InputError if PyAV or the encoder is missing, or if the encoder has no such rate."""

    parameters, weight_bytes = None, 0

    def __init__(self, name, codec, kind, value):
        av = load_av(name)
        self.encoder, self.decoder, options = CODECS[codec]
        for needed in (self.encoder, self.decoder):
            if needed not in av.codecs_available:
                raise InputError(f"{name}: this PyAV ({av.__version__}) was built without {needed}")
        most = 63 if codec == "av1" else 51
        if kind == "crf" and value > most or value == 0 and kind == "kbps":
            raise InputError(f"{name}: crf0 to crf{most}, or 1 kbit/s or more, is wanted")
        self.name, self.codec, self.kbps = name, codec, value if kind == "kbps" else None
        self.options = options if self.kbps else {**options, "crf": f"{value:g}"}
        self.words = f"{self.encoder}, preset {options['preset']}, " + (
            f"{value:g} kbit/s" if self.kbps else f"crf {value:g}")
        versions = {key: av.library_versions[key] for key in sorted(av.library_versions)}
        self.fingerprint = f"{self.encoder} {self.options} {self.kbps} {CONVERSION} {versions}"

    def group(self, frames):
        return 1, 0

    def returned(self, frames):
        return list(range(frames))

    def run(self, video, fps, clip, timed=False):
        """1 T 3 H W in [0, 1] -> a Result."""
        av = load_av(self.name)
        height, width = video.shape[-2:]
        pad = (0, -width % 2, 0, -height % 2)
        images = F.pad(video[0], pad, mode="replicate").mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        rate = fractions.Fraction(fps).limit_denominator(1001)
        start = time.perf_counter()
        packets = self.encode(av, images, rate)
        middle = time.perf_counter()
        decoder = av.CodecContext.create(self.decoder, "r")
        frames = [frame for packet in [*map(av.Packet, packets), None] for frame in decoder.decode(packet)]
        frames = np.stack([frame.reformat(format="rgb24", interpolation=CONVERSION).to_ndarray() for frame in frames])
        seconds = {"encode": middle - start, "decode": time.perf_counter() - middle}
        if len(frames) != len(images):
            raise InputError(f"{self.name}: {len(frames)} of {len(images)} frames came back")
        output = torch.from_numpy(frames[:, :height, :width]).permute(0, 3, 1, 2)[None].float().div_(255)
        return Result(output.to(video.device), seconds, None, 8 * sum(map(len, packets)))

    def encode(self, av, images, rate):
        """[bytes of each packet] of T H W 3 uint8."""
        encoder = av.CodecContext.create(self.encoder, "w")
        encoder.height, encoder.width, encoder.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        encoder.framerate, encoder.time_base, encoder.options = rate, 1 / rate, self.options
        if self.kbps:
            encoder.bit_rate = round(1000 * self.kbps)
        packets = []
        try:
            for number, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame = frame.reformat(format="yuv420p", interpolation=CONVERSION)
                frame.pts, frame.time_base = number, 1 / rate
                packets += map(bytes, encoder.encode(frame))
            packets += map(bytes, encoder.encode(None))
        except av.error.FFmpegError as error:
            raise InputError(f"{self.name}: the encoder refuses frames of {images.shape[1]}x{images.shape[2]} at "
                             f"{float(rate):g} frames/s ({error.strerror})") from None
        return [packet for packet in packets if packet]


# ---- curves --------------------------------------------------------------------------------------------------------


def slopes(x, y):
    """Slopes at the points of a piecewise cubic without overshoot (Fritsch and Butland 1984), the same as those of
    scipy's PchipInterpolator. x: increasing."""
    steps, rises = np.diff(x), np.diff(y) / np.diff(x)
    if len(x) == 2:
        return np.array([rises[0]] * 2)
    inner = np.zeros(len(x))
    for k in range(1, len(x) - 1):
        if rises[k - 1] * rises[k] > 0:
            before, after = 2 * steps[k] + steps[k - 1], steps[k] + 2 * steps[k - 1]
            inner[k] = (before + after) / (before / rises[k - 1] + after / rises[k])
    for end, (h, g), (r, s) in ((0, steps[:2], rises[:2]), (-1, steps[:-3:-1], rises[:-3:-1])):
        slope = ((2 * h + g) * r - h * s) / (h + g)
        inner[end] = 0 if slope * r <= 0 else 3 * r if r * s <= 0 and abs(slope) > 3 * abs(r) else slope
    return inner


def integral(x, y, low, high):
    """The integral, from low to high, of the piecewise cubic through the points; low and high lie within them."""
    found = slopes(x, y)

    def value(k, at):
        t, h = (at - x[k]) / (x[k + 1] - x[k]), x[k + 1] - x[k]
        return ((1 + 2 * t) * (1 - t) ** 2 * y[k] + t * (1 - t) ** 2 * h * found[k]
                + t ** 2 * (3 - 2 * t) * y[k + 1] + t ** 2 * (t - 1) * h * found[k + 1])

    total = 0.0
    for k in range(len(x) - 1):
        a, b = max(low, x[k]), min(high, x[k + 1])
        if a < b:  # Simpson's rule is exact for cubics
            total += (b - a) / 6 * (value(k, a) + 4 * value(k, (a + b) / 2) + value(k, b))
    return total


def bd_rate(reference, other):
    """How many percent more bits `other` takes than `reference` (negative: fewer) for the same PSNR, on average over
    the PSNRs that both reach (Bjontegaard 2001, VCEG-M33; with piecewise cubics, as in JCT-VC's later spreadsheets;
    Bjontegaard used one cubic through four points).

    Both: [(bits per pixel, PSNR in dB), ...], two or more, in any order. None if they have no PSNR in common, or if a
    curve does not rise.
    """
    curves = []
    for points in (reference, other):
        rates, psnrs = np.array(sorted(points), float).reshape(-1, 2).T
        if len(rates) < 2 or rates[0] <= 0 or (np.diff(rates) <= 0).any() or (np.diff(psnrs) <= 0).any():
            return None
        curves.append((psnrs, np.log10(rates)))
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if low >= high:
        return None
    ours, theirs = (integral(x, y, low, high) / (high - low) for x, y in curves[::-1])
    return 100 * (10 ** (ours - theirs) - 1)


def curve_name(row):
    """The name of the curve that a row is a point of: "h264" for "h264@crf30", "runs/tok" for "runs/tok levels 2"; None
    for no curve."""
    codec, at, _ = row["name"].partition("@")
    if codec in CODECS and at:
        return codec
    name, levels, _ = row["name"].rpartition(" levels ")
    return name if levels else None


def curves(rows):
    """{name: [rows, sorted by bits per pixel]} of the curves with two rows or more, in the order of the rows."""
    found = {}
    for row in rows:
        if not row.get("failed") and row.get("bits_per_pixel") and (name := curve_name(row)):
            found.setdefault(name, []).append(row)
    return {name: sorted(some, key=lambda row: row["bits_per_pixel"]) for name, some in found.items() if len(some) > 1}


def points_of(rows, clip=None):
    """[(bits per pixel, PSNR)] of a curve's rows: of one clip by its number, or (None) means over all clips."""
    if clip is None:
        return [(row["bits_per_pixel"], row["metrics"]["psnr"]) for row in rows]
    return [(row["clips"][clip]["bits_per_pixel"], row["clips"][clip]["psnr"]) for row in rows]


def compare_rates(rows):
    """BD-rates of all curves against the first: {"against": its name, "curves": {other: {"mean": over the clips that
    have a BD-rate, "of_mean": of the mean curves, "clips": [percent or None]}}}; {} for fewer than two curves."""
    found = curves(rows)
    if len(found) < 2:
        return {}
    (first, reference), *others = found.items()
    result = {"against": first, "curves": {}}
    for name, some in others:
        clips = [bd_rate(points_of(reference, i), points_of(some, i)) for i in range(len(reference[0]["clips"]))]
        known = [value for value in clips if value is not None]
        result["curves"][name] = {"mean": sum(known) / len(known) if known else None, "clips": clips,
                                  "of_mean": bd_rate(points_of(reference), points_of(some))}
    return result
