"""A run's folder: taking it, finding what to go on from, and saving to it, all ranks together. Its disk may be full,
read-only or gone: what can be saved is saved; what cannot is said, with what is on disk instead. The files themselves
are checkpoint.py's."""
import contextlib
import copy
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

import checkpoint
import lock
from check_config import ConfigError
from device import is_out_of_memory
from ranks import from_rank_0, gather


class NotSaved(Exception):
    """A run has ended without its last steps; the message is one line. All ranks raise it together."""


class Saver:
    """Saves to a folder that rank 0 has locked, while training goes on: what is to be saved is copied, and a thread of
    each rank writes it, one file after the other. The threads have a process group of their own, so what they decide
    together is the same on all ranks. Training waits for them only where the next save, or the run's end, comes before
    they are done. log: a Logbook; trend: the run's, which knows the sound checkpoint; at_end: the run's ExitStack.
    """

    def __init__(self, folder, cfg, control, log, trend, at_end):
        self.folder, self.keep_last, self.control, self.log, self.trend = folder, cfg.keep_last, control, log, trend
        self.step, self.problem, self.on_disk = 0, "", ""  # of the last save: why it failed, what was there instead
        self.group = None if control is None else dist.new_group(
            backend="gloo", timeout=timedelta(minutes=cfg.timeout_minutes))
        self.thread, self.pending = ThreadPoolExecutor(1, "saving"), []  # [(name, future, function of its result)]
        self.memory = {"run": [], "best": []}  # storages that the copies are made in, again and again
        self.state, self.has_copy = None, True
        at_end.callback(self.close)

    def run(self, step, rank_state, random_state, make_state, is_last):
        """Save all that a run needs to go on from a step; every rank calls this. rank_state: what this rank alone
        holds, in memory that nobody else writes to, or None. make_state: called on rank 0 with the list of all ranks'
        random_state and with what `Trend.sound` becomes, it returns what rank 0 saves. is_last: wait for it, and
        return, on every rank, why the run could not be saved, or an empty string."""
        if self.state is not None and not self.pending[0][1].done():
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
                   lambda result: self.tell(step, sound, *result, is_last))
        if is_last:
            self.settle()
        return self.problem

    def copy(self, name, state):
        """On rank 0: a copy of a state for the thread. Where memory lacks for one, the state itself: `begin` waits."""
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
        """In the threads of all ranks. Returns (why it could not be saved, or ""; what is on disk then, in words)."""
        problem = problem or self.save_ranks(step, rank_state) or from_rank_0(self.group, lambda: checkpoint.save_run(
            self.folder, self.state, self.keep_last, self.log, sound[0], self.trend.sound_step))
        return problem, from_rank_0(self.group, self.look) if problem else ""

    def tell(self, step, sound, problem, on_disk, is_last):
        """What became of a save, where training has time to hear of it."""
        self.problem, self.on_disk, self.state = problem, on_disk, None
        if not problem:
            self.trend.sound = sound
            self.log.event("saved", step, f"step {step}: saved {checkpoint.step_path(self.folder, step)}")
        elif not is_last:
            self.log(f"the checkpoint of step {step} could not be saved: {problem}; the run goes on; {on_disk}")

    def begin(self, name, write, tell):
        """Have the thread call write(), after what it has to do already; `settle` gives its result to tell()."""
        self.pending.append((name, self.thread.submit(write), tell))
        if not self.has_copy:
            self.settle()
            self.has_copy = True

    def settle(self, names=("run", "best")):
        """Tell what has become of all that has been written, and wait until it includes what has these names. What the
        thread did not expect is raised here."""
        while self.pending and (self.pending[0][1].done() or any(name in names for name, *_ in self.pending)):
            _, future, tell = self.pending.pop(0)
            tell(future.result())

    def close(self):
        """However the run ends: what is being written is finished before the folder is let go of, and told."""
        self.thread.shutdown()
        self.group = None  # its own threads could outlive it
        if not any(future.exception() for _, future, _ in self.pending):
            self.settle()

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
        Returns why that cannot be, or ""."""
        while True:
            error = checkpoint.save_rank(self.folder, step, self.log.rank, state)
            errors = list(filter(None, gather(self.group, error)))
            if not errors:
                return ""
            if not all(map(checkpoint.is_full, errors)) or not from_rank_0(
                    self.group, lambda: checkpoint.drop_oldest(self.folder, step, self.log, self.trend.sound_step)):
                return str(errors[0])
            state = state if error else None

    def best(self, state, then):
        """On rank 0: save the weights that validated best; then() is called once that is done."""
        self.settle()
        problem, state, sound = self.find_folder(), self.copy("best", state), self.trend.sound_step

        def tell(problem):
            if problem:
                self.log(f"best.pt of step {state['step']} could not be saved: {problem}; the run goes on")
            else:
                then()
        self.begin("best", lambda: problem or checkpoint.save_best(self.folder, state, self.log, sound), tell)

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


def tensors_in(state):
    """The tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        yield state
    for part in state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ():
        yield from tensors_in(part)


def bytes_of(state):
    """How much the tensors take that are in nested dicts, lists and tuples."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(state))


def copied(state, memory):
    """A copy of a nested state on the CPU, which torch.save writes as it would write the state: tensors that share
    their storage do so too. memory: a list of storages for it, which is filled; the next copy of the same shapes takes
    them again (so no page is asked of the system anew) and overwrites this one."""
    storages, copies = {}, {}
    for tensor in tensors_in(state):
        storage = tensor.untyped_storage()
        source = storage.device, storage.data_ptr(), storage.nbytes()
        if source not in storages:
            place = len(storages)
            if place == len(memory) or memory[place].nbytes() != storage.nbytes():
                memory[place:place + 1] = [torch.UntypedStorage(storage.nbytes())]
            storages[source] = memory[place].copy_(storage)
        copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
            storages[source], tensor.storage_offset(), tensor.size(), tensor.stride())
    return copy.deepcopy(state, copies)


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


def check_start(saved, cfg, path):
    """ConfigError for an init_from= that is not in the saved settings, a dict: the checkpoint at `path` would take its
    place. (The TAEHV of a vq_latents may have moved.)"""
    began = saved.get("init_from", "")
    if cfg.init_from and cfg.model != "vq_latents" and os.path.normpath(cfg.init_from) != os.path.normpath(began):
        raise ConfigError(f"init_from={cfg.init_from}, but {path} is there to go on from, which began "
                          f"{f'with {began}' if began else 'from scratch'}: choose another name= for a new run, or "
                          "leave init_from out")


def restore(state, model, average, optimizer, teacher, path):
    """Put a checkpoint's weights and optimizer state in place; ConfigError if it is another model's."""
    if state.get("teacher") and teacher not in ("", state["teacher"]):  # another scale of the latents, another model
        raise ConfigError(f"{path} learnt from another teacher: choose another name= for this run, with init_from=")
    if not same_model(state.get("model_config"), model.config):
        raise ConfigError(f"{path} is a checkpoint of {state.get('model_config', 'something else')}, "
                          f"not of {model.config}: choose another name= for this run, or init_from= in the place of "
                          "resume=")
    if "optimizer" not in state:
        raise ConfigError(f"{path} holds weights only: give it as init_from=, not as resume=")
    today = optimizer.state_dict()["param_groups"]
    if numbers(state["optimizer"]["param_groups"]) != numbers(today):
        raise ConfigError(f"{path} trained other parts: keep train_encoder and train_decoder, or give it as init_from=")
    if state.get("teacher", "") != teacher:
        raise ConfigError(f"{path} learnt from {'a teacher' if state.get('teacher') else 'no latent cache'}: "
                          "choose another name= for this run, with init_from=")
    counts = state["step"], state["samples"], state.setdefault("pieces", 1) - 1
    if any(type(count) is not int or not 0 <= count < 2 ** 60 for count in counts) or not 0 <= float(
            state.get("seconds", 0)) < 1e12:
        raise ConfigError(f"{path} counts impossible steps, samples or seconds: choose another name= for this run")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    # Today's settings and groups, not those of the day it was saved: the parameters' order is the same.
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": today})
    for parameter, kept in optimizer.state.items():
        if not kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape or kept["step"].numel() != 1:
            raise ValueError("its optimizer's state is of other weights")


def numbers(groups):
    """The numbers of the parameters in an optimizer's groups, in their order."""
    return [number for group in groups for number in group["params"]]


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
