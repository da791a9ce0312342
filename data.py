"""Clips from videos and images: finding, splitting, sampling.

    sources, refused = probe(find_sources("videos/"))
    train, val = split_sources(sources, val_fraction=0.1)
    clips = TrainClips(train, seed=0)
    clips[Key(epoch=0, index=5, size=128, frames=12)]["video"]      # uint8 12 3 128 128, RGB

What a training sample is depends on (seed, epoch, index) and the files alone: neither on the number of workers or ranks
nor on what was read before, so a run can be resumed exactly. A file that cannot be read at training time is replaced by
another one, chosen by the same numbers, and reported in the sample's "notes".

This file works alone with torch, numpy and opencv-python (and tqdm where many files are probed).
"""
import collections.abc
import csv
import ctypes
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import stat
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

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
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 100_000_000  # in an image or a frame: a file of 3 MB can hold one that takes 6 GB of memory
MAX_LIST = 1 << 28  # bytes of an annotation, which may hold captions
MANY = 200  # files: more take long enough to look at to show it
MAX_REPLACEMENTS = 50  # unreadable files in a row before a sample gives up
try:
    MALLOPT = ctypes.CDLL(None).mallopt
except (AttributeError, OSError, TypeError):  # another C library than glibc
    MALLOPT = None
M_PERTURB, FILL = -6, 165  # glibc's name for an option, see `first_picture`; a byte
PERTURBING = threading.Lock()


class DataError(Exception):
    """Data that cannot be used; the message says what and what to do."""


class Source(NamedTuple):
    """A video or an image that clips are cut from."""
    path: str
    key: str         # path relative to the data folder: what the split is made by
    frames: int = 0  # as the container says; 1 for an image

    @property
    def is_image(self):
        return self.path.lower().endswith(IMAGE_SUFFIXES)


class Sources(collections.abc.Sequence):
    """Many Sources in few arrays: as objects, 100 000 take 37 MB in each data process, like this 7."""

    def __init__(self, sources):
        texts = [source.path if source.path.endswith(source.key) else f"{source.path}\0{source.key}"
                 for source in sources]
        texts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.texts, self.ends = b"".join(texts), np.cumsum([0, *map(len, texts)])
        self.frames = np.array([source.frames for source in sources], np.int64)
        self.key_lengths = np.array([len(source.key) for source in sources], np.int32)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, i):
        text = self.texts[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogatepass")
        path, _, key = text.partition("\0")
        return Source(path, key or path[len(path) - self.key_lengths[i]:], int(self.frames[i]))


class Key(NamedTuple):
    """Names one training sample."""
    epoch: int
    index: int
    size: int    # height and width, pixels
    frames: int
    part: int = 0  # which of the clips that are cut from one opening of the file


class Bucket(NamedTuple):
    """One shape of training batches: `size` x `size` pixels, `frames` frames, `batch` clips per rank and micro-step."""
    size: int
    frames: int
    probability: float
    batch: int


# ---- finding -----------------------------------------------------------------------------------------------------


def find_sources(data, data_root="", only_images=False):
    """Sources of a folder (recursive), of a single file, or of a list of files: an annotation {"list": [{"path":
    "a.mp4"}, ...]} or a table .csv with a column "path". Their paths are relative to `data_root` (default: the list's
    folder). Nothing is opened. DataError for none.
    """
    if only_images:
        images = [source for source in find_sources(data, data_root) if source.is_image]
        if not images:
            raise DataError(f"data: no image ({' '.join(IMAGE_SUFFIXES)}) in {data!r}, and use_images=true")
        return images
    if not data:
        raise DataError("no data given: set data= to a folder, a file, an annotation .json or a table .csv")
    if not os.path.exists(data):
        raise DataError(f"data: {data!r} does not exist")
    if os.path.isdir(data):
        sources = []
        for folder, files in walk(data):
            inner = os.path.relpath(folder, data).replace(os.sep, "/")
            for file in sorted(files):
                if file.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES) and not file.startswith("."):
                    sources.append(Source(os.path.join(folder, file), file if inner == "." else f"{inner}/{file}"))
        if not sources:
            raise DataError(f"data: no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}) under {data!r}")
        return sources
    if read := LISTS.get(os.path.splitext(data)[1].lower()):
        root = data_root or os.path.dirname(data)
        return [Source(os.path.join(root, path), path) for path in read(data)]
    if not data.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):  # FFmpeg would render a text file as video
        raise DataError(f"data: {data!r} is no video or image: its name ends in none of "
                        f"{' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}")
    return [Source(data, os.path.basename(data))]


OUTPUTS = {"summary_report.html": ("comparison_videos", "latent_visualizations"),  # infer.py's
           "leaderboard.html": ("videos",)}


def walk(top):
    """Yields (folder, names of its files) for a folder and those in it, in the order of their names. Links to folders
    are followed, each folder is visited once, and the videos and pictures that stand beside a report are left out."""
    parts = os.path.realpath(top).split(os.sep)
    # Those above, too: a link there would lead back here.
    seen = {os.sep.join(parts[:count]) or os.sep for count in range(1, len(parts) + 1)}
    for folder, folders, files in os.walk(top, followlinks=True):
        outputs = {name for report, names in OUTPUTS.items() if report in files for name in names}
        wanted, folders[:] = sorted(set(folders) - outputs), []
        for name in wanted:
            if (real := os.path.realpath(os.path.join(folder, name))) not in seen:
                seen.add(real)
                folders.append(name)
        yield folder, files


def check_list(path):
    """DataError for a list that is no regular file, or too long to be held in memory many times over, as JSON is."""
    try:
        size = check_regular(path)
    except DataError as error:
        raise DataError(f"data: {path!r}: {error}") from None
    if size > MAX_LIST and not path.lower().endswith(".csv"):
        raise DataError(f"data: {path!r} has more than {MAX_LIST >> 20} MiB: a table .csv takes less memory")


def read_annotation(path):
    """The paths in an annotation file, each once, in order."""
    try:
        check_list(path)
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)["list"]
        paths = [entry["path"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DataError(f"data: {path!r} is no annotation like {{\"list\": [{{\"path\": \"a.mp4\"}}]}} "
                        f"({type(error).__name__}: {error})") from None
    if not paths or not all(isinstance(p, str) and p and "\0" not in p for p in paths):
        raise DataError(f"data: {path!r} must list at least one entry, and every \"path\" must be a file name")
    return list(dict.fromkeys(paths))


def read_table(path):
    """The paths in the column "path" of a CSV file (commas, UTF-8), each once, in order; other columns are ignored."""
    try:
        check_list(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if "path" not in columns:
                raise DataError(f"data: {path!r} has no column \"path\" in its first line"
                                + (f", but {', '.join(columns)[:80]}" if columns else ": it is empty"))
            paths = [row["path"] for row in rows]
    except (ValueError, csv.Error, OSError) as error:
        raise DataError(f"data: {path!r} cannot be read as a CSV file in UTF-8 ({type(error).__name__}: "
                        f"{error})") from None
    if not paths or not all(p and "\0" not in p for p in paths):
        raise DataError(f"data: {path!r} must list at least one file, and have a file name in each row's \"path\"")
    return list(dict.fromkeys(paths))


# What reads the lists of files: {suffix: function of the list's path that returns the paths in it}.
LISTS = {".json": read_annotation, ".csv": read_table}


def probe(sources, max_pixels=MAX_PIXELS, workers=0):
    """Open every source and read its first frame. Returns (readable sources, with frame counts, [(path, why not)])."""
    results = list(look_at(sources, max_pixels, workers))
    readable = [source for source, problem in results if problem is None]
    return readable, [(source.path, problem) for source, problem in results if problem is not None]


def look_at(sources, max_pixels=MAX_PIXELS, workers=0):
    """Yields for every source, in order, (the source with its number of frames, None) or (the source, why it cannot be
    read). `workers` are opened at once; 0: as many as there are cores, but 8 to 64."""
    def look(source):
        try:
            return source._replace(frames=open_source(source.path, max_pixels)[0]), None
        except DataError as error:
            return source, str(error)
    pool = ThreadPoolExecutor(workers or min(64, max(8, os.cpu_count() or 1)))
    try:  # piece by piece: what waits takes a kilobyte each
        results = (result for start in range(0, len(sources), 4096)
                   for result in pool.map(look, sources[start:start + 4096]))
        if len(sources) > MANY:
            from tqdm import tqdm
            results = tqdm(results, total=len(sources), desc="looking at the data", unit="file")
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C


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


def split_sources(sources, val_fraction):
    """(train, validation). A file's side follows from its key alone, so adding files moves none of the others.

    The one exception: if no file falls into the validation share, the one nearest to it is taken.
    """
    if val_fraction <= 0 or len(sources) < 2:
        return list(sources), []
    places = [int.from_bytes(hashlib.sha256(s.key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2 ** 64
              for s in sources]
    limit, last = max(val_fraction, min(places)), max(places)
    held_out = [place < val_fraction or place == limit for place in places]
    if all(held_out):  # a handful of files and a large share: keep something to train on
        held_out = [place < last for place in places]
    return ([s for s, out in zip(sources, held_out) if not out], [s for s, out in zip(sources, held_out) if out])


# ---- reading -----------------------------------------------------------------------------------------------------


def read_frames(path, place, frames, delta, max_pixels=MAX_PIXELS):
    """`frames` frames of a video, every `delta`-th, from the place 0 <= place < 1 among those where the clip fits.

    Returns (list of H W 3 BGR uint8, first frame number, spacing used, [what was odd]). Too short a video is read with
    a smaller spacing, and its last frame repeated; a count that the container got wrong is corrected. DataError if
    nothing can be read. OpenCV seeks by time: where frames are not evenly spaced in time (a variable frame rate), the
    clip begins some frames beside the first frame number; its frames still follow each other as stored.
    """
    capture = open_video(path, max_pixels=max_pixels)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    count = int(count) if known(count) else 0
    if count:
        first, spacing = fit_clip(count, place, frames, delta)
        clip = grab_frames(capture, first, frames, spacing)
        if len(clip) == frames:
            return clip, first, spacing, []
    notes, real = [], count_frames(path, max_pixels)
    if real == 0:
        raise DataError("no frame can be decoded")
    if real != count:
        notes.append(f"the container says {count or 'nothing of its'} frames, {real} can be read")
    first, spacing = fit_clip(real, place, frames, delta)
    clip = grab_frames(open_video(path, max_pixels=max_pixels), first, frames, spacing)
    if len(clip) < min(frames, real):  # some files cannot be sought in; a variable frame rate makes it land too late
        walked = grab_frames(open_video(path, max_pixels=max_pixels), first, frames, spacing, seek=False)
        clip = max(clip, walked, key=len)
    if not clip:
        raise DataError("frames can be counted but not read")
    if len(clip) < frames:
        notes.append(f"only {real} frames, {frames} wanted: the last is repeated")
    return clip + clip[-1:] * (frames - len(clip)), first, spacing, notes


def read_clips(path, place, offsets, frames, deltas, parts, max_pixels=MAX_PIXELS):
    """Several clips from one opening, which seeks once: they lie one behind the other, or overlap in a short video.

    place: of the piece that holds them all, as in `read_frames`; offsets, deltas: of each clip, its place in its part
    of the piece and its spacing. Yields (part, clip, first frame number, spacing, [what was odd]) for those of `parts`,
    each as soon as it is read. DataError as `read_frames`, which reads the clips that do not come out whole.
    """
    capture = open_video(path, max_pixels=max_pixels)
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    count = int(count) if known(count) else 0
    spacings = [fit_clip(count, 0, frames, int(delta))[1] for delta in deltas]
    spans = [(frames - 1) * spacing + 1 for spacing in spacings]
    length = min(count, sum(spans))
    start = int(place * (count - length + 1))
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


def fit_clip(count, place, frames, delta):
    """First frame and spacing of a clip in a video of `count` frames; the spacing shrinks until the clip fits."""
    if frames > 1:
        delta = max(1, min(delta, (count - 1) // (frames - 1)))
    return int(place * max(1, count - (frames - 1) * delta)), delta


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


# ---- augmentation ------------------------------------------------------------------------------------------------


class Augment(NamedTuple):
    """How training clips are varied; every choice is drawn once per clip and is the same for all of its frames."""
    random_crop: bool = True      # a square of random side and place; off: the largest centred square
    min_crop: float = 0.0         # smallest side of that square, as a part of the frame's shorter side (never < size)
    flip: bool = True             # left-right, half of the time
    color_jitter: float = 0.0     # brightness, contrast, saturation by up to this factor; hue by a quarter of it
    blur: float = 0.0             # probability of a Gaussian blur with a deviation of 0.2 to 1.5 pixels


def finish_clip(frames, size, augment, rng):
    """Crop, resize, flip, colour, blur: list of H W 3 BGR uint8 -> (T size size 3 RGB uint8, where it was cut).

    The second is {"crop": (top, left, edge) in pixels of the first frame, "flip": bool}. Cropping comes before resizing
    and resizing before colour conversion: each step then touches fewer pixels.
    """
    side, y, x = 1.0, 0.5, 0.5  # side as a part of the shorter edge; place as a part of what is left
    if augment.random_crop:
        shorter = min(frames[0].shape[:2])
        low = min(1.0, max(augment.min_crop, size / shorter))
        side, y, x = rng.uniform(low, 1.0), rng.random(), rng.random()
    flip = augment.flip and rng.random() < 0.5
    clip, cut = np.empty((len(frames), size, size, 3), np.uint8), None
    for out, frame in zip(clip, frames):
        height, width = frame.shape[:2]
        edge = max(1, round(side * min(height, width)))
        top, left = round(y * (height - edge)), round(x * (width - edge))
        cut = cut or {"crop": (top, left, edge), "flip": bool(flip)}
        frame = frame[top:top + edge, left:left + edge]
        if edge != size:
            frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA if edge > size else cv2.INTER_CUBIC)
        cv2.cvtColor(frame[:, ::-1] if flip else frame, cv2.COLOR_BGR2RGB, dst=out)
    return colour_and_blur(clip, augment, rng), cut


def colour_and_blur(clip, augment, rng):
    """What an Augment says of them: T H W 3 RGB uint8 -> the same shape."""
    if augment.color_jitter > 0:
        clip = jitter_color(clip, augment.color_jitter, rng)
    if augment.blur > 0 and rng.random() < augment.blur:
        sigma = rng.uniform(0.2, 1.5)
        clip = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])
    return clip


def jitter_color(clip, strength, rng):
    """Brightness, contrast and saturation as one 3x4 colour matrix, hue as a rotation about the grey axis."""
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    angle = 2 * np.pi * 0.25 * strength * rng.uniform(-1, 1)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * grey + np.sin(angle) * cross
    matrix = brightness * contrast * (saturation * hue + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * clip.mean()
    matrix = np.column_stack([matrix, np.full(3, offset)]).astype(np.float32)
    return np.stack([cv2.transform(frame, matrix) for frame in clip])


# ---- datasets ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, count):
    """The order in which an epoch takes `count` items."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class TrainClips(Dataset):
    """Training samples by Key. Images serve as clips of one frame, or, with `image_sequences`, as clips of `frames`
    images drawn at random. `clips_per_open` clips are cut from a video each time that it is opened (see `read_clips`);
    a TrainSchedule spreads them over as many steps."""

    def __init__(self, sources, seed=0, min_frame_delta=1, max_frame_delta=1, augment=Augment(), image_sequences=False,
                 max_pixels=MAX_PIXELS, clips_per_open=1):
        self.seed, self.deltas, self.augment = seed, (min_frame_delta, max_frame_delta), augment
        self.image_sequences, self.max_pixels, self.clips_per_open = image_sequences, max_pixels, clips_per_open
        self.sources = Sources(sources)
        is_image = np.array([source.is_image for source in sources], bool)
        self.images, self.videos = np.flatnonzero(is_image), np.flatnonzero(~is_image)
        self.all = np.arange(len(is_image))

    def pool(self, frames):
        """Which sources can give clips of `frames` frames: an epoch opens each of them once."""
        return self.all if frames == 1 or self.image_sequences else self.videos

    def check(self, bucket):
        if not len(self.pool(bucket.frames)):
            raise DataError(f"the data holds only images, which give no clips of {bucket.frames} frames: clips of 1 "
                            "frame are wanted, or image_sequences=true of train.py for clips of unrelated images")

    def __getitem__(self, key):
        """{"video": uint8 T 3 H W tensor (memory order T H W 3), "notes": [(path, what was odd)], "origin": {...}}

        The origin names the file (its key), the first frame, the frames' spacing, the crop and the flip.
        """
        sample, = self.samples(key, [key.part])
        return sample

    def __getitems__(self, keys):
        """The samples of several keys; a file is opened once for those that differ in `part` alone."""
        if self.clips_per_open == 1:
            return [self[key] for key in keys]
        files, found = {}, {}
        for key in keys:
            files.setdefault(key._replace(part=0), []).append(key.part)
        for key, parts in files.items():
            found.update((key._replace(part=part), sample) for part, sample in zip(parts, self.samples(key, parts)))
        return [found[key] for key in keys]

    def samples(self, key, parts):
        """Those of `parts`, of one opening."""
        pool, notes = self.pool(key.frames), []
        order = epoch_order(self.seed, key.epoch, len(pool))
        for attempt in range(MAX_REPLACEMENTS):
            numbers = self.seed, key.epoch, key.index, attempt
            rng = np.random.default_rng(numbers)
            source = self.sources[pool[order[key.index] if attempt == 0 else rng.integers(len(pool))]]
            try:
                found = {part: self.finish(key.size, source, numbers, rng, part, *clip)
                         for part, *clip in self.read_parts(source, key.frames, rng, parts)}
            except DataError as error:
                notes.append((source.path, f"{error}; another file took its place"))
                continue
            found[parts[0]]["notes"][:0] = notes
            return [found[part] for part in parts]
        raise DataError(f"{MAX_REPLACEMENTS} files in a row could not be read, the last {notes[-1][0]!r}: "
                        f"{notes[-1][1]}")

    def finish(self, size, source, numbers, rng, part, frames, first, spacing, odd):
        """A sample of what was read."""
        own = rng if self.clips_per_open == 1 else np.random.default_rng((*numbers, part))
        clip, cut = finish_clip(frames, size, self.augment, own)
        return {"video": torch.from_numpy(clip).permute(0, 3, 1, 2), "notes": [(source.path, note) for note in odd],
                "origin": {"file": source.key, "first": first, "spacing": spacing, **cut}}

    def batches(self, schedule, workers, pin_memory=False):
        """Batches for a TrainSchedule, without end (see `collate`)."""
        ahead = max(1, 4 // self.clips_per_open)
        return schedule.cut(endless(make_loader(self, workers, pin_memory, ahead, batch_sampler=schedule)))

    def read_parts(self, source, frames, rng, parts):
        """Yields (part, *what `read` gives) for each of `parts`."""
        if self.clips_per_open == 1 or source.is_image:  # of an image: other crops
            clip = self.read(source, frames, rng)
            return ((part, *clip) for part in parts)
        deltas = rng.integers(self.deltas[0], self.deltas[1] + 1, self.clips_per_open)
        return read_clips(source.path, rng.random(), rng.random(self.clips_per_open), frames, deltas, parts,
                          self.max_pixels)

    def read(self, source, frames, rng):
        """(frames, first frame number, spacing, [what was odd])"""
        delta, place = int(rng.integers(self.deltas[0], self.deltas[1] + 1)), rng.random()
        if not source.is_image:
            return read_frames(source.path, place, frames, delta, self.max_pixels)
        more = rng.choice(len(self.images), frames - 1, replace=len(self.images) < frames) if frames > 1 else []
        images = [source, *(self.sources[self.images[i]] for i in more)]
        return [read_image(image.path, self.max_pixels) for image in images], 0, 1, []


class ValClips(Dataset):
    """Fixed clips: of each video `per_video`, evenly spread, consecutive frames, the largest centred square. Images as
    in TrainClips; their sequences are of neighbours in the list."""

    def __init__(self, sources, size, frames, per_video=1, limit=0, image_sequences=False,
                 max_pixels=MAX_PIXELS):
        usable = [s for s in sources if frames == 1 or image_sequences or not s.is_image]
        items = ((s, (k + 0.5) / per_video) for k in range(per_video) for s in usable if k == 0 or not s.is_image)
        self.items = list(itertools.islice(items, limit or None))
        images = [s.path for s in sources if s.is_image]
        self.sequences = {}  # of an item that is an image: its files
        for i, (source, _) in enumerate(self.items):
            if source.is_image:
                first = len(self.sequences)
                self.sequences[i] = [images[(first + k) % len(images)] for k in range(frames)]
        self.size, self.frames, self.max_pixels = size, frames, max_pixels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        """{"video": uint8 T 3 H W, "notes": [...]}; an unreadable file gives a video of 0 frames and a note."""
        source, place = self.items[i]
        try:
            if source.is_image:
                frames, notes = [read_image(path, self.max_pixels) for path in self.sequences[i]], []
            else:
                frames, _, _, notes = read_frames(source.path, place, self.frames, 1, self.max_pixels)
        except DataError as error:
            return {"video": torch.empty(0, 3, self.size, self.size, dtype=torch.uint8),
                    "notes": [(source.path, f"{error}; left out of the validation")]}
        clip, _ = finish_clip(frames, self.size, Augment(random_crop=False, flip=False), None)
        return {"video": torch.from_numpy(clip).permute(0, 3, 1, 2), "notes": [(source.path, note) for note in notes]}

    def share(self, rank, world, take_notes):
        """This rank's part, decoded once and kept: [{"video": uint8 T 3 H W}, ...].

        `take_notes` gets each clip's [(path, what was odd)].
        """
        with ThreadPoolExecutor(4) as pool:
            samples = list(pool.map(self.__getitem__, range(rank, len(self), world)))
        for sample in samples:
            take_notes(sample["notes"])
        return [{"video": sample["video"]} for sample in samples if len(sample["video"])]


class TrainSchedule(Sampler):
    """Which samples each micro-batch of this rank holds, without end, from optimizer step `step`, sample `sample` on.

    A step draws one bucket for all ranks, by (seed, step), and takes the next `world * accumulation * batch` samples:
    the same ones however they are spread over ranks and micro-steps. `passed`: what the iteration has given already,
    which the next one leaves out.

    With clips that take several from one opening, so many steps are a block: all take the same bucket and the same
    files, each another clip of a file, so that the clips of a micro-batch are of different files. The iteration then
    gives this rank's samples of a block at once, to one data process, and `cut` makes micro-batches of them.
    """

    def __init__(self, clips, buckets, seed, world=1, rank=0, accumulation=1, step=0, sample=0):
        self.pool_size = {b.frames: len(clips.pool(b.frames)) for b in buckets}
        self.buckets, self.seed, self.world, self.rank = buckets, seed, world, rank
        self.accumulation, self.step, self.sample, self.passed = accumulation, step, sample, 0
        self.block = clips.clips_per_open

    def bucket(self, step):
        weights = np.array([b.probability for b in self.buckets])
        return self.buckets[np.random.default_rng((self.seed, step, 1)).choice(len(weights), p=weights / weights.sum())]

    def __iter__(self):
        return itertools.islice(self.micro_batches() if self.block == 1 else self.blocks(), self.passed, None)

    def micro_batches(self):
        step, sample = self.step, self.sample
        while True:
            bucket = self.bucket(step)
            for _ in range(self.accumulation):
                mine = range(sample + self.rank * bucket.batch, sample + (self.rank + 1) * bucket.batch)
                yield [Key(*divmod(i, self.pool_size[bucket.frames]), bucket.size, bucket.frames) for i in mine]
                sample += self.world * bucket.batch
            step += 1

    def blocks(self):
        step, sample = self.step, self.sample
        while True:
            begin = step - step % self.block  # a resumed run may begin within a block
            bucket, end = self.bucket(begin), begin + self.block
            taken = self.accumulation * self.world * bucket.batch
            opening = max(0, sample - (step - begin) * taken) // self.block
            mine = [opening + (m * self.world + self.rank) * bucket.batch + k
                    for m in range(self.accumulation) for k in range(bucket.batch)]
            yield [Key(*divmod(i, self.pool_size[bucket.frames]), bucket.size, bucket.frames, (now + i) % self.block)
                   for now in range(step, end) for i in mine]
            step, sample = end, sample + (end - step) * taken

    def cut(self, batches):
        """Micro-batches of what a loader of this schedule gives."""
        if self.block == 1:
            yield from batches
            return
        begin = self.step - self.step % self.block
        for n, block in enumerate(batches):
            size = self.bucket(begin + n * self.block).batch
            for start in range(0, len(block["video"]), size):
                yield {"video": block["video"][start:start + size], "notes": [] if start else block["notes"]}


def collate(samples):
    """-> {"video": uint8 N T 3 H W (memory order N T H W 3), "notes": [...]}"""
    video = torch.stack([s["video"].permute(0, 2, 3, 1) for s in samples]).permute(0, 1, 4, 2, 3)
    return {"video": video, "notes": [note for s in samples for note in s["notes"]]}


def endless(loader):
    """The batches of a loader. Its processes take no part in signals that end the run (a terminal or a scheduler sends
    them to all processes at once): only this process acts on them, and the batches go on until it is done.

    With a TrainSchedule, processes that were killed (by a system short of memory, say) are replaced, and no batch is
    lost; DataError if that happens three times without a batch between."""
    schedule, killed = loader.batch_sampler, 0
    while killed < 3:
        try:
            for batch in start_loader(loader):
                if isinstance(schedule, TrainSchedule):
                    schedule.passed += 1
                    if killed:
                        batch["notes"].append(("a data process", f"killed; others read batch {schedule.passed} on"))
                killed = 0
                yield batch
            return
        except DataError as error:  # from a worker it comes with a traceback in its text
            raise DataError(str(error).strip().splitlines()[-1].removeprefix("data.DataError: ")) from None
        except (RuntimeError, OSError, EOFError) as error:  # the last two: of a batch whose sender is gone
            if not isinstance(schedule, TrainSchedule) or type(error) is RuntimeError and "exited" not in str(error):
                raise
            killed += 1
    raise DataError("the data processes died three times in a row (is memory short?): set workers lower")


def start_loader(loader):
    """iter(loader); its processes leave signals to this one, which tells them when to end."""
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # inherited by the processes that iter() starts
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_):
    cv2.setNumThreads(0)  # the workers are the parallelism
    torch.set_num_threads(1)
    # PyTorch looks at the parent's id, which is the helper's (see below): this would outlive a killed run, for good.
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(process):
    process.join()
    os._exit(1)


def worker_context():
    """Workers fork from a clean helper process: forking this one, with its threads, can hang them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cv2"])  # imported once, not once per worker
    return context


def make_loader(clips, workers, pin_memory=False, ahead=4, **kwargs):
    """A DataLoader over `clips` whose processes are clean ones, `ahead` batches each in advance."""
    with warnings.catch_warnings():  # "may create too many workers": the user's number stands
        warnings.simplefilter("ignore", UserWarning)
        return DataLoader(clips, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
                          worker_init_fn=start_worker, persistent_workers=False,
                          generator=torch.Generator(),  # not the global one: each start, a resume's too, draws a seed
                          multiprocessing_context=worker_context() if workers else None,
                          prefetch_factor=ahead if workers else None, **kwargs)
