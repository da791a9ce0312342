"""infer.py: inputs that fail among others, samples of folders, targets, teachers as models, memory beside a teacher."""

import json
import os
import sys
import threading
import weakref

import cv2
import numpy as np
import pytest
import torch

import codec
import compare
import data_files
import infer
import inputs
import pictures
import reconstruct
import video_files
from conftest import mistake, write_clip
from model_taehv import TAEHV
from model_vqgan import VQGAN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs infer.py in this process, in a folder with the weights taehv.pth; returns (exit code, metrics.json)."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(TAEHV(encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32)).state_dict(), "taehv.pth")

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


def three_clips():  # absolute paths: video_files.py remembers by path how many frames there are
    return [write_clip(os.path.abspath(f"{name}.mp4"), frames=4, height=32, width=32, seed=ord(name)) for name in "abc"]


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
    assert log.startswith(os.path.abspath("b.mp4") + "\n") and "a.mp4" not in log
    assert "Traceback" in log and type(error).__name__ in log
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

    command("taehv.pth", clips[0], "--targets")  # bare, or not at all
    printed = capsys.readouterr().out
    assert "targets: MSE ≤ 0.005, PSNR ≥ 25, SSIM ≥ 0.85" in printed, "the defaults"
    _, found = command("taehv.pth", clips[0], "--targets", "none")
    assert "targets" not in capsys.readouterr().out.replace(os.getcwd(), "") and found["rows"][0]["targets"] == {}


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
    clip = write_clip(os.path.abspath("a.mp4"), frames=5, height=32, width=32)
    alone, beside = (command("taehv.pth", clip, *arguments)[1]["rows"][0] for arguments in
                     ([], ["--teacher", write_teacher(held=150, passing=350)]))
    assert abs(beside["peak_memory_mb"] - alone["peak_memory_mb"]) < 60
    assert beside["teacher"]["peak_memory_mb"] > alone["peak_memory_mb"] + 300


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_long_video_is_never_held(command, monkeypatch, tokenizer):
    """Frames as read and as written, and latents or codes: no more are alive at once than the queues hold, also in a
    video three times as long."""
    references, most, lock = [], [0], threading.Lock()
    monkeypatch.setattr(codec, "queue_depth", lambda reader: 2)
    monkeypatch.setattr(reconstruct, "queue_depth", lambda reader: 2)
    monkeypatch.setattr(reconstruct, "stack_size", lambda *_: 1)

    def watch(thing):
        with lock:
            references[:] = [r for r in references if r() is not None] + [weakref.ref(thing)]
            most[0] = max(most[0], len(references))
        return thing

    def encode(self, frame, original=codec.Codec.encode):
        piece = original(self, frame)
        watch(piece[0] if self.tokens else piece)
        return piece

    read, to_uint8 = video_files.VideoReader.__iter__, codec.to_uint8
    monkeypatch.setattr(video_files.VideoReader, "__iter__", lambda self: map(watch, read(self)))
    monkeypatch.setattr(codec.Codec, "encode", encode)
    for module in (codec, reconstruct):
        monkeypatch.setattr(module, "to_uint8", lambda *arguments: watch(to_uint8(*arguments)))
    model = ["taehv.pth", "--save-latents", "--teacher", "taehv:taehv.pth", "--teacher-frames", "9"]
    if tokenizer:
        vqgan = VQGAN(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8,
                      embed_dim=8, n_embed=16)
        torch.save(dict(model_name="vqgan", model_config=vqgan.config, step=1, ema=vqgan.state_dict()), "vqgan.pt")
        model = ["vqgan.pt", "--save-tokens"]
    found = []
    for frames in (24, 72):
        clip = write_clip(os.path.abspath(f"{frames}.mp4"), frames=frames, height=32, width=32)
        file = f"inference_results/tokens/{frames}.tokens" if tokenizer else \
            f"inference_results/latents/{frames}.latents.npz"
        for arguments in ([*model, clip], [model[0], file]):
            most[0] = 0
            assert command(*arguments)[0] == 0
            found.append(most[0])
    assert max(found) <= 20, found  # two chunks of the teacher; 24 frames are 24 more as written


def test_a_teacher_is_given_a_few_frames_at_a_time(command, capsys, monkeypatch):
    assert [compare.frames_at_a_time(h * w) for h, w in ((256, 256), (480, 832), (1080, 1920))] == [33, 17, 9]
    monkeypatch.setattr(compare, "frames_at_a_time", lambda pixels: 9)
    clip = write_clip(os.path.abspath("a.avi"), frames=10, height=32, width=32)
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
    strip = pictures._strip
    monkeypatch.setattr(pictures, "_strip", lambda text, *rest: captions.append(text) or strip(text, *rest))
    clip = write_clip(os.path.abspath("a.avi"), frames=33, height=16, width=16)
    command("taehv.pth", clip)  # 9 latents, 8 of them shown
    assert [c for c in captions if c.startswith("t = ")] == [f"t = {k}" for k in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert any("T=9 (8 of them here)" in caption for caption in captions)


# ---- a teacher in the model's place, samples of folders --------------------------------------------------------------


def test_any_teacher_takes_the_models_place(command, capsys):
    clip = write_clip(os.path.abspath("a.avi"), frames=12, height=30, width=36)
    code, found = command(write_teacher(), clip, "--teacher-frames", 9)
    (row,) = found["rows"]
    assert code == 0 and row["frames"] == 12 and row["latent_shape"] == [3 + 2, 16, 4, 5]
    assert row["seconds"] > 0 and row["peak_memory_mb"] > 0 and "9 frames at a time" in row["notes"][-1]
    original, output = (np.stack(list(video_files.VideoReader(f"inference_results/{row['videos'][kind]}")))
                        for kind in ("original", "reconstructed"))
    assert len(original) == len(output) == 12
    assert cv2.imread(f"inference_results/{row['latent_picture']}") is not None
    assert found["info"]["model"] == "Hungry of hungry.py" and "teacher" not in found["info"]
    printed = capsys.readouterr()
    assert "a.avi teacher: 100%" in printed.err and "mean ± deviation" in printed.out
    own, same = (command(spec, clip)[1]["rows"][0] for spec in ("taehv.pth", "taehv:taehv.pth"))
    assert own["metrics"]["psnr"] == pytest.approx(same["metrics"]["psnr"], abs=0.02)
    assert own["latent_shape"][1:] == same["latent_shape"][1:] and same["frames"] == 12


@pytest.mark.any_precision
def test_options_that_a_teacher_has_not_are_one_line(command, capsys, monkeypatch):
    spec = write_teacher()
    write_clip(os.path.abspath("a.mp4"), frames=2, height=32, width=32)
    open("x.latents.npz", "w").close()
    with open("hungry.py", "a") as file:
        file.write("\nclass Half:\n    encode = Hungry.encode\n")
    for first, *arguments, words in (
        (spec, "a.mp4", "--save-tokens", "--save-tokens is for models of ours"),
        (spec, "a.mp4", "--tile", 0, "--tile is for models"),
        (spec, "a.mp4", "--teacher", spec, "--teacher is for models"),
        (spec, "x.latents.npz", "decodes no files"),
        ("diffusers:", "a.mp4", "diffusers:CLASS:FOLDER is wanted"),
        ("python:hungry.py:Half", "a.mp4", "has no decode"),
        ("taehv.pth", "a.mp4", "--teacher", "python:hungry.py:Half", "has no decode"),
    ):
        assert words in mistake(capsys, monkeypatch, infer, first, *arguments)
    assert not os.path.exists("inference_results")


def test_a_file_that_cannot_be_read_costs_only_its_row_also_where_it_is_named(command, capsys):
    three_clips()
    with open("text.mp4", "w") as file:
        file.write("no video")
    with open("list.csv", "w") as file:
        file.write("path\nb.mp4\ntext.mp4\nc.mp4\n")
    code, found = command("taehv.pth", "a.mp4", "text.mp4", "a.mp4", "./a.mp4", "list.csv", "--no-videos")
    assert code == 0 and [row["name"] for row in found["rows"]] == ["a", "b", "c", "text.mp4"], "each once"
    assert "text.mp4" in capsys.readouterr().out
    code, _ = command("taehv.pth", "text.mp4", "--no-videos")
    assert code == 2 and "text.mp4: " in capsys.readouterr().err


def test_variants_that_a_file_contradicts_and_overlaps_that_make_no_sense(command, capsys):
    three_clips()
    torch.save({"model_name": "taehv", "step": 1, "ema": torch.load("taehv.pth"), "model_config": TAEHV(
        encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32)).config}, "best.pt")
    for arguments, words in ((("best.pt", "a.mp4", "--variant", "taew2_1"), "is of variant taehv, as it says: leave out"),
                             (("best.pt", "a.mp4", "--variant", "blah"), "variant 'blah' is none of taehv, taew2_1"),
                             (("best.pt", "a.mp4", "--tile-overlap", "0.7"), "--tile-overlap 0.7: 0 to 0.5 is wanted")):
        code, _ = command(*arguments)
        assert code == 2 and words in capsys.readouterr().err
    assert command("best.pt", "a.mp4", "--variant", "taehv", "--no-videos")[0] == 0


def test_a_sample_of_a_folder_is_the_same_each_time(tmp_path, monkeypatch):
    for k in range(9):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.zeros((16, 16, 3), np.uint8))
    folder = str(tmp_path)

    def names(number, seed=0):
        return [source.key for source in inputs.find_inputs([folder], number, seed)[0]]

    chosen = names(4)
    assert len(chosen) == 4 and chosen == sorted(chosen) and names(2) != names(2, seed=1)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: [(f, d, files[::-1]) for f, d, files in walk(*a, **k)])
    monkeypatch.setattr(data_files, "sorted", list, raising=False)
    assert [s.key for s in data_files.find_sources(folder)] != sorted(map(str, os.listdir(folder)))
    assert names(4) == chosen, "in whatever order the folder is listed"
    assert set(names(2)) < set(chosen)
    (tmp_path / chosen[0]).write_text("x")
    sources, _, refused, notes = inputs.find_inputs([folder], 4)
    assert len(sources) == 4 and len(refused) == 1 and notes == [f"{folder}: 4 of 9 files, chosen by --seed 0"]
    sources, _, _, notes = inputs.find_inputs([folder], 20)
    assert len(sources) == 8 and "8 of 9 files, no more can be read, and --num-samples is 20" in notes[0]


@pytest.mark.any_precision
def test_mistakes_in_samples(capsys, monkeypatch, tmp_path):
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, np.zeros((16, 16, 3), np.uint8))
    assert "--num-samples -1" in mistake(capsys, monkeypatch, infer, "m.pth", path, "--num-samples", -1)
    assert "none of the inputs is a folder" in mistake(capsys, monkeypatch, infer, "m.pth", path, "--num-samples", 3)
    assert "invalid int value" in mistake(capsys, monkeypatch, infer, "m.pth", path, "--seed", "x")


def test_a_folder_of_latents_stands_for_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.latents.npz", "sub/a.tokens", "notes.txt"):
        (tmp_path / name).write_text("")
    found = inputs.find_inputs([str(tmp_path)])
    assert found[:2] == ([], [str(tmp_path / "b.latents.npz"), str(tmp_path / "sub" / "a.tokens")])
