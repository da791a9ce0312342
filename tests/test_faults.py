"""Faults, caused: two ranks in trouble, kills, full disks, damaged files; memory over time. Minutes: about three."""

import io
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import config
import data
import model_vqvae
import objective
import train
from conftest import (BATCH_NORM, CODES, FRAMES, NARROW, PLAIN, ROOT, SERAENA, command, different, log_of, metrics_of, run, spoilt,
                      state_of, write_clip)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and /proc as Linux has them")

# ---- two ranks, one of them in trouble ---------------------------------------------------------------------------


# An out-of-memory error costs a split of the batch of 16 each time. Step 10 is for a rank without data.
MANY = """
spoil(quantize.SinkhornQuantizer, "cost_scale", {(2, 1): memory})  # before its first reduction
spoil(quantize.SinkhornQuantizer, "kernel", {(3, 0): memory})      # between two of them
spoil(adversary.PatchGAN, "forward", {(4, 1): memory})
spoil(objective, "pixel_loss", {(5, 0): in_backward(memory), (7, 1): lambda call: call() * float("nan"),
                                (8, 0): in_backward(lambda gradient: gradient * float("inf"))})
read = data.TrainClips.read
def unreadable(self, source, *arguments):
    if now[0] >= 9 and dist.get_rank() == 1:
        raise data.DataError("injected")
    return read(self, source, *arguments)
data.TrainClips.read = unreadable
"""


def assert_ranks_are_equal(output, world=2):
    found = re.findall(r"weights of \d after (\d+) are (.*)", output)
    for step in {step for step, _ in found}:
        weights = [w for s, w in found if s == step]
        assert len(weights) >= world and len(set(weights)) == 1, found
    assert found


@pytest.mark.slow
def test_two_ranks_go_through_every_fault_of_one_together(clips, tmp_path):
    settings = ["vqgan_optvq", *CODES, "net.num_head=2", "net.n_embed=16", "size=32", "gan_weight=0.5", "batch_size=16"]
    script = spoilt(tmp_path, MANY)
    output = run(script, *settings, f"data={clips}", "max_steps=20", "save_every=6", "name=a", "timeout_minutes=1",
                 ranks=2, cwd=tmp_path, expect=1)
    log = log_of(tmp_path / "runs" / "a")
    assert re.findall(r"step (\d+): out of memory; .* split in (\d+)", log) == [(str(s), str(2 ** (s - 1)))
                                                                                 for s in (2, 3, 4, 5)]
    assert re.findall(r"step (\d+): loss .* (\d) steps skipped", log) == [("7", "1"), ("8", "2"), ("9", "2")]
    assert "no data (on another rank) at step 9; the run is saved" in output, "rank 1 has none, rank 0 has"
    state = state_of(tmp_path / "runs" / "a", 9)
    assert {int(v["step"]) for v in state["optimizer"]["state"].values()} == {9 - 2}
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    assert_ranks_are_equal(output)


@pytest.mark.slow
def test_memory_that_runs_out_beside_the_micro_batches(clips, tmp_path):
    """On one rank: as a step begins it is done again in smaller parts, in a validation all save and end."""
    faults = """
import evaluate
spoil(adversary.Adversary, "begin", {(3, 1): memory})  # the first step with the PatchGAN
spoil(evaluate.Quality, "add", {(4, 1): memory})
"""
    output = run(spoilt(tmp_path, faults), *PLAIN, *NARROW, f"data={clips}", "size=32", "batch_size=4", "gan_weight=0.5", "gan_start=2",
                 "max_steps=6", "save_every=4", "val_every=4", "val_fraction=0.5", "name=a", "timeout_minutes=1",
                 ranks=2, cwd=tmp_path, expect=1)
    assert "step 3: out of memory; micro-batches are split in 2" in output and "Traceback" not in output
    assert "train.py: out of memory in validation at step 4; the run is saved. Set val_size lower." in output
    state_of(tmp_path / "runs" / "a", 4)
    assert_ranks_are_equal(output)


def test_validation_clips_of_which_none_can_be_read_end_the_run_at_its_start(here, monkeypatch):
    def broken(*arguments):
        raise data.DataError("injected")

    monkeypatch.setattr(data, "read_frames", broken)
    with pytest.raises(data.DataError, match="none of the clips for validation can be read.*val_fraction=0"):
        here(*FRAMES, "val_fraction=0.3", "max_steps=1", "name=blind")


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_alone_ends_all_with_one_line(clips, tmp_path):
    """A file that one machine lacks, memory that one rank lacks."""
    plain = [*PLAIN, *NARROW, f"data={clips}"]
    run(os.path.join(ROOT, "train.py"), *plain, "max_steps=1", "name=first", cwd=tmp_path)
    absent = """
def absent(owner, name, error):
    original = getattr(owner, name)
    def call(*arguments, **keywords):
        if os.environ["RANK"] == "1":
            raise error
        return original(*arguments, **keywords)
    setattr(owner, name, call)
"""
    for fault, words, settings in (
            ('absent(models, "make_model", models.ConfigError("init_from=w.pth does not exist"))', "init_from=w.pth", []),
            ('absent(checkpoint, "read", checkpoint.CheckpointError("step.pt is not here"))', "step.pt is not here",
             ["resume=runs/first/step_00000001.pt"]),
            ('absent(train, "summarize", models.ConfigError("out of memory with one clip"))', "out of memory", [])):
        output = run(spoilt(tmp_path, absent + fault), *plain, *settings, "max_steps=2", "name=second", ranks=2,
                     cwd=tmp_path, expect=1)
        lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert len(lines) == 1 and words in lines[0] and "Traceback" not in output, output[-3000:]
        assert "exitcode  : 2" in output or "exitcode: 2" in output


@pytest.mark.slow
def test_two_ranks_hold_the_same_batch_statistics(clips, tmp_path):
    """Also after a step that was not finite on one, and one that was done again."""
    faults = '''
import model_vqvae
spoil(model_vqvae.VQVAE2, "_prepared", {(2, 1): lambda call: call() * float("nan")})
spoil(objective, "pixel_loss", {(3, 0): memory})
'''
    output = run(spoilt(tmp_path, faults), *BATCH_NORM, f"data={clips}", "max_steps=5", "save_every=1", ranks=2,
                 cwd=tmp_path)
    assert_ranks_are_equal(output)
    state = state_of(tmp_path / "runs" / "vqvae2", 4)
    assert all(v.isfinite().all() for v in (*state["model"].values(), *state["ema"].values()))


def test_batch_statistics_forget_steps_that_are_bad_done_again_or_given_up(here, tmp_path, monkeypatch):
    prepared, pixel_loss, seen = model_vqvae.VQVAE2._prepared, objective.pixel_loss, []

    def clip(self, video):
        seen.extend([len(video)] * self.training)
        return prepared(self, video * (float("nan") if self.training and len(seen) == 2 else 1))

    def loss(*arguments):  # behind the network, whose statistics have moved
        if len(seen) in (3, 6):
            raise MemoryError
        return pixel_loss(*arguments)

    monkeypatch.setattr(model_vqvae.VQVAE2, "_prepared", clip)
    monkeypatch.setattr(objective, "pixel_loss", loss)
    with pytest.raises(config.ConfigError, match="out of memory with one clip at a time at step 3; the run is saved"):
        here(*BATCH_NORM, "max_steps=9", "name=norms")
    assert seen == [2, 2, 2, 1, 1, 1]
    state = state_of(tmp_path / "norms", 3)
    counts = [v.item() for k, v in state["model"].items() if k.endswith("num_batches_tracked")]
    assert counts and set(counts) == {3}, "step 1 whole, nothing of step 2, step 3 in two halves, nothing of step 4"
    assert all(v.isfinite().all() for v in (*state["model"].values(), *state["ema"].values()))


@pytest.mark.slow
def test_a_rank_killed_in_a_save_costs_no_more_than_the_steps_since_the_last(clips, tmp_path):
    """And Seraena runs out of memory on one rank, in the last step, in both runs."""
    common = [*SERAENA, f"data={clips}", "max_steps=5", "save_every=2", "timeout_minutes=2"]
    memory = 'spoil(seraena.PatchDiscriminator, "forward", {(5, 1): memory})\n'
    output = run(spoilt(tmp_path, memory), *common, "batch_size=2", "name=whole", ranks=2, cwd=tmp_path)
    assert_ranks_are_equal(output)
    death = """
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    write = checkpoint.write_atomically
    def killed(path, content):
        if "step_00000004.pt" in path:
            with open(path + ".1.tmp", "wb") as file:
                file.write(bytes(12345))
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)
    checkpoint.write_atomically = killed
"""
    line = command(spoilt(tmp_path, memory + death), *common, "batch_size=2", "name=killed", ranks=2)
    line[3:3] = ["--max-restarts", "1"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    whole, killed = (tmp_path / "runs" / name for name in ("whole", "killed"))
    assert "step_00000002.pt at step 2" in log_of(killed) and "out of memory" in log_of(killed)
    for name in ("step_00000005.pt", "step_00000005.rank0", "step_00000005.rank1"):
        a, b = (checkpoint.read(str(folder / name)) for folder in (whole, killed))
        assert set(different(a, b)) <= {"state.config.name", "state.seconds"}, "Seraena and its replayed samples too"
    assert not [name for name in os.listdir(killed) if name.endswith(".tmp")]


@pytest.mark.slow
def test_the_ranks_of_a_killed_launcher_save_and_one_rank_goes_on_with_their_samples(clips, here, tmp_path):
    common = [*FRAMES, "batch_size=1", "save_every=100"]
    faults = 'spoil(objective, "pixel_loss", {(3, 0): lambda call: (kill(os.getppid)(0), call())[1]})'
    launcher = subprocess.Popen(command(spoilt(tmp_path, faults), *common, f"data={clips}", "max_steps=500",
                                        f"out_dir={tmp_path}", "name=orphans", ranks=2),
                                cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    output = launcher.communicate(timeout=120)[0]  # the ranks hold its other end: that they ended is waited for too
    assert launcher.returncode == -signal.SIGKILL
    stopped = re.search(r"torchrun was killed: stopped after step (\d+)", output)
    assert stopped, output
    step = int(stopped[1])
    assert step <= 8
    here(*common, "accumulation=2", "workers=1", f"max_steps={step + 3}", "name=orphans")
    here(*common, "accumulation=2", f"max_steps={step + 3}", "name=whole")
    assert f"step_{step:08d}.pt at step {step}" in log_of(tmp_path / "orphans")
    orphans, whole = (state_of(tmp_path / name, step + 3) for name in ("orphans", "whole"))
    assert orphans["samples"] == whole["samples"] == 2 * (step + 3)
    apart = torch.cat([(orphans["model"][k] - whole["model"][k]).abs().flatten() for k in whole["model"]])
    # The mean: AdamW makes a whole step of rounding noise where a gradient is next to nothing.
    assert apart.mean() < 1e-6 and apart.max() < 1e-3, "the same samples in the same order"


@pytest.mark.slow
def test_an_error_of_one_rank_is_readable_and_ends_all_at_once(clips, tmp_path):
    """Here in validation, where another rank waits for it."""
    faults = """
import time
def fail(call):
    with open("failed", "w") as file:
        file.write(str(time.time()))
    raise ValueError("injected")
spoil(train, "evaluate", {(2, 1): fail})
"""
    output = run(spoilt(tmp_path, faults), *FRAMES, f"data={clips}", "val_fraction=0.3", "val_every=2", "max_steps=9",
                 ranks=2, cwd=tmp_path, expect=1, fresh=True)
    assert time.time() - float((tmp_path / "failed").read_text()) < 15, "timeout_minutes is 30"
    assert re.search(r"rank 1: Traceback.*\n(rank 1:   .*\n)+rank 1: ValueError: injected\n", output), output
    assert len(re.findall("rank 0: no answer from another rank .*: its own message says why", output)) == 1
    assert "rank 0: Traceback" not in output and "[rank0]: Traceback" not in output


@pytest.mark.slow
def test_an_error_ends_the_data_processes_too(clips, tmp_path):
    """They are deaf to signals, so the interpreter's own end waits for them in vain."""
    (tmp_path / "wrong.py").write_text(f"""
import sys
sys.path.insert(0, {ROOT!r})
import objective, train
def wrong(*_):
    raise ValueError("injected")
if __name__ == "__main__":  # data processes import this too
    objective.pixel_loss = wrong
    train.main()
""")
    output = run("wrong.py", *FRAMES, "workers=1", f"data={clips}", cwd=tmp_path, expect=1, timeout=100, fresh=True)
    assert output.count("Traceback") == 1 and "ValueError: injected" in output


# ---- saving and loading ------------------------------------------------------------------------------------------


def run_state(step):
    weights = {"w": torch.full((4000,), float(step))}
    return dict(step=step, model_config={}, model=weights, ema=weights)


class Dying(io.FileIO):
    """A file that kills its process when `left` bytes have been written, to it and to those before it."""

    left = 0

    def write(self, content):
        written = super().write(bytes(content)[:Dying.left])
        Dying.left -= written
        if written < len(content) or Dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def save_and_die(folder, state, offset):
    child = os.fork()
    if child == 0:
        Dying.left = offset
        checkpoint.open = lambda path, mode: Dying(path, "w")
        checkpoint.save_run(folder, state, 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_save_killed_at_any_byte_leaves_the_one_before(tmp_path):
    folder = str(tmp_path)
    assert checkpoint.save_run(folder, run_state(1), 3) == ""
    step_file, weights = (os.path.getsize(tmp_path / name) for name in ("step_00000001.pt", "model.pth"))
    offsets = [1, 2, 100, step_file // 2, step_file - 1, step_file, step_file + 1, step_file + weights // 2]
    for offset in offsets:
        save_and_die(folder, run_state(2), offset)
        assert any(name.endswith(".tmp") for name in os.listdir(folder))
        path, problems = checkpoint.newest_checkpoint(folder)
        assert checkpoint.read(path)["step"] == (2 if offset > step_file else 1) and not problems
        assert checkpoint.read(folder + "/model.pth")["w"][0] == 1
    assert checkpoint.save_run(folder, run_state(3), 1) == ""
    assert sorted(os.listdir(folder)) == ["model.pth", "step_00000003.pt"], "what they left is gone"


def test_a_full_disk_costs_a_checkpoint_and_the_run_goes_on(here, at):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at({3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard)),  # of a checkpoint of three million
        5: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))})
    try:
        folder = here(*FRAMES, "max_steps=6", "save_every=2", "val_fraction=0.3", "val_every=4", "name=full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log = log_of(folder)
    assert "the checkpoint of step 4 could not be saved: [Errno 27] File too large; the run goes on" in log
    assert "best.pt of step 4 could not be saved" in log
    assert [n for n in sorted(os.listdir(folder)) if re.search("step|tmp", n)] == ["step_00000002.pt",
                                                                                     "step_00000006.pt"]


DAMAGES = {
    "cut": lambda content: content[: len(content) * 2 // 3],
    "flipped": lambda content: content[:99999] + bytes([content[99999] ^ 8]) + content[100000:],
    "empty": lambda content: b"",
}


def test_damaged_checkpoints_are_passed_over_and_lose_nothing_but_time(here):
    folder = here(*FRAMES, "max_steps=4", "save_every=1", "keep_last=9", "name=damaged")
    whole = state_of(folder, 4)
    for step, damage in zip((4, 3, 2), DAMAGES.values()):
        path = folder / f"step_{step:08d}.pt"
        path.write_bytes(damage(path.read_bytes()))
    here(*FRAMES, "max_steps=4", "save_every=1", "keep_last=9", "name=damaged")
    log = log_of(folder)
    assert log.count("warning: ") == 3 and log.count("; the one before it is used") == 3
    assert "step_00000001.pt at step 1" in log
    steps = [(line["kind"], line["step"]) for line in metrics_of(folder) if line["kind"] in ("start", "train")]
    assert steps == [("start", 0), ("train", 1), ("train", 2), ("train", 3), ("train", 4),
                     ("start", 1), ("train", 2), ("train", 3), ("train", 4)]
    assert different(whole, state_of(folder, 4)) == []
    for path in folder.glob("step_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(config.ConfigError, match="none of the 4 checkpoints in .* can be read: choose another name="):
        here(*FRAMES, "max_steps=9", "name=damaged")


# ---- data --------------------------------------------------------------------------------------------------------


def kill_workers():
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_data_workers_are_replaced_and_no_sample_is_lost(here, at, monkeypatch):
    calm = here(*FRAMES, "max_steps=12", "workers=2", "name=calm")
    at({2: kill_workers, 5: kill_workers})
    killed = here(*FRAMES, "max_steps=12", "workers=2", "name=killed")
    assert set(different(state_of(calm, 12), state_of(killed, 12))) <= {"state.config.name"}
    found = re.findall(r"a data process: killed; others read batch (\d+) on", log_of(killed))
    assert len(found) == 2 and 2 <= int(found[0]) < int(found[1]), found
    iterate = data.start_loader

    def dead_at_once(loader):
        iterator = iterate(loader)
        kill_workers()
        return iterator

    monkeypatch.setattr(data, "start_loader", dead_at_once)
    with pytest.raises(config.ConfigError, match="no data .the data processes died three times .* is saved"):
        here(*FRAMES, "max_steps=20", "workers=1", "name=killed")


class GreedyClips(data.TrainClips):
    """Its process may make no file of more than a kilobyte, as where shared memory is full."""

    def __getitem__(self, key):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return super().__getitem__(key)


def test_full_shared_memory_ends_a_run_in_one_line(here, monkeypatch):
    monkeypatch.setattr(data, "TrainClips", GreedyClips)
    with pytest.raises(config.ConfigError, match="no shared memory for a batch of 0.0 MB .*--shm-size"):
        here(*FRAMES, "max_steps=2", "workers=1", "name=greedy")


class WaitingClips(data.TrainClips):
    """All but the first are made when a validation has begun. Events and semaphores come with the data processes."""

    def __getitem__(self, key):
        first = (key.epoch, key.index) == (0, 0)
        assert first or self.validating.wait(60)
        sample = super().__getitem__(key)
        if not first:
            self.made.release()
        return sample


def test_data_processes_go_on_during_a_validation(here, monkeypatch):
    """Which ends when they have made four batches, as many as they may be ahead."""
    processes = data.worker_context()
    validating, made = processes.Event(), processes.Semaphore(0)

    def make(*arguments, **keywords):
        clips = WaitingClips(*arguments, **keywords)
        clips.validating, clips.made = validating, made
        return clips

    def evaluate(*arguments, original=train.evaluate, **keywords):
        validating.set()
        ahead.append(sum(made.acquire(timeout=60) for _ in range(4)))
        return original(*arguments, **keywords)

    ahead = []
    monkeypatch.setattr(data, "TrainClips", make)
    monkeypatch.setattr(train, "evaluate", evaluate)
    folder = here(*FRAMES, "workers=1", "batch_size=1", "max_steps=1", "val_fraction=0.3", "name=ahead")
    assert ahead == [4] and "step 1: validation psnr" in log_of(folder)


def test_broken_files_and_files_that_break_are_named_and_training_goes_on(here, at, tmp_path):
    folder = tmp_path / "videos"
    for i in range(5):
        write_clip(str(folder / f"{i}.mp4"), frames=8, seed=i)
    whole = (folder / "0.mp4").read_bytes()
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.mp4").write_bytes(DAMAGES["flipped"](whole) if len(whole) > 99999 else whole[::-1])

    def replace(name, make):
        os.remove(folder / name)
        make(folder / name)

    at({2: lambda: replace("1.mp4", lambda path: None),
        3: lambda: replace("2.mp4", os.mkfifo),
        4: lambda: replace("3.mp4", os.mkdir),
        5: lambda: replace("4.mp4", lambda path: path.write_bytes(whole[:3000]))})
    log = log_of(here(*FRAMES, f"data={folder}", "max_steps=20", "name=broken"))
    assert "training: 5 files" in log and "done: 20 steps" in log
    for name, reason in {"zero": "empty file", "text": "not a video", "pipe": "not a regular file",
                         "cut": "not a video", "flipped": "not a video"}.items():
        assert re.search(f"refused: .*/{name}.mp4: {reason}", log), name
    for name, reason in {"1": "no such file or directory", "2": "not a regular file", "3": "not a regular file",
                         "4": "not a video"}.items():
        assert len(re.findall(f"/{name}.mp4: {reason}; another file took its place", log)) == 1, name
    at({22: lambda: shutil.rmtree(folder)})
    with pytest.raises(config.ConfigError, match="no data .50 files in a row could not be read.* at step 2.*is saved"):
        here(*FRAMES, f"data={folder}", "max_steps=40", "name=broken")


# ---- memory ------------------------------------------------------------------------------------------------------

WATCHED = """
import glob, os, sys
sys.path.insert(0, {root!r})
import objective, train
def resident():  # of this process and of those that it has started, and these, in MB
    total = 0
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = open(path).read().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if int(fields[2]) == os.getpgrp() else 0
    return total
def begin(self, step, begin=objective.Objective.begin):
    if step % 50 == 0:
        with open("resident", "a") as file:
            file.write(f"{{step}} {{resident():.1f}}\\n")
    begin(self, step)
objective.Objective.begin = begin
if __name__ == "__main__":  # data processes import this too
    train.main()
"""


@pytest.mark.slow
def test_memory_stops_growing(clips, tmp_path):
    """Of the run and its data process, with validation and checkpoints; the first steps fill caches."""
    (tmp_path / "watched.py").write_text(WATCHED.format(root=ROOT))
    steps = int(os.environ.get("MEMORY_STEPS", "351"))  # 3001 takes minutes
    done = subprocess.Popen(command("watched.py", *FRAMES, "workers=1", "val_fraction=0.3", "val_every=40",
                                    "save_every=60", "keep_last=1", f"max_steps={steps}", f"data={clips}", "name=long"),
                            cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    assert done.wait(timeout=3000) == 0
    lines = [line.split() for line in (tmp_path / "resident").read_text().splitlines()]
    resident = {int(step): float(size) for step, size in lines}
    early, late = (max(size for step, size in resident.items() if first <= step < last)
                   for first, last in ((100, 250) if steps < 1000 else (300, 1000), (steps - steps // 3, steps)))
    assert late < early + 8, resident
