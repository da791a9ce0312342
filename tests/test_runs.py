"""Runs that are stopped, fail, branch off, or start from weights; inputs that fail among others."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch

import checkpoint
import config
import infer
import train
from conftest import FRAMES, NARROW, ROOT, command, log_of, mistake, run, write_clip
from model_taehv import TAEHV
from test_smoke import FP32, INFER, PLAIN, SMALL, TRAIN, largest_difference, weights


FAULT = """
import sys, torch
sys.path.insert(0, {root!r})
import torch.distributed as dist
import objective
import train
original, calls = objective.pixel_loss, [0]
def faulty(*arguments):
    calls[0] += 1
    loss = original(*arguments)
    if dist.get_rank() == 1 and calls[0] in {calls}:
        {fault}
    return loss
objective.pixel_loss = faulty
train.main()
"""


@pytest.mark.slow
def test_nan_on_one_rank_is_skipped_by_both(clips, tmp_path):
    (tmp_path / "nan.py").write_text(FAULT.format(root=ROOT, calls=[3, 4], fault="loss = loss * float('nan')"))
    run("nan.py", *SMALL, f"data={clips}", "max_steps=6", "name=nan", ranks=2, cwd=tmp_path)
    log = (tmp_path / "runs" / "nan" / "train.log").read_text()
    assert "2 steps skipped" in log and "step 6: loss" in log
    state = checkpoint.read(str(tmp_path / "runs" / "nan" / "step_00000006.pt"))
    assert all(v.isfinite().all() for v in state["model"].values())
    assert {int(v["step"]) for v in state["optimizer"]["state"].values()} == {4}, "6 steps, 2 of them skipped"
    assert not re.search("step [56]: loss nan", log)


@pytest.mark.slow
def test_too_many_bad_steps_stop_the_run_with_a_checkpoint(clips, tmp_path):
    (tmp_path / "nan.py").write_text(FAULT.format(root=ROOT, calls="range(3, 99)", fault="loss = loss + float('inf')"))
    output = run(
        "nan.py",
        *SMALL,
        f"data={clips}",
        "max_steps=30",
        "max_bad_steps=4",
        "name=nan",
        ranks=2,
        cwd=tmp_path,
        expect=1,
    )
    assert "not finite 4 steps in a row at step 6; the run is saved" in output
    assert (tmp_path / "runs" / "nan" / "step_00000006.pt").exists()


@pytest.mark.slow
def test_out_of_memory_on_one_rank_splits_the_batch_on_both(clips, tmp_path):
    fault = "raise torch.cuda.OutOfMemoryError('injected')"
    (tmp_path / "oom.py").write_text(FAULT.format(root=ROOT, calls=[3], fault=fault))
    run("oom.py", *SMALL, f"data={clips}", "max_steps=4", "batch_size=2", "name=oom", ranks=2, cwd=tmp_path)
    run(TRAIN, *SMALL, f"data={clips}", "max_steps=4", "batch_size=2", "name=fine", ranks=2, cwd=tmp_path)
    assert (
        "step 3: out of memory; micro-batches are split in 2" in (tmp_path / "runs" / "oom" / "train.log").read_text()
    )
    oom, fine = (weights(tmp_path / "runs" / name, 4) for name in ("oom", "fine"))
    assert largest_difference(oom, fine) < 5e-5, "the step is done again in parts, so nothing is lost; a step is 3e-4"


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(clips, tmp_path):
    arguments = [TRAIN, *SMALL, f"data={clips}", "name=stopped"]
    process = subprocess.Popen(
        command(*arguments, "max_steps=100000"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, limit = tmp_path / "runs" / "stopped" / "train.log", time.monotonic() + 120
    while not (log.exists() and "step 3: loss" in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "stopped by a signal" in output, output
    step = int(re.search(r"stopped by a signal after step (\d+)", output)[1])
    output = run(*arguments, f"max_steps={step + 1}", cwd=tmp_path)
    assert f"at step {step}" in output and f"done: {step + 1} steps" in output
    assert "nothing to do" in run(*arguments, f"max_steps={step + 1}", cwd=tmp_path)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_too(clips, tmp_path):
    """As a terminal's Ctrl-C and schedulers send it: to the data workers as well, while the run waits for them."""
    arguments = [TRAIN, *SMALL, f"data={clips}", "name=group", "workers=1", "accumulation=8", "max_steps=100000"]
    process = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log, limit = tmp_path / "runs" / "group" / "train.log", time.monotonic() + 120
    while not (log.exists() and "step 2: loss" in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "stopped by a signal" in output, output


@pytest.mark.slow
def test_each_rank_draws_numbers_of_its_own(trained):
    state = checkpoint.read(os.path.join(trained[1], "step_00000004.pt"))
    assert not torch.equal(*(state["random"][rank]["torch"] for rank in range(2)))


def test_branching_off_an_older_step_loses_nothing(trained, clips, tmp_path):
    folder, run_folder, _ = trained
    common = [*PLAIN, f"data={clips}", "val_fraction=0.3", "max_steps=3", f"resume={run_folder}/step_00000002.pt"]
    output = run(TRAIN, *common, "name=two", f"out_dir={folder}/runs", cwd=tmp_path, expect=2)
    assert "holds newer checkpoints than step 2" in output
    output = run(TRAIN, *common, "name=branch", "weight_decay=0.5", "beta2=0.9", cwd=tmp_path)
    assert "at step 2" in output
    group = checkpoint.read(str(tmp_path / "runs" / "branch" / "step_00000003.pt"))["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0.9, 0.9), "today's settings hold"
    output = run(TRAIN, *common[:-2], common[-1], "max_steps=4", "name=branch", cwd=tmp_path)
    assert "at step 3" in output, "the same command goes on in its own folder"


@pytest.mark.slow
def test_one_clip_can_be_learnt(tmp_path):
    write_clip(str(tmp_path / "v" / "a.mp4"), frames=5, height=32, width=32)
    run(
        TRAIN,
        *SMALL,
        "data=v",
        "name=one",
        "size=32",
        "frames=5",
        "random_crop=false",
        "flip=false",
        "color_jitter=0",
        "max_frame_delta=1",
        "max_steps=40",
        "lr=1e-3",
        "ema_decay=0.9",
        cwd=tmp_path,
    )
    psnrs = [
        float(x)
        for x in re.findall(r"step \d+: loss \S+ psnr (\S+) dB", (tmp_path / "runs" / "one" / "train.log").read_text())
    ]
    assert len(psnrs) == 40 and np.mean(psnrs[-5:]) > np.mean(psnrs[:5]) + 4


def test_a_run_does_not_go_on_where_other_weights_are_asked_for(trained, clips, capsys, monkeypatch, tmp_path):
    shutil.copytree(os.path.join(trained[0], "runs"), tmp_path / "runs")
    step = tmp_path / "runs/two/step_00000004.pt"
    settings = ["taehv", *PLAIN[2:], f"data={clips}", f"out_dir={tmp_path}/runs", "max_steps=5"]
    for words, more in (
            ("init_from=w.pth, but .*step_00000004.pt is there to go on from, which began from scratch: choose another",
             ["name=two", "init_from=w.pth"]),
            ("checkpoint: 'nope.pt' does not exist", ["name=new", "resume=nope.pt"]),
            ("is a folder: name a step_", ["name=new", f"resume={tmp_path}/runs/two"]),
            ("or init_from= in the place of resume=", ["name=new", "net.encoder_widths=32,32,32,32", f"resume={step}"])):
        if more[-1] == "init_from=w.pth":
            torch.save(checkpoint.read(str(tmp_path / "runs/two/model.pth")), tmp_path / "w.pth")
            monkeypatch.chdir(tmp_path)
        assert re.search(words, mistake(capsys, monkeypatch, train, *settings, *more)), words


@pytest.mark.slow
def test_starting_from_weights_and_training_one_half(here):
    whole = here(*PLAIN, "max_steps=1", "name=whole")
    half = here("taehv", *PLAIN[2:], "max_steps=2", "name=half", f"init_from={whole}/model.pth", "train_encoder=false")
    before = checkpoint.read(str(whole / "model.pth"))
    after = checkpoint.read(str(half / "step_00000002.pt"))["model"]
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith("decoder.") for k in moved)


def test_a_config_json_means_the_run_that_it_lies_with(here, tmp_path, monkeypatch, capsys):
    """Copied, moved, from another working directory."""
    run_folder = here(*PLAIN, *NARROW, "max_steps=1", "name=first")
    shutil.copytree(run_folder, tmp_path / "elsewhere" / "second")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path, out_dir, name in (("second/config.json", ".", "second"),
                                (f"{run_folder}/config.json", str(tmp_path), "first")):
        cfg = config.load_config([path, "max_steps=2"])
        assert (os.path.abspath(cfg.out_dir), cfg.name) == (os.path.abspath(out_dir), name)
    monkeypatch.chdir("second")
    cfg = config.load_config(["config.json", "max_steps=2"])
    assert (cfg.out_dir, cfg.name) == ("..", "second")
    assert config.load_config(["config.json", "name=new"]).name == "new"
    assert train.train(cfg) == 0 and "resumed from" in log_of(tmp_path / "elsewhere" / "second")
    assert not os.path.exists(run_folder / "step_00000002.pt"), "the copied run went on, not the first"
    shutil.copy(run_folder / "config.json", "mine.json")
    assert config.load_config(["mine.json"]).name == "first", "any other file says itself which run it is"


def test_a_resume_names_the_settings_that_have_changed(here):
    folder = here(*PLAIN, *NARROW, "max_steps=1", "name=changed")
    here(*PLAIN, *NARROW, "max_steps=2", "name=changed")
    assert "have changed" not in log_of(folder)
    here(*PLAIN, *NARROW, "max_steps=3", "name=changed", "seed=5", "pixel_loss=l1", "val_every=7")
    assert "settings that have changed: seed=5 (0 before), pixel_loss=l1 (l2 before)\n" in log_of(folder)
    with pytest.raises(config.ConfigError, match=r"of another model \(encoder_widths is \[32, 32, 32, 32\], and \[8, 8, 8, "
                                                 r"8\] here\): choose another name="):
        here(*PLAIN, "net.encoder_widths=8,8,8,8", NARROW[1], "max_steps=4", "name=changed")


@pytest.mark.slow
@pytest.mark.any_precision
def test_a_mistake_in_a_real_process(tmp_path):
    output = run(TRAIN, "taehv", "data=nowhere", cwd=tmp_path, expect=2, fresh=True)
    assert output == "train.py: data: 'nowhere' does not exist\n"
    assert "key=value" in run(TRAIN, "--help", cwd=tmp_path) and "INPUT" in run(INFER, "--help", cwd=tmp_path)
    assert os.listdir(tmp_path) == ["runs"] or os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.auto_precision
def test_latents_of_another_model_or_cut_short_are_refused(trained, tmp_path, capsys, monkeypatch):
    folder, run_folder, _ = trained
    monkeypatch.chdir(tmp_path)
    write_clip(str(tmp_path / "a.mp4"), frames=4, height=32, width=32)
    run(INFER, run_folder, "a.mp4", "--save-latents", "--lpips", "none", cwd=tmp_path)
    latents = tmp_path / "inference_results" / "latents" / "a.latents.npz"
    torch.save(TAEHV("taehv1_5").state_dict(), "taehv1_5.pth")
    assert "not this model's" in mistake(capsys, monkeypatch, infer, "taehv1_5.pth", latents)
    whole = latents.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        (tmp_path / "b.latents.npz").write_bytes(damaged)
        assert "damaged" in mistake(capsys, monkeypatch, infer, run_folder, "b.latents.npz")


@pytest.mark.slow
def test_one_bad_input_does_not_cost_the_others(teacher, tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), np.zeros((16, 16400, 3), np.uint8))  # too wide for VP8
    write_clip(str(tmp_path / "in" / "b.mp4"), frames=3, height=32, width=32)
    output = run(INFER, teacher, "in", "--lpips", "none", *FP32, cwd=tmp_path)
    rows = json.loads((tmp_path / "inference_results" / "metrics.json").read_text())["rows"]
    assert "failed" in rows[0] and rows[1]["frames"] == 3 and "a  " in output


LEAVING = """
import os
import torch
import torch.distributed as dist
import ranks
rank, world, control = ranks.start_ranks(torch.device("cpu"), 5)
weight = torch.nn.Parameter(torch.zeros(3))
weight.grad = torch.ones(3)
torch.optim.AdamW([weight], fused=True).step()
ranks.gather(control, {"rank": rank})
del control
dist.destroy_process_group()
threads = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
assert not any("gloo" in t for t in threads), threads
print("left nothing behind")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_ranks_end_without_threads_that_could_abort_them(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    assert run(tmp_path / "leaving.py", ranks=2, cwd=tmp_path, fresh=True).count("left nothing behind") == 2


def test_a_cosine_schedule_ends_with_the_minutes_of_the_run(here, monkeypatch, capsys):
    """Six seconds a step: ten steps in a minute, of the thousand that max_steps allows."""
    seconds, take = [0.0], train.Trainer.take_clips
    monkeypatch.setattr(train.Clock, "total", lambda self: seconds[0])
    monkeypatch.setattr(train.Trainer, "take_clips", lambda self: (seconds.append(seconds.pop() + 6), take(self))[1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # else there is no bar
    settings = [*FRAMES, "schedule=cosine", "lr=1e-3", "lr_final=0.1", "warmup_steps=2", "log_every=1"]
    folder = here(*settings, "max_steps=1000", "max_minutes=1", "name=minute")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert rates[:2] == pytest.approx([5e-4, 1e-3]) and len(rates) == 10
    shares = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(3, 11)]
    assert rates[2:] == pytest.approx([1e-3 * share for share in shares], rel=1e-5)
    assert "10/10 [" in capsys.readouterr().err, "the bar counts the steps of these minutes"
    steps = here(*settings, "max_steps=4", "max_minutes=600", "name=steps")
    last = json.loads([line for line in (steps / "metrics.jsonl").read_text().splitlines() if '"train"' in line][-1])
    assert last["learning_rate"] < 7e-4, "whichever comes first"


def test_clips_of_too_few_latents_are_remarked_on(here):
    """docs/training.md says what they cost."""
    notes = [re.findall("note: the model is trained on 4 frames .1 latents.*frames=12 or more", log_of(here(*settings)))
             for settings in ([*SMALL, "max_steps=1", "name=a"], [*SMALL, "frames=12", "max_steps=1", "name=b"],
                              [*FRAMES, "max_steps=1", "name=c"])]
    assert [len(note) for note in notes] == [1, 0, 0]


CLOCKS = """
import os, sys
sys.path.insert(0, {root!r})
import train
rank, total, update = int(os.environ["RANK"]), train.Clock.total, train.Trainer.update
train.Clock.total = lambda self: total(self) * (1 + 2 * rank)
def told(self, *arguments):
    update(self, *arguments)
    with open(f"rates{{rank}}", "a") as file:
        print(self.optimizer.param_groups[0]["lr"], file=file)
train.Trainer.update = told
train.main()
"""


@pytest.mark.slow
def test_ranks_with_other_clocks_have_one_learning_rate(clips, tmp_path):
    (tmp_path / "clocks.py").write_text(CLOCKS.format(root=ROOT))
    settings = [*SMALL, f"data={clips}", "schedule=cosine", "warmup_steps=0", "max_minutes=1", "max_steps=4"]
    run("clocks.py", *settings, "name=clocks", ranks=2, cwd=tmp_path)
    first, second = ((tmp_path / f"rates{rank}").read_text().split() for rank in (0, 1))
    assert first == second and len(set(first)) == 4


@pytest.mark.slow
def test_a_run_of_minutes_ends_by_itself_and_is_scored_at_another_size(clips, tmp_path):
    common = [*SMALL, f"data={clips}", f"val_data={clips}", "val_clips=2", "val_size=32", "name=timed"]
    output = run(TRAIN, *common, "max_minutes=0.02", cwd=tmp_path)
    (last,) = re.findall(r"done: (\d+) steps in 0.\d minutes", output)
    assert f"step {last}: validation psnr" in output and int(last) < 10000
    state = checkpoint.read(str(tmp_path / "runs" / "timed" / f"step_{int(last):08d}.pt"))
    assert 1.2 <= state["seconds"] < 30
    assert "nothing to do" in run(TRAIN, *common, "max_minutes=0.02", cwd=tmp_path)
    output = run(TRAIN, *common, f"max_minutes={state['seconds'] / 60 + 0.001}", cwd=tmp_path)
    assert f"at step {last}" in output and "done: " in output
