"""A run's folder: taking it, finding what to go on from, and saving to it, all ranks together. Its disk may be full,
read-only or gone: what can be saved is saved; what cannot is said, with what is on disk instead. The files themselves
are checkpoint.py's."""
import contextlib
import os
import shutil

import torch

import checkpoint
import lock
from config import ConfigError
from ranks import from_rank_0, gather


class NotSaved(Exception):
    """A run has ended without its last steps; the message is one line. All ranks raise it together."""


class Saver:
    """Saves to a folder that rank 0 has locked. log: a Logbook; trend: the run's, which knows the sound checkpoint."""

    def __init__(self, folder, keep_last, control, log, trend):
        self.folder, self.keep_last, self.control, self.log, self.trend = folder, keep_last, control, log, trend
        self.step, self.on_disk = 0, ""  # of the last save; what was there when that was not possible, in words

    def run(self, step, rank_state, random_state, make_state):
        """Save all that a run needs to go on from a step; every rank calls this. rank_state: what this rank alone
        holds, or None. make_state: called on rank 0 with the list of all ranks' random_state and with what
        `Trend.sound` becomes, it returns what rank 0 saves. Returns, on every rank, why the run could not be saved, or
        an empty string."""
        self.step, sound = step, self.trend.judge(step)
        problem = from_rank_0(self.control, self.find_folder) or self.save_ranks(step, rank_state)
        if not problem:
            states = gather(self.control, random_state)
            problem = from_rank_0(self.control, lambda: checkpoint.save_run(
                self.folder, make_state(states, sound), self.keep_last, self.log, sound[0], self.trend.sound_step))
        if problem:
            self.on_disk = from_rank_0(self.control, self.look)
        else:
            self.trend.sound = sound
            self.log.event("saved", step, f"step {step}: saved {checkpoint.step_path(self.folder, step)}")
        return problem

    def find_folder(self):
        """On rank 0: make and lock the folder again if somebody has removed it. Returns why that cannot be, or ""."""
        try:
            if not lock.holds(self.folder):
                lock.hold_again(self.folder)
                self.log.start_again()
        except (OSError, lock.InUse) as error:
            return str(error)
        return ""

    def save_ranks(self, step, state):
        """Each rank saves its own state. Where the disk is full, rank 0 makes room, and those who failed try again.
        Returns what `run` does."""
        while True:
            error = checkpoint.save_rank(self.folder, step, self.log.rank, state)
            errors = list(filter(None, gather(self.control, error)))
            if not errors:
                return ""
            if not all(map(checkpoint.is_full, errors)) or not from_rank_0(
                    self.control, lambda: checkpoint.drop_oldest(self.folder, step, self.log, self.trend.sound_step)):
                return str(errors[0])
            state = state if error else None

    def best(self, state):
        """On rank 0: save the weights that validated best. Returns whether that could be done."""
        problem = self.find_folder() or checkpoint.save_best(self.folder, state, self.log, self.trend.sound_step)
        if problem:
            self.log(f"best.pt of step {state['step']} could not be saved: {problem}; the run goes on")
        return not problem

    def look(self):
        """On rank 0: what is on disk, in words. Files of ranks whose step could not be saved are removed."""
        try:
            if not lock.holds(self.folder):
                return "nothing is on disk"
            with contextlib.suppress(OSError):  # read-only
                checkpoint.remove_rank_files(self.folder)
            newest, _ = checkpoint.newest_checkpoint(self.folder)
        except OSError as error:
            return f"what is on disk cannot be read ({error})"
        return f"on disk: step {checkpoint.step_of(newest)} ({self.folder})" if newest else "nothing is on disk"

    def not_saved(self, problem):
        """The words of a NotSaved, which are logged too."""
        reason = f"{problem}; {self.on_disk}"
        self.log.event("not saved", self.step, f"not saved: {reason}", reason, screen=False)
        return f"not saved: {reason}"

    def lack_of_room(self, *states):
        """A warning, or "" if the disk has room for a file of these nested states, or has it without older checkpoints.
        It may be wrong: quotas are not seen, and some file systems compress."""
        needed = bytes_of(states)
        try:
            room = shutil.disk_usage(self.folder).free + sum(map(os.path.getsize,
                                                                 checkpoint.checkpoints(self.folder)[1:]))
        except OSError:
            return ""
        if needed <= room:
            return ""
        return (f"warning: a checkpoint takes {needed / 1e6:,.0f} MB or more, and the disk of {self.folder} has "
                f"{room / 1e6:,.0f} MB: make room before the first is saved")


def bytes_of(state):
    """How much the tensors take that are in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(bytes_of, parts))


# ---- before a run, and as it ends -------------------------------------------------------------------------------


def take_folder(cfg, folder, at_end):
    """Makes the run's folder and locks it until `at_end` is closed. Returns "", or why it cannot be locked."""
    try:
        unlocked = at_end.enter_context(lock.locked(folder, "choose another name="))
        checkpoint.remove_leftovers(folder)
        checkpoint.probe(folder)
    except OSError as error:
        raise ConfigError(f"out_dir={cfg.out_dir}: {folder} cannot be made or written to ({error.strerror})") from None
    return unlocked


def find_resume(cfg, folder, restarted, log):
    """Path of the checkpoint to go on from, or None. `restarted`: torchrun has started these ranks anew."""
    present = checkpoint.checkpoints(folder)
    if cfg.resume == "none" and present and not restarted:
        raise ConfigError(f"resume=none, but {folder} holds checkpoints: choose another name=, or remove it")
    if cfg.resume not in ("auto", "none"):
        wanted = checkpoint.read_run(cfg.resume)
        if not present:
            return cfg.resume
        if os.path.realpath(cfg.resume) in [os.path.realpath(p) for p in present[1:]] and not restarted:
            raise ConfigError(f"resume={cfg.resume}, but {folder} holds newer checkpoints than step "
                              f"{wanted.get('step')}: choose another name= to branch off, or remove those")
    path, problems = checkpoint.newest_checkpoint(folder)
    for problem in problems:
        log(f"warning: {problem}; the one before it is used")
    if present and not path:
        raise ConfigError(f"none of the {len(present)} checkpoints in {folder} can be read: choose another name=")
    return path


def restore(state, model, average, optimizer, teacher, path):
    """Put a checkpoint's weights and optimizer state in place; ConfigError if it is another model's."""
    if not same_model(state.get("model_config"), model.config):
        raise ConfigError(f"{path} is a checkpoint of {state.get('model_config', 'something else')}, "
                          f"not of {model.config}: choose another name= for this run")
    if "optimizer" not in state:
        raise ConfigError(f"{path} holds weights only: give it as init_from=, not as resume=")
    if len(state["optimizer"]["param_groups"][0]["params"]) != len(optimizer.param_groups[0]["params"]):
        raise ConfigError(f"{path} trained other parts: keep train_encoder and train_decoder, or give it as init_from=")
    if state.get("teacher", "") != teacher:
        raise ConfigError(f"{path} learnt from {'another teacher' if state.get('teacher') else 'no latent cache'}: "
                          "choose another name= for this run, with init_from=")
    counts = state["step"], state["samples"], state.setdefault("pieces", 1) - 1
    if any(type(count) is not int or not 0 <= count < 2 ** 60 for count in counts) or not 0 <= float(
            state.get("seconds", 0)) < 1e12:
        raise ConfigError(f"{path} counts impossible steps, samples or seconds: choose another name= for this run")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(settings)  # today's settings, not those of the day it was saved
    for parameter, kept in optimizer.state.items():
        if not kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape or kept["step"].numel() != 1:
            raise ValueError("its optimizer's state is of other weights")


def same_model(saved, ours):
    """Whether two configurations of a model differ at most in how its codebooks start, which a checkpoint has behind
    it."""
    return isinstance(saved, dict) and {**saved, "kmeans_init": None} == {**ours, "kmeans_init": None}


def where_to_go_on(folder, model, trend, step, skipped):
    """After `skipped` steps in a row that were not finite, in words: which step's weights these are, and the checkpoint
    to go on from if the run had gone wrong before."""
    finite = not checkpoint.not_finite(model.state_dict())
    words = f"The weights are those of step {step - skipped}, from before"
    if finite and not trend.has_risen(step):
        return f"{words}."
    words += ", when the loss had risen already." if finite else ", and not finite."
    sound = checkpoint.step_path(folder, trend.sound_step)
    if sound and os.path.exists(sound):
        words += f" resume={sound} name=OTHER goes on from before that."
    return words
