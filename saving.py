"""Saves checkpoints to a run's folder, by all ranks together, while training goes on. The disk may be full, read-only
or gone: then the log says what could not be saved, and what is on disk instead. checkpoint.py writes the files."""
import contextlib
import copy
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

import checkpoint
import lock
from device import is_out_of_memory
from ranks import from_rank_0, gather


class NotSaved(Exception):
    """A run has ended without its last steps; the message is one line. All ranks raise it together."""


class Pending(NamedTuple):
    """A save that a thread works on, or is done with."""
    name: str         # "run" or "best"
    future: Future    # of the thread's result
    report: callable  # function of that result, which logs how the save has ended


class Saver:
    """Saves to a folder that rank 0 has locked. The state is copied, and a thread of each rank writes the copy while
    training goes on, one file after the other. The threads have a process group of their own, in which they make
    decisions that are the same on all ranks. Training waits only if the next save, or the end of the run, comes before
    the threads are done. log: a Logbook; trend: the run's Trend, which knows the sound checkpoint; at_end: the run's
    ExitStack.
    """

    def __init__(self, folder, cfg, control, log, trend, at_end):
        self.folder, self.keep_last, self.control, self.log, self.trend = folder, cfg.keep_last, control, log, trend
        self.step, self.problem, self.on_disk = 0, "", ""  # last save: step, why it failed, what was on disk instead
        self.group = None if control is None else dist.new_group(
            backend="gloo", timeout=timedelta(minutes=cfg.timeout_minutes))
        self.thread, self.pending = ThreadPoolExecutor(1, "saving"), []  # [Pending]
        self.memory = {"run": [], "best": []}  # storages for the copies, which each save uses again
        self.state, self.has_copy = None, True  # the run's state that is being written; whether it is a copy
        at_end.callback(self.close)

    def run(self, step, rank_state, random_state, make_state, is_last):
        """Save everything that a run needs to go on from a step. Every rank calls this.

        rank_state: the state that this rank has for itself, in memory that nothing else writes to, or None.
        random_state: this rank's. make_state: function that rank 0 calls with the list of all ranks' random_state and
        with the newest sound checkpoint, this one included (see `Trend.judge`); it returns the state to save.
        is_last: wait until all is written, and return, on every rank, why it could not be saved, or an empty string."""
        if self.state is not None and not self.pending[0].future.done():
            self.log(f"step {step}: waits, as step {self.step} is still being written", screen=False)
        self.settle(["run"])
        self.step, sound = step, self.trend.judge(step)
        states = gather(self.control, random_state)

        def prepare():
            problem = self.find_folder()
            self.state = None if problem else self.copy("run", make_state(states, sound))
            return problem
        problem = from_rank_0(self.control, prepare)
        self.begin("run", lambda: self.write(step, problem, rank_state, sound),
                   lambda result: self.report(step, sound, *result, is_last))
        if is_last:
            self.settle()
        return self.problem

    def copy(self, name, state):
        """On rank 0: a copy of a state for the thread. If there is no memory for a copy: the state itself, and `begin`
        waits until it is written."""
        try:
            return copied(state, self.memory[name])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.memory[name], self.has_copy = [], False
        self.log(f"warning: no memory for a copy of what is saved ({bytes_of(state) / 1e6:,.0f} MB): training waits "
                 "while it is written")
        return state

    def write(self, step, problem, rank_state, sound):
        """The threads of all ranks call this. Returns (why the step could not be saved, or ""; a description of what is
        on disk in that case)."""
        problem = problem or self.save_ranks(step, rank_state) or from_rank_0(self.group, lambda: checkpoint.save_run(
            self.folder, self.state, self.keep_last, self.log, sound.step, self.trend.sound.step))
        return problem, from_rank_0(self.group, self.describe_disk) if problem else ""

    def report(self, step, sound, problem, on_disk, is_last):
        """Log how a save has ended. `settle` calls this, at a point where training can wait."""
        self.problem, self.on_disk, self.state = problem, on_disk, None
        if not problem:
            self.trend.sound = sound
            self.log.event("saved", step, f"step {step}: saved {checkpoint.step_path(self.folder, step)}")
        elif not is_last:
            self.log(f"the checkpoint of step {step} could not be saved: {problem}; the run goes on; {on_disk}")

    def begin(self, name, write, report):
        """Have the thread call write() when it is done with earlier calls. `settle` passes the result to report()."""
        self.pending.append(Pending(name, self.thread.submit(write), report))
        if not self.has_copy:
            self.settle()
            self.has_copy = True

    def settle(self, names=("run", "best")):
        """Wait for the pending saves with these names ("run", "best") and all before them. Log how they have ended, and
        also any other that is done. An unexpected error of the thread is raised here."""
        while self.pending and (self.pending[0].future.done() or any(save.name in names for save in self.pending)):
            save = self.pending.pop(0)
            save.report(save.future.result())

    def close(self):
        """However the run ends: finish pending saves and log how they have ended, before the folder is unlocked."""
        self.thread.shutdown()
        self.group = None  # the threads of the process group could outlive it
        if not any(save.future.exception() for save in self.pending):
            self.settle()

    def find_folder(self):
        """On rank 0: if the folder was removed, make and lock it again. Returns why that is impossible, or ""."""
        try:
            if not lock.holds(self.folder):
                lock.hold_again(self.folder)
                self.log.start_again()
        except (OSError, lock.InUse) as error:
            return str(error)
        return ""

    def save_ranks(self, step, state):
        """Each rank saves its own state. If the disk is full, rank 0 makes room, and the ranks that failed try again.
        Returns why a state could not be saved, or ""."""
        while True:
            error = checkpoint.save_rank(self.folder, step, self.log.rank, state)
            errors = list(filter(None, gather(self.group, error)))
            if not errors:
                return ""
            if not all(map(checkpoint.is_full, errors)) or not from_rank_0(
                    self.group, lambda: checkpoint.drop_oldest(self.folder, step, self.log, self.trend.sound.step)):
                return str(errors[0])
            state = state if error else None

    def best(self, state, then):
        """On rank 0: save the weights that validated best. then: function that is called once they are saved."""
        self.settle()
        problem, state, sound = self.find_folder(), self.copy("best", state), self.trend.sound.step

        def report(problem):
            if problem:
                self.log(f"best.pt of step {state['step']} could not be saved: {problem}; the run goes on")
            else:
                then()
        self.begin("best", lambda: problem or checkpoint.save_best(self.folder, state, self.log, sound), report)

    def describe_disk(self):
        """On rank 0: a description of what is on disk. Removes rank files whose step could not be saved."""
        try:
            if not lock.holds(self.folder):
                return "nothing is on disk"
            with contextlib.suppress(OSError):  # read-only
                checkpoint.remove_rank_files(self.folder)
            newest, _ = checkpoint.newest_checkpoint(self.folder)
        except OSError as error:
            return f"what is on disk cannot be read ({error})"
        if newest:
            return f"on disk: step {checkpoint.step_of(newest)} ({self.folder})"
        best = os.path.join(self.folder, "best.pt")
        return f"no step is on disk, but {best} is" if os.path.exists(best) else "nothing is on disk"

    def not_saved(self, problem):
        """Log that the run is not saved, and return the message of the NotSaved."""
        reason = f"{problem}; {self.on_disk}"
        self.log.event("not saved", self.step, f"not saved: {reason}", reason, screen=False)
        return f"not saved: {reason}"

    def lack_of_room(self, *states):
        """A warning if the disk has no room for a file of these nested states, even without older checkpoints; else "".
        This is an estimate: quotas are not seen, and some file systems compress."""
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


def tensors_in(state):
    """The tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        yield state
    for part in state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ():
        yield from tensors_in(part)


def bytes_of(state):
    """The size in bytes of the tensors in nested dicts, lists and tuples."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(state))


def copied(state, memory):
    """A copy of a nested state on the CPU. Tensors that share a storage share one in the copy too, so torch.save writes
    the same file. memory: a list of storages, which this function fills. The next copy of the same shapes uses them
    again, and so overwrites this copy: this saves the system from providing new memory pages each time."""
    storages, copies = {}, {}
    for tensor in tensors_in(state):
        storage = tensor.untyped_storage()
        source = storage.device, storage.data_ptr(), storage.nbytes()
        if source not in storages:
            i = len(storages)
            if i == len(memory) or memory[i].nbytes() != storage.nbytes():
                memory[i:i + 1] = [torch.UntypedStorage(storage.nbytes())]
            storages[source] = memory[i].copy_(storage)
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
            storages[source], tensor.storage_offset(), tensor.size(), tensor.stride())
    return copy.deepcopy(state, copies)
