"""The main job once, in about a minute on two cores: training on one and two CPU ranks, resuming, reconstructing,
mistakes.

    python -m pytest test_smoke.py

All other tests are in tests/.
"""

import json
import os
import re

import cv2
import numpy as np
import pytest
import torch

import checkpoint
import data
import data_files
import infer
import models
import train
import video_files
from conftest import NARROW, PLAIN, ROOT, mistake, run, shapeless, write_clip
from model_taehv import TAEHV

pytestmark = pytest.mark.slow  # it has a command of its own

TRAIN, INFER = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "infer.py")
FP32 = ("--precision", "fp32")
SMALL = [*PLAIN, *NARROW]


def weights(folder, step):
    state = checkpoint.read(os.path.join(folder, f"step_{step:08d}.pt"))
    return {**{f"model.{k}": v for k, v in state["model"].items()}, **{f"ema.{k}": v for k, v in state["ema"].items()}}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def test_two_ranks_equal_one_with_accumulation(clips, tmp_path):
    common = [*SMALL, f"data={clips}", "max_steps=5"]
    run(TRAIN, *common, "name=two", ranks=2, cwd=tmp_path, fresh=True)
    run(TRAIN, *common, "name=one", "accumulation=2", cwd=tmp_path)
    run(TRAIN, *common, "name=other", "accumulation=2", "seed=1", cwd=tmp_path)
    two, one, other = (weights(tmp_path / "runs" / name, 5) for name in ("two", "one", "other"))
    assert largest_difference(two, one) < 1e-6
    assert largest_difference(two, other) > 1e-3, "so the comparison can fail"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(clips, tmp_path):
    common = [*shapeless(SMALL), f"data={clips}", "buckets=16x4:0.6:1, 32x1:0.4:2"]
    run(TRAIN, *common, "name=whole", "max_steps=20", cwd=tmp_path)
    run(TRAIN, *common, "name=parts", "max_steps=10", cwd=tmp_path)
    output = run(TRAIN, *common, "name=parts", "max_steps=20", "workers=1", cwd=tmp_path)
    assert "at step 10" in output
    whole, parts = (weights(tmp_path / "runs" / name, 20) for name in ("whole", "parts"))
    assert largest_difference(whole, parts) == 0
    logs = [
        re.findall(r"step (1[1-9]|20): (loss \S+)", (tmp_path / "runs" / name / "train.log").read_text())
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 10


def test_training_leaves_what_it_promises(trained):
    folder, run_folder, output = trained
    names = set(os.listdir(run_folder))
    assert {"step_00000002.pt", "step_00000004.pt", "best.pt", "model.pth", "config.json", "train.log"} <= names
    log = open(os.path.join(run_folder, "train.log")).read()
    for words in (
        "encoder.2 TPool",
        "all  ",
        "11,315,539",
        '"max_steps": 4',
        "training: ",
        "held out: ",
        "validation psnr",
    ):
        assert words in log, words
    frames = int(re.search(r"step 4: validation .* over (\d+) frames", log)[1])
    assert frames == 3 * 1, "3 clips of 4 frames give one frame each: every clip once, on whichever rank"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run_folder)
    events.Reload()
    wanted = {
        f"train/{n}"
        for n in ("loss", "reconstruction_loss", "learning_rate", "resident_memory_gb", "clips_per_second")
    }
    assert wanted | {"val/mse", "val/psnr", "val/ssim"} <= set(events.Tags()["scalars"])
    assert "val/clip_0" in events.Tags()["images"]
    plain = checkpoint.read(os.path.join(run_folder, "model.pth"))
    assert largest_difference(plain, checkpoint.read(os.path.join(run_folder, "step_00000004.pt"))["ema"]) == 0
    assert not [k for k in plain if "module." in k or "_orig_mod." in k]


def test_validation_is_the_same_on_one_rank(trained, clips):
    folder, run_folder, _ = trained
    sources, _ = data_files.probe(data_files.find_sources(clips))
    _, val = data_files.split_sources(sources, 0.3)
    val_clips = data.ValClips(val, 16, 4, 2, 3).share(0, 1, print)
    assert len(val_clips) == 3
    model = TAEHV()
    model.load_state_dict(checkpoint.read(os.path.join(run_folder, "step_00000004.pt"))["ema"])
    import contextlib

    result, _ = train.evaluate(model.eval(), val_clips, torch.device("cpu"), contextlib.nullcontext(), None)
    logged = re.search(
        r"step 4: validation psnr (\S+) dB, ssim (\S+), mse (\S+)", open(os.path.join(run_folder, "train.log")).read()
    )
    assert abs(result["psnr"] - float(logged[1])) < 0.006 and abs(result["ssim"] - float(logged[2])) < 6e-5


# ---- mistakes: one line, exit code 2, no traceback ---------------------------------------------------------------


@pytest.mark.any_precision
def test_mistakes_get_one_line_and_code_2(trained, clips, tmp_path, capsys, monkeypatch):
    folder, run_folder, _ = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("x")
    torch.save({"a": Bomb()}, "bomb.pt")
    torch.save(TAEHV("taew2_2").state_dict(), "taew2_2.pth")
    cases = [
        (["taehv"], "no data given"),
        (["taehv", "data=nowhere"], "'nowhere' does not exist"),
        (["taehv", "data=none"], "no video or image"),
        (["taehv", "data=bad"], "none of the 1 files of 'bad' can be read"),
        (["taehvv"], "did you mean 'taehv'"),
        (["frame=3"], "did you mean 'frames'"),
        (["size=big"], "whole number"),
        (["taehv", "size=100", f"data={clips}"], "takes multiples of 8"),
        (["variant=taehw"], "unknown TAEHV variant"),
        (["taehv", f"data={clips}", "init_from=bomb.pt"], "code"),
        (["taehv", f"data={clips}", "init_from=taew2_2.pth", "variant=taehv"], "does not fit"),
        (["taehv", f"data={clips}", "resume=missing.pt"], "missing.pt"),
        (
            ["taehv", f"data={clips}", f"out_dir={folder}/runs", "name=two", "variant=taew2_2", "size=32"],
            "is a checkpoint of",
        ),
        (["taehv", f"data={clips}", f"out_dir={folder}/runs", "name=two", "resume=none"], "resume=none, but"),
        (["taehv", f"data={clips}", "device=cuda:77"], "device"),
    ]
    for arguments, words in cases:
        assert words in mistake(capsys, monkeypatch, train, *arguments), arguments
    for arguments, words in [
        (["nothing", clips], "'nothing' does not exist"),
        ([run_folder, "missing.mp4"], "does not exist"),
        ([run_folder, "bad/a.mp4"], "not a video"),
        ([run_folder, "none"], "no video"),
        (["bomb.pt", clips], "code"),
        ([run_folder, "x.latents.npz"], "does not exist"),
    ]:
        assert words in mistake(capsys, monkeypatch, infer, *arguments), arguments
    (tmp_path / "x.latents.npz").write_text("x")
    assert "no file of latents" in mistake(capsys, monkeypatch, infer, run_folder, "x.latents.npz")


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


# ---- reconstruction ----------------------------------------------------------------------------------------------


def read_all(path):
    return list(video_files.VideoReader(str(path)))


def test_reconstruct_report_and_latents(trained, tmp_path):
    folder, run_folder, _ = trained
    write_clip(str(tmp_path / "in" / "odd.mp4"), frames=14, height=50, width=70, fps=12)
    write_clip(str(tmp_path / "in" / "more" / "odd.mp4"), frames=1, height=48, width=48)
    cv2.imwrite(str(tmp_path / "in" / "<b>&picture.png"), np.full((33, 40, 3), 99, np.uint8))
    (tmp_path / "in" / "broken.mp4").write_text("x")
    output = run(INFER, run_folder, "in", "--out", "out", "--save-latents", "--lpips", "none", *FP32, cwd=tmp_path)
    assert "broken" in output and "padded from 50x70 to 56x72" in output and "report: out" in output
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 4 and rows["odd"]["frames"] == 14 and rows["odd"]["latent_shape"] == [5, 16, 7, 9]
    assert rows["odd"]["fps"] == 12 and "failed" in rows["broken.mp4"]
    page = (tmp_path / "out" / "summary_report.html").read_text()
    assert "<b>" not in page.replace("<body>", "") and "mse_first" not in page, "that one is in metrics.json alone"
    assert "mse_first" in (tmp_path / "out" / "metrics.json").read_text()
    originals, outputs = (read_all(tmp_path / "out" / rows["odd"]["videos"][k]) for k in ("original", "reconstructed"))
    assert len(originals) == len(outputs) == 14
    # what is reported is what the model gives on the whole clip, frame by frame
    model, _ = models.load_model(run_folder)
    frames = torch.from_numpy(np.stack(read_all(tmp_path / "in" / "odd.mp4"))).permute(0, 3, 1, 2)[None].float() / 255
    padded = torch.nn.functional.pad(frames[0], (0, 2, 0, 6), mode="replicate")[None]
    padded = torch.cat([padded, padded[:, -1:].repeat(1, 3, 1, 1, 1)], 1)
    with torch.no_grad():
        whole = model(padded)[0][:, :14, :, :50, :70]
    whole = (whole * 255).round() / 255
    psnr = -10 * (whole - frames).square().mean((2, 3, 4)).log10().mean().item()
    assert abs(psnr - rows["odd"]["metrics"]["psnr"]) < 1e-2
    stored = np.load(tmp_path / "out" / "latents" / "odd.latents.npz")
    assert stored["latents"].shape == (5, 16, 7, 9)
    with torch.no_grad():
        assert np.allclose(stored["latents"], model.encode(padded)[0].numpy(), atol=1e-4)
    run(INFER, run_folder, "out/latents/odd.latents.npz", "--out", "again", *FP32, cwd=tmp_path)
    again = read_all(tmp_path / "again" / "comparison_videos" / "odd_reconstructed.webm")
    assert all(np.array_equal(a, b) for a, b in zip(again, outputs)) and len(again) == 14
    for name in ("odd_latents", "odd_2_latents"):
        assert cv2.imread(str(tmp_path / "out" / "latent_visualizations" / f"{name}.png")) is not None
