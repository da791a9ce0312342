"""Signals, and going on after them: exactly, in every family; with other settings; with less memory."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import config
import data
import objective
import ranks
import train
from conftest import (CODES, COMMON, FRAMES, NARROW, PLAIN, ROOT, SERAENA, command, different, log_of, metrics_of,
                      shapeless, state_of)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and terminals as Linux has them")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


GAN = ["gan_weight=0.5", "size=32"]
FAMILIES = {
    "taehv with Seraena": SERAENA,
    "vq and a PatchGAN": ["vqgan", *CODES, "net.n_embed=16", *GAN, "gan_every=2"],
    "ema with restarts": ["vqgan_ema", *CODES, "net.n_embed=64", "size=16", "gan_weight=0"],
    "optvq and a PatchGAN": ["vqgan_optvq", *CODES, "net.n_embed=16", "net.num_head=2", *GAN, "net.use_prob=true"],
    "rvq": ["vqgan", *CODES, "net.quantizer=rvq", "net.n_embed=16", "net.depth=2", "net.kind=ema", "size=16",
            "gan_weight=0", "net.restart_below=0.5"],
    "fsq": ["vqgan", *CODES, "net.quantizer=fsq", "size=16", "gan_weight=0", "net.embed_dim=4"],
    "vqvae2": ["vqvae2", *COMMON, "net.hidden_channels=8", "net.res_channels=4", "net.nb_entries=16", "size=64",
               "batch_size=2"],
    "vqvae_video": ["vqvae_video", *COMMON, "net.group_count=2", "net.n_hid=8", "net.n_init=64",
                    "net.vocab_size=16", "net.n_blk_per_group=1", "net.sequence_length=4", "frames=4", "size=32",
                    "batch_size=1"],
    "dcae and a clip PatchGAN": ["dcae_disc", *COMMON, "net.width_list=(16,16,16,32,32,32)",
                                 "net.encoder_depth_list=(1,1,1,1,1,1)", "net.decoder_depth_list=(1,1,1,1,1,1)",
                                 "net.latent_channels=16", "buckets=32x4:0.7:1, 32x1:0.3:2", "gan_lecam=0.1",
                                 "gan_norm=group", "gan_start=4"],
}


def curves_of(metrics):
    """What is measured in each line, without what depends on the machine."""
    return [{name: value for name, value in line.items() if not re.search("second|memory|fps", name)}
            for line in metrics if line["kind"] in ("train", "val")]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_stopped_anywhere_a_run_goes_on_as_if_never_stopped(name, here, at):
    """SIGTERM in step 5 of 8: no multiple of anything, and in the middle of an epoch of four files."""
    settings = [*FAMILIES[name], "max_steps=8", "log_every=4", "val_every=3", "save_every=4", "val_fraction=0.3",
                "val_clips=2"]
    whole = here(*settings, "name=whole")
    at({5: terminate})
    parts = here(*settings, "name=parts")
    assert checkpoint.checkpoints(str(parts))[0].endswith("step_00000005.pt")
    assert "training: 4 files" in log_of(parts) and "stopped by a signal after step 5 of 8" in log_of(parts)
    here(*settings, "name=parts")
    differences = different(state_of(whole, 8), state_of(parts, 8))
    assert set(differences) <= {"state.config.name"}, "weights, averages, optimizers, chance, counters"
    of_rank_0 = [checkpoint.read_rank(str(folder / "step_00000008.pt"), 0) for folder in (whole, parts)]
    assert different(*of_rank_0) == [] and (of_rank_0[0][0] is not None) == ("Seraena" in name)
    lines = [re.findall(r"(step \d+: (?:loss|validation) .*?)(?:, [\d.]+ clips/s|, after .*)?\n", log_of(folder))
             for folder in (whole, parts)]
    assert lines[0] == lines[1] and [line.split(":")[0] for line in lines[0]] == ["step 3", "step 4", "step 6",
                                                                                  "step 8", "step 8"]
    metrics = [metrics_of(folder) for folder in (whole, parts)]
    assert [(line["kind"], line["step"]) for line in metrics[1]] == [
        ("start", 0), ("val", 3), ("train", 4), ("saved", 4), ("saved", 5), ("stopped", 5), ("start", 5),
        ("resumed", 5), ("val", 6), ("train", 8), ("val", 8), ("saved", 8), ("done", 8)]
    assert curves_of(metrics[0]) == curves_of(metrics[1]) and len(curves_of(metrics[0])) == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(parts))
    events.Reload()
    speeds = events.Scalars("train/clips_per_second")
    assert [e.step for e in speeds] == [4, 8] and all(0 < e.value < 1e5 for e in speeds)


def test_a_damaged_file_of_one_ranks_replayed_samples_costs_only_these(here):
    folder = here(*SERAENA, "max_steps=2", "name=a")
    (folder / "step_00000002.rank0").write_bytes(b"damaged")
    here(*SERAENA, "max_steps=3", "name=a")
    assert re.search("warning: .*rank0' is .*; that rank goes on without its replayed samples", log_of(folder))
    assert "done: 3 steps" in log_of(folder)


def test_a_stop_during_validation_lets_it_end_and_saves(here, monkeypatch):
    evaluate = train.evaluate

    def stopped(*arguments, **keywords):
        terminate()
        assert not any(p.requires_grad for p in arguments[0].parameters()), "a graph that grows with each step"
        return evaluate(*arguments, **keywords)

    monkeypatch.setattr(train, "evaluate", stopped)
    folder = here(*FRAMES, "max_steps=9", "val_fraction=0.3", "val_every=2", "name=val")
    log = log_of(folder)
    assert "step 2: validation psnr" in log and "stopped by a signal after step 3 of 9" in log
    assert os.path.exists(folder / "step_00000003.pt") and os.path.exists(folder / "best.pt")
    monkeypatch.undo()
    here(*FRAMES, "max_steps=4", "val_fraction=0.3", "val_every=2", "name=val")
    assert "step_00000003.pt at step 3" in log_of(folder) and "step 4: validation psnr" in log_of(folder)


STUCK = """
import sys, time
sys.path.insert(0, {root!r})
import objective, train
def stuck(*_):
    print("stuck", flush=True)
    while True:
        time.sleep(60)
objective.pixel_loss = stuck
train.main()
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(clips, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK.format(root=ROOT))
    process = subprocess.Popen(command("stuck.py", *FRAMES, f"data={clips}", "name=stuck"), cwd=tmp_path,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while "stuck" not in process.stdout.readline():
            assert process.poll() is None
        first = time.monotonic()
        while process.poll() is None and time.monotonic() < first + 30:
            process.send_signal(signal.SIGINT)  # those of the first two seconds count as one
            time.sleep(0.1)
        assert 2 <= time.monotonic() - first < 10 and process.wait() == 128 + signal.SIGINT
    finally:
        process.kill()


HUNG_UP = """
import signal, sys, time
sys.path.insert(0, {root!r})
import objective, train
received = []
def receive(self, number, frame, receive=train.StopSignal.receive):
    received.append(number)
    receive(self, number, frame)
def begin(self, step, begin=objective.Objective.begin):
    if step == 2:
        print("in step 3", flush=True)
        limit = time.monotonic() + 30
        while not received and time.monotonic() < limit:
            signal.sigtimedwait([], 0.05)
        print("nobody reads this", flush=True)
    begin(self, step)
train.StopSignal.receive, objective.Objective.begin = receive, begin
train.main()
"""


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends(clips, tmp_path):
    (tmp_path / "hung_up.py").write_text(HUNG_UP.format(root=ROOT))
    line = command("hung_up.py", *FRAMES, f"data={clips}", "max_steps=9", "name=hung")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(line[0], line)
    output = b""
    while b"in step 3\r\n" not in output:  # the whole line, or closing the terminal breaks off its writing
        output += os.read(terminal, 1000)  # an error where the run has ended
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log = log_of(tmp_path / "runs" / "hung")
    assert "stopped by a signal after step 3 of 9" in log
    assert (tmp_path / "runs" / "hung" / "step_00000003.pt").exists()


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = ranks.StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = ranks.StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- going on otherwise ------------------------------------------------------------------------------------------


def test_memory_that_ran_out_is_remembered(here, at, monkeypatch):
    """A stop between the split of the micro-batches and the end changes nothing, to the bit."""
    settings, fits = [*FRAMES, "batch_size=4", "max_steps=7"], objective.pixel_loss
    full = []

    def pixel_loss(*arguments):
        if full:
            raise MemoryError(full.pop())
        return fits(*arguments)

    monkeypatch.setattr(objective, "pixel_loss", pixel_loss)
    at({2: lambda: full.append("injected")})
    whole = here(*settings, "name=whole")
    at({2: lambda: full.append("injected"), 5: terminate})
    parts = here(*settings, "name=parts")
    here(*settings, "name=parts")
    for folder in (whole, parts):
        assert log_of(folder).count("out of memory") == log_of(folder).count("step 2: out of memory") == 1
    assert "at step 5; micro-batches are split in 2, since memory ran out" in log_of(parts)
    states = [state_of(folder, 7) for folder in (whole, parts)]
    assert set(different(*states)) <= {"state.config.name"} and states[0]["pieces"] == 2
    here(*settings, "name=parts", "batch_size=2", "max_steps=8")
    assert state_of(parts, 8)["pieces"] == 1, "smaller batches may fit"


def test_other_settings_go_on_from_the_same_weights_with_the_clips_that_come_next(here, monkeypatch):
    """Another batch_size, max_steps, learning rate, other buckets."""
    seen, read = [], data.TrainClips.__getitem__
    monkeypatch.setattr(data.TrainClips, "__getitem__", lambda self, key: (seen.append(key), read(self, key))[1])
    common = [*FRAMES, "name=a", "schedule=cosine"]
    folder = here(*common, "batch_size=3", "max_steps=4")
    more = ["batch_size=2", "max_steps=6", "lr=5e-4"]
    here(*common, *more)
    assert (cfg := config.load_config([*common, *more])).lr == 5e-4
    state = state_of(folder, 6)
    assert 5e-5 < state["optimizer"]["param_groups"][0]["lr"] == train.learning_rate(cfg, 5), "as of 6 steps, not of 4"
    here(*shapeless(common), "buckets=16x1:0.5:1, 32x1:0.5:1", "max_steps=12")
    assert [key.epoch * 6 + key.index for key in seen] == list(range(4 * 3 + 2 * 2 + 6 * 1)), "of six files"
    assert {key.size for key in seen[-6:]} == {16, 32}
    assert {int(v["step"]) for v in state_of(folder, 12)["optimizer"]["state"].values()} == {12}
    with pytest.raises(config.ConfigError, match="is a checkpoint of .*: choose another name= for this run"):
        here(*common, "net.n_embed=32", "max_steps=13")


def test_a_run_of_an_older_preset_goes_on_with_todays(here, monkeypatch):
    """Its optimizers take today's settings, and a codebook that has started another way stays as it is."""
    settings = [*FAMILIES["optvq and a PatchGAN"], "net.num_head=2"]
    today = config.PRESETS["vqgan_optvq"]
    older = {**today, "beta1": 0.7, "gan_beta2": 0.8, "weight_decay": 0.0, "pixel_loss": "l1", "pixel_weight": 1.0,
             "net": {key: value for key, value in today["net"].items() if key != "kmeans_init"}}
    monkeypatch.setitem(config.PRESETS, "vqgan_optvq", older)
    here(*settings, "max_steps=2", "name=run")
    monkeypatch.setitem(config.PRESETS, "vqgan_optvq", today)
    folder = here(*settings, "max_steps=3", "name=run")
    assert "step_00000002.pt at step 2" in log_of(folder)
    before, state = (checkpoint.read(str(folder / f"step_0000000{step}.pt")) for step in (2, 3))
    groups = [of["param_groups"][0] for of in (state["optimizer"], state["objective"]["adversary"]["optimizer"])]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.999), (0.9, 0.999)]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.05]
    assert state["model"]["quantize.started"] and "quantize.started" not in before["model"]
    codes = [of["model"]["quantize.embedding.weight"] for of in (before, state)]
    assert (codes[0] - codes[1]).abs().max() < 1e-3, "one step of the optimizer, no new start"


def test_an_encoders_learning_rate_is_its_own_also_after_a_resume_of_a_run_that_had_none(here):
    """In a checkpoint from before encoder_lr_factor, all parameters are in one group."""
    settings = [*PLAIN, *NARROW, "lr=1e-3", "name=a"]
    folder = here(*settings, "max_steps=2", "encoder_lr_factor=0")
    path = str(folder / "step_00000002.pt")
    state = checkpoint.read(path)
    groups = state["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0, 0, 1e-3]
    seed = state_of(here(*settings, "max_steps=1", "lr=0", "name=start"), 1)["model"]
    same = {name: torch.equal(value, seed[name]) for name, value in state["model"].items()}
    assert all(equal == name.startswith("encoder") for name, equal in same.items() if "bias" not in name)

    numbers = [number for group in groups for number in group["params"]]
    state["optimizer"]["param_groups"] = [{**groups[0], "params": numbers}]
    checkpoint.save(state, path)
    folder = here(*settings, "max_steps=3", "encoder_lr_factor=4")
    state = state_of(folder, 3)
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == pytest.approx([4e-3, 4e-3, 1e-3])
    assert {int(kept["step"]) for kept in state["optimizer"]["state"].values()} == {3}
    moved = [max((state["model"][name] - seed[name]).abs().max() for name in seed if name.startswith(half))
             for half in ("encoder", "decoder")]
    assert 3e-3 < moved[0] < 5e-3 and moved[1] < 2.6e-3, "one step of 4e-3; steps of 5e-4, 1e-3 and 1e-3"
