"""The files of a run: saved so that no fault loses them, and read without running code or taking more memory than they
hold.

A run folder holds step_00001000.pt (everything a run needs to go on), best.pt (the averaged weights that validated
best), model.pth (the newest averaged weights as a plain state_dict, for other programs) and config.json. Models that
are built and loaded from such files are models.py's matter.
"""
import errno
import os
import pickle
import re
import struct
import warnings
import zipfile

import torch

from untrusted import check_weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEP_FILE = re.compile(r"step_(\d{8,})\.pt")
RANK_FILE = re.compile(r"step_(\d{8,})\.rank(\d+)")
# What `write_atomically` leaves behind if it is killed.
LEFTOVER = re.compile(r"(step_\d{8,}\.(pt|rank\d+)|model\.pth|best\.pt|config\.json|probe)\.(\d+\.)+tmp")
# What contents that are not as expected raise.
MISSHAPEN = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError,
             ZeroDivisionError)
# What reading a file of weights raises that is damaged, or is none, besides pickle.UnpicklingError.
UNREADABLE = (*MISSHAPEN, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError, struct.error)


class CheckpointError(Exception):
    """Weights that cannot be loaded; the message names the file and the reason."""


def first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- reading -----------------------------------------------------------------------------------------------------


def not_finite(weights):
    """The name of the first tensor in a state_dict that holds an inf or a NaN, or "". For the 459 million weights of
    the largest model it takes 0.2 s on two cores (isfinite() of each tensor takes 5 s), and reading them several."""
    for name, tensor in weights.items():
        if torch.is_tensor(tensor) and tensor.dtype in FLOATS and tensor.layout == torch.strided and tensor.numel() \
                and not torch.stack(tensor.aminmax()).isfinite().all():
            return str(name)
    return ""


def check_finite(path, weights):
    """CheckpointError, about the file `path`, for weights that are not finite."""
    if name := not_finite(weights):
        raise CheckpointError(f"checkpoint: {path!r}: its weights are not finite ({name})")


def read_run(path):
    """`read` for a step file, whose weights are to be finite too."""
    state = read(path)
    for weights in (state.get("model"), state.get("ema")):
        if isinstance(weights, dict):
            check_finite(path, weights)
    return state


def read(path):
    """The dict in a .pt or .pth file, on the CPU. CheckpointError if it is damaged, holds code, or is no dict."""
    try:
        check_weights(path)
        with warnings.catch_warnings():  # of files in old formats
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"checkpoint: {path!r} is no file of weights, or holds code: it is not run") from None
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: {path!r} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(f"checkpoint: {path!r} is a folder: name a step_*.pt in it") from None
    except UNREADABLE as error:
        raise CheckpointError(f"checkpoint: {path!r} is damaged or no file of weights ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint: {path!r} holds a {type(state).__name__}, not weights")
    return state


def step_path(folder, step):
    """Of a run's checkpoint of that step; None for None."""
    return None if step is None else os.path.join(folder, f"step_{step:08d}.pt")


def checkpoints(folder):
    """Paths of the step files in a run folder, newest first."""
    names = [n for n in (os.listdir(folder) if os.path.isdir(folder) else []) if STEP_FILE.fullmatch(n)]
    return [os.path.join(folder, n) for n in sorted(names, key=step_of, reverse=True)]


def step_of(path):
    """The step of a step file, by its name."""
    return int(STEP_FILE.fullmatch(os.path.basename(path))[1])


def newest_checkpoint(folder):
    """(path of the newest step file that can be used or None, [messages about newer ones that cannot])."""
    problems = []
    for path in checkpoints(folder):
        if not (problem := problem_of(path)):
            return path, problems
        problems.append(problem)
    return None, problems


def problem_of(path):
    """Why a step file cannot be used, or ""."""
    try:
        return "" if "model_config" in read_run(path) else f"{path}: not a checkpoint of a run"
    except CheckpointError as error:
        return str(error)


# ---- writing -----------------------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Write bytes, or what the function data(file) writes, under a temporary name, flush them to the disk, rename. An
    error leaves nothing behind."""
    write_all([data], [path])


def write_all(contents, paths):
    """Write several files so, all of them before the first is renamed."""
    temporary = [f"{path}.{os.getpid()}.tmp" for path in paths]
    try:
        for name, content in zip(temporary, contents):
            with open(name, "wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, path in zip(temporary, paths):
            os.replace(name, path)
    finally:
        for name in temporary:
            if os.path.exists(name):
                os.remove(name)


def probe(folder):
    """OSError if no small file can be written and flushed there."""
    path = os.path.join(folder, "probe")
    write_atomically(path, os.urandom(1 << 16))  # which no file system compresses
    os.remove(path)


def is_full(error):
    """Whether an OSError says that the disk is full, or this user's part of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def save(state, path, make_room=lambda: False):
    """OSError leaves nothing behind. While the disk is full and make_room() returns True, it is tried again."""
    while error := try_to_save(state, path):
        if not is_full(error) or not make_room():
            raise error


def try_to_save(state, path):
    """Returns the OSError that prevents it, or None."""
    def write(file):
        sink = Sink(file)
        torch.save(state, sink)
        if sink.error:
            raise sink.error
    try:
        write_atomically(path, write)
    except OSError as error:
        return error.with_traceback(None)
    return None


class Sink:
    """A file for torch.save, written piece by piece: through a buffer in memory, 400 MB took another 400 MB and three
    times as long. A full disk is told when all is done, as `error`: raised inside of PyTorch's writer, it would come
    out as another one."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, content):
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self):
        """Done by `write_all`."""


def drop_oldest(folder, step, log=print, sound=None):
    """Remove the oldest checkpoint of a run to make room for what is saved at `step`, but neither the newest good one
    nor that of step `sound`; the newest goes only where the sound one is all that is left besides. Returns whether that
    could be done."""
    newest, _ = newest_checkpoint(folder)
    sound = step_path(folder, sound)
    others = [path for path in checkpoints(folder) if newest and path not in (newest, sound)]
    if not others and sound not in (None, newest) and not problem_of(sound):
        others = [newest]
    if not others:
        return False
    try:
        os.remove(others[-1])
        remove_rank_files(folder, but=step)
    except OSError:
        return False
    log(f"the disk is full: {others[-1]} was removed to make room")
    return True


def remove_rank_files(folder, but=None):
    """Those of steps that have no step file, except of one step. OSError."""
    kept = {os.path.basename(path).removesuffix(".pt") for path in checkpoints(folder)}
    for name in os.listdir(folder):
        match = RANK_FILE.fullmatch(name)
        if match and name.split(".")[0] not in kept and int(match[1]) != but:
            os.remove(os.path.join(folder, name))


def remove_leftovers(folder):
    """What killed saves left in a run folder, which no other process may be saving to. OSError."""
    for name in os.listdir(folder):
        if LEFTOVER.fullmatch(name):
            os.remove(os.path.join(folder, name))


def save_run(folder, state, keep_last, log=print, sound=None, sound_before=None):
    """Save a run's state as its newest checkpoint and its averaged weights as model.pth; drop all but `keep_last`, on a
    full disk some of them before. Returns why it could not be saved, or "": a full disk must not end a run.

    sound: the step of the newest sound checkpoint with this one, see `watch.Trend.judge`, which stays;
    sound_before: without it. Weights that are not finite are not saved: no run goes on from them.
    """
    step = state["step"]
    if name := not_finite(state["model"]) or not_finite(state["ema"]):
        return f"its weights are not finite ({name})"
    try:
        remove_leftovers(folder)
        for what, path in ((state, step_path(folder, step)), (state["ema"], os.path.join(folder, "model.pth"))):
            save(what, path, lambda: drop_oldest(folder, step, log, sound_before))
    except OSError as error:
        return f"{error}"
    try:
        for path in checkpoints(folder)[keep_last:]:
            if path != step_path(folder, sound):
                os.remove(path)
        remove_rank_files(folder)
    except OSError as error:  # saved it is
        log(f"warning: older checkpoints are not removed: {error}")
    return ""


def save_rank(folder, step, rank, state):
    """Save what one rank alone holds (its replayed samples), beside the step file and before it: step_00001000.rank3.
    Nothing is written for None. Returns the OSError that prevents it, or None."""
    if state is not None:
        try:
            save(state, os.path.join(folder, f"step_{step:08d}.rank{rank}"))
        except OSError as error:
            return error
    return None


def read_rank(path, rank):
    """(what `save_rank` left beside the step file `path`, or None; what is wrong with it, or "")."""
    path = f"{path.removesuffix('.pt')}.rank{rank}"
    try:
        return read(path) if os.path.exists(path) else None, ""
    except CheckpointError as error:
        return None, str(error)


def save_best(folder, state, log=print, sound=None):
    """Save the weights that validated best, on a full disk in the place of older checkpoints (`sound` as in
    `drop_oldest`); returns why they could not be saved, or ""."""
    if name := not_finite(state["ema"]):
        return f"its weights are not finite ({name})"
    try:
        save(state, os.path.join(folder, "best.pt"), lambda: drop_oldest(folder, state["step"], log, sound))
    except OSError as error:
        return f"{error}"
    return ""


# ---- random states -----------------------------------------------------------------------------------------------


def random_state(device):
    """PyTorch's generators; nothing here draws from Python's or NumPy's global ones."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), **cuda}


def restore_random_state(state, device):
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
