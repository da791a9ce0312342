"""The files of a run. They are saved so that no fault loses them, and read without running code in them and without
taking more memory than they hold.

A run folder holds step_00001000.pt (everything a run needs to go on), best.pt (the averaged weights that validated
best), model.pth (the newest averaged weights as a plain state_dict, for other programs) and config.json. models.py
builds models from such files.
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
# Temporary files that `write_atomically` leaves behind if it is killed.
LEFTOVER = re.compile(r"(step_\d{8,}\.(pt|rank\d+)|model\.pth|best\.pt|config\.json|probe)\.(\d+\.)+tmp")
# Errors that a file raises whose contents are not as expected.
MISSHAPEN = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError,
             ZeroDivisionError)
# Errors that reading a file raises which is damaged or holds no weights, besides pickle.UnpicklingError.
UNREADABLE = (*MISSHAPEN, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError, struct.error)


class CheckpointError(Exception):
    """Weights that cannot be loaded; the message names the file and the reason."""


def first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- reading -----------------------------------------------------------------------------------------------------


def not_finite(weights):
    """The name of the first tensor in a state_dict that holds an inf or a NaN, or "". For the 459 million weights of
    the largest model this takes 0.2 s on two cores; isfinite() of each tensor takes 5 s."""
    for name, tensor in weights.items():
        if torch.is_tensor(tensor) and tensor.dtype in FLOATS and tensor.layout == torch.strided and tensor.numel() \
                and not torch.stack(tensor.aminmax()).isfinite().all():
            return str(name)
    return ""


def check_finite(path, weights):
    """CheckpointError, naming the file `path`, for weights that are not finite."""
    if name := not_finite(weights):
        raise CheckpointError(f"checkpoint: {path!r}: its weights are not finite ({name})")


def read_run(path):
    """`read` for a step file. CheckpointError also if its weights are not finite."""
    state = read(path)
    for weights in (state.get("model"), state.get("ema")):
        if isinstance(weights, dict):
            check_finite(path, weights)
    return state


def read(path):
    """The dict in a .pt or .pth file, on the CPU. CheckpointError if it is damaged, holds code, or is not a dict."""
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
    """The path of a run's checkpoint of this step; None if step is None."""
    return None if step is None else os.path.join(folder, f"step_{step:08d}.pt")


def checkpoints(folder):
    """Paths of the step files in a run folder, newest first."""
    names = [n for n in (os.listdir(folder) if os.path.isdir(folder) else []) if STEP_FILE.fullmatch(n)]
    return [os.path.join(folder, n) for n in sorted(names, key=step_of, reverse=True)]


def step_of(path):
    """The step in the name of a step file."""
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
    """Write a file under a temporary name, flush it to the disk, and rename it. data: bytes, or a function that is
    given the open file and writes to it. An error leaves nothing behind."""
    write_all([data], [path])


def write_all(contents, paths):
    """`write_atomically` for several files: all are written before the first is renamed."""
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
    """OSError if not even a small file can be written to the folder."""
    path = os.path.join(folder, "probe")
    write_atomically(path, os.urandom(1 << 16))  # random, so that no file system compresses it
    os.remove(path)


def is_full(error):
    """Whether an OSError says that the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def save(state, path, make_room=lambda: False):
    """Save a state to `path` with torch.save. If the disk is full, call make_room(), and try again as long as it
    returns True. OSError if that fails; it leaves nothing behind."""
    while error := try_to_save(state, path):
        if not is_full(error) or not make_room():
            raise error


def try_to_save(state, path):
    """Save a state to `path` once. Returns the OSError that prevents this, or None."""
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
    """A file object for torch.save that writes each piece to the file. (With a buffer in memory, 400 MB took another
    400 MB and three times as long.) An OSError is kept as `error`, and all later writes are dropped: raised within
    PyTorch's writer, it would turn into another error."""

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
        """Nothing: `write_all` flushes the file."""


def drop_oldest(folder, step, log=print, sound=None):
    """Remove the oldest checkpoint of a run, to make room for what is saved at `step`. Returns whether one was removed.

    Two checkpoints are kept: the newest usable one, and that of step `sound` (None: there is none). If these two are
    all that is left, the newest is removed, since the run can go on from the sound one."""
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
    """Remove the rank files of steps that have no step file. but: a step whose rank files are kept. OSError."""
    kept = {os.path.basename(path).removesuffix(".pt") for path in checkpoints(folder)}
    for name in os.listdir(folder):
        match = RANK_FILE.fullmatch(name)
        if match and name.split(".")[0] not in kept and int(match[1]) != but:
            os.remove(os.path.join(folder, name))


def remove_leftovers(folder):
    """Remove the temporary files of killed saves. No other process may be saving to the folder. OSError."""
    for name in os.listdir(folder):
        if LEFTOVER.fullmatch(name):
            os.remove(os.path.join(folder, name))


def save_run(folder, state, keep_last, log=print, sound=None, sound_before=None):
    """Save a run's state as its newest checkpoint, and its averaged weights as model.pth. Then remove older checkpoints
    until `keep_last` are left; on a full disk, remove some of them before. Returns why the state could not be saved, or
    "": a full disk must not end a run. Weights that are not finite are not saved, since no run can go on from them.

    sound: the step of the newest sound checkpoint, this one included (see `watch.Trend.judge`), which is kept;
    sound_before: that of the newest sound checkpoint before this one.
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
    except OSError as error:  # only a warning, since the state is saved
        log(f"warning: older checkpoints are not removed: {error}")
    return ""


def save_rank(folder, step, rank, state):
    """Save the state that one rank has for itself (its replayed samples) as step_00001000.rank3, before the step file.
    state: None for nothing to save. Returns the OSError that prevents this, or None."""
    if state is not None:
        try:
            save(state, os.path.join(folder, f"step_{step:08d}.rank{rank}"))
        except OSError as error:
            return error
    return None


def read_rank(path, rank):
    """(the state that `save_rank` saved beside the step file `path`, or None; why it cannot be read, or "")."""
    path = f"{path.removesuffix('.pt')}.rank{rank}"
    try:
        return read(path) if os.path.exists(path) else None, ""
    except CheckpointError as error:
        return None, str(error)


def save_best(folder, state, log=print, sound=None):
    """Save the weights that validated best. On a full disk, older checkpoints make room (sound: as in `drop_oldest`).
    Returns why the weights could not be saved, or ""."""
    if name := not_finite(state["ema"]):
        return f"its weights are not finite ({name})"
    try:
        save(state, os.path.join(folder, "best.pt"), lambda: drop_oldest(folder, state["step"], log, sound))
    except OSError as error:
        return f"{error}"
    return ""


# ---- random states -----------------------------------------------------------------------------------------------


def random_state(device):
    """The states of PyTorch's random generators. Training does not use the global ones of Python or NumPy."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), **cuda}


def restore_random_state(state, device):
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
