"""Models, data, metrics, checkpoints and settings, each by itself. Minutes: under one."""

import ast
import contextlib
import dataclasses
import gc
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
import urllib.error

import cv2
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import check_config
import checkpoint
import config
import data
import data_files
import evaluate
import metrics
import model_taehv
import models
import synthetic
import train
import video_files
from bench import published
from clips import find_files
from conftest import NEEDS, ROOT, mistake, write_clip
from golden.fill import fill_, make_input
from init_taehv import colours
from losses import PIXEL_LOSSES, pixel_loss, temporal_loss, wavelet_loss
from model_taehv import TAEHV, VARIANTS, load_taehv, recognise
from quantize import QUANTIZERS


# ---- TAEHV -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taehv", "taecvx", "taew2_1", "taew2_2"])
def test_taehv_computes_what_the_published_code_does(name):
    golden = torch.load(os.path.join(ROOT, "tests", "golden", f"{name}.pt"), weights_only=True)
    model = TAEHV(name).eval()
    assert [(k, tuple(v.shape)) for k, v in model.state_dict().items()] == [(k, tuple(s)) for k, s in golden["params"]]
    fill_(model.state_dict())
    inputs = {k: make_input(*spec) for k, spec in golden["inputs"].items()}
    with torch.no_grad():
        encoded, decoded = model.encode(inputs["video"]), model.decode(inputs["latent"])
        old = model.encode_video(inputs["video"], parallel=False, show_progress_bar=False)
    for ours, theirs in (
        (encoded, golden["outputs"]["encoded"]),
        (decoded, golden["outputs"]["decoded"]),
        (old, encoded),
    ):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["taeh3", "taeltx_2", "taehv1_5_super", "taecvx"])
def test_other_variants_follow_the_published_rules(name):
    model = TAEHV(name).eval()
    fill_(model.state_dict())
    size, patch = model.space_factor, model.patch_size
    unshuffle = lambda v: F.pixel_unshuffle(v, patch) if patch > 1 else v
    shuffle = lambda v: (F.pixel_shuffle(v, patch) if patch > 1 else v).clamp(0, 1)
    for frames in (5, 18, 24):
        video = make_input("rand", (2, frames, 3, size, size), frames)
        with torch.no_grad():
            if name == "taeh3":  # 17-frame chunks led by three black frames; the last three latents go
                padded = torch.cat([video, video[:, -1:].repeat(1, -frames % 17, 1, 1, 1)], 1).reshape(
                    -1, 17, 3, size, size
                )
                latents = published(model.encoder, unshuffle(F.pad(padded, (0, 0, 0, 0, 0, 0, 3, 0))))
                latents = latents.reshape(2, -1, *latents.shape[2:])[:, :-3]
                raw = published(model.decoder, latents)
                raw = (
                    F.pad(raw, (0, 0, 0, 0, 0, 0, 0, -raw.shape[1] % 20)).unflatten(1, (-1, 20))[:, :, 3:].flatten(1, 2)
                )
                expected = shuffle(raw[:, :-12])
            else:
                padded = torch.cat([video, video[:, -1:].repeat(1, -frames % model.time_factor, 1, 1, 1)], 1)
                latents = published(model.encoder, unshuffle(padded))
                trim = 0 if name == "taecvx" and latents.shape[1] % 2 == 0 else model.frames_to_trim
                expected = shuffle(published(model.decoder, latents))[:, trim:]
            output, info = model(video)
        assert info["latents"].shape == latents.shape and torch.allclose(info["latents"], latents, atol=1e-4)
        assert output.shape == expected.shape and torch.allclose(output, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["taehv", "taecvx", "taeh3"])
@pytest.mark.parametrize("frames", [1, 12, 19])
def test_stream_gives_the_whole_clip_however_it_is_cut(name, frames):
    model = TAEHV(name).eval()
    size = model.space_factor
    video = torch.rand(1, frames, 3, size, size)
    with torch.no_grad():
        whole, info = model(video)
    results = []
    for cut in (1, 5, frames):
        stream = model.stream()
        pieces = [stream.decode(stream.encode(piece)) for piece in video.split(cut, 1)]
        results.append(torch.cat([*pieces, stream.flush()], 1))
        stream = model.stream()
        latents = torch.cat([*(stream.encode(piece) for piece in video.split(cut, 1)), stream.flush()], 1)
        assert torch.allclose(latents, info["latents"], atol=1e-5)
    assert all(torch.equal(results[0], other) for other in results), "the cutting changes bits"
    assert results[0].shape == whole.shape and torch.allclose(results[0], whole, atol=1e-5)
    stream = model.stream(memory_limit=1 << 20)  # groups of several latents
    grouped = torch.cat([*(stream.decode(stream.encode(piece)) for piece in video.split(3, 1)), stream.flush()], 1)
    assert torch.allclose(grouped, whole, atol=1e-5)


def test_targets_are_the_frames_that_outputs_reveal():
    """Weights that start from colours keep each frame's mean colour: so outputs show which frame they stand for."""
    model = colours(TAEHV()).eval()
    with torch.no_grad():
        model.decoder[-1].weight[:, 6:] = 0  # the random channels
        clip = (0.1 + torch.arange(12) / 15).view(1, 12, 1, 1, 1).expand(1, 12, 3, 24, 24)
        output = model(clip)[0]
    target = model.targets(clip)
    assert output.shape == target.shape and torch.equal(target, clip[:, :9]), "12 frames come back as the first 9"
    inner = (..., slice(8, 16), slice(8, 16))  # cells at the border fade to grey
    assert (output - target)[inner].abs().max() < 0.02
    assert (output - clip[:, 3:])[inner].abs().min() > 0.1, "not the last 9"
    assert model.frame_index(13) == list(range(13))
    assert TAEHV("taehv", decoder_time_upscale=(False, False)).frame_index(12) == [0, 4, 8]
    assert TAEHV("taecvx").frame_index(8) == list(range(8)) and TAEHV("taecvx").frame_index(12) == list(range(9))
    assert TAEHV("taeh3").frame_index(22) == list(range(22))
    small = TAEHV("taehv", decoder_space_upscale=(False, False, False))
    assert small.targets(clip).shape == small.eval()(clip)[0].shape == (1, 9, 3, 3, 3)


def test_streaming_keeps_nothing_of_the_past():
    model = TAEHV().eval()

    def held(frames):
        stream = model.stream()
        for _ in range(frames):
            stream.decode(stream.encode(torch.rand(1, 1, 3, 16, 16)))
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)

    held(8)
    assert held(40) == held(8)


def test_a_stream_says_what_shape_it_wants():
    stream = TAEHV().stream()
    with pytest.raises(ValueError, match=r"expected frames as N T 3 H W, got \(4, 3, 16, 16\)"):
        stream.encode(torch.rand(4, 3, 16, 16))
    stream.encode(torch.rand(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match="of the size before, got"):
        stream.encode(torch.rand(1, 2, 3, 24, 16))


def test_a_checkpoint_or_a_folder_in_the_place_of_weights_is_named(tmp_path):
    torch.save({"model_config": {}, "ema": {}}, tmp_path / "best.pt")
    (tmp_path / "model.pth").touch()
    for path, words in (("best.pt", "is a checkpoint of a run: load the model.pth beside it"),
                        (".", "is not a regular file: load the model.pth in it")):
        with pytest.raises(ValueError, match=words):
            load_taehv(str(tmp_path / path))


def test_a_stream_can_be_used_again():
    model, video = TAEHV().eval(), torch.rand(1, 6, 3, 8, 8)
    stream = model.stream()
    first, second = (torch.cat([stream.decode(stream.encode(video)), stream.flush()], 1) for _ in range(2))
    assert torch.equal(first, second) and first.shape[1] == 5
    with pytest.raises(ValueError, match="given nothing"):
        stream.flush()


def test_every_convolution_runs_channels_last():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        layouts = []

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            if function is torch.ops.aten.convolution.default:
                self.layouts.append(arguments[0].is_contiguous(memory_format=torch.channels_last))
            return function(*arguments, **(named or {}))

    model = TAEHV().train().to(memory_format=torch.channels_last)
    with Watch() as watch:
        model(torch.rand(2, 8, 3, 16, 16))
    assert len(watch.layouts) > 60 and all(watch.layouts)


def test_previews_take_the_last_frames_weights(tmp_path):
    full = TAEHV("taehv").eval()
    fill_(full.state_dict())
    path = str(tmp_path / "taehv.pth")
    torch.save(full.state_dict(), path)
    preview = load_taehv(path, decoder_time_upscale=(False, False))
    for i, channels in ((7, 256), (13, 128), (19, 64)):
        assert torch.equal(preview.decoder[i].conv.weight, full.decoder[i].conv.weight[-channels:])
    latents = torch.randn(1, 3, 16, 4, 4)
    with torch.no_grad():
        assert torch.allclose(preview.decode(latents), published(preview.decoder, latents).clamp(0, 1), atol=1e-5)
    superb = TAEHV("taehv1_5_super")
    torch.save(superb.state_dict(), tmp_path / "s.pth")
    assert load_taehv(str(tmp_path / "s.pth"), decoder_space_upscale=(False,) * 3).decode(
        torch.randn(1, 2, 32, 3, 3)
    ).shape == (1, 5, 3, 6, 6)


def test_weights_are_recognised_by_shape_and_then_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as shapes:  # it asks for names and shapes: numbers would take seconds
        shapes.setattr(TAEHV, "fresh_weights", lambda model: None)
        shapes.setattr(torch.nn.Conv2d, "reset_parameters", lambda layer: None)
        for name in VARIANTS:
            found = recognise(TAEHV(name).state_dict(), f"some/{name}.pth")
            assert found["variant"] == name
            assert TAEHV(**found).config == TAEHV(name).config
    state = TAEHV("taecvx").state_dict()
    assert [recognise(state, name)["variant"] for name in ("", "taecvx/model.pth", "my_taecvx/1/taew2_1.pth")] == [
        "taehv", "taecvx", "taew2_1"], "the last part of the path that names one"
    assert recognise(TAEHV("taeh3").state_dict())["variant"] == "taeh3"
    odd = TAEHV("taehv", latent_channels=4, patch_size=2)
    assert TAEHV(**recognise(odd.state_dict())).config == odd.config
    from safetensors.torch import save_file

    save_file(TAEHV("taew2_2").state_dict(), tmp_path / "x.safetensors")
    model, words = models.load_model(tmp_path / "x.safetensors")
    assert model.config == TAEHV("taew2_2").config and "taew2_2" in words
    assert models.load_model(tmp_path / "x.safetensors", decoder_time_upscale=(False, False))[0].t_upscale == 1
    with pytest.raises(checkpoint.CheckpointError, match="not of variant taecvx"):
        models.load_model(tmp_path / "x.safetensors", "taecvx")


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="multiples of 8, got 30x32"):
        TAEHV().encode(torch.rand(1, 4, 3, 30, 32))
    with pytest.raises(ValueError, match="N T 16 H W"):
        TAEHV().decode(torch.rand(1, 4, 15, 4, 4))
    with pytest.raises(ValueError, match="cannot undo"):
        TAEHV(encoder_time_downscale=(2, 2, 2))


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model, video = TAEHV().train(), torch.rand(1, 4, 3, 16, 16)
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(video)[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


# ---- data --------------------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_epoch_and_index_only(clips):
    sources, refused = data_files.probe(data_files.find_sources(clips))
    assert len(sources) == 6 and not refused and all(s.frames == 24 for s in sources)
    make = lambda seed=0: data.TrainClips(sources, seed, 1, 3, data.Augment(color_jitter=0.2, blur=0.5))
    a, b = make(), make()
    for index in (5, 0, 3):
        a[data.Key(0, index, 32, 4)]  # what was read before plays no part
    key = data.Key(2, 3, 32, 4)
    assert a[key]["video"].shape == (4, 3, 32, 32) and a[key]["video"].dtype == torch.uint8
    assert torch.equal(a[key]["video"], b[key]["video"])
    assert not torch.equal(a[key]["video"], make(1)[key]["video"])
    assert not torch.equal(a[key]["video"], a[key._replace(epoch=3)]["video"])
    schedule = lambda **kw: data.TrainSchedule(a, [data.Bucket(32, 4, 1.0, 2)], 0, **kw)
    batches = {}
    for workers in (0, 2):
        loader = iter(data.make_loader(a, workers, batch_sampler=schedule()))
        batches[workers] = [next(loader)["video"] for _ in range(3)]
        del loader
    assert all(torch.equal(x, y) for x, y in zip(batches[0], batches[2]))


def test_schedule_gives_each_step_the_same_samples_for_any_spread(clips):
    dataset = data.TrainClips(data_files.probe(data_files.find_sources(clips))[0])
    buckets = [data.Bucket(32, 4, 0.7, 2), data.Bucket(64, 1, 0.3, 3)]

    def steps(world, accumulation, count=30, **kw):
        per_rank = [
            iter(data.TrainSchedule(dataset, buckets, 0, world, rank, accumulation, **kw)) for rank in range(world)
        ]
        return [
            sorted(key for rank in per_rank for _ in range(accumulation) for key in next(rank)) for _ in range(count)
        ]

    reference = steps(1, 4)
    assert steps(2, 2) == steps(4, 1) == reference
    assert {key.size for step in reference for key in step} == {32, 64}
    assert all(len({(key.size, key.frames) for key in step}) == 1 for step in reference), "one shape per step"
    assert steps(1, 4, 10, step=20, sample=sum(len(s) for s in reference[:20])) == reference[20:]
    first_epoch = [key.index for step in steps(1, 1, 3) for key in step][:6]
    assert sorted(first_epoch) == list(range(6)), "an epoch is one pass"


def test_other_ranks_go_on_with_the_clips_that_come_next(clips):
    """2 ranks, 1, 3 and 2, stopped within an epoch, whose data processes had read on: none is lost or comes twice."""
    dataset = data.TrainClips(data_files.probe(data_files.find_sources(clips))[0][:5])
    buckets = [data.Bucket(16, 4, 0.7, 1), data.Bucket(32, 1, 0.3, 2)]
    whole, step, sample, sizes = iter(data.TrainSchedule(dataset, buckets, 4, accumulation=6)), 0, 0, set()
    for world, steps in ((2, 3), (1, 2), (3, 2), (2, 2)):
        accumulation = 6 // world
        ranks = [dataset.batches(data.TrainSchedule(dataset, buckets, 4, world, rank, accumulation, step, sample), 1)
                 for rank in range(world)]
        with contextlib.ExitStack() as at_end:  # or, where the test fails, their processes keep Python from ending
            for rank in ranks:
                at_end.callback(rank.close)
            for _ in range(steps):
                given = [clip for _ in range(accumulation) for rank in ranks for clip in next(rank)["video"]]
                wanted = [dataset[key]["video"] for _ in range(6) for key in next(whole)]
                assert len(given) == len(wanted) and all(map(torch.equal, given, wanted)), f"{world} ranks, step {step}"
                step, sample = step + 1, sample + len(given)
                sizes.add(given[0].shape)
        assert sample % 5, "in the middle of an epoch"
    assert len(sizes) == 2, "buckets"


def test_split_is_by_file_and_survives_additions():
    sources = [data_files.Source(f"/x/{i}.mp4", f"{i}.mp4") for i in range(300)]
    train, val = data_files.split_sources(sources[:200], 0.1)
    more_train, more_val = data_files.split_sources(sources, 0.1)
    assert set(train) | set(val) == set(sources[:200]) and not set(train) & set(val)
    assert set(train) <= set(more_train) and set(val) <= set(more_val) and 8 <= len(val) <= 35
    assert all(data_files.split_sources(sources[:n], 0.01)[1] for n in (2, 3, 5)), "a few files: one is held out all the same"
    assert data_files.split_sources(sources[:1], 0.5) == (sources[:1], []) and data_files.split_sources(sources, 0)[1] == []


def test_damaged_and_odd_files_are_refused_padded_or_replaced(tmp_path):
    good = write_clip(str(tmp_path / "good.mp4"))
    short = write_clip(str(tmp_path / "short.mp4"), frames=3)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "notes.txt").write_text("FFmpeg would render this")
    shutil.copy(good, os.fsencode(tmp_path) + b"/bad\xff.mp4")
    with open(good, "rb") as file:
        whole = file.read()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    sources, refused = data_files.probe(data_files.find_sources(str(tmp_path)))
    assert sorted(s.key for s in sources) == ["good.mp4", "short.mp4"]
    reasons = {os.path.basename(path): reason for path, reason in refused}
    not_utf8 = os.fsdecode(b"bad\xff.mp4")
    assert reasons.keys() == {"empty.mp4", "text.mp4", "pipe.mp4", "text.png", "cut.mp4", not_utf8}
    assert reasons[not_utf8] == "its name is not UTF-8"  # OpenCV would crash
    with pytest.raises(video_files.DataError, match="no video or image"):
        data_files.find_sources(str(tmp_path / "notes.txt"))
    assert reasons["empty.mp4"] == "empty file" and reasons["pipe.mp4"] == "not a regular file"
    frames, _, _, notes = video_files.read_frames(short, 0.5, 5, 2)
    assert len(frames) == 5 and np.array_equal(frames[2], frames[4]) and "only 3 frames" in notes[0]
    # a file that disappears or breaks after the start is replaced, by the same one each time, and named
    dataset = data.TrainClips([*sources, data_files.Source(str(tmp_path / "gone.mp4"), "gone.mp4")])
    samples = [dataset[data.Key(0, i, 32, 4)] for i in range(3)]
    notes = [note for s in samples for note in s["notes"]]
    assert all(s["video"].shape == (4, 3, 32, 32) for s in samples)
    assert [os.path.basename(path) for path, note in notes if "took its place" in note] == ["gone.mp4"]
    with pytest.raises(video_files.DataError, match="in a row could not be read"):
        data.TrainClips([data_files.Source(str(tmp_path / "gone.mp4"), "gone.mp4")])[data.Key(0, 0, 32, 4)]


def claim(monkeypatch, count):
    """Make OpenCV report `count` frames for every video. (A subclass of its capture would crash it.)"""
    real = cv2.VideoCapture

    class Claiming:
        def __init__(self, *arguments):
            self.capture = real(*arguments)

        def __getattr__(self, name):
            return getattr(self.capture, name)

        def get(self, what):
            return count if what == cv2.CAP_PROP_FRAME_COUNT else self.capture.get(what)

    monkeypatch.setattr(data.cv2, "VideoCapture", Claiming)


def test_a_container_that_lies_about_its_length(tmp_path, monkeypatch):
    path = write_clip(str(tmp_path / "a.mp4"), frames=10)
    claim(monkeypatch, 100.0)
    frames, first, delta, notes = video_files.read_frames(path, 0.9, 4, 2)
    assert len(frames) == 4 and first + 3 * delta < 10 and delta == 2
    assert notes == ["the container says 100 frames, 10 can be read"]


def test_a_recording_that_was_never_closed(tmp_path, monkeypatch):
    path = write_clip(str(tmp_path / "a.avi"), frames=20)
    claim(monkeypatch, -2.3e17)
    frames, first, delta, notes = video_files.read_frames(path, 0.9, 4, 3)
    assert (len(frames), first, delta) == (4, 9, 3) and "20 can be read" in notes[0]


def test_frames_are_the_right_ones_upright_and_rgb(tmp_path):
    path = str(tmp_path / "a.avi")
    writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for t in range(20):
        writer.write(np.full((48, 64, 3), (0, 0, 10 * t), np.uint8))  # red, brighter with time
    writer.release()
    frames, first, delta, _ = video_files.read_frames(path, 0.5, 4, 3)
    assert first == int(0.5 * 11) and delta == 3
    assert [round(f[..., 2].mean() / 10) for f in frames] == [first, first + 3, first + 6, first + 9]
    clip = data.TrainClips([data_files.Source(path, "a", 20)])[data.Key(0, 0, 32, 2)]["video"]
    assert clip[:, 0].float().mean() > 10 * clip[:, 2].float().mean(), "red comes first"
    val = data.ValClips([data_files.Source(path, "a", 20)], 32, 4, per_video=2)
    assert len(val) == 2 and torch.equal(val[1]["video"], val[1]["video"])
    assert val[1]["video"].float().mean() > val[0]["video"].float().mean()


def test_annotations_images_and_sequences(tmp_path):
    write_clip(str(tmp_path / "v" / "a.mp4"))
    for i in range(4):
        cv2.imwrite(
            str(tmp_path / "v" / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"), np.full((40, 50, 3), 60 * i, np.uint8)
        )
    (tmp_path / "list.json").write_text(
        json.dumps({"list": [{"path": "a.mp4"}, {"path": "0.png", "caption": "x"}, {"path": "no.mp4"}]})
    )
    sources, refused = data_files.probe(data_files.find_sources(str(tmp_path / "list.json"), str(tmp_path / "v")))
    assert [s.key for s in sources] == ["a.mp4", "0.png"] and refused[0][1] == "no such file or directory"
    images, _ = data_files.probe([s for s in data_files.find_sources(str(tmp_path / "v")) if s.is_image])
    assert len(images) == 4 and data.TrainClips(images)[data.Key(0, 0, 32, 1)]["video"].shape == (1, 3, 32, 32)
    sequence = data.TrainClips(images, image_sequences=True)[data.Key(0, 1, 32, 4)]["video"]
    assert len({round(float(f.float().mean())) for f in sequence}) >= 2, "unrelated images"
    with pytest.raises(video_files.DataError, match="only images"):
        data.TrainClips(images).check(data.Bucket(32, 4, 1.0, 1))
    for text in ("", "[]", '{"list": []}', '{"list": [{"path": 3}]}', '{"list": [{"file": "a"}]}', "{" * 100000):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(video_files.DataError, match="bad.json"):
            data_files.find_sources(str(tmp_path / "bad.json"))


def test_demo_set(tmp_path):
    synthetic.make_demo(str(tmp_path / "demo"), videos=4, frames=6, size=32)
    train, refused = data_files.probe(data_files.find_sources(str(tmp_path / "demo" / "train")))
    assert len(train) == 4 and not refused and train[0].frames == 6
    a = synthetic.demo_clip("sea", 3, 32, np.random.default_rng(1))
    assert all(np.array_equal(x, y) for x, y in zip(a, synthetic.demo_clip("sea", 3, 32, np.random.default_rng(1))))


# ---- metrics, losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(40, 53), (11, 11), (43, 26), (106, 12), (12, 300)])
def test_psnr_and_ssim_are_scikit_images(height, width):
    rng = np.random.default_rng(0)
    a = rng.random((2, 3, height, width))
    b = np.clip(a + 0.1 * rng.normal(size=a.shape), 0, 1)
    ours = [f(torch.from_numpy(b)[None], torch.from_numpy(a)[None])[0] for f in (metrics.psnr, metrics.ssim)]
    for i in range(2):
        x, y = a[i].transpose(1, 2, 0), b[i].transpose(1, 2, 0)
        assert abs(ours[0][i] - peak_signal_noise_ratio(x, y, data_range=1)) < 1e-4
        theirs = structural_similarity(x, y, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                       use_sample_covariance=False)
        assert abs(ours[1][i] - theirs) < 1e-5


def test_measures_have_their_limits():
    assert metrics.psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).item() == float("inf")
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_ssim_of_many_images_is_that_of_each():
    """Of more than are blurred at once, and of frames whose channels lie side by side in memory."""
    a = torch.rand(2, 40, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    each = torch.stack([torch.cat([metrics.ssim(x[None], y[None]) for x, y in zip(*both)]) for both in zip(a, b)])
    last = [video.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for video in (a, b)]
    for found in (metrics.ssim(a, b), metrics.ssim(*last)):
        assert found.shape == (2, 40) and torch.allclose(found, each, atol=1e-6, rtol=0)


def test_mean_counts_every_image_once():
    mean = metrics.Mean("a")
    mean.add(a=torch.tensor([[1.0, 2.0]]))
    mean.add(a=torch.tensor([[6.0]]))
    assert mean.reduce() == {"a": 3.0, "count": 3}


def test_fid_is_the_distance_of_two_gaussians():
    generator, mixed = torch.Generator().manual_seed(0), torch.randn(6, 6, dtype=torch.float64)
    ours = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ mixed
    theirs = torch.randn(400, 6, generator=generator, dtype=torch.float64) + 0.5
    fid = metrics.FID(lambda frames: frames[:, 0, 0, :6], features=6)
    for part in range(0, 400, 100):  # rows of pixels stand for features
        a, b = (x[part : part + 100].view(50, 2, 1, 1, 6).expand(-1, -1, 3, 1, -1) for x in (ours, theirs))
        fid.add(a, b)
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (ours, theirs)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.trace(covariances[0] + covariances[1] - 2 * root) + (ours - theirs).mean(0).square().sum().item()
    assert abs(fid.reduce() - expected) < 1e-3 * expected  # frames become float32
    assert np.isnan(metrics.FID(None, 6).reduce())


@pytest.mark.slow
def test_fid_is_there_or_says_how_to_get_it(monkeypatch):
    network = types.ModuleType("pytorch_fid.inception")

    class InceptionV3(torch.nn.Module):
        BLOCK_INDEX_BY_DIM = {2048: 3}

        def __init__(self, blocks):
            super().__init__()
            assert blocks == [3]

        def forward(self, x):
            return [F.adaptive_avg_pool2d(x, (16, 16)).flatten(1)[:, :, None, None].repeat(1, 3, 1, 1)[:, :2048]]

    network.InceptionV3 = InceptionV3
    monkeypatch.setitem(sys.modules, "pytorch_fid", types.ModuleType("pytorch_fid"))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", network)
    make, note = metrics.load_fid()
    frames = torch.rand(2, 2, 3, 32, 32)
    fid = make()
    fid.add(frames, frames)
    assert note == "" and abs(fid.reduce()) < 1e-3

    def offline(self, blocks):
        raise urllib.error.URLError("no network")

    InceptionV3.__init__ = offline
    assert metrics.load_fid()[0] is None and "no network" in metrics.load_fid()[1]
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    assert metrics.load_fid() == (None, "FID is left out: pip install pytorch-fid")


def test_lpips_is_there_or_says_how_to_get_it(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    function, note = metrics.load_lpips("alex")
    assert function is None and "alexnet-owt-7be5be79.pth" in note and str(tmp_path) in note
    from torchvision.models import alexnet  # any weights show that the measure works once the file is in place

    os.makedirs(tmp_path / "hub" / "checkpoints", exist_ok=True)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    function, note = metrics.load_lpips("alex")
    a = torch.rand(1, 2, 3, 64, 64)
    assert note == "" and function(a, a).abs().max() < 1e-6 and function(a, 1 - a).shape == (1, 2)


def test_pixel_losses():
    a, b = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    assert [round(pixel_loss(kind, a, b).item(), 3) for kind in PIXEL_LOSSES] == [0.5, 0.25, 1.0, 0.5]
    assert set(PIXEL_LOSSES) == set(config.CHOICES["pixel_loss"])
    with pytest.raises(ValueError, match="differ in shape"):
        pixel_loss("l1", a, b[:1])


def test_losses_in_time_and_of_details():
    zero, still = torch.zeros(2, 5, 3, 6, 7), torch.full((2, 5, 3, 6, 7), 0.3)
    for loss in (temporal_loss, wavelet_loss):
        assert loss(still, zero) < 1e-7, "what all frames and pixels share is the pixel loss's"
    a, b = torch.rand(2, 2, 5, 3, 6, 7)
    assert temporal_loss(a, b) == pytest.approx(metrics.flicker(a, b).mean().item(), rel=1e-5)
    dot = torch.zeros(1, 2, 1, 2, 2)
    dot[0, 1, 0, 0, 1] = 1  # each of the seven details is 1 or -1, over sqrt(8)
    assert wavelet_loss(dot, torch.zeros_like(dot), 1) == pytest.approx(8 ** -0.5)
    image = torch.rand(1, 1, 3, 9, 9, requires_grad=True)
    (temporal_loss(image, b[:1, :1, :, :1, :1]) + wavelet_loss(image, torch.zeros_like(image), 8)).backward()
    assert image.grad.isfinite().all() and image.grad.abs().max() > 0


# ---- checkpoints -------------------------------------------------------------------------------------------------


def run_state(step, value=0.0):
    model = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(model.weight, value)
    return dict(step=step, model_name="taehv", model_config={}, model=model.state_dict(), ema=model.state_dict())


def test_newest_good_checkpoint_is_found(tmp_path):
    for step in range(1, 6):
        assert checkpoint.save_run(str(tmp_path), run_state(step, step), keep_last=4) == ""
    files = [os.path.basename(p) for p in checkpoint.checkpoints(str(tmp_path))]
    assert files == [f"step_0000000{i}.pt" for i in (5, 4, 3, 2)]
    with open(tmp_path / "step_00000005.pt", "r+b") as file:  # a flipped bit
        file.seek(os.path.getsize(file.name) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))
    with open(tmp_path / "step_00000004.pt", "r+b") as file:  # cut short
        file.truncate(300)
    path, problems = checkpoint.newest_checkpoint(str(tmp_path))
    assert os.path.basename(path) == "step_00000003.pt" and len(problems) == 2
    (tmp_path / "step_00000009.pt").touch()
    (tmp_path / "step_00000010.pt.123.tmp").write_bytes(b"half")
    assert os.path.basename(checkpoint.newest_checkpoint(str(tmp_path))[0]) == "step_00000003.pt"


def test_a_full_disk_costs_one_checkpoint_and_no_more(tmp_path, monkeypatch):
    assert checkpoint.save_run(str(tmp_path), run_state(1), 3) == ""

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in checkpoint.save_run(str(tmp_path), run_state(2), 3)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["model.pth", "step_00000001.pt"]
    assert checkpoint.save_run(str(tmp_path), run_state(3), 3) == ""


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_files_from_strangers_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_config": Bomb()}, "bomb.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"a": torch.ones(1)}, "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    state = {k: v[:1] if k == "decoder.8.weight" else v for k, v in TAEHV().state_dict().items()}
    torch.save(state, "cut.pth")
    for name, words in (
        ("bomb.pt", "holds code"),
        ("list.pt", "holds a list"),
        ("other.pth", "no TAEHV weights"),
        ("text.pth", "holds code|no file of weights"),
        ("text.safetensors", "damaged"),
        ("cut.pth", "decoder.8.weight is"),
        ("missing.pt", "does not exist"),
        (".", "holds no best.pt"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=words) as caught:
            models.load_model(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not os.path.exists("exploded")


# ---- settings ----------------------------------------------------------------------------------------------------


def test_validation_takes_files_from_all_over_the_data():
    sources = [data_files.Source(f"{kind:02}/{i}.mp4", f"{kind:02}/{i}.mp4") for kind in range(20) for i in range(30)]
    chosen = data.ValClips(sources, 32, 4, per_video=2, limit=64).items
    assert {source.key[:2] for source, _ in chosen} == {f"{kind:02}" for kind in range(20)} and len(chosen) == 64
    assert [place for _, place in data.ValClips(sources[:2], 32, 4, per_video=2, limit=3).items] == [0.25, 0.25, 0.75]


def test_settings_are_parsed_and_checked():
    cfg = config.load_config(["taehv", "data=x", "lr=1e-3", "flip=false", "--batch-size=2"])
    assert (cfg.data, cfg.lr, cfg.flip, cfg.batch_size, cfg.name) == ("x", 1e-3, False, 2, "taehv")
    assert config.load_config([]).data == "demo"
    narrow = config.load_config([]).net
    assert narrow == config.load_config(["variant=taew2_2"]).net and narrow["encoder_widths"] == (32, 32, 48, 48)
    assert config.load_config(["init_from=x.pth"]).net == config.load_config(["model=vqgan"]).net == {}
    assert config.load_config(["init_from=x", "net.encoder_widths=1,2,3,4"]).net == {"encoder_widths": (1, 2, 3, 4)}
    assert check_config.parse_buckets(config.load_config(["dcae", "size=64", "batch_size=3"])) == [(64, 32, 1.0, 3)]
    assert check_config.parse_buckets(config.load_config(["buckets=64x12:1:8, 128x1:.5:2"])) == [
        (64, 12, 1.0, 8),
        (128, 1, 0.5, 2),
    ]
    for arguments, words in (
        (["tae"], "did you mean 'taehv'"),
        (["lrr=1"], "did you mean 'lr'"),
        (["lr=fast"], "a number"),
        (["frames=1.5"], "whole number"),
        (["flip=maybe"], "true or false"),
        (["lr"], "unknown preset"),
        (["taehv", "lr"], "no key=value"),
        (["pixel_loss=charbonier"], "did you mean 'charbonnier'"),
        (["pixel_loss=l1+l3"], "did you mean 'l1.l2'"),
        (["gan_dims=4"], "gan_dims=4: one of 2, 3 is wanted"),
        (["gan_dims=two"], "gan_dims=two: a whole number is wanted"),
        (["gan_beta1=1"], "gan_beta1=1.0: at most 0.9999"),
        (["gan_beta2=-0.1"], "at least 0"),
        (["gan_weight_decay=-1"], "at least 0"),
        (["gan_clip=-1"], "at least 0"),
        (["gan_max_weight=inf"], "a finite number"),
        (["size=8"], "at least 16"),
        (["lr=nan"], "a finite number"),
        (["buckets=64"], "is not like"),
        (["val_fraction=1"], "at most"),
        (["min_frame_delta=9"], "above max_frame_delta"),
        (["name=../x"], "letters"),
        (["train_encoder=0", "train_decoder=0"], "nothing to train"),
        (["taehv_distill"], "decoder_input=teacher needs teacher latents: set latent_cache=FOLDER"),
        (["encoder_weight=1"], "encoder_weight=1.0 needs teacher latents: set latent_cache=FOLDER"),
        (["vq_latents", "init_from=x"], "model=vq_latents needs latents: set latent_cache=FOLDER"),
        (["vq_latents", "latent_cache=x"], "model=vq_latents needs init_from=FILE"),
        (["taehv_distill", "latent_cache=x", "encoder_weight=0"], "no term of the loss trains the encoder"),
        (["pixel_weight=0", "train_encoder=0"], "no term of the loss trains the decoder"),
        (["taehv", "gan_weight=1", "train_decoder=0"], "gan_adaptive=true with train_decoder=false.*gan_adaptive=false"),
        (["dcae", "gan_weight=1", "gan_dims=3", "buckets=32x4:1:1"], "one clip of 4 frames of 32x32 leaves BatchNorm"),
        (["vqgan", "latent_channels=8"], "latent_channels=8 with model=vqgan: it is for a taehv; leave latent_ch"),
        (["taehv", "size=64", "buckets=32x8:1:1"], "size=64 with buckets=32x8:1:1: each bucket has its own; leave size"),
        (["taehv", "data=x", "clip_cache=y"], "data=x with clip_cache=y: training reads the cache alone"),
        (["taehv_distill", "latent_cache=x", "train_encoder=0", "encoder_weight=5"], "the encoder does not learn; leave"),
        (["taehv_distill", "latent_cache=x", "train_decoder=0", "gan_weight=1"], "learns from latents alone; set gan_w"),
        (["vqgan", "init=colours"], "init=colours with model=vqgan: it is for a taehv from scratch; leave init"),
        (["taehv", "init=colours", "init_from=x"], "init=colours with init_from=x: it is for a taehv from scratch"),
        (["dcae", "variant=taew2_2"], "variant=taew2_2 with model=dcae: it is for a taehv"),
        (["wavelet_weight=1", "wavelet_levels=5", "buckets=64x4:1:1,16x4:1:1"], "16 pixels have 4 levels at most"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            config.load_config(arguments)


def test_the_demos_videos_are_validated_on_others_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clips.make_demo", lambda folder: None)
    for name in ("demo_data/train", "demo_data/val", "mine"):
        write_clip(f"{name}/a.mp4", frames=14)
    for settings, expected in (([], "demo_data/val"), (["val_data=mine"], "mine")):
        _, val, _ = find_files(config.load_config(["demo", *settings]), 12)
        assert [source.path for source in val] == [os.path.join(expected, "a.mp4")]


def test_a_validation_of_frames_without_ssim_is_described():
    means = {name: None for name in metrics.MEASURES} | {"psnr": 20.0, "mse": 0.01, "sharpness": None, "count": 4}
    assert evaluate.describe_validation(means).startswith("psnr 20.00 dB, ssim -, mse 0.01000, sharpness - over 4")


def test_a_presets_quantizer_options_go_with_its_quantizer():
    net = config.load_config(["vqgan_ema", "net.quantizer=fsq", "net.ch=64"]).net
    assert net == {"quantizer": "fsq", "ch": 64}
    residual = ["net.quantizer=rvq", "net.depth=2", "net.kind=ema"]
    net = config.load_config(["vq_latents", *NEEDS["vq_latents"], *residual]).net
    assert net["kmeans_init"] and net["restart_below"] == 0.1
    assert config.load_config(["vqgan_optvq", "net.quantizer=ema", "net.num_head=2"]).net["num_head"] == 2  # as asked
    assert config.load_config(["vqgan_ema"]).net == config.PRESETS["vqgan_ema"]["net"]
    for quantizer in QUANTIZERS:
        more = {"rvq": ["net.depth=2"], "product": ["net.groups=2"]}.get(quantizer, [])
        for preset in ("vq_latents", "vqgan", "vqgan_ema", "vqgan_optvq"):
            cfg = config.load_config([preset, *NEEDS.get(preset, []), f"net.quantizer={quantizer}", *more])
            with torch.device("meta"):
                model = models.build_model(cfg.model, models.model_config(cfg))
            assert len(model.codebook_sizes) >= 1


def test_presets_weigh_pixels_as_the_published_trainers_do_on_their_own_ranges():
    a, b = torch.rand(2, 2, 3, 8, 8)
    difference = (a * 2 - 1) - (b * 2 - 1)
    l1, l2 = difference.abs().mean(), difference.square().mean()
    deviations = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # of ImageNet, in VqVaeVideo
    published = {"vqgan": l1, "vqgan_ema": l1, "vqgan_optvq": l1 + l2, "vqvae2": l2, "vqvae2_optvq": l2, "dcae": l1,
                 "dcae_disc": l1, "vqvae_video": ((a - b) / deviations).square().mean()}
    for preset, expected in published.items():
        cfg = config.load_config([preset])
        value = cfg.pixel_weight * pixel_loss(cfg.pixel_loss, a, b)
        assert value.item() == pytest.approx(expected.item(), rel=0.01), preset


def test_finetuning_says_that_it_needs_weights(capsys, monkeypatch):
    error = mistake(capsys, monkeypatch, train, "taehv_finetune", "data=x")
    assert error.startswith("train.py: taehv_finetune needs init_from=FILE")
    assert config.load_config(["taehv_finetune", "resume=runs/a/step_00000001.pt"]).init_from == ""
    for more, source in (["latent_cache=c"], "teacher"), (["latent_cache=c", "decoder_input=own"], "own"), ([], "own"):
        assert config.load_config(["taehv_finetune", "init_from=taew2_1", *more]).decoder_input == source


def test_every_setting_is_documented_and_read():
    text = ""
    for name in os.listdir(ROOT):
        if name.endswith(".py") and not name.startswith(("test_", "conftest", "config.", "check_config.")):
            with open(os.path.join(ROOT, name)) as file:
                text += file.read()
    parse_buckets = inspect.getsource(check_config.parse_buckets)
    help_text = config.usage()
    for field in dataclasses.fields(config.Config):
        assert re.search(rf"\b(cfg|config)\.{field.name}\b", text + parse_buckets), f"{field.name} is read nowhere"
        assert re.search(rf"^  {field.name}=\S*\s+\S", help_text, re.M), f"{field.name} has no comment"
    shown = help_text.split()
    for line in inspect.getsource(config.Config).splitlines()[2:]:
        comment = line.partition("# ")[2].split()
        assert "----" in comment or any(shown[i:i + len(comment)] == comment for i in range(len(shown))), line
    assert "  gan_dims=2                       one of 2, 3\n" in help_text
    assert "  precision=auto                   one of auto, bf16, fp32\n" in help_text
    for preset in config.PRESETS:
        config.load_config([preset, *NEEDS.get(preset, [])])


def test_no_files_import_each_other_in_a_circle():
    """Nor do they within functions."""
    names = {name.removesuffix(".py") for name in os.listdir(ROOT) if name.endswith(".py")}
    wanted = {}
    for name in names:
        with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as file:
            nodes = list(ast.walk(ast.parse(file.read())))
        found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        found += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        wanted[name] = names & set(found)
    assert {"train", "objective"} <= names and {"checkpoint", "objective"} <= wanted["train"]
    while free := [name for name in wanted if not wanted[name] & wanted.keys()]:  # those that need none of the others
        for name in free:
            del wanted[name]
    assert not wanted, "these are in a circle, or need one"


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", ["model_taehv", "data data_files video_files", "video_files", "losses", "metrics", "report", "pictures",
              "video_writer", "device", "config check_config", "synthetic", "quantize_base", "ranks", "adversary",
              "seraena", "init_taehv model_taehv", "fit_taehv init_taehv model_taehv", "step_taehv model_taehv",
              "prune_taehv model_taehv", "fast_cuda fast_taehv model_taehv", "fast_dcae model_dcae fast_taehv model_taehv",
              "hubconf fast_taehv init_taehv step_taehv model_taehv"]
)
def test_leaf_files_work_when_copied_alone(names, tmp_path):
    names = set(names.split())
    for name in names:
        shutil.copy(importlib.util.find_spec(name).origin, tmp_path)
    ours = [f[:-3] for f in os.listdir(ROOT) if f.endswith(".py")]
    code = f"import sys, {', '.join(names)}; assert not (set(sys.modules) & set({ours!r})) - {names!r}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_published_names_are_there():
    assert {"encode_video", "decode_video", "t_downscale", "t_upscale", "frames_to_trim"} <= set(
        dir(model_taehv.TAEHV())
    )
