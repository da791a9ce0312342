"""What a run shows of itself, and how its commands are given: curves, warnings, best.pt, settings from files."""

import contextlib
import inspect
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch

import config
import launch
import metrics
import objective
import ranks
import train
from logbook import summary
from model_taehv import TAEHV

CPU = torch.device("cpu")


class Speckled(torch.nn.Module):
    """A model whose reconstruction is its input and a little noise."""

    def forward(self, video):
        return video + 1e-3 * torch.randn(video.shape), {"latents": video}

    def targets(self, video):
        return video


def validate(model, samples):
    return objective.evaluate(model, samples, CPU, contextlib.nullcontext(), None)[0]


def test_a_flat_clip_has_no_sharpness():
    """A ratio of details where there is none: 1e8 and more, for noise that nobody sees."""
    flat = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    dithered = flat + (torch.rand(4, 3, 32, 32) > 0.9)  # a level up here and there
    textured = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for clip in (flat, dithered):
        result = validate(Speckled(), [{"video": clip}])
        assert result["sharpness"] is None and "sharpness - over 4 frames" in train.describe_validation(result)
    result = validate(Speckled(), [{"video": textured}, {"video": flat}])
    assert result["sharpness"] == pytest.approx(1, abs=0.01)
    assert f"sharpness {result['sharpness']:.3f} over 8 frames" in train.describe_validation(result)


def test_validation_measures_lpips_with_the_backbone_of_infer(monkeypatch):
    seen = []
    def load(net=inspect.signature(metrics.load_lpips).parameters["net"].default, device="cpu"):
        seen.append(net)
        return print, ""

    monkeypatch.setattr(metrics, "load_lpips", load)
    train.load_judges(config.load_config(["taehv", "val_metrics=lpips", "perceptual_net=vgg"]), CPU)
    assert seen == ["alex"], "whatever training minimises"


def test_the_table_of_layers_lists_each_once_with_the_frames_of_the_whole_clip():
    """On a CPU the first layers take a frame or two at a time."""
    model = TAEHV()
    rows = summary(model, 32, 12, CPU).splitlines()
    names = [row.split()[0] for row in rows[1:-1]]
    assert names == [f"{part}.{i}" for part in ("encoder", "decoder") for i in range(len(getattr(model, part)))]
    assert re.search(r"encoder.0 .*\(12, 64, 32, 32\)", rows[1]) and "(3, 16, 4, 4)" in rows[18]


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no, yes", [("false", "true"), ("False", "True")])
def test_booleans_are_written_either_way(no, yes):
    cfg = config.load_config(["taehv", f"use_images={no}", f"--flip={yes}", f"net.a={no}", f"net.b={yes},{no},{no}",
                              f"net.c=({yes},{no})", f"net.d=[{no}]", "net.e=untrue"])
    assert cfg.use_images is False and cfg.flip is True
    assert cfg.net == {"a": False, "b": (True, False, False), "c": (True, False), "d": [False], "e": "untrue"}


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
