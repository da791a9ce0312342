"""The files of a dataset: finds them in folders and lists, checks that they can be read, splits off validation files.

    sources, refused = probe(find_sources("videos/"))
    train, val = split_sources(sources, val_fraction=0.1)

This file needs video_files.py beside it, and tqdm for a progress bar over many files.
"""
import collections.abc
import csv
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from video_files import IMAGE_SUFFIXES, MAX_PIXELS, VIDEO_SUFFIXES, DataError, check_regular, open_source

MAX_LIST = 1 << 28  # bytes of an annotation, which may hold captions
MANY = 200  # number of files from which on a progress bar is shown while they are checked


class Source(NamedTuple):
    """A video or an image that clips are cut from."""
    path: str
    key: str         # path relative to the data folder; decides whether the file is for training or validation
    frames: int = 0  # number of frames according to the container; 1 for an image

    @property
    def is_image(self):
        return self.path.lower().endswith(IMAGE_SUFFIXES)


class Sources(collections.abc.Sequence):
    """A sequence of Sources in a few arrays: 100 000 take 7 MB in each data process, and 37 MB as a list of objects."""

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


def find_sources(data, data_root="", only_images=False):
    """Sources of a folder (recursive), of a single file, or of a list of files: an annotation {"list": [{"path":
    "a.mp4"}, ...]} or a table .csv with a column "path". Their paths are relative to `data_root` (default: the list's
    folder). No video or image is opened. DataError, naming the path, if there is nothing; the caller adds the setting.
    """
    if only_images:
        images = [source for source in find_sources(data, data_root) if source.is_image]
        if not images:
            raise DataError(f"no image ({' '.join(IMAGE_SUFFIXES)}) in {data!r}, and use_images=true")
        return images
    if not data:
        raise DataError("no data given: a folder, a file, an annotation .json or a table .csv is wanted")
    if not os.path.exists(data):
        raise DataError(f"{data!r} does not exist")
    if os.path.isdir(data):
        sources = []
        for folder, files in walk(data):
            inner = os.path.relpath(folder, data).replace(os.sep, "/")
            for file in sorted(files):
                if file.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES) and not file.startswith("."):
                    sources.append(Source(os.path.join(folder, file), file if inner == "." else f"{inner}/{file}"))
        if not sources:
            raise DataError(f"no video or image ({' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}) under {data!r}")
        return sources
    if read := LISTS.get(os.path.splitext(data)[1].lower()):
        root = data_root or os.path.dirname(data)
        return [Source(os.path.join(root, path), path) for path in read(data)]
    if not data.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):  # FFmpeg would render a text file as video
        raise DataError(f"{data!r} is no video or image: its name ends in none of "
                        f"{' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}")
    return [Source(data, os.path.basename(data))]


# {report: folders beside it with videos and pictures of results}, which are no data.
OUTPUTS = {"summary_report.html": ("comparison_videos", "latent_visualizations"),  # of infer.py
           "leaderboard.html": ("videos",)}


def walk(top):
    """Yields (folder, names of its files) for a folder and all folders in it, in the order of their names. Links to
    folders are followed, and each folder is visited once. The folders of results beside a report are left out."""
    parts = os.path.realpath(top).split(os.sep)
    # The folders above count as visited: a link to one of them would lead back here.
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
    """DataError for a list that is not a regular file, or for JSON that is too long: parsed, it takes many times its
    size in memory."""
    try:
        size = check_regular(path)
    except DataError as error:
        raise DataError(f"{path!r}: {error}") from None
    if size > MAX_LIST and not path.lower().endswith(".csv"):
        raise DataError(f"{path!r} has more than {MAX_LIST >> 20} MiB: a table .csv takes less memory")


def read_annotation(path):
    """The paths in an annotation file, each once, in order."""
    try:
        check_list(path)
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)["list"]
        paths = [entry["path"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise DataError(f"{path!r} is no annotation like {{\"list\": [{{\"path\": \"a.mp4\"}}]}} "
                        f"({type(error).__name__}: {error})") from None
    if not paths or not all(isinstance(p, str) and p and "\0" not in p for p in paths):
        raise DataError(f"{path!r} must list at least one entry, and every \"path\" must be a file name")
    return list(dict.fromkeys(paths))


def read_table(path):
    """The paths in the column "path" of a CSV file (commas, UTF-8), each once, in order; other columns are ignored."""
    try:
        check_list(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if "path" not in columns:
                raise DataError(f"{path!r} has no column \"path\" in its first line"
                                + (f", but {', '.join(columns)[:80]}" if columns else ": it is empty"))
            paths = [row["path"] for row in rows]
    except (ValueError, csv.Error, OSError) as error:
        raise DataError(f"{path!r} cannot be read as a CSV file in UTF-8 ({type(error).__name__}: "
                        f"{error})") from None
    if not paths or not all(p and "\0" not in p for p in paths):
        raise DataError(f"{path!r} must list at least one file, and have a file name in each row's \"path\"")
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
    read). workers: number of files that are opened at once; 0: as many as there are cores, but 8 to 64."""
    def look(source):
        try:
            return source._replace(frames=open_source(source.path, max_pixels)[0]), None
        except DataError as error:
            return source, str(error)
    pool = ThreadPoolExecutor(workers or min(64, max(8, os.cpu_count() or 1)))
    try:  # in pieces, since each waiting file takes a kilobyte
        results = (result for start in range(0, len(sources), 4096)
                   for result in pool.map(look, sources[start:start + 4096]))
        if len(sources) > MANY:
            from tqdm import tqdm
            results = tqdm(results, total=len(sources), desc="looking at the data", unit="file")
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C


def split_sources(sources, val_fraction):
    """Returns (training sources, validation sources). A hash of its key decides where a file belongs, so adding files
    moves none of the others.

    There are two exceptions, from two files on: if the hash chooses no file for validation, the file with the smallest
    hash is taken; if it chooses all files, that with the largest stays in training.
    """
    if val_fraction <= 0 or len(sources) < 2:
        return list(sources), []
    fractions = [int.from_bytes(hashlib.sha256(s.key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2 ** 64
              for s in sources]
    limit, last = max(val_fraction, min(fractions)), max(fractions)
    held_out = [fraction < val_fraction or fraction == limit for fraction in fractions]
    if all(held_out):  # possible with few files and a large val_fraction: keep something to train on
        held_out = [fraction < last for fraction in fractions]
    return ([s for s, out in zip(sources, held_out) if not out], [s for s, out in zip(sources, held_out) if out])
