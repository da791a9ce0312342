"""What a run shows of itself, and how its commands are given: curves, warnings, best.pt, settings from files."""

import contextlib
import importlib.util
import inspect
import math
import os
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import config
import data_files
import evaluate
import launch
import logbook
import metrics
import models
import objective
import ranks
import train
import watch
from conftest import FRAMES, NARROW, SERAENA, log_of, mistake
from logbook import summary
from model_taehv import TAEHV
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CPU = torch.device("cpu")


class Speckled(torch.nn.Module):
    """A model whose reconstruction is its input and a little noise."""

    def forward(self, video):
        return video + 1e-3 * torch.randn(video.shape), {"latents": video}

    def encode(self, video):
        return video

    decode = targets = encode


def validate(model, samples):
    return evaluate.evaluate(model, samples, CPU, contextlib.nullcontext(), None)[0]


def test_a_flat_clip_has_no_sharpness():
    """A ratio of details where there is none: 1e8 and more, for noise that nobody sees."""
    flat = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    dithered = flat + (torch.rand(4, 3, 32, 32) > 0.9)  # a level up here and there
    textured = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for clip in (flat, dithered):
        result = validate(Speckled(), [{"video": clip}])
        assert result["sharpness"] is None and "sharpness -, flicker 0.0" in train.describe_validation(result)
    result = validate(Speckled(), [{"video": textured}, {"video": flat}])
    assert result["sharpness"] == pytest.approx(1, abs=0.01)
    line = f"sharpness {result['sharpness']:.3f}, flicker {result['flicker']:.4g} over 8 frames"
    assert line in train.describe_validation(result)


def test_flicker_and_places_do_not_depend_on_how_a_video_is_cut():
    """infer.py measures a few frames at a time. A TAEHV's first latent gives its last frame alone: 9 are 1 + 4 + 4."""
    assert evaluate.group_of(TAEHV(), 9) == (4, 3) and evaluate.group_of(TAEHV("taecvx"), 8) == (4, 0)
    assert evaluate.group_of(Speckled(), 9) == evaluate.group_of(TAEHV("taeh3"), 9) == (1, 0)
    torch.manual_seed(0)
    output, target = torch.rand(2, 1, 9, 3, 8, 8)
    errors, changes = (output - target).square().mean((0, 2, 3, 4)), (output - target).diff(dim=1).abs().mean()
    for cuts in ([9], [1] * 9, [2, 4, 3]):
        quality = evaluate.Quality(group=(4, 3))
        for a, b in zip(output.split(cuts, 1), target.split(cuts, 1)):
            quality.add(a, b, follows=True)
        found = quality.reduce()
        assert found["flicker"] == pytest.approx(changes.item(), rel=1e-5) and found["ssim"] is None
        for name, frames in (("first", [1, 5]), ("inner", [2, 3, 6, 7]), ("last", [0, 4, 8])):
            assert found[f"mse_{name}"] == pytest.approx(errors[frames].mean().item(), rel=1e-5), name
    apart = evaluate.Quality()
    for a, b in zip(output.split([4, 5], 1), target.split([4, 5], 1)):
        apart.add(a, b)  # two clips: no change between them
    assert apart.sums[apart.names.index("flicker"), 1] == 7 and "mse_first" not in apart.reduce()


def test_validation_measures_lpips_with_the_backbone_of_infer(monkeypatch):
    seen = []
    def load(net=inspect.signature(metrics.load_lpips).parameters["net"].default, device="cpu"):
        seen.append(net)
        return print, ""

    monkeypatch.setattr(metrics, "load_lpips", load)
    train.load_judges(config.load_config(["taehv", "val_metrics=lpips", "perceptual_net=vgg"]), CPU)
    assert seen == ["alex"], "whatever training minimises"


def test_the_clock_stands_still_for_all_that_a_validation_does(here, monkeypatch):
    now, pictures = [0.0], logbook.Logbook.pictures

    def slow_pictures(self, *arguments):
        now[0] += 1000
        paused.append(self.clock.paused)
        return pictures(self, *arguments)

    paused = []
    clock = logbook.Clock(7.0, monotonic=lambda: now[0])
    now[0] += 3
    with clock.stopped():
        now[0] += 50
        assert clock.total() == 10, "in the middle, too: what asks there is told the time of training"
    now[0] += 2
    assert (clock.total(), clock.lap()) == (12, 5)
    monkeypatch.setattr(logbook.Logbook, "pictures", slow_pictures)
    here(*FRAMES, "val_fraction=0.3", "val_every=1", "max_steps=1", "name=drawn")
    assert paused == [True]


def test_the_table_of_layers_lists_each_once_with_the_frames_of_the_whole_clip():
    """On a CPU the first layers take a frame or two at a time."""
    model = TAEHV()
    rows = summary(model, 32, 12).splitlines()
    names = [row.split()[0] for row in rows[1:-1]]
    assert names == [f"{part}.{i}" for part in ("encoder", "decoder") for i in range(len(getattr(model, part)))]
    assert re.search(r"encoder.0 .*\(12, 64, 32, 32\)", rows[1]) and "(3, 16, 4, 4)" in rows[18]


PLAIN = ["taehv", "size=32", "frames=4"]
DISTILLED = ["taehv_distill", "latent_cache=none_is_opened", "size=32", "frames=4"]
RESULT = dict(psnr=20.0, ssim=0.5, mse=0.01, lpips=0.5, teacher_psnr=20.0, teacher_ssim=0.5, teacher_mse=0.01,
              teacher_lpips=0.5, latent_mse=0.1, teacher_square=1.0)
MODEL = TAEHV()


@pytest.mark.parametrize("settings, counts", [
    (PLAIN, {"psnr": 1}),
    ([*PLAIN, "best_by=ssim"], {"ssim": 1}),
    ([*PLAIN, "best_by=mse"], {"mse": -1}),
    ([*PLAIN, "best_by=lpips", "val_metrics=lpips"], {"lpips": -1}),
    (DISTILLED, {"teacher_psnr": 1, "latent_mse": -1}),
    ([*DISTILLED, "best_by=ssim"], {"teacher_ssim": 1, "latent_mse": -1}),
    ([*DISTILLED, "best_by=lpips", "val_metrics=lpips"], {"teacher_lpips": -1, "latent_mse": -1}),
    ([*DISTILLED, "train_encoder=false"], {"teacher_psnr": 1}),
    ([*DISTILLED, "train_decoder=false"], {"latent_mse": -1}),
    ([*DISTILLED, "encoder_weight=0", "decoder_input=own"], {"psnr": 1}),
])
def test_best_is_what_the_run_is_for(settings, counts):
    """Each figure of a validation that grows makes the run better (1), worse (-1), or does not count."""
    cfg = config.load_config(settings)
    score = objective.Objective(cfg, MODEL, CPU, contextlib.nullcontext()).score
    for name, value in RESULT.items():
        change = score({**RESULT, name: value * 1.1}) - score(RESULT)
        assert (change > 0) - (change < 0) == counts.get(name, 0) or name == "teacher_square", name


# ---- curves and warnings -----------------------------------------------------------------------------------------


def learn(losses, norms, **settings):
    """{step: warnings} of a run with these losses and gradient norms (NaN: a skipped step), logged each 10 steps."""
    trend, found = watch.Trend(CPU, **settings), {}
    for step, (loss, norm) in enumerate(zip(losses, norms)):
        loss, norm = torch.tensor(float(loss)), torch.tensor(float(norm))
        trend.add(step, loss, norm, 1.0 - (loss.isfinite() & norm.isfinite()).float())
        if (step + 1) % 10 == 0 and (warnings := trend.read(step + 1)[1]):
            found[step + 1] = warnings
    return found


def test_a_run_that_goes_wrong_is_said_once_a_window():
    rng = np.random.default_rng(0)
    noise, steady = 1 + 0.1 * rng.standard_normal(700), 0.3 + 0.05 * rng.random(700)
    falls = (0.05 + 0.5 * np.exp(-np.arange(700) / 50)) * noise
    settles = steady + 20 * np.exp(-np.arange(700) / 20)
    options = dict(window=300, least=100)
    assert learn(falls, settles, **options) == {} and learn(0.05 * noise, steady, **options) == {}
    found = learn(falls + np.maximum(0, np.arange(700) - 350) * 1e-3, settles, **options)
    first, *others = found
    assert 350 < first < 500 and others in ([], [first + 300]) and "warning: the loss rises: mean 0." in found[first][0]
    found = learn(falls, settles * np.where(np.arange(700) % 25 == 24, 1 + np.arange(700), 1), **options)
    first, second = found
    assert second == first + 300 and "the gradient norm is unsteady: mean" in found[first][0]
    gaps = np.where(np.arange(700) % 3, falls, np.nan)
    assert learn(gaps, settles, **options) == {}, "steps that were skipped do not count"


def scalars_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_discriminators_do_is_logged_and_drawn(here, at):
    settings = [*FRAMES, "size=32", "gan_weight=0.5", "max_steps=9", "val_fraction=0.3", "val_every=9", "name=gan"]
    stop = {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    at(stop)
    here(*settings)
    folder = here(*settings)
    drawn, log = scalars_of(folder), log_of(folder)
    assert len(drawn["train/gan_score_real"]) == 9 and len(drawn["train/loss_trend"]) == 2 == len(
        drawn["train/gradient_norm_deviation"]), "from the eighth step on, resumed or not"
    assert any(drawn["train/gan_score_real"]) and any(drawn["train/gan_score_fake"])
    assert all(0 < x < 5 for x in drawn["train/gan_discriminator_loss"]) and min(drawn["train/gan_adaptive_weight"]) > 0
    assert drawn["train/gan_skipped_steps"] == [0.0] * 9
    assert re.search(r"step 9: loss .*, gradient norm [\d.]+ ± \d+ %, loss trend [+-][\d.]+ %, gan: loss [\d.]+, "
                     r"real \S+, fake \S+, weight \S+, [\d.]+ clips/s\n", log)
    assert re.search(r"step 9: validation .* minutes, encode [\d.]+ frames/s, decode [\d.]+ frames/s\n", log)
    assert drawn["val/encode_fps"][0] > 0 and drawn["val/decode_fps"][0] > 0 and "going wrong" not in log


def test_seraenas_figures_too_and_a_step_without_figures_does_not_count(here):
    drawn = scalars_of(here(*SERAENA, "max_steps=2", "log_every=2", "name=seraena"))
    assert drawn["train/seraena_discriminator_loss"][0] > 0 and drawn["train/seraena_skipped_steps"] == [0.0]
    figures = watch.Figures({"gan": ("discriminator_loss", "score_real")}, CPU)
    for loss, score, skipped, learned in ((1.0, 0.5, 0, True), (3.0, 0.0, 0, True), (9.0, 9.0, 0, False),
                                          (math.nan, math.nan, 1, True), (2.0, 1.5, 1, True)):
        figures.add("gan", {"discriminator_loss": torch.tensor(loss), "score_real": torch.tensor(score)},
                    torch.tensor(float(skipped)), learned)
    assert figures.read() == {"gan_discriminator_loss": 2.0, "gan_score_real": 1.0, "gan_skipped_steps": 1.0}
    assert figures.read() == {"gan_skipped_steps": 1.0}, "means begin anew"


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no, yes", [("false", "true"), ("False", "True")])
def test_booleans_are_written_either_way(no, yes):
    cfg = config.load_config(["taehv", f"use_images={no}", f"--flip={yes}", f"net.a={no}", f"net.b={yes},{no},{no}",
                              f"net.c=({yes},{no})", f"net.d=[{no}]", "net.e=untrue"])
    assert cfg.use_images is False and cfg.flip is True
    assert cfg.net == {"a": False, "b": (True, False, False), "c": (True, False), "d": [False], "e": "untrue"}


SMALL = "workers=0 val_fraction=0 warmup_steps=2 precision=fp32 device=cpu save_every=100 size=16 frames=4".split()
SMALL += ["init=colours"]  # init=clips reads 48 clips first


@pytest.mark.slow
def test_a_runs_config_json_stands_for_its_settings(here, tmp_path, monkeypatch):
    """The same run goes on, to the same end; with another name it is another run."""
    folder = here("taehv", *SMALL, "batch_size=1", "max_steps=1", "lr=1e-5", "name=first",
                  "net.encoder_time_downscale=true,true,false")
    file = str(folder / "config.json")
    saved = config.load_config([file])
    assert config.load_config([file, "lr=1"]).lr == 1 and config.load_config([file, "name=b"]).name == "b"
    assert saved.net == {"encoder_time_downscale": (True, True, False)}
    train.train(config.load_config([file, "max_steps=2"]))
    assert "at step 1" in (folder / "train.log").read_text() and (folder / "step_00000002.pt").exists()
    (tmp_path / "few.json").write_text('{"lr": 1, "gan_start": 3}')
    few = config.load_config([str(tmp_path / "few.json")])
    assert (few.name, few.lr, few.gan_start, few.max_steps) == ("few", 1.0, 3, config.Config.max_steps)


@pytest.mark.parametrize("text, words", [
    (None, "No such file or directory; a preset or a run's config.json is wanted"),
    ('{"lr": ', "cannot be read as JSON"),
    ("[1]", "an object of settings"),
    ('{"learning_rate": 1}', "unknown key 'learning_rate'"),
    ('{"lrr": 1}', "(did you mean 'lr'?)"),
    ('{"lr": "high"}', 'lr="high": a number is wanted'),
    ('{"lr": true}', "lr=true: a number is wanted"),
    ('{"max_steps": 1.5}', "max_steps=1.5: a whole number is wanted"),
    ('{"max_steps": ' + "9" * 300 + "}", "a whole number is wanted"),
    ('{"flip": 1}', "flip=1: true or false is wanted"),
    ('{"net": 1}', "net=1: an object is wanted"),
    ('{"lr": NaN}', "lr=nan: a finite number is wanted"),
    ('{"precision": "half"}', "precision=half"),
])
def test_a_file_that_is_none_of_settings_is_one_line(text, words, tmp_path, monkeypatch, capsys):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    assert words in mistake(capsys, monkeypatch, train, tmp_path / "c.json")


def test_best_by_lpips_needs_its_measure(monkeypatch, capsys):
    assert "best_by=lpips needs val_metrics=lpips" in mistake(capsys, monkeypatch, train, "demo", "best_by=lpips")
    assert "one of psnr, ssim, mse, lpips" in mistake(capsys, monkeypatch, train, "demo", "best_by=fid")


def test_a_table_of_files_is_data(here, tmp_path, clips):
    """Relative to the table's folder or to data_root; files that are missing are named, and the rest is learnt from."""
    (tmp_path / "list.csv").write_text('\ufeffcaption,path\r\n"a, b",sub0/clip0.mp4\r\n,sub1/clip1.mp4\r\n'
                                       ",sub0/clip0.mp4\r\n,none.mp4\r\n", encoding="utf-8")
    folder = here("taehv", *SMALL, *NARROW, "batch_size=1", "max_steps=1", f"data={tmp_path}/list.csv",
                  f"data_root={clips}")
    log = (folder / "train.log").read_text()
    assert "training: 2 files" in log and "none.mp4: no such file or directory" in log
    own = data_files.find_sources(str(tmp_path / "list.csv"))
    assert [(s.path, s.key) for s in own][:1] == [(str(tmp_path / "sub0" / "clip0.mp4"), "sub0/clip0.mp4")]


@pytest.mark.parametrize("content, words", [
    (b"", 'has no column "path" in its first line: it is empty'),
    (b"file,caption\na.mp4,b\n", 'has no column "path" in its first line, but file, caption'),
    (b"path\n", "must list at least one file"),
    (b"path,x\n,1\n", "have a file name in each row"),
    (b"path\n\xff\xfe.mp4\n", "cannot be read as a CSV file in UTF-8 (UnicodeDecodeError"),
    (b"path\n" + b"a" * 200000, "cannot be read as a CSV file in UTF-8 (Error: field larger"),
    (b"path\nnone.mp4\n", "none of the 1 files of"),
])
@pytest.mark.any_precision
def test_a_file_that_is_no_table_of_files_is_one_line(content, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "l.csv").write_bytes(content)
    assert words in mistake(capsys, monkeypatch, train, "taehv", f"data={tmp_path}/l.csv", f"out_dir={tmp_path}")


@pytest.mark.parametrize("settings, words", [
    (["vqgan", "net.chh=1"], "quantizer 'vq': .*'chh'"),
    (["vqgan", "net.ch_mult=2.5"], "ch_mult=2.5: whole numbers like 1,2,4 \\(one alone: 16,\\) are wanted"),
    (["vqvae2", "net.hidden_channels=-4"], "hidden_channels=-4: a whole number from 1 on is wanted"),
    (["taehv", "size=20"], "size=20: taehv takes multiples of 8"),
    (["taehv", "lr=no"], "lr=no: a number is wanted"),
    (["dcae"], ""),
    (["vq_latents", "latent_cache=none", "init_from=none"], ""),
])
def test_what_is_wrong_with_a_model_is_said_without_making_its_weights(settings, words):
    problem = models.problem_of(settings)
    assert re.match(words + "$" * (not words), problem) and "\n" not in problem


FAKE_WANDB = """
calls = []
class Error(Exception):
    pass
class Run:
    def finish(self):
        calls.append("finished")
def init(**given):
    if given["project"] == "locked":
        raise Error("no API key configured")
    calls.append(given)
    return Run()
"""


@pytest.mark.slow
def test_wandb_copies_the_curves_and_a_resumed_run_keeps_its_id(here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = mistake(capsys, monkeypatch, train, "demo", "wandb=project")
    assert "wandb=project needs a package: pip install wandb" in words
    monkeypatch.undo()
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    boards = []
    writer = logbook.SummaryWriter
    monkeypatch.setattr(logbook, "SummaryWriter", lambda *a, **k: (boards.append(len(wandb.calls)), writer(*a, **k))[1])
    settings = ["taehv", *SMALL, *NARROW, "batch_size=1", "wandb=project"]
    here(*settings, "max_steps=1", "name=a")
    here(*settings, "max_steps=2", "name=a")
    here(*settings, "max_steps=1", "name=b")
    first, _, second, _, other, ended = wandb.calls
    assert ended == "finished" and boards == [1, 3, 5], "made before TensorBoard's writer"
    assert first["project"] == "project" and first["name"] == "a" and first["sync_tensorboard"] is True
    assert first["config"]["max_steps"] == 1 and first["dir"] == str(tmp_path / "a")
    assert first["id"] == second["id"] != other["id"] and first["resume"] == "allow"
    with pytest.raises(config.ConfigError, match="^wandb=locked: no API key configured$"):
        here(*settings[:-1], "wandb=locked", "name=c")
    monkeypatch.delitem(sys.modules, "wandb")


# ---- signals -----------------------------------------------------------------------------------------------------


def test_ctrl_c_is_130_and_sigterm_0():
    """So that `train.py && infer.py` goes no further after Ctrl-C, while a scheduler's SIGTERM is no failure."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)):
            stop = ranks.StopSignal()
            os.kill(os.getpid(), number)
            assert stop and stop.exit_code(None) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_launch_takes_130_for_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "kill", lambda task: None)
    for code, state in ((130, "stopped"), (1, "failed"), (0, "done")):
        task = launch.Task("a", [], 1, None, str(tmp_path), process=SimpleNamespace(returncode=code),
                           log=open(tmp_path / "launch.log", "wb"), seen={"ending": ""})  # noqa: SIM115 (it closes it)
        launch.finish(task, stopping=False)
        assert task.state == state
