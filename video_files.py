"""Video and image files, opened with care and read: whole, or some frames of them.

    reader = VideoReader("a.mp4")
    for frame in reader: ...                               # H W 3 RGB uint8
    frames, first, spacing, odd = read_frames("a.mp4", position=0.5, frames=12, delta=2)      # 12 of H W 3 BGR uint8

Files may be broken, forged or gone: DataError says in a few words what is wrong with one. This file works alone with
numpy and opencv-python.
"""
import ctypes
import functools
import os
import stat
import struct
import threading

# A playlist (ffconcat, HLS, DASH, SDP) may be named .mp4, and FFmpeg would open the files and addresses in it. So only
# containers that hold a whole video are read, from disk. OpenCV reads this at each opening; what comes last counts.
OWN_OPTIONS = ("protocol_whitelist;file|format_whitelist;mov,matroska,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,mjpeg,"
               "ivf,flv,ogg,asf,mxf,nut,dv,gif,yuv4mpegpipe")
if not os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS", "").endswith(OWN_OPTIONS):
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "|".join(
        filter(None, [os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS"), OWN_OPTIONS]))
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a damaged stream prints a line per block otherwise
os.environ.setdefault("OPENCV_LOG_LEVEL", "FATAL")  # or a line for a damaged image, besides our own
import cv2
import numpy as np

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 100_000_000  # in an image or a frame: a file of 3 MB can hold one that takes 6 GB of memory
try:
    MALLOPT = ctypes.CDLL(None).mallopt
except (AttributeError, OSError, TypeError):  # another C library than glibc
    MALLOPT = None
M_PERTURB, FILL = -6, 165  # glibc's name for an option, see `first_picture`; a byte
PERTURBING = threading.Lock()


class DataError(Exception):
    """Data that cannot be used; the message says what and what to do."""


def open_source(path, max_pixels=MAX_PIXELS):
    """(frames by the container's word, frames per second, first frame H W 3 BGR uint8); DataError if there is none, or
    it has more than `max_pixels` pixels."""
    if path.lower().endswith(IMAGE_SUFFIXES):
        return 1, 0.0, read_image(path, max_pixels)
    capture = open_video(path, max_pixels=max_pixels)
    count, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    frame = first_picture(capture)
    if frame is None:
        raise DataError("no frame can be decoded (damaged, or this OpenCV has no decoder for its codec)")
    check_size(frame.shape[1], frame.shape[0], max_pixels)  # it may be larger than the container says
    if is_blank(frame) and is_blank(first_picture(open_video(path, max_pixels=max_pixels), FILL + 1), FILL + 1):
        raise DataError(BLANK)
    return int(count) if known(count) else 1, fps, frame


BLANK = (f"OpenCV {cv2.__version__} gives no picture of its frames, as of all interlaced videos: deinterlace it, say "
         "with ffmpeg -i IN -vf bwdif OUT")


def first_picture(capture, fill=FILL):
    """The next frame of a capture that gave none so far, H W 3 BGR uint8, or None. With `fill` in all of it, OpenCV
    gave no picture, but the memory as it found it.

    OpenCV 4.13 to 5.0 does that with interlaced frames, and says that it has read them: its FFmpeg 8 does not convert
    them. A capture takes the memory for pictures with its first one; glibc is told to fill it before. Without glibc
    such a video is read as what its memory held.
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


def known(count):
    """Whether a container's frame count means anything: a recording that was never closed has none."""
    return 1 <= count < 1e8


def check_size(width, height, max_pixels):
    """DataError for more pixels than that."""
    if width * height > max_pixels:
        raise DataError(f"{width}x{height} pixels, and max_pixels is {max_pixels}: raise it, or scale the file down")


def check_regular(path):
    """Its size in bytes. DataError for what is no regular file: to open a FIFO would take for ever."""
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
    """DataError if there is nothing to read. Asked each time: it may have become a FIFO."""
    if check_regular(path) == 0:
        raise DataError("empty file")


def open_video(path, threads=1, max_pixels=MAX_PIXELS):
    """A cv2.VideoCapture; DataError if it is no video, or a larger one. threads: of its decoder, 0 for all cores.

    One is right for clips: more threads decode as many frames more, beyond the clip's end, and start anew for each file
    (16 threads: 1.5 times the work per clip). And damaged streams then look the same on all machines.
    """
    check_file(path)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:  # OpenCV would crash
        raise DataError("its name is not UTF-8") from None
    threads = threads or cv2.getNumberOfCPUs()
    # FFmpeg is named, or OpenCV goes on to read a%d.mp4 as an image series. To FFmpeg, a: of a relative a:b.mp4 would
    # be a protocol.
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    if not capture.isOpened():
        raise DataError("not a video")
    # Nothing is decoded yet.
    check_size(*(int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)), max_pixels)
    return capture


def read_image(path, max_pixels=MAX_PIXELS):
    """H W 3 BGR uint8, turned upright as its EXIF data says. A larger image is not decoded."""
    check_file(path)
    try:
        check_size(*image_size(path), max_pixels)
        if os.path.getsize(path) > 8 * max_pixels + (1 << 24):  # RGBA of 16 bits, and what else may be in the file
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
    """(width, height) as the first bytes of a PNG, JPEG, WebP or BMP file say, before EXIF data turn it; struct.error
    or IndexError where they end too early. DataError for any other file: OpenCV would decode it by its content,
    whatever its name."""
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
            return abs(width), abs(height)  # a negative height: from the top downwards
    raise DataError("not a PNG, JPEG, WebP or BMP image")


def jpeg_size(file):
    """(width, height) of an open JPEG file: of its first frame header, found as libjpeg finds it."""
    file.seek(2)
    for _ in range(1 << 16):  # more parts, or bytes between them, are before no honest image
        if file.read(1)[0] != 0xff:
            continue
        marker = file.read(1)[0]
        if marker == 0xff:
            file.seek(-1, os.SEEK_CUR)
        if marker in (0x00, 0x01, 0xff) or 0xd0 <= marker <= 0xd7:  # no marker, or one without contents
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
    """`frames` frames of a video, every `delta`-th, from position, 0 <= position < 1, of those where the clip fits.

    Returns (list of H W 3 BGR uint8, first frame number, spacing used, [what was odd]). Too short a video is read with
    a smaller spacing, and its last frame repeated; a count that the container got wrong is corrected. DataError if
    nothing can be read. OpenCV seeks by time: where frames are not evenly spaced in time (a variable frame rate), the
    clip begins some frames beside the first frame number; its frames still follow each other as stored.
    """
    capture = open_video(path, max_pixels=max_pixels)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    count = int(count) if known(count) else 0
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
    if len(clip) < min(frames, real):  # some files cannot be sought in; a variable frame rate makes it land too late
        walked = grab_frames(open_video(path, max_pixels=max_pixels), first, frames, spacing, seek=False)
        clip = max(clip, walked, key=len)
    if not clip:
        raise DataError("frames can be counted but not read")
    if len(clip) < frames:
        notes.append(f"only {real} frame{'s' * (real > 1)}, {frames} wanted: the last is repeated")
    return clip + clip[-1:] * (frames - len(clip)), first, spacing, notes


def read_clips(path, position, offsets, frames, deltas, parts, max_pixels=MAX_PIXELS):
    """Several clips from one opening, which seeks once: they lie one behind the other, or overlap in a short video.

    position: of the piece that holds them all, as in `read_frames`; offsets, deltas: of each clip, where in its part of
    the piece it is, and its spacing. Yields (part, clip, first frame number, spacing, [what was odd]) for those of
    `parts`, each as soon as it is read. DataError as `read_frames`, which reads the clips that do not come out whole.
    """
    capture = open_video(path, max_pixels=max_pixels)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    count = int(count) if known(count) else 0
    spacings = [fit_clip(count, 0, frames, int(delta))[1] for delta in deltas]
    spans = [(frames - 1) * spacing + 1 for spacing in spacings]
    length = min(count, sum(spans))
    start = int(position * (count - length + 1))
    firsts = [start + int((k + offset) / len(offsets) * max(1, length - span + 1))
              for k, (offset, span) in enumerate(zip(offsets, spans))]
    wanted = {k: range(firsts[k], firsts[k] + spans[k], spacings[k]) for k in sorted(parts, key=lambda k: firsts[k])}
    needed, held, t = {n for numbers in wanted.values() for n in numbers}, {}, min(firsts)
    # Whatever parts are wanted, it seeks to the same frame: a seek can land elsewhere than it should.
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
    """First frame and spacing of a clip in a video of `count` frames; the spacing shrinks until the clip fits."""
    if frames > 1:
        delta = max(1, min(delta, (count - 1) // (frames - 1)))
    return int(position * max(1, count - (frames - 1) * delta)), delta


def grab_frames(capture, first, frames, spacing, seek=True):
    """Up to `frames` frames. Seeks once, or reads from the start on; frames that are passed over are grabbed, which
    skips their conversion to BGR. DataError if OpenCV gives no picture of them, see `first_picture`."""
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
    """How many frames can be decoded: all are; the answer is kept while the file stays as it is."""
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

    Has `fps` (25 if the container names none), `frames` (by the container's word), `height`, `width`. DataError if it
    is no video.
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
        """[what is odd about it] after it was read more than once: it may have grown, as a recording does. DataError if
        it is another file now, or a shorter one: what was read of it does not belong together."""
        now = os.stat(self.path)
        if now.st_ino != self.about.st_ino or now.st_size < self.about.st_size:
            raise DataError("the file was changed while it was read")
        return ["the file was written to while it was read"] * (now.st_mtime_ns != self.about.st_mtime_ns)
