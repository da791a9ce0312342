"""Reads video and image files, whole or some frames of them, and is careful with files that may do harm.

    reader = VideoReader("a.mp4")
    for frame in reader: ...                               # H W 3 RGB uint8
    frames, first, spacing, odd = read_frames("a.mp4", position=0.5, frames=12, delta=2)      # 12 of H W 3 BGR uint8

Files may be broken, forged or gone: DataError then says in a few words what is wrong. This file works alone with numpy
and opencv-python.
"""
import ctypes
import functools
import os
import stat
import struct
import threading

# A playlist (ffconcat, HLS, DASH, SDP) may be named .mp4, and FFmpeg would open the files and addresses in it. So only
# containers that hold a whole video are read, and only from disk. OpenCV reads this variable whenever it opens a video;
# of repeated options the last one counts, so ours come last.
OWN_OPTIONS = ("protocol_whitelist;file|format_whitelist;mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,mjpeg,"
               "ivf,flv,ogg,asf,mxf,nut,dv,gif,yuv4mpegpipe")
if not os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS", "").endswith(OWN_OPTIONS):
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "|".join(
        filter(None, [os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS"), OWN_OPTIONS]))
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # or FFmpeg prints a line for each block of a damaged stream
os.environ.setdefault("OPENCV_LOG_LEVEL", "FATAL")  # or OpenCV prints a line for a damaged image, besides ours
import cv2
import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 100_000_000  # of an image or a frame: a file of 3 MB can hold one that takes 6 GB of memory
try:
    MALLOPT = ctypes.CDLL(None).mallopt
except (AttributeError, OSError, TypeError):  # another C library than glibc
    MALLOPT = None
# glibc's number for the option that fills new memory with a byte, and that byte: see `first_picture`.
M_PERTURB, FILL = -6, 165
PERTURBING = threading.Lock()


class DataError(Exception):
    """Data that cannot be used; the message says what and what to do."""


def open_source(path, max_pixels=MAX_PIXELS):
    """Returns (number of frames according to the container, frames per second, first frame H W 3 BGR uint8). DataError
    if no frame can be read, or if it has more than `max_pixels` pixels."""
    if path.lower().endswith(IMAGE_SUFFIXES):
        return 1, 0.0, read_image(path, max_pixels)
    capture = open_video(path, max_pixels=max_pixels)
    count, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    frame = first_picture(capture)
    if frame is None:
        raise DataError("no frame can be decoded (damaged, or this OpenCV has no decoder for its codec)")
    check_size(frame.shape[1], frame.shape[0], max_pixels)  # a frame may be larger than the container says
    if is_blank(frame) and is_blank(first_picture(open_video(path, max_pixels=max_pixels), FILL + 1), FILL + 1):
        raise DataError(BLANK)
    return int(count) if is_plausible(count) else 1, fps, frame


BLANK = (f"OpenCV {cv2.__version__} gives no picture of its frames, as of all interlaced videos: deinterlace it, say "
         "with ffmpeg -i IN -vf bwdif OUT")


def first_picture(capture, fill=FILL):
    """The next frame of a capture that has not read any yet, H W 3 BGR uint8, or None. If every byte of it is `fill`,
    OpenCV has not written to its memory (see `is_blank`).

    That happens with interlaced frames in OpenCV 4.13 to 5.0: its FFmpeg 8 does not convert them, but OpenCV reports
    them as read. A capture allocates the memory for its frames with the first one. So glibc is told to fill new memory
    with a known byte before that. Without glibc, the frames of such a video are whatever the memory held.
    """
    if not capture.grab():
        return None
    if MALLOPT is None:
        ok, frame = capture.retrieve()
    else:
        with PERTURBING:
            MALLOPT(M_PERTURB, fill ^ 255)
            try:
                ok, frame = capture.retrieve()
            finally:
                MALLOPT(M_PERTURB, 0)
    return frame if ok else None


def is_blank(frame, fill=FILL):
    return frame is not None and frame[0, 0, 0] == fill and bool((frame == fill).all())


def is_plausible(count):
    """Whether a container's frame count can be right: a recording that was never closed has none."""
    return 1 <= count < 1e8


def check_size(width, height, max_pixels):
    """DataError for more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise DataError(f"{width}x{height} pixels, and max_pixels is {max_pixels}: raise it, or scale the file down")


def check_regular(path):
    """The size of a file in bytes. DataError if it is not a regular file: opening a FIFO could block forever."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(error.strerror.lower()) from None
    except ValueError:
        raise DataError("its name is none that a file can have") from None
    if not stat.S_ISREG(info.st_mode):
        raise DataError("not a regular file")
    return info.st_size


def check_file(path):
    """DataError if the file is not regular, or empty. Checked before each opening, since it may have changed."""
    if check_regular(path) == 0:
        raise DataError("empty file")


def open_video(path, threads=1, max_pixels=MAX_PIXELS):
    """A cv2.VideoCapture. DataError if the file is not a video, or has larger frames. threads: number of the decoder's
    threads; 0: one for each core.

    One thread is right for clips. Each further thread decodes one more frame beyond the clip's end, and threads start
    anew for each file (16 threads: 1.5 times the work per clip). With one thread, damaged streams also look the same on
    all machines.
    """
    check_file(path)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:  # OpenCV would crash
        raise DataError("its name is not UTF-8") from None
    threads = threads or cv2.getNumberOfCPUs()
    # CAP_FFMPEG: otherwise OpenCV would read a%d.mp4 as an image series. abspath: in the relative path a:b.mp4, FFmpeg
    # would take a: for a protocol.
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    if not capture.isOpened():
        raise DataError("not a video")
    # The container's values: nothing is decoded yet.
    check_size(*(int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)), max_pixels)
    return capture


def read_image(path, max_pixels=MAX_PIXELS):
    """The image, H W 3 BGR uint8, turned upright as its EXIF data says. DataError if it cannot be read, or has more
    than `max_pixels` pixels: then it is not decoded."""
    check_file(path)
    try:
        check_size(*image_size(path), max_pixels)
        if os.path.getsize(path) > 8 * max_pixels + (1 << 24):  # RGBA of 16 bits, and 16 MiB for other contents
            raise DataError(f"{os.path.getsize(path)} bytes are too many for an image of at most {max_pixels} pixels "
                            "(max_pixels)")
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as error:
        raise DataError(f"not readable ({type(error).__name__})") from None
    except (struct.error, IndexError):
        image = None
    if image is None:
        raise DataError("not an image")
    return image


def image_size(path):
    """(width, height) according to the header of a PNG, JPEG, WebP or BMP file, before its EXIF rotation. struct.error
    or IndexError if the file ends too early. DataError for any other format, which OpenCV might decode, whatever the
    file's name."""
    with open(path, "rb") as file:
        head = file.read(32)
        if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
            return struct.unpack_from(">II", head, 16)
        if head[:2] == b"\xff\xd8":
            return jpeg_size(file)
        if head[:4] == b"RIFF" and head[8:15] == b"WEBPVP8":
            if head[15] == ord("X"):  # the canvas, which animations have
                return tuple(1 + int.from_bytes(head[at:at + 3], "little") for at in (24, 27))
            if head[15] == ord("L"):
                bits, = struct.unpack_from("<I", head, 21)
                return 1 + bits % 2 ** 14, 1 + (bits >> 14) % 2 ** 14
            return tuple(side % 2 ** 14 for side in struct.unpack_from("<HH", head, 26))
        if head[:2] == b"BM":
            width, height = struct.unpack_from("<HH" if head[14] == 12 else "<ii", head, 18)
            return abs(width), abs(height)  # a negative height means that the rows go from top to bottom
    raise DataError("not a PNG, JPEG, WebP or BMP image")


def jpeg_size(file):
    """(width, height) in the first frame header of an open JPEG file, which is searched as libjpeg does."""
    file.seek(2)
    for _ in range(1 << 16):  # no real image has more segments, or bytes between them, before its frame header
        if file.read(1)[0] != 0xff:
            continue
        marker = file.read(1)[0]
        if marker == 0xff:
            file.seek(-1, os.SEEK_CUR)
        if marker in (0x00, 0x01, 0xff) or 0xd0 <= marker <= 0xd7:  # not a marker, or one without contents
            continue
        length, = struct.unpack(">H", file.read(2))
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):
            height, width = struct.unpack(">xHH", file.read(5))
            return width, height
        if marker in (0xda, 0xd9) or length < 2:
            break
        file.seek(length - 2, os.SEEK_CUR)
    raise DataError("not an image")


def read_frames(path, position, frames, delta, max_pixels=MAX_PIXELS):
    """Read a clip of `frames` frames, every `delta`-th of the video. position: where it begins, from 0 for the first to
    just below 1 for the last frame from which it fits.

    Returns (list of H W 3 BGR uint8, first frame number, spacing used, [what was odd]). If the video is too short, the
    spacing becomes smaller, and if need be the last frame is repeated. If the container's frame count is wrong, the
    frames are counted. DataError if nothing can be read. OpenCV seeks by time: in a video with a variable frame rate,
    the clip may begin some frames before or after the first frame number. Its spacing is still right.
    """
    capture = open_video(path, max_pixels=max_pixels)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    count = int(count) if is_plausible(count) else 0
    if count:
        first, spacing = fit_clip(count, position, frames, delta)
        clip = grab_frames(capture, first, frames, spacing)
        if len(clip) == frames:
            return clip, first, spacing, []
    notes, real = [], count_frames(path, max_pixels)
    if real == 0:
        raise DataError("no frame can be decoded")
    if real != count:
        notes.append(f"the container says {count or 'nothing of its'} frames, {real} can be read")
    first, spacing = fit_clip(real, position, frames, delta)
    clip = grab_frames(open_video(path, max_pixels=max_pixels), first, frames, spacing)
    if len(clip) < min(frames, real):  # seeking may fail, or, with a variable frame rate, go too far
        without_seek = grab_frames(open_video(path, max_pixels=max_pixels), first, frames, spacing, seek=False)
        clip = max(clip, without_seek, key=len)
    if not clip:
        raise DataError("frames can be counted but not read")
    if len(clip) < frames:
        notes.append(f"only {real} frame{'s' * (real > 1)}, {frames} wanted: the last is repeated")
    return clip + clip[-1:] * (frames - len(clip)), first, spacing, notes


def read_clips(path, position, offsets, frames, deltas, parts, max_pixels=MAX_PIXELS):
    """Read several clips from one opening of a video, with one seek. They all lie in one section of the video, one
    after the other; in a short video they overlap.

    position: where the section begins, as in `read_frames`. offsets: for each clip, its position (0 to 1) in its own
    part of the section; deltas: its spacing. parts: the numbers of the clips that are wanted. Yields (part, clip, first
    frame number, spacing, [what was odd]) for these, each as soon as it is read. A clip that lacks frames is read again
    by `read_frames`; DataError as there.
    """
    capture = open_video(path, max_pixels=max_pixels)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    count = int(count) if is_plausible(count) else 0
    spacings = [fit_clip(count, 0, frames, int(delta))[1] for delta in deltas]
    spans = [(frames - 1) * spacing + 1 for spacing in spacings]
    length = min(count, sum(spans))
    start = int(position * (count - length + 1))
    firsts = [start + int((k + offset) / len(offsets) * max(1, length - span + 1))
              for k, (offset, span) in enumerate(zip(offsets, spans))]
    wanted = {k: range(firsts[k], firsts[k] + spans[k], spacings[k]) for k in sorted(parts, key=lambda k: firsts[k])}
    needed, held, t = {n for numbers in wanted.values() for n in numbers}, {}, min(firsts)
    # Always seek to the same frame, whichever parts are wanted: a seek may miss its frame, but it does so repeatably.
    going = count > 0 and (t == 0 or capture.set(cv2.CAP_PROP_POS_FRAMES, t))
    for k, numbers in wanted.items():
        held = {n: frame for n, frame in held.items() if n >= numbers[0]}
        while going and t <= numbers[-1]:
            if t in needed:
                held[t] = first_picture(capture) if not held else capture.read()[1]
            going = held[t] is not None if t in needed else capture.grab()
            t += 1
        clip = [held[n] for n in numbers if held.get(n) is not None]
        if len(clip) < frames:
            at = firsts[k] / count if count else (k + offsets[k]) / len(offsets)
            yield k, *read_frames(path, at, frames, int(deltas[k]), max_pixels)
            continue
        if is_blank(clip[0]) and is_blank(clip[-1]):
            raise DataError(BLANK)
        yield k, clip, firsts[k], spacings[k], []


def fit_clip(count, position, frames, delta):
    """(first frame number, spacing) of a clip in a video of `count` frames. The spacing shrinks until the clip fits."""
    if frames > 1:
        delta = max(1, min(delta, (count - 1) // (frames - 1)))
    return int(position * max(1, count - (frames - 1) * delta)), delta


def grab_frames(capture, first, frames, spacing, seek=True):
    """Read up to `frames` frames, [H W 3 BGR uint8], every `spacing`-th from `first` on. Seeks there, or without `seek`
    decodes all frames before it. Frames in between are grabbed only, which saves their conversion to BGR. DataError if
    OpenCV gives no picture, see `first_picture`."""
    if first > 0 and not (capture.set(cv2.CAP_PROP_POS_FRAMES, first) if seek else
                          all(capture.grab() for _ in range(first))):
        return []
    clip = []
    while len(clip) < frames:
        frame = capture.read()[1] if clip else first_picture(capture)
        if frame is None:
            break
        clip.append(frame)
        if len(clip) < frames and not all(capture.grab() for _ in range(spacing - 1)):
            break
    if clip and is_blank(clip[0]) and is_blank(clip[-1]):
        raise DataError(BLANK)
    return clip


def count_frames(path, max_pixels=MAX_PIXELS):
    """The number of frames that can be decoded. All are decoded; the result is cached until the file changes."""
    try:
        about = os.stat(path)
    except OSError as error:
        raise DataError(error.strerror.lower()) from None
    return _count_frames(path, max_pixels, about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=10000)
def _count_frames(path, max_pixels, *_):
    capture, count = open_video(path, max_pixels=max_pixels), 0
    while capture.grab():
        count += 1
    return count


class VideoReader:
    """All frames of a video or image, in order: `for frame in VideoReader(path)` gives H W 3 RGB uint8.

    Has `fps` (25 if the container names none), `frames` (their number according to the container), `height` and
    `width`. DataError if the file cannot be read.
    """

    def __init__(self, path, max_pixels=MAX_PIXELS):
        self.path, self.max_pixels = path, max_pixels
        self.frames, fps, first = open_source(path, max_pixels)
        self.about = os.stat(path)
        self.fps = fps if np.isfinite(fps) and 0 < fps <= 1000 else 25.0
        self.height, self.width = first.shape[:2]

    def __iter__(self):
        if self.path.lower().endswith(IMAGE_SUFFIXES):
            yield cv2.cvtColor(read_image(self.path, self.max_pixels), cv2.COLOR_BGR2RGB)
            return
        capture = open_video(self.path, 0, self.max_pixels)
        while True:
            ok, frame = capture.read()
            if not ok or frame is None:
                return
            if frame.shape[:2] != (self.height, self.width):  # a stream may change its size half-way
                frame = cv2.resize(frame, (self.width, self.height), interpolation=cv2.INTER_AREA)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def changes(self):
        """Call this after the file was read more than once. Returns [what is odd about it]: it may have been written
        to, as a growing recording is. DataError if it was replaced or became shorter: what was read does not match."""
        now = os.stat(self.path)
        if now.st_ino != self.about.st_ino or now.st_size < self.about.st_size:
            raise DataError("the file was changed while it was read")
        return ["the file was written to while it was read"] * (now.st_mtime_ns != self.about.st_mtime_ns)
