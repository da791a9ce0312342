"""Comparison videos, latent pictures, metrics.json and summary_report.html for a run over some videos.

    with VideoWriter("out/comparison_videos/NAME_comparison.webm", fps, width, height) as writer:
        writer.write(side_by_side([original, reconstruction], ["original", "reconstruction"]))
    picture = latent_picture(latents)                      # save with cv2.imwrite(path, picture[..., ::-1])
    write_report("out", rows, info)                        # out/metrics.json, out/summary_report.html

Frames and pictures are RGB uint8 H W 3 in [0, 255]. Needs numpy and OpenCV; with the package av (PyAV) videos are
written several times faster.
"""
import contextlib
import fractions
import html
import json
import math
import os
import re
import sys
import tempfile
import threading
import unicodedata
import urllib.parse

import cv2
import numpy as np


# Through OpenCV, VP8 takes 86 ms a 1280x720 frame at 38.5 dB, VP9 ("VP90") 306 ms at 38.0 dB and 0.6 of the bytes
# (opencv-python 5.0.0, one of two cores, moving texture, 41.0 dB is the ceiling of 4:2:0). The wheels have no H.264
# encoder.
FOURCC = "VP80"
# Through PyAV, with these settings, a frame of 480x832 takes 14 ms at 41.8 dB; through OpenCV 60 ms at 40.0 dB and 0.9
# of the bytes (PyAV 18.1, one core, an animated film). libvpx's realtime mode gave 41.5 dB in the same time.
ENCODER, SETTINGS = "libvpx", {"deadline": "good", "cpu-used": "5", "crf": "4", "qmin": "0", "qmax": "50"}
DARK, LIGHT, ALARM = (24, 24, 24), (232, 232, 232), (255, 0, 255)
STDERR = threading.Lock()
MAX_SIDE = 16382  # pixels: VP8 has 14 bits for a side, and sides are padded to even ones
BITS_PER_PIXEL, LEAST_RATE = 3, 1100  # OpenCV asks the encoder for the first; under 1 kbit/s it writes a broken file


def check_video_size(width, height, path):
    """OSError, about `path`, for frames that VideoWriter cannot write: too long a side, or too few pixels."""
    if max(width, height) > MAX_SIDE:
        raise OSError(f"{path}: {width}x{height} pixels: the videos that are written have at most {MAX_SIDE} a side; "
                      "scale it down")
    if BITS_PER_PIXEL * 25 * width * height < LEAST_RATE:
        raise OSError(f"{path}: {width}x{height} pixels are too few to write a video of")


@contextlib.contextmanager
def _without_tag_warning():
    """OpenCV prints "tag ... is not supported" on stderr for each .webm that it opens well (its issue 8919): hold
    stderr back, drop that line, print the others."""
    with STDERR, tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            others = b"".join(line for line in held if b"is not supported with codec id" not in line)
            print(others.decode(errors="replace"), end="", file=sys.stderr)


def has_all_bytes(path):
    """Whether a .webm is as long as its beginning says: the size in 7 bytes behind the segment's name and a 1."""
    with open(path, "rb") as file:
        head = file.read(256)
    start = head.find(b"\x18\x53\x80\x67\x01") + 12
    return start + int.from_bytes(head[start - 7:start], "big") == os.path.getsize(path)


class _ThroughOpenCV:
    """A VP8 encoder and its file, for RGB frames of even sides. It tells no error of the disk."""

    def __init__(self, path, fps, size):
        with _without_tag_warning():
            self.writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*FOURCC), fps, size)
        if not self.writer.isOpened():
            raise OSError("was OpenCV built with FFmpeg and VP8, as the pip wheels are?")

    def write(self, frame):
        self.writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def finish(self):
        self.writer.release()

    abandon = finish


class _ThroughPyAV:
    """The same through PyAV's module `av`, with settings that OpenCV does not pass on. OSError where a write fails."""

    def __init__(self, av, path, fps, size):
        self.av, self.count = av, 0
        self.rate = fractions.Fraction(fps).limit_denominator(1001)  # 29.97003 is 30000/1001
        self.file = av.open(path, "w", format="webm")
        try:
            self.stream = self.file.add_stream(ENCODER, rate=self.rate, options=SETTINGS)
            self.stream.width, self.stream.height, self.stream.pix_fmt = *size, "yuv420p"
            most = min(BITS_PER_PIXEL * fps * size[0] * size[1], 1e9)  # libvpx counts bits in 32 bits
            self.stream.bit_rate = round(most)
            self.stream.codec_context.thread_count = 1  # each video has a thread of its own
            self.file.start_encoding()
        except BaseException:
            self.abandon()
            raise

    def write(self, frame):
        picture = self.av.VideoFrame.from_ndarray(frame, format="rgb24")  # swscale makes 4:2:0 of it, as in OpenCV
        picture.pts, picture.time_base = self.count, 1 / self.rate
        self.count += 1
        self.file.mux(self.stream.encode(picture))

    def finish(self):
        self.file.mux(self.stream.encode(None))
        self.file.close()

    def abandon(self):
        with contextlib.suppress(OSError):  # of a full disk
            self.file.close()


def _open_encoder(path, fps, size):
    """Through PyAV where it is installed."""
    try:
        import av
    except ImportError:
        av = None
    if av and ENCODER in av.codecs_available:
        return _ThroughPyAV(av, path, fps, size)
    return _ThroughOpenCV(path, fps, size)


class VideoWriter:
    """Streams RGB uint8 H W 3 frames into a VP8 .webm, which browsers play: through PyAV, several times faster, where
    that is installed, else through OpenCV. A context manager.

    The folder is made if need be. The file gets its name when the block ends without an exception; until then it is
    `.NAME.part.webm` beside it. An odd height or width grows by a repeated row or column (OpenCV would cut one off).
    `fps` (frames/s) outside 0.1 to 240, NaN or None, as broken containers report it, becomes 25, as does one too slow
    for so few pixels: `.fps` is the rate written, `.note` says so in words ("" where nothing was changed).
    Raises ValueError for a path that isn't .webm or a frame of another size or type, OSError for a size as in
    `check_video_size`, and where the file cannot be opened or written, or is empty or incomplete at the end (OpenCV
    itself says nothing when the disk is full).
    """

    def __init__(self, path, fps, width, height):
        self.path = os.path.abspath(path)  # absolute, or FFmpeg takes the "a:" of a relative "a:b.webm" for a protocol
        folder, name = os.path.split(self.path)
        if not name.endswith(".webm"):
            raise ValueError(f"a video must be written to a .webm file, got {path}")
        check_video_size(width, height, path)
        usable = fps is not None and 0.1 <= fps <= 240 and BITS_PER_PIXEL * fps * width * height >= LEAST_RATE
        self.fps = float(fps) if usable else 25.0
        self.note = "" if usable else f"videos are written at 25 frames/s, the source says {fps}"
        self.width, self.height, self.frames, self.finished = width, height, 0, False
        os.makedirs(folder, exist_ok=True)
        self._part = os.path.join(folder, f".{name}.part.webm")
        size = (width + width % 2, height + height % 2)
        try:
            self._encoder = _open_encoder(self._part, self.fps, size)
        except OSError as error:
            if os.path.exists(self._part):
                os.remove(self._part)
            raise OSError(f"cannot write {path} ({width}x{height}, {self.fps:g} frames/s): is the folder writable? "
                          f"{error.strerror or error}") from error

    def write(self, frame):
        """frame: RGB uint8 H W 3."""
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            raise ValueError(f"{os.path.basename(self.path)} takes uint8 frames of shape "
                             f"{(self.height, self.width, 3)}, got {frame.dtype} {frame.shape}")
        frame = np.ascontiguousarray(frame)
        if self.height % 2 or self.width % 2:
            frame = cv2.copyMakeBorder(frame, 0, self.height % 2, 0, self.width % 2, cv2.BORDER_REPLICATE)
        self._encoder.write(frame)
        self.frames += 1

    def finish(self):
        """No more frames come. OSError where the file is not whole; else all that is left for the block's end is to
        give it its name."""
        if not self.frames:
            raise OSError(f"{self.path}: no frame was written")
        self._encoder.finish()
        # A file that was cut short has no duration and so no count; or it has them, as these stand at its beginning, to
        # which FFmpeg comes back, but fewer bytes than the size that stands there too.
        count = cv2.VideoCapture(self._part, cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
        if abs(count - self.frames) > 1 or not has_all_bytes(self._part):
            raise OSError(f"{self.path}: the {self.frames} frames cannot be read back; is the disk full?")
        self.finished = True

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        try:
            if error_type is None:
                if not self.finished:
                    self.finish()
                os.replace(self._part, self.path)
        finally:
            self._encoder.abandon()
            if os.path.exists(self._part):
                os.remove(self._part)


def _strip(text, width, height, colour=LIGHT):
    """A dark strip, uint8 height x width x 3, with `text` (ASCII) in it, shrunk where it would not fit."""
    strip = np.full((height, width, 3), DARK, np.uint8)
    scale = height / 36
    scale *= min(1, max(1, width - 8) / cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0])
    baseline = round(height / 2 + 10 * scale)
    cv2.putText(strip, text, (4, baseline), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, max(1, round(1.6 * scale)),
                cv2.LINE_AA)
    return strip


def _grid(cells, columns, gap=4):
    """Equally sized cells, row after row, as one picture; a cell short of a full row is left dark."""
    cells = [cv2.copyMakeBorder(cell, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=DARK) for cell in cells]
    cells += [np.full_like(cells[0], DARK[0])] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i:i + columns]) for i in range(0, len(cells), columns)])


def side_by_side(frames, labels, max_width=3840, gain=4):
    """One comparison frame: the frames, and |second - first| times `gain`, each under a strip with its label.

    frames: the original, the reconstruction and, if there is one, the teacher's; RGB uint8 H W 3 of one size.
    Panels stand in a row, or two by two where the row would be wider than `max_width` pixels, and are scaled down
    where two are too wide as well, or too high for a video. Small frames are enlarged by a whole factor, to about 240
    pixels a panel.
    Returns RGB uint8; its size depends only on H, W, the number of frames and `max_width`. Labels are ASCII.
    Raises ValueError where the frames differ in size or aren't uint8.
    """
    kinds = [(frame.shape, str(frame.dtype)) for frame in frames]
    if len(frames) not in (2, 3) or len(labels) != len(frames) or len(set(kinds)) > 1 or kinds[0][1] != "uint8":
        raise ValueError(f"expected 2 or 3 uint8 frames of one size, each with a label, got {kinds} and {list(labels)}")
    height, width = frames[0].shape[:2]
    panels = [*frames, cv2.convertScaleAbs(cv2.absdiff(frames[0], frames[1]), alpha=gain)]
    factor = max(1, min(-(-240 // width), 1080 // height))
    columns = len(panels) if len(panels) * width * factor <= max_width else 2
    highest = MAX_SIDE / -(-len(panels) // columns) - max_width // 32  # of a panel, without its strip
    factor = min(factor, max_width / (columns * width), highest / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = cv2.INTER_NEAREST if factor >= 1 else cv2.INTER_AREA
    strip = max(22, size[0] // 32)
    return _grid([np.vstack([_strip(label, size[0], strip), cv2.resize(panel, size, interpolation=how)])
                  for label, panel in zip([*labels, f"difference x {gain}"], panels)], columns)


def _tile(picture, caption, side):
    """A small map, uint8 h w 3, brought to about `side` pixels (whole factors up, averaged down) over its caption."""
    height, width = picture.shape[:2]
    factor = max(1, round(side / max(height, width)))
    size = (width * max(factor, -(-12 // width)), height * max(factor, -(-12 // height)))  # a line gets 12 px
    if max(size) > 1.5 * side:
        size = tuple(max(12, round(pixels * 1.5 * side / max(size))) for pixels in size)
    how = cv2.INTER_NEAREST if size[0] >= width and size[1] >= height else cv2.INTER_AREA
    tile = np.full((size[1] + 20, max(size[0], 144), 3), DARK, np.uint8)
    tile[:size[1], :size[0]] = cv2.resize(picture, size, interpolation=how)
    tile[size[1]:] = _strip(caption, tile.shape[1], 20)
    return tile


def _principal_colours(frames):
    """T C h w -> uint8 T h w 3: the three main directions of the channel vectors of all frames as red, green, blue.

    Each direction's sign makes its largest weight positive; 1 % at either end is clipped. One channel gives grey.
    """
    t, c, h, w = frames.shape
    pixels = frames.transpose(0, 2, 3, 1).reshape(-1, c)
    good = np.isfinite(pixels).all(axis=1)
    sample = pixels[good].astype(np.float64)[::max(1, int(good.sum()) // 50000)] if good.any() else np.zeros((1, c))
    mean, size = sample.mean(axis=0), math.sqrt(np.mean(sample ** 2))
    axes = np.linalg.eigh((sample - mean).T @ (sample - mean))[1][:, ::-1][:, :3]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    mapped = (np.where(good[:, None], pixels, mean) - mean) @ axes
    low, high = np.percentile(mapped, (1, 99), axis=0)
    mapped = 0.5 + (mapped - (low + high) / 2) / np.maximum(high - low, 1e-6 * size + 1e-30)
    colours = np.full((len(pixels), 3), 127, np.uint8)
    colours[:, :3 if c == 1 else c] = np.clip(255 * mapped, 0, 255)
    colours[~good] = ALARM
    return colours.reshape(t, h, w, 3)


def latent_picture(latents, max_frames=8, max_channels=256, numbers=None, total=None):
    """A picture of latents, float T C h w (a few latent frames): RGB uint8 H W 3. Where these are some of `total`,
    `numbers` are their places among them; captions number them so.

    Above, the main directions of the channels as colours for up to `max_frames` frames spread over T; below, each
    channel of the middle one, blue below and red above zero on one scale for all, so that a dead channel stays white
    and a dominating one saturates. Captions: channel, mean +- standard deviation over all T. Values that aren't
    finite are magenta, counted in the title and left out of the figures. Raises ValueError for another shape.
    """
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 4 or not latents.size:
        raise ValueError(f"expected latents of shape T C h w, got {latents.shape}")
    t, c, h, w = latents.shape
    numbers, total = range(t) if numbers is None else numbers, total or t
    finite = np.ma.masked_invalid(latents)
    lost = latents.size - finite.count()
    mean, deviation = [f(axis=(0, 2, 3), dtype=np.float64).filled(0) for f in (finite.mean, finite.std)]
    rms = np.hypot(mean, deviation)
    found = finite.compressed().astype(np.float64) if finite.count() else np.zeros(1)
    some = f" ({t} of them here)" if t < total else ""
    title = (f"latents T={total}{some} C={c} h={h} w={w}   mean {found.mean():.3g}   "
             f"rms {np.sqrt(np.mean(found ** 2)):.3g}   "
             f"min {found.min():.3g}   max {found.max():.3g}")
    title += f"   {lost} VALUES NOT FINITE (magenta)" if lost else ""
    times = np.unique(np.linspace(0, t - 1, min(t, max_frames)).round().astype(int))
    colours = _principal_colours(latents[times])
    tiles = [_tile(colour, f"t = {numbers[time]}", 192) for colour, time in zip(colours, times)]
    middle = times[len(times) // 2]
    limit = 3 * float(np.median(rms)) or 3 * float(rms.max()) or 1.0
    maps = []
    for i in range(min(c, max_channels)):
        strength = np.clip(finite[middle, i].filled(0) / limit, -1, 1)[..., None]
        shade = 255 + np.abs(strength) * (np.where(strength < 0, (33, 102, 172), (178, 24, 43)) - 255.0)
        shade = np.where(np.isfinite(latents[middle, i])[..., None], shade, ALARM).astype(np.uint8)
        maps.append(_tile(shade, f"{i}: {mean[i]:.2g} +- {deviation[i]:.2g}", 144))
    hidden = f", the first {max_channels} of {c}" if c > max_channels else ""
    blocks = [_grid(some, max(1, min(len(some), 1440 // (some[0].shape[1] + 4)))) for some in (tiles, maps)]
    width = max(960, *(block.shape[1] for block in blocks))
    blocks = [cv2.copyMakeBorder(block, 0, 8, 0, width - block.shape[1], cv2.BORDER_CONSTANT, value=DARK)
              for block in blocks]
    above = "PCA of the channels over these frames: components 1, 2, 3 as red, green, blue"
    below = (f"channels{hidden} at t = {numbers[middle]}: blue {-limit:.3g}, red {limit:.3g}; mean +- deviation over "
             f"{'all t' if t == total else 'those here'}")
    return np.vstack([_strip(title, width, 30, ALARM if lost else LIGHT), _strip(above, width, 24), blocks[0],
                      _strip(below, width, 24), blocks[1]])


def safe_name(path, taken):
    """A short name for an input's outputs that every file system takes, and that is none of the set `taken`, to which
    it is added in lower case (`x.mp4`, then `other/x.mp4`, give x and x_2). Letters of any script stay; case alone
    never differs."""
    stem = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    stem = unicodedata.normalize("NFC", stem.encode("utf-8", "replace").decode())
    stem = re.sub(r"[^\w.-]+", "_", stem).strip("._-").encode()[:120].decode("utf-8", "ignore") or "input"
    name, number = stem, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name.casefold())
    return name


# key, heading, unit, number format
QUANTITIES = [("psnr", "PSNR", "dB", ".2f"), ("ssim", "SSIM", "", ".4f"), ("lpips", "LPIPS", "", ".4f"),
              ("mse", "MSE", "", ".2e"), ("encode_seconds", "encode", "s", ".3f"),
              ("decode_seconds", "decode", "s", ".3f"), ("encode_fps", "encode", "frames/s", ".1f"),
              ("decode_fps", "decode", "frames/s", ".1f"), ("peak_memory_mb", "peak memory", "MB", ".0f"),
              ("latent_error", "latent error", "ours to its", ".4g")]

AT_LEAST = {"mse": False, "lpips": False, "psnr": True, "ssim": True, "flicker": False}  # else a target is "at most"
HEADINGS = {"mse": "MSE", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "flicker": "flicker"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1c1e; --soft: #5d6167; --rule: #d5d8dc; --paper: #fff; --alarm: #a3281f;
  --met: #1d6b35 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e5e7; --soft: #9da2a9; --rule: #3a3d42; --paper: #151618; --alarm: #f0887f; --met: #7cc993 }
  a { color: #86b4ef } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 78rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", "Liberation Sans", Arial, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem } p { margin: .4rem 0 }
.soft, figcaption, small, dt { color: var(--soft) } .alarm { color: var(--alarm) } .met { color: var(--met) }
small { display: block }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; margin: 1.2rem 0 } dd { margin: 0 }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; border-block: 2px solid; font-size: .93em }
th, td { padding: .35rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; overflow-wrap: normal }
td { font-variant-numeric: tabular-nums } tbody { border-top: 1px solid var(--rule) } .name { text-align: left }
td.name:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem } figure { margin: 0 }
.videos { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem;
  margin: 1rem 0 } .wide { grid-column: 1 / -1 } img { max-width: 100% } .small video { image-rendering: pixelated }
video { display: block; width: 100%; max-height: 80vh; background: #000 }
"""


# ---- what the inputs say together, targets met or missed ------------------------------------------------------------


def in_words(targets):
    """{"psnr": 25.0, ...} -> "PSNR ≥ 25, ..."."""
    return ", ".join(f"{HEADINGS[key]} {'≥' if AT_LEAST[key] else '≤'} {target:g}"
                     for key, target in targets.items())


def judge(targets, values):
    """{metric: {"target", "value", "met"}} for the targets whose metric has a value."""
    return {key: {"target": target, "value": values[key],
                  "met": bool(values[key] >= target if AT_LEAST[key] else values[key] <= target)}
            for key, target in targets.items() if values.get(key) is not None}


def verdict(judged):
    """"met", "missed PSNR, SSIM", or "" where nothing was judged."""
    missed = [HEADINGS[key] for key, one in judged.items() if not one["met"]]
    return f"missed {', '.join(missed)}" if missed else "met" if judged else ""


def values(rows, key):
    """The finite values of a quantity, which stands among a row's metrics or beside them."""
    found = [row["metrics"].get(key, row.get(key)) for row in rows]
    return [float(value) for value in found if value is not None and math.isfinite(value)]


def statistics(rows, keys):
    """{key: mean, sample standard deviation (None for one value), count}, over the rows with a finite value."""
    return {key: {"mean": float(np.mean(found)) if found else None,
                  "std": float(np.std(found, ddof=1)) if len(found) > 1 else None, "count": len(found)}
            for key in keys for found in [values(rows, key)]}


def versus(rows, keys):
    """{key: mean of ours minus (PSNR) or divided by the teacher's, over the rows that have both; None without any}"""
    result = {}
    for key in keys:
        both = [row for row in rows if row.get("teacher") and values([row], key) and values([row["teacher"]], key)]
        ours, theirs = sum(values(both, key)), sum(values([row["teacher"] for row in both], key))
        result[key] = (ours - theirs) / len(both) if both and key == "psnr" else ours / theirs if theirs else None
    return result


def summarize(rows, keys, targets):
    """The "summary" of metrics.json: of all rows, with those that failed."""
    done = [row for row in rows if not row.get("failed")]
    teachers = [row["teacher"] for row in done if row.get("teacher")]
    ours = statistics(done, keys)
    return {"inputs": len(rows), "failed": len(rows) - len(done), "ours": ours,
            "teacher": statistics(teachers, keys) if teachers else None,
            "versus_teacher": versus(done, keys) if teachers else None,
            "targets": judge(targets, {key: ours[key]["mean"] for key in targets if key in ours}),
            "inputs_that_met_targets": sum(verdict(row.get("targets", {})) == "met" for row in done)}


# ---- the page ------------------------------------------------------------------------------------------------------


def strict(value, where="", lost=None):
    """A copy of `value` that strict JSON and UTF-8 can hold. NaN and infinity become None and are named in `lost`, a
    list if there is one."""
    if isinstance(value, dict):
        return {str(key): strict(item, f"{where}{key} ", lost) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [strict(item, where, lost) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        if lost is not None:
            lost.append(f"{where}is {value}; null in metrics.json")
        return None
    if isinstance(value, (str, os.PathLike)):  # a file name's undecodable bytes are lone surrogates in Python
        return os.fspath(value).encode("utf-8", "replace").decode()
    return value


def write_whole(path, content):
    """Writes a text or bytes through a temporary name: `path` is always whole. OSError leaves nothing behind."""
    try:
        with open(f"{path}.part", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except OSError:  # a full disk
        if os.path.exists(f"{path}.part"):
            os.remove(f"{path}.part")
        raise


def _url(path):
    return urllib.parse.quote(os.fsencode(os.fspath(path).replace(os.sep, "/")))  # quotes ":" too, so never a scheme


def _cells(rows, quantities, judged=()):
    """HTML for each quantity: its value, or over several rows mean, ± deviation, and of how many if not of all. What
    misses its target is marked."""
    texts = []
    for key, _, _, style in quantities:
        mean, std, count = statistics(rows, [key])[key].values()
        if mean is None:
            texts.append("∞" if any(row["metrics"].get(key) == math.inf for row in rows) else "–")
        else:
            text = f"{mean:{style}}" + (f"<small>± {std:{style}}</small>" if std is not None else "")
            text += f"<small>{count} of {len(rows)}</small>" if count < len(rows) else ""
            missed = key in judged and not judged[key]["met"]
            text = text.replace("-", "−")
            texts.append(f'<span class="alarm">{text}</span>' if missed else text)
    return texts


def _verdict(judged, more=""):
    """HTML of targets met or missed."""
    word, _, which = verdict(judged).partition(" ")
    lines = "".join(f"<small>{text}</small>" for text in (which, more) if text)
    return f'<span class="{"alarm" if word == "missed" else "met"}">{word or "–"}</span>{lines}'


def _table(first, quantities, groups):
    """HTML of a table. groups: (html of the first cell, rows, targets judged, a word on them): one input's row, or
    several to be averaged."""
    with_teacher = any(row.get("teacher") for _, rows, *_ in groups for row in rows)
    with_targets = any(judged for *_, judged, _ in groups)
    names = [first] + ["targets"] * with_targets + ["model"] * with_teacher
    page = '<div class="scroll"><table><thead><tr>' + "".join(f'<th class="name">{name}</th>' for name in names)
    page += "".join(f"<th>{html.escape(name)}<small>{unit}</small></th>" for _, name, unit, _ in quantities)
    page += "</tr></thead>"
    for cell, rows, judged, more in groups:
        lines = {"ours": _cells(rows, quantities, judged)}
        teachers = [row["teacher"] for row in rows if row.get("teacher")]
        if teachers:
            lines["teacher"] = _cells(teachers, quantities)
            ratios = versus(rows, [key for key, *_ in quantities])
            lines["ours vs teacher"] = ["–" if value is None else f"{value:+.2f}".replace("-", "−") if key == "psnr"
                                        else f"{value:.2f}×" for key, value in ratios.items()]
        body = [(f'<td class="name">{model}</td>' if with_teacher else "") + "".join(f"<td>{x}</td>" for x in texts)
                for model, texts in lines.items()]
        first = [cell, _verdict(judged, more)] if with_targets else [cell]
        first = "".join(f'<td class="name" rowspan="{len(body)}">{text}</td>' for text in first)
        page += f'<tbody><tr>{first}{"</tr><tr>".join(body)}</tr></tbody>'
    return page + "</table></div>"


def _section(number, row, clean):
    """HTML of one input. `clean` is the row as metrics.json has it; paths come from `row`, where they are exact."""
    name = html.escape(clean["name"])
    text = f'<h2 id="input-{number}">{name}</h2><p class="soft">{html.escape(clean["source"])}'
    if row.get("failed"):
        return text + f'</p><p class="alarm">{html.escape(clean["failed"])}</p>'
    text += (f': {row["frames"]} frames of {row["width"]} × {row["height"]} at {row["fps"] or math.nan:.4g} frames/s, '
             f'latents {" × ".join(str(size) for size in row["latent_shape"])}</p>')
    text += "".join(f"<p>{html.escape(note)}</p>" for note in clean["notes"])
    text += f'<div class="videos{" small" if row["width"] <= 320 else ""}">'
    for label, path in row.get("videos", {}).items():
        wide = " class=wide" if label == "comparison" else ""
        text += (f'<figure{wide}><figcaption>{html.escape(label)}</figcaption>'
                 f'<video controls loop muted playsinline preload="metadata" src="{_url(path)}"></video></figure>')
    if row.get("latent_picture"):
        text += f'<img class="wide" src="{_url(row["latent_picture"])}" alt="latents of {name}" loading="lazy">'
    return text + "</div>"


def write_report(out_dir, rows, info, targets=None, headings=None):
    """Writes out_dir/metrics.json and out_dir/summary_report.html (self-contained); returns the path of the latter.

    rows: one dict an input: name, source, frames, fps, height, width, latent_shape, metrics (psnr in dB, ssim, lpips,
    mse and any others; None where not computed), encode_seconds, decode_seconds, encode_fps, decode_fps,
    peak_memory_mb, notes (list of str), videos ({label: path relative to out_dir}), latent_picture (such a path or
    None). An input that could not be read has name, source and failed (the reason) only. row["teacher"], if there,
    holds a teacher's metrics, times, memory and latent_error; the tables then show ours, the teacher's, and ours
    against it: the difference for PSNR, the ratio for the others. targets: as of `judge.parse_targets`; row["targets"]
    is what `judge` says of a row. headings: {metric: heading} for metrics that `QUANTITIES` lacks; None as a heading
    leaves it out of the tables.
    info: {what: text} about the run (checkpoint, model, device, ...), shown in its order; lpips_note, a sentence, says
    why LPIPS is missing.
    metrics.json: info, rows and summary (mean, sample standard deviation, count of finite values; targets, judged on
    the means). NaN and infinity are null there, and named in the row's notes. Raises OSError where it cannot write.
    """
    done = [row for row in rows if not row.get("failed")]
    teachers = [row["teacher"] for row in done if row.get("teacher")]
    others = sorted({key for row in done for key in row["metrics"]} - {key for key, *_ in QUANTITIES})
    quantities = QUANTITIES[:4] + [(key, (headings or {}).get(key, key), "", ".4g") for key in others] + QUANTITIES[4:]
    quantities = quantities if teachers else quantities[:-1]
    if not values(done + teachers, "lpips"):
        quantities = [quantity for quantity in quantities if quantity[0] != "lpips"]  # the note says why
    summary = summarize(rows, [key for key, *_ in quantities] + ["seconds"], targets or {})
    quantities = [quantity for quantity in quantities if quantity[1] is not None]
    clean_rows = []
    for row in rows:
        lost = []
        clean = strict(row, "", lost)
        clean_rows.append({**clean, "notes": clean.get("notes", []) + lost})
    clean_info = strict(info)
    os.makedirs(out_dir, exist_ok=True)
    content = {"info": clean_info, "summary": summary, "rows": clean_rows}
    write_whole(os.path.join(out_dir, "metrics.json"), json.dumps(content, indent=2, allow_nan=False) + "\n")

    title = html.escape(f"Reconstructions by {clean_info.get('model', 'a video autoencoder')}")
    facts = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(str(value))}</dd>"
                    for what, value in clean_info.items() if what != "lpips_note")
    inputs, sections, failures = [], "", ""
    for number, (row, clean) in enumerate(zip(rows, clean_rows), 1):
        link = f'<a href="#input-{number}">{html.escape(clean["name"])}</a>'
        sections += _section(number, row, clean)
        if row.get("failed"):
            failures += f'<p class="alarm">{link}: {html.escape(clean["failed"])}</p>'
        else:
            inputs.append((link, [row], row.get("targets", {}), ""))
    met = f"{summary['inputs_that_met_targets']} of {len(done)} met" if len(done) > 1 else ""
    if len(done) > 1:
        inputs.append(("mean ± deviation", done, summary["targets"], met))
    legend = "Mean ± sample standard deviation"
    if teachers:
        legend += "; ours vs teacher: difference for PSNR, ratio for the others, over the inputs that have both"
    if targets:
        legend += f". Targets: {in_words(targets)}, judged on the means and on each input"
    if clean_info.get("lpips_note"):
        legend += f'. {html.escape(clean_info["lpips_note"])}'
    path = os.path.join(out_dir, "summary_report.html")
    write_whole(
        path, f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
              f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
              f'<h1>{title}</h1><dl>{facts}</dl><h2>Summary</h2>'
              f'{_table("inputs", quantities, [(f"{len(done)} of {len(rows)}", done, summary["targets"], met)])}'
              f'<p class="soft">{legend}. '
              f'<a href="metrics.json">metrics.json</a></p><h2>Inputs</h2>'
              f'{_table("input", quantities, inputs)}{failures}{sections}</body></html>\n')
    return path
