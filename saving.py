"""Saving a run, all ranks together, in a folder whose disk may be full, read-only or gone: what can be saved is saved;
what cannot is said, with what is on disk instead. The files themselves are checkpoint.py's."""
import contextlib
import os
import shutil

import torch

import checkpoint
import lock
from ranks import from_rank_0, gather


class NotSaved(Exception):
    """A run has ended without its last steps; the message is one line. All ranks raise it together."""


class Saver:
    """Saves to a folder that rank 0 has locked. log: a Logbook; trend: the run's, which knows the sound checkpoint."""

    def __init__(self, folder, keep_last, control, log, trend):
        self.folder, self.keep_last, self.control, self.log, self.trend = folder, keep_last, control, log, trend
        self.on_disk = ""  # what was there when a checkpoint could not be saved, in words

    def run(self, step, rank_state, random_state, make_state):
        """Save all that a run needs to go on from a step; every rank calls this. rank_state: what this rank alone
        holds, or None; make_state([random_state of each rank]): what rank 0 saves. Returns, on every rank, why the run
        could not be saved, or ""."""
        sound = self.trend.judge(step)
        problem = from_rank_0(self.control, self.find_folder) or self.save_ranks(step, rank_state)
        if not problem:
            states = gather(self.control, random_state)
            problem = from_rank_0(self.control, lambda: checkpoint.save_run(
                self.folder, make_state(states), self.keep_last, self.log, sound[0], self.trend.sound[0]))
        if problem:
            self.on_disk = from_rank_0(self.control, self.look)
        else:
            self.trend.sound = sound
            self.log(f"step {step}: saved {self.folder}/step_{step:08d}.pt")
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
                    self.control, lambda: checkpoint.drop_oldest(self.folder, step, self.log, self.trend.sound[0])):
                return str(errors[0])
            state = state if error else None

    def best(self, state):
        """On rank 0: save the weights that validated best. Returns whether that could be done."""
        problem = self.find_folder() or checkpoint.save_best(self.folder, state, self.log, self.trend.sound[0])
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
        words = f"not saved: {problem}; {self.on_disk}"
        self.log(words, screen=False)
        return words

    def lack_of_room(self, *states):
        """A warning, or "" if the disk has room for a file of these nested states, or has it without older checkpoints.
        It may be wrong: quotas are not seen, and some file systems compress."""
        needed = bytes_of(states)
        try:
            there = shutil.disk_usage(self.folder).free + sum(map(os.path.getsize,
                                                                  checkpoint.checkpoints(self.folder)[1:]))
        except OSError:
            return ""
        if needed <= there:
            return ""
        return (f"warning: a checkpoint takes {needed / 1e6:,.0f} MB or more, and the disk of {self.folder} has "
                f"{there / 1e6:,.0f} MB: make room before the first is saved")


def bytes_of(state):
    """How much the tensors take that are in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(bytes_of, parts))
