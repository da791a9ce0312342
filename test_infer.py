"""infer.py: inputs that fail among others, samples of folders, targets, teachers as models, memory beside a teacher."""

import json
import os
import sys

import cv2
import numpy as np
import pytest
import torch

import codec
import compare
import infer
import report
from conftest import mistake, write_clip
from model_taehv import TAEHV

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs infer.py in this process, in a folder with the weights taehv.pth; returns (exit code, metrics.json)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(TAEHV().state_dict(), "taehv.pth")

    def infer_py(*arguments):
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments), "--lpips", "none", "--device", "cpu",
                                          "--precision", "fp32"])
        try:
            code = infer.main() or 0
        except SystemExit as end:
            code = end.code
        path = "inference_results/metrics.json"
        return code, json.load(open(path)) if os.path.exists(path) else None

    return infer_py


def three_clips():
    return [write_clip(f"./{name}.mp4", frames=4, height=32, width=32, seed=i) for i, name in enumerate("abc")]


def fail_at_second(monkeypatch, error):
    """The model's decoder raises it on the second of all inputs, after one frame."""
    calls = []

    def decode(self, pieces, original=codec.Codec.decode):
        calls.append(self)
        for number, frame in enumerate(original(self, pieces)):
            if len(calls) == 2 and number == 1:
                raise error
            yield frame

    monkeypatch.setattr(codec.Codec, "decode", decode)


# ---- one input's error -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("unsupported datatype\nby the kernel"), "RuntimeError: unsupported datatype"),
    (MemoryError(), "MemoryError"),
])
def test_an_error_of_any_kind_costs_only_its_input(command, monkeypatch, capsys, error, reason):
    fail_at_second(monkeypatch, error)
    code, found = command("taehv.pth", *three_clips())
    assert code == 1
    assert [row.get("failed") for row in found["rows"]] == [None, reason, None]
    assert found["summary"]["failed"] == 1 and found["summary"]["ours"]["psnr"]["count"] == 2
    page = open("inference_results/summary_report.html", encoding="utf-8").read()
    assert reason in page and "c_comparison.webm" in page
    assert sorted(os.listdir("inference_results/comparison_videos")) == [
        f"{name}_{kind}.webm" for name in "ac" for kind in ("comparison", "original", "reconstructed")]
    log = open("inference_results/errors.log").read()
    assert log.startswith("./b.mp4\n") and "Traceback" in log and type(error).__name__ in log and "a.mp4" not in log
    printed = capsys.readouterr()
    assert f"failed: {reason}" in printed.out and "1 of 3 inputs failed by an unexpected error" in printed.err
    assert "errors.log" in printed.err


def test_so_it_is_with_files_of_latents(command, monkeypatch, capsys):
    clip = three_clips()[2]
    assert command("taehv.pth", clip, "--save-latents")[0] == 0
    latents = "inference_results/latents/c.latents.npz"
    fail_at_second(monkeypatch, RuntimeError("of a kernel"))
    code, found = command("taehv.pth", latents, latents, clip)
    assert code == 1 and [row.get("failed") for row in found["rows"]] == ["RuntimeError: of a kernel", None]
    videos = os.listdir("inference_results/comparison_videos")
    assert "c_reconstructed.webm" in videos and not [name for name in videos if "part" in name]
    assert "1 of 3 inputs failed" in capsys.readouterr().err


# ---- the table, the mean, targets ------------------------------------------------------------------------------------


def test_targets_are_marked_and_the_last_row_is_the_mean(command, capsys):
    clips = three_clips()
    code, found = command("taehv.pth", *clips, "--targets", "mse=0.9,psnr=60,ssim=0.0")
    rows, summary = found["rows"], found["summary"]
    for row in rows:
        assert row["seconds"] == pytest.approx(row["encode_seconds"] + row["decode_seconds"]) and row["seconds"] > 0
        assert {key: one["met"] for key, one in row["targets"].items()} == {"mse": True, "psnr": False, "ssim": True}
        assert row["targets"]["psnr"] == {"target": 60, "value": row["metrics"]["psnr"], "met": False}
    mean = sum(row["metrics"]["psnr"] for row in rows) / 3
    assert code == 0 and summary["ours"]["psnr"]["mean"] == pytest.approx(mean)
    assert summary["ours"]["seconds"]["std"] > 0
    assert summary["targets"]["psnr"]["met"] is False and summary["inputs_that_met_targets"] == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("mean ± deviation")]
    assert f"{mean:.2f}" in lines[at] and lines[at].endswith("missed PSNR (0 of 3 met)")
    assert f"±{summary['ours']['psnr']['std']:.2f}" in lines[at + 1]
    assert "targets: MSE ≤ 0.9, PSNR ≥ 60" in lines[at + 2]
    heading = next(line for line in lines if "PSNR dB" in line)
    assert all(word in heading for word in ("MSE", "seconds", "targets"))
    page = open("inference_results/summary_report.html", encoding="utf-8").read()
    assert "mean ± deviation" in page and page.count('<span class="alarm">missed</span><small>PSNR</small>') == 5
    assert "<small>0 of 3 met</small>" in page

    command("taehv.pth", clips[0])
    printed = capsys.readouterr().out
    assert "targets: MSE ≤ 0.005, PSNR ≥ 25, SSIM ≥ 0.85" in printed, "the defaults"
    _, found = command("taehv.pth", clips[0], "--targets", "none")
    assert "targets" not in capsys.readouterr().out and found["rows"][0]["targets"] == {}


@pytest.mark.parametrize("text, words", [
    ("psnr", "'psnr' is none of mse="), ("fid=3", "'fid=3' is none of"), ("mse=low", "'low' is no number"),
    ("psnr=nan", "a number of 0 or more"), ("", "is none of"),
])
def test_bad_targets_are_one_line(capsys, monkeypatch, text, words):
    assert words in mistake(capsys, monkeypatch, infer, "no.pth", "no.mp4", "--targets", text)


def test_a_flat_clip_has_no_sharpness(command):
    cv2.imwrite("black.png", np.zeros((32, 32, 3), np.uint8))
    assert command("taehv.pth", "black.png")[1]["rows"][0]["metrics"]["sharpness"] is None


# ---- beside a teacher ------------------------------------------------------------------------------------------------

HUNGRY = """
import torch

class Hungry:
    def __init__(self):
        self.weights = torch.ones({held} * 2 ** 18)
        self.seen = []

    def encode(self, video):
        self.seen.append(tuple(video.shape[1:]))
        print("given", video.shape[1])
        torch.ones({passing} * 2 ** 18)
        return video[:, ::4, :, ::8, ::8].repeat(1, 1, 6, 1, 1)[:, :, :16]

    def decode(self, latents):
        frames = latents[:, :, :3].repeat_interleave(4, 1)[:, 3:]
        return frames.repeat_interleave(8, 3).repeat_interleave(8, 4)

def hungry():
    return Hungry()
"""


def write_teacher(held=0, passing=0):
    with open("hungry.py", "w") as file:
        file.write(HUNGRY.format(held=held, passing=passing))
    return "python:hungry.py:hungry"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot start a peak anew")
def test_a_teachers_memory_is_not_counted_as_ours(command):
    clip = write_clip("./a.mp4", frames=5, height=32, width=32)
    alone, beside = (command("taehv.pth", clip, *arguments)[1]["rows"][0] for arguments in
                     ([], ["--teacher", write_teacher(held=150, passing=350)]))
    assert abs(beside["peak_memory_mb"] - alone["peak_memory_mb"]) < 60
    assert beside["teacher"]["peak_memory_mb"] > alone["peak_memory_mb"] + 300


def test_a_teacher_is_given_a_few_frames_at_a_time(command, capsys, monkeypatch):
    assert [compare.frames_at_a_time(h * w) for h, w in ((256, 256), (480, 832), (1080, 1920))] == [33, 17, 9]
    monkeypatch.setattr(compare, "frames_at_a_time", lambda pixels: 9)
    clip = write_clip("./a.avi", frames=10, height=32, width=32)
    for arguments, given in (([], [9, 1]), (["--teacher-frames", 5], [5, 5]), (["--teacher-frames", 0], [13])):
        _, found = command("taehv.pth", clip, "--teacher", write_teacher(), *arguments)
        printed = capsys.readouterr()
        assert [int(line.split()[1]) for line in printed.out.splitlines() if line.startswith("given")] == given
        assert found["rows"][0]["frames"] == 10 and "a.avi teacher: 100%" in printed.err
        notes = " ".join(found["rows"][0]["notes"])
        assert ("frames at a time" in notes) == (len(given) > 1) and ("0 the whole video" in notes) == (not arguments)
    assert "ours / its" in printed.out and "x" in printed.out.split("ours / its")[1].splitlines()[0]


def test_latent_pictures_number_the_latents(command, monkeypatch):
    captions = []
    strip = report._strip
    monkeypatch.setattr(report, "_strip", lambda text, *rest: captions.append(text) or strip(text, *rest))
    command("taehv.pth", write_clip("./a.avi", frames=33, height=16, width=16))  # 9 latents, 8 of them shown
    assert [c for c in captions if c.startswith("t = ")] == [f"t = {k}" for k in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert any("T=9 (8 of them here)" in caption for caption in captions)
