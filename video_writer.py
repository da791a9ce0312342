"""Writes videos that browsers play, frame by frame, as .webm files.

    with VideoWriter("out/comparison_videos/NAME_comparison.webm", fps, width, height) as writer:
        writer.write(frame)                                # RGB uint8 H W 3

This file works alone with numpy and OpenCV; with the package av (PyAV) videos are written several times faster.
"""
import contextlib
import fractions
import os
import sys
import tempfile
import threading

import cv2
import numpy as np

# With OpenCV, VP8 takes 86 ms for a 1280x720 frame at 38.5 dB; VP9 ("VP90") takes 306 ms at 38.0 dB, and 0.6 of the
# bytes (opencv-python 5.0.0, one of two cores, moving texture; 4:2:0 allows at most 41.0 dB). The wheels have no H.264
# encoder.
FOURCC = "VP80"
# With PyAV and these settings, a frame of 480x832 takes 14 ms at 41.8 dB; with OpenCV 60 ms at 40.0 dB and 0.9 of the
# bytes (PyAV 18.1, one core, an animated film). libvpx's realtime mode gave 41.5 dB in the same time.
ENCODER, SETTINGS = "libvpx", {"deadline": "good", "cpu-used": "5", "crf": "4", "qmin": "0", "qmax": "50"}
STDERR = threading.Lock()
MAX_SIDE = 16382  # pixels: VP8 has 14 bits for a side, and odd sides are padded to even ones
BITS_PER_PIXEL, LEAST_RATE = 3, 1100  # OpenCV's bit rate; bits/s: under 1000, OpenCV writes a broken file


def check_video_size(width, height, path):
    """OSError, naming `path`, for frames that VideoWriter cannot write: too long a side, or too few pixels."""
    if max(width, height) > MAX_SIDE:
        raise OSError(f"{path}: {width}x{height} pixels: the videos that are written have at most {MAX_SIDE} a side; "
                      "scale it down")
    if BITS_PER_PIXEL * 25 * width * height < LEAST_RATE:
        raise OSError(f"{path}: {width}x{height} pixels are too few to write a video of")


@contextlib.contextmanager
def _without_tag_warning():
    """Context that drops OpenCV's line "tag ... is not supported" from stderr, which it prints for each .webm that it
    opens without problems (OpenCV issue 8919). Other lines are printed at the end of the block."""
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
    """Whether a .webm file is as long as its header says: after the segment's id and a 1 come 7 bytes with the size."""
    with open(path, "rb") as file:
        head = file.read(256)
    start = head.find(b"\x18\x53\x80\x67\x01") + 12
    return start + int.from_bytes(head[start - 7:start], "big") == os.path.getsize(path)


class _ThroughOpenCV:
    """A VP8 encoder and its file, for RGB frames of even sides. It does not report errors of the disk."""

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
    """The same with PyAV (the module `av`), with settings that OpenCV does not pass on. OSError if a write fails."""

    def __init__(self, av, path, fps, size):
        self.av, self.count = av, 0
        self.rate = fractions.Fraction(fps).limit_denominator(1001)  # 29.97003 is 30000/1001
        self.file = av.open(path, "w", format="webm")
        try:
            self.stream = self.file.add_stream(ENCODER, rate=self.rate, options=SETTINGS)
            self.stream.width, self.stream.height, self.stream.pix_fmt = *size, "yuv420p"
            most = min(BITS_PER_PIXEL * fps * size[0] * size[1], 1e9)  # libvpx holds the rate in 32 bits
            self.stream.bit_rate = round(most)
            self.stream.codec_context.thread_count = 1  # each video has a thread of its own
            self.file.start_encoding()
        except BaseException:
            self.abandon()
            raise

    def write(self, frame):
        picture = self.av.VideoFrame.from_ndarray(frame, format="rgb24")  # swscale converts it to 4:2:0, as in OpenCV
        picture.pts, picture.time_base = self.count, 1 / self.rate
        self.count += 1
        self.file.mux(self.stream.encode(picture))

    def finish(self):
        self.file.mux(self.stream.encode(None))
        self.file.close()

    def abandon(self):
        with contextlib.suppress(OSError):  # the disk may be full
            self.file.close()


def _open_encoder(path, fps, size):
    """An encoder of PyAV if that is installed, else of OpenCV."""
    try:
        import av
    except ImportError:
        av = None
    if av and ENCODER in av.codecs_available:
        return _ThroughPyAV(av, path, fps, size)
    return _ThroughOpenCV(path, fps, size)


class VideoWriter:
    """Streams RGB uint8 H W 3 frames into a VP8 .webm, which browsers play: with PyAV if that is installed, which is
    several times faster, else with OpenCV. A context manager.

    It creates the folder. The file gets its name when the block ends without an exception; until then it is
    `.NAME.part.webm` in the same folder. A row or column is repeated if the height or width is odd (OpenCV would cut
    one off). `fps` (frames/s) becomes 25 if it is outside 0.1 to 240, NaN or None, as broken containers report it, or
    too low for so few pixels. `.fps` is the rate written; `.note` is a text about the change, or "".
    ValueError for a path that is not .webm, or a frame of another size or dtype. OSError for a size as in
    `check_video_size`, and if the file cannot be opened or written, or is empty or incomplete at the end (OpenCV itself
    does not report a full disk).
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
        """Call it after the last frame. OSError if the file is incomplete. The end of the block then only renames it.
        """
        if not self.frames:
            raise OSError(f"{self.path}: no frame was written")
        self._encoder.finish()
        # FFmpeg writes duration and size into the header at the end. A file that was cut short has no duration, and so
        # no frame count; or it has them, but fewer bytes than its header says.
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
