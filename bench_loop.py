"""The section "loop" of bench.py: train.py's whole loop, with its loader and with clips in memory, compared with the
bare step; and how long training waits for a validation and for a save.

Each turn is a process of its own, like train.py, and measures the second half of its steps. "threads spin" is OpenMP's
default: a thread that waits for another one keeps its core busy. train.py lets it sleep.
"""
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time

import torch

import progress
from config import load_config
from device import pick_device, synchronize

SPIN = ", threads spin"


def in_process(function, *arguments, spin):
    """function(*arguments) in a fresh process, which may start others. spin: whether OpenMP's waiting threads spin."""
    before = os.environ.pop("OMP_WAIT_POLICY", None)
    if not spin:
        os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.pop("OMP_WAIT_POLICY", None)
        if before is not None:
            os.environ["OMP_WAIT_POLICY"] = before


def step_turn(train_call, options, size, batch, steps):
    """(clips/s of the bare step, {})."""
    step, *_ = train_call(options, size, batch, "ours fp32")
    device = pick_device(options.device)
    for done in range(steps):
        if done == steps // 2:
            synchronize(device)
            start = time.perf_counter()
        step()
    synchronize(device)
    return batch * (steps - steps // 2) / (time.perf_counter() - start), {}


def in_memory(size, batch):
    """A replacement for TrainClips.batches: endless batches of noise."""
    videos = torch.randint(256, (4, batch, 12, size, size, 3), dtype=torch.uint8).permute(0, 1, 2, 5, 3, 4)
    return lambda *_, **__: ({"video": videos[i % 4], "notes": []} for i in itertools.count())


def loop_turn(how, options, size, batch, steps, folder):
    """(clips/s of train.py's loop, {"validation": seconds, "save": seconds that training waits, "written": seconds
    until a save is on the disk}). Medians without the first time, which allocates memory, and the last, for which
    training waits."""
    import data
    import saving
    import train
    if "memory" in how:
        data.TrainClips.batches = in_memory(size, batch)
    seconds = {}

    def timed(owner, name, what):
        def call(*arguments, original=getattr(owner, name), **keywords):
            start = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                seconds.setdefault(what, []).append(time.perf_counter() - start)
        setattr(owner, name, call)
    timed(train.Trainer, "validate", "validation")
    timed(train.Trainer, "save", "save")
    timed(saving.Saver, "write", "written")
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, \
            contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train.train(load_config([
            "taehv", f"data={folder}", f"size={size}", f"batch_size={batch}", "precision=fp32", "init=colours",
            f"max_steps={steps}", f"log_every={steps // 2}", f"val_every={steps // 4}", f"save_every={steps // 4}",
            "val_fraction=0.2", "val_clips=8", f"device={options.device}", f"out_dir={out}", "name=run"]))
        with open(os.path.join(out, "run", progress.FILE), "rb") as file:
            lines = [line for line in map(progress.parse, file) if line and line["kind"] == "train"]
    return lines[-1]["clips_per_second"], {what: statistics.median(all_[1:-1]) for what, all_ in seconds.items()}


def loop(options, train_call):
    """`bench.py loop`: yields what is measured next (str), and rows of the table (dict).

    train_call: `bench.train_call`, which makes the function for one bare training step.
    """
    from synthetic import make_demo
    size, batch, steps = (16, 2, 8) if options.quick else (64, 4, 16)
    rows = ["step alone", f"step alone{SPIN}", "loop, clips in memory", "loop with its loader"]
    found = {how: [] for how in rows}
    with tempfile.TemporaryDirectory() as folder:
        make_demo(os.path.join(folder, "demo"))
        clips = options.data or os.path.join(folder, "demo", "train")
        for turn, how in itertools.product(range(options.repeat), rows):
            yield f"loop: {how}, turn {turn + 1}"
            call = [step_turn, train_call] if how.startswith("step") else [loop_turn, how]
            found[how].append(in_process(*call, options, size, batch, steps,
                                         *([] if how.startswith("step") else [clips]), spin=SPIN in how))
    speeds = {how: statistics.median(speed for speed, _ in turns) for how, turns in found.items()}
    for how, speed in speeds.items():
        yield dict(what=f"train taehv {size}x{size}x12, batch {batch}", how=how, value=speed, unit="clips/s",
                   ratio=speed / speeds["step alone"])
    pauses = {what: statistics.median(seconds[what] for _, seconds in found["loop with its loader"])
              for what in ("written", "save", "validation")}
    for how, what in (("a save, until it is on the disk", "written"), ("a save, training waits", "save"),
                      ("a validation of 8 clips", "validation")):
        yield dict(what="pauses of that loop", how=how, value=pauses[what], unit="s",
                   ratio=pauses["written"] / pauses[what])
