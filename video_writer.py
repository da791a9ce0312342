"""Videos that browsers play, frame by frame into a .webm.

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

# Through OpenCV, VP8 takes 86 ms a 1280x720 frame at 38.5 dB, VP9 ("VP90") 306 ms at 38.0 dB and 0.6 of the bytes
# (opencv-python 5.0.0, one of two cores, moving texture, 41.0 dB is the ceiling of 4:2:0). The wheels have no H.264
# encoder.
FOURCC = "VP80"
# Through PyAV, with these settings, a frame of 480x832 takes 14 ms at 41.8 dB; through OpenCV 60 ms at 40.0 dB and 0.9
# of the bytes (PyAV 18.1, one core, an animated film). libvpx's realtime mode gave 41.5 dB in the same time.
ENCODER, SETTINGS = "libvpx", {"deadline": "good", "cpu-used": "5", "crf": "4", "qmin": "0", "qmax": "50"}
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
