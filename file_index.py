"""What looking at many files has found is kept, so that the next start over them takes seconds.

    sources, refused, notes = probe(find_sources("videos/"), max_pixels, "videos/")

An index is one file for each `data` of runs, in $XDG_CACHE_HOME/video_autoencoders or ~/.cache/video_autoencoders. Its
first line says what it was made with. Each further line is of one file: its path as in the data, size, times of change,
and number of frames or, in the place of that, why it cannot be read (docs/formats.md). Files that have changed are
looked at again. Data of up to `data_files.MANY` files have no index: they are looked at in seconds.
"""
import contextlib
import hashlib
import json
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2

import checkpoint
import data_files
from untrusted import open_regular

FORMAT = 1
MAX_BYTES = 1 << 30  # of an index: about ten million files
SAVED_EVERY = 300  # seconds: what a first start has found by then is not lost if it is killed


def probe(sources, max_pixels, name, *details):
    """`data_files.probe` with an index. name: what the sources were found in, a run's `data`; details: how else they
    were chosen from it. Returns (readable sources, [(path, why not)], [lines about the index])."""
    if len(sources) <= data_files.MANY:
        return *data_files.probe(sources, max_pixels), []
    path, notes, trouble = index_path(name, *details), [], []
    about = dict(format=FORMAT, max_pixels=max_pixels, opencv=cv2.__version__)  # what can be read depends on these
    try:
        known = read(path, about)
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError) as error:
        known, notes = {}, [f"file index {path}: {checkpoint.first_line(error)}: all files are looked at again"]
    states = states_of(sources)
    found = [known.get((source.key, state)) if state else None for source, state in zip(sources, states)]
    missing, was = [i for i, one in enumerate(found) if one is None], len(known)
    del known
    if len(missing) < len(sources):
        notes.append(f"file index {path}: {len(sources) - len(missing)} of {len(sources)} files are as they were")

    def save():
        entries = ([source.key, *state, one] for source, state, one in zip(sources, states, found)
                   if state and one is not None)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            checkpoint.write_atomically(path, written(about, entries))
        except OSError as error:
            trouble[:] = [f"file index {path} cannot be written ({error.strerror}): each start looks at all files"]

    saved = time.monotonic()
    try:
        with contextlib.closing(data_files.look_at([sources[i] for i in missing], max_pixels)) as looked_at:
            for (source, problem), i in zip(looked_at, missing):
                found[i] = source.frames if problem is None else problem
                if time.monotonic() - saved > SAVED_EVERY:
                    save()
                    saved = time.monotonic()
    finally:  # after Ctrl-C too
        if missing or was > len(sources):  # files have gone
            save()
    readable = [source._replace(frames=one) for source, one in zip(sources, found) if type(one) is int]
    refused = [(source.path, one) for source, one in zip(sources, found) if type(one) is not int]
    return readable, refused, notes + trouble


def index_path(name, *details):
    """Where the index of a run's `data` is."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    names = "\0".join(map(str, (os.path.realpath(name), *details))).encode("utf-8", "surrogatepass")
    return os.path.join(home, "video_autoencoders", f"files_{hashlib.sha256(names).hexdigest()[:16]}.jsonl")


def states_of(sources):
    """[(size, time of the last change of the contents, and of anything, nanoseconds)]; None where nobody can say."""
    def look(source):
        try:
            now = os.stat(source.path)
        except (OSError, ValueError):
            return None
        return now.st_size, now.st_mtime_ns, now.st_ctime_ns
    with ThreadPoolExecutor(32) as pool:  # on a network, each takes a millisecond
        pieces = pool.map(lambda start: list(map(look, sources[start:start + 1000])), range(0, len(sources), 1000))
        return [state for piece in pieces for state in piece]


def written(about, entries):
    """The bytes of an index."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    return json.dumps({**about, "crc32": zlib.crc32(lines)}).encode() + b"\n" + lines


def read(path, about):
    """{(key of a source, its state): number of frames, or why it cannot be read}; empty if it was made with another
    OpenCV or max_pixels. OSError or ValueError for a file that is no whole index."""
    with open_regular(path) as file:
        content = file.read(MAX_BYTES + 1)
    head, _, lines = content.partition(b"\n")
    try:
        made = json.loads(head)
        if len(content) > MAX_BYTES or made.pop("crc32") != zlib.crc32(lines):
            raise ValueError("damaged")
        if made != about:
            return {}
        entries = json.loads(b"[" + lines.strip().replace(b"\n", b",") + b"]")
        known = {(key, (size, *times)): found for key, size, *times, found in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("damaged, or no index") from None
    if not all(type(found) in (int, str) for found in known.values()):
        raise ValueError("damaged, or no index")
    return known
