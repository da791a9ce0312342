"""The inputs of a command (videos, images, samples of folders, files of latents and tokens), and their failures.

Used by infer.py.
"""
import hashlib
import os
import re
import traceback

import checkpoint
from codec import TOKENS, InputError
from data_files import find_sources, probe, walk
from device import DeviceError
from latent_file import LATENTS, LatentFileError
from lock import InUse
from teachers import TeacherError
from token_file import TokenError
from video_files import MAX_PIXELS, DataError

# Mistakes of the user's: the command prints one line, and ends with code 2.
MISTAKES = (InputError, LatentFileError, TokenError, TeacherError, DeviceError, DataError,
            checkpoint.CheckpointError, InUse, OSError)


def sample(sources, number, seed, max_pixels):
    """(up to `number` readable sources, [(path, reason)] of the unreadable ones among those tried). A hash of the seed
    and each name chooses them, so the choice does not depend on the order of the list."""
    waiting = sorted(sources, key=lambda source: hashlib.sha256(f"{seed} {source.key}".encode(errors="surrogatepass")
                                                                ).digest())
    readable, refused = [], []
    while waiting and len(readable) < number:
        some, waiting = waiting[:number - len(readable)], waiting[number - len(readable):]
        found, bad = probe(some, max_pixels)
        readable, refused = readable + found, refused + bad
    return sorted(readable, key=lambda source: source.key), refused


def find_inputs(inputs, number=0, seed=0, max_pixels=MAX_PIXELS, out=None):
    """([video and image sources], [latent and token files], [(path, reason)] refused, [notes]), each input once.
    number, seed: see `sample`; at most `number` files of each folder, 0 for all. max_pixels: see video_files.py. out:
    the folder to write to; the videos and pictures that were written there are left out of folders. InputError for a
    path that does not exist, or if nothing can be read."""
    sources, latents, refused, notes, folders = [], [], [], [], 0
    for path in inputs:
        if path.endswith((LATENTS, TOKENS)):
            if not os.path.isfile(path):
                raise InputError(f"{path!r} {'is not a regular file' if os.path.exists(path) else 'does not exist'}")
            latents.append(path)
            continue
        try:
            found = find_sources(path)
        except DataError:
            stored = [os.path.join(folder, name) for folder, names in walk(path) for name in sorted(names)
                      if name.endswith((LATENTS, TOKENS))] if os.path.isdir(path) else []
            if not stored:
                raise
            latents += stored
            continue
        if out and os.path.isdir(path):
            there, found = len(found), without_outputs(found, out)
            if not found:
                raise InputError(f"{path!r} holds nothing but what is written to --out {out}: choose another --out")
            if len(found) < there:
                notes.append(f"{path}: {there - len(found)} files that are outputs of --out {out} are left out")
        if number and (os.path.isdir(path) or len(found) > 1):
            there, folders = len(found), folders + 1
            found, bad = sample(found, number, seed, max_pixels)
            how = f"chosen by --seed {seed}" if len(found) == number < there else \
                f"no more can be read, and --num-samples is {number}"
            notes.append(f"{path}: {len(found)} of {there} files, {how}")
        else:
            found, bad = probe(found, max_pixels)
        sources += found
        refused += bad
    sources = list({os.path.realpath(source.path): source for source in reversed(sources)}.values())[::-1]
    refused = list(dict.fromkeys(refused))
    if not sources and not latents:
        first = f"{refused[0][0]}: {refused[0][1]}"
        raise InputError(f"none of the {len(refused)} files can be read; the first: {first}" if refused[1:] else first)
    if number and not folders:
        raise InputError(f"--num-samples {number}: none of the inputs is a folder")
    return sources, latents, refused, notes


UNFINISHED = {"": r"(metrics\.json|summary_report\.html)\.part", "comparison_videos": r"\..+\.webm\.part\.webm",
              "latent_visualizations": r".+_latents\.png\.part", "latents": rf".+{re.escape(LATENTS)}\.\d+\.tmp",
              "tokens": rf".+{re.escape(TOKENS)}\.\d+\.tmp"}  # names of files by their folder under --out


def without_outputs(sources, out):
    """The sources, except those in the folders under --out that videos and pictures are written to."""
    own = tuple(os.path.join(os.path.realpath(os.path.join(out, part)), "")
                for part in ("comparison_videos", "latent_visualizations"))
    folders = {os.path.dirname(source.path) for source in sources}
    there = {folder for folder in folders if os.path.join(os.path.realpath(folder), "").startswith(own)}
    return [source for source in sources if os.path.dirname(source.path) not in there]


def remove_leftovers(out):
    """Remove the unfinished files of a killed command under --out. No other command may be writing there."""
    for part, pattern in UNFINISHED.items():
        folder = os.path.join(out, part)
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if re.fullmatch(pattern, name):
                os.remove(os.path.join(folder, name))


class Failures:
    """Keeps count of inputs that failed, and makes their report rows. Tracebacks of errors that are no user's mistakes
    go to OUT/errors.log; `unexpected` counts these errors. `code`: the exit code, if other inputs succeeded."""

    def __init__(self, out):
        self.path, self.unexpected, self.code = os.path.join(out, "errors.log"), 0, 0
        if os.path.exists(self.path):
            os.remove(self.path)  # written by an earlier command

    def row(self, name, path, error):
        """The row of an input that this error ended."""
        reason = checkpoint.first_line(error)
        if not isinstance(error, MISTAKES):
            reason = reason if reason == type(error).__name__ else f"{type(error).__name__}: {reason}"
            self.unexpected += 1
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{path}\n{''.join(traceback.format_exception(error))}\n")
        if not isinstance(error, (OSError, DataError)):  # not merely a file that cannot be read or written
            self.code = 1
        return dict(name=name, source=path, failed=reason)
