"""Clips of a cache without a teacher: building it, what is cut from it, and training from it."""

import json
import os
import re
import resource
import shutil
import signal
import sys

import cv2
import numpy as np
import pytest
import torch

import cache_files
import checkpoint
import clip_cache
import config
import data
import latent_cache
import train
import video_files
from conftest import CACHE, COMMON, NARROW, ROOT, SCRATCH, log_of, mistake, run, shapeless

TRAIN = os.path.join(ROOT, "train.py")
ASKED = "--teacher none --size 40 --frames 6 --clips 10 --shard-clips 4 --batch-size 2 --workers 0".split()
SMALL = [*SCRATCH, *COMMON, *NARROW, "val_fraction=0.3", "size=16", "frames=4", "batch_size=2", "data="]


@pytest.fixture(scope="module")
def stored(clips, tmp_path_factory):
    """A finished cache of clips: 10 in 3 shards."""
    folder = tmp_path_factory.mktemp("clip_caches") / "stored"
    latent_cache.build(latent_cache.parse([*ASKED, "--data", clips, "--out", str(folder)]))
    return str(folder)


@pytest.fixture
def cuts(stored):
    return lambda **how: clip_cache.TrainCuts(cache_files.LatentCache(stored, True), range(10), **how)


# ---- building ----------------------------------------------------------------------------------------------------


def test_the_cache_holds_clips_alone_several_of_each_opening(stored, clips, tmp_path, monkeypatch):
    cache = cache_files.LatentCache(stored, clips_only=True)
    assert len(cache) == 10 and (cache.size, cache.frames) == (40, 6) and cache.problem() == ""
    assert not [name for name in os.listdir(stored) if "latents" in name]
    assert cache.files == [origin["file"] for origin in cache.origins]
    assert cache.files[0] == cache.files[3] != cache.files[4] == cache.files[7] != cache.files[8]
    for i, origin in enumerate(cache.origins):  # what stands there is where the clip is from
        top, left, edge = origin["crop"]
        frames = list(video_files.VideoReader(os.path.join(clips, origin["file"])))
        frame = frames[origin["first"] + 5 * origin["spacing"]][top:top + edge, left:left + edge]
        how = cv2.INTER_AREA if edge > 40 else cv2.INTER_CUBIC
        frame = cv2.resize(frame, (40, 40), interpolation=how) if edge != 40 else frame
        assert np.abs((frame[:, ::-1] if origin["flip"] else frame).astype(int) - cache.clip(i)[5]).max() <= 1
    opened, original = [], video_files.open_video
    monkeypatch.setattr(video_files, "open_video", lambda path, **how: opened.append(path) or original(path, **how))
    asked = [*ASKED, "--data", clips, "--out", str(tmp_path / "c"), "--batch-size", "4"]
    latent_cache.build(latent_cache.parse(asked))
    assert len(opened) == 6 + 3, "each of six files to look at it, and three for ten clips"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_build_and_leaves_no_half_shard(number, stored, clips, tmp_path, monkeypatch, capsys):
    asked = [*ASKED, "--data", clips, "--out", str(tmp_path / "cut")]
    write = cache_files.ShardWriter.write

    def signalled(self, *arguments):
        if self.i == 1:
            os.kill(os.getpid(), number)
        write(self, *arguments)

    monkeypatch.setattr(cache_files.ShardWriter, "write", signalled)
    monkeypatch.setattr(sys, "argv", ["latent_cache.py", *asked])
    with pytest.raises(SystemExit) as caught:
        latent_cache.main()
    assert caught.value.code == 128 + number and "the same command goes on from here" in capsys.readouterr().err
    left = sorted(os.listdir(tmp_path / "cut"))
    assert not [name for name in left if name.endswith((".tmp", ".lock"))] and "shard_00000.json" in left
    monkeypatch.undo()
    latent_cache.build(latent_cache.parse(asked))
    assert "4 of them from before" in capsys.readouterr().out


def test_an_interrupted_build_of_clips_goes_on_and_grows(stored, clips, tmp_path, capsys):
    shutil.copytree(stored, tmp_path / "cut")
    os.remove(tmp_path / "cut" / "shard_00001.json")
    os.truncate(tmp_path / "cut" / "shard_00001.clips.npy", 1000)
    (tmp_path / "cut" / "shard_00002.clips.npy.99.tmp").touch()
    asked = [*ASKED, "--data", clips, "--out", str(tmp_path / "cut")]
    latent_cache.build(latent_cache.parse(asked))
    assert "6 of them from before" in capsys.readouterr().out
    for name in os.listdir(stored):
        with open(os.path.join(stored, name), "rb") as a, open(tmp_path / "cut" / name, "rb") as b:
            assert a.read() == b.read(), name
    latent_cache.build(latent_cache.parse([*asked, "--clips", "13"]))
    grown = cache_files.LatentCache(tmp_path / "cut", True)
    assert len(grown) == 13 and all(np.array_equal(grown.clip(i), cache_files.LatentCache(stored, True).clip(i))
                                    for i in range(10))
    for other in (["--clips-per-open", "2"], ["--size", "32"], ["--teacher", "taehv:none.pth", "--precision", "fp32"]):
        with pytest.raises((video_files.DataError, checkpoint.CheckpointError, latent_cache.TeacherError)):
            latent_cache.build(latent_cache.parse([*asked, *other]))


@pytest.mark.slow
def test_two_ranks_build_the_same_clips(stored, clips, tmp_path):
    run(CACHE, *ASKED, "--data", clips, "--out", tmp_path / "two", ranks=2, cwd=tmp_path)
    with open(os.path.join(stored, "index.json")) as a, open(tmp_path / "two" / "index.json") as b:
        assert json.load(a) == json.load(b)


# ---- what is cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, frames", [(16, 4), (39, 1), (40, 6), (33, 5)])
def test_cuts_are_pieces_of_what_is_stored_at_every_place_either_way_round(cuts, size, frames):
    train_cuts, found = cuts(), []
    for index in range(10):
        for epoch in range(20):
            key = data.Key(epoch, index, size, frames)
            stored = train_cuts.cache.clip(data.epoch_order(0, epoch, 10)[index])
            clip, again = np.empty((2, frames, size, size, 3), np.uint8)
            train_cuts.read(key, clip)
            train_cuts.read(key, again)
            assert np.array_equal(clip, again)
            way = []
            for flip in (False, True):
                wanted = clip[:, :, ::-1] if flip else clip
                rows = np.lib.stride_tricks.sliding_window_view(stored, (size, 3), (2, 3))  # T H left 1 size 3
                for first, top, left in np.argwhere((rows[..., 0, :, :] == wanted[0, 0]).all((-1, -2))):
                    piece = stored[first:first + frames, top:top + size, left:left + size]
                    if piece.shape == wanted.shape and (piece == wanted).all():
                        way.append((first, top, left, flip))
            assert way, "no piece of the stored clip"
            found.append(way[0])
    places = list(zip(*found))
    for values, most in zip(places, (6 - frames, 40 - size, 40 - size)):
        assert min(values) == 0 and max(values) == most, "from the first place to the last one"
    assert 60 < sum(places[3]) < 140, "half of them are flipped"
    assert len(set(found)) > (150 if size == 16 else 1)


def test_cuts_depend_on_seed_epoch_and_index_alone(cuts):
    def batches(seed, workers, world=1, **how):
        ranks = [train_cuts.batches(data.TrainSchedule(train_cuts, buckets, seed, world, rank, **how), workers)
                 for rank in range(world) for train_cuts in [cuts(seed=seed)]]
        try:
            return [b"".join(next(rank)["video"].numpy().tobytes() for rank in ranks) for _ in range(8)]
        finally:
            for rank in ranks:
                rank.close()

    buckets = [data.Bucket(16, 4, 1.0, 4)]
    whole = batches(0, 0)
    assert whole == batches(0, 3) != batches(1, 0) and len(set(whole)) == 8
    assert batches(0, 1, step=3, sample=12)[:5] == whole[3:]
    buckets = [data.Bucket(16, 4, 1.0, 2)]
    assert batches(0, 2, world=2) == whole


def test_colours_blur_and_whole_clips(cuts):
    key, plain, other = data.Key(0, 0, 16, 4), *np.empty((2, 4, 16, 16, 3), np.uint8)
    for augment in (data.Augment(color_jitter=0.5), data.Augment(blur=1.0), data.Augment(random_crop=False)):
        cuts().read(key, plain)
        cuts(augment=augment).read(key, other)
        assert not np.array_equal(plain, other)
    whole = cuts(augment=data.Augment(random_crop=False, flip=False))
    whole.read(key, plain)
    stored = whole.cache.clip(data.epoch_order(0, 0, 10)[0])
    firsts = [[cv2.resize(frame, (16, 16), interpolation=cv2.INTER_AREA) for frame in stored[k:k + 4]]
              for k in range(3)]
    assert any(np.array_equal(first, plain) for first in firsts)


def test_training_and_validation_are_of_other_files(stored):
    cache = cache_files.LatentCache(stored, True)
    mine, held_back, held_out = cache.split_by_file(0.3)
    assert len(mine) + len(held_back) == 10 and len(held_back)
    assert {cache.files[i] for i in held_back} <= set(held_out) and not {cache.files[i] for i in mine} & set(held_out)
    val = clip_cache.ValCuts(cache, held_back, 20, 5, 3)
    first, second = (val.share(0, 2, None) + val.share(1, 2, None) for _ in range(2))
    assert len(val) == len(first) == min(3, len(held_back)) and first[0]["video"].shape == (5, 3, 20, 20)
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(first, second))


def test_more_shards_than_a_process_may_open_at_first(stored):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
        held = [open(os.devnull) for _ in range(40)]
        assert len(cache_files.LatentCache(stored, True)) == 10
        cache_files.allow_open_files(10 ** 3)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(2000, before[1])
        del held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_any_latent_cache_serves_as_a_clip_cache(cache, here):
    folder = here(*shapeless(SMALL), f"clip_cache={cache}", "max_steps=2", "buckets=16x4:0.5:2,24x1:0.5:3", "name=latents")
    assert "clip cache: 10 clips of 32x32x12 from 6 files" in log_of(folder)


def test_what_does_not_go_together_is_refused(stored, cache, clips, capsys, monkeypatch, tmp_path):
    def line(*settings, common=SMALL):
        return mistake(capsys, monkeypatch, train, *common, f"out_dir={tmp_path}", *settings)

    mine, plain = f"clip_cache={stored}", "color_jitter=0"
    assert "with latent_cache: training reads one of them; leave clip_cache out" in line(mine, f"latent_cache={cache}")
    cut = [("use_images", "true"), ("image_sequences", "true"), ("min_crop", "0.5"), ("max_frame_delta", "9"),
           ("val_clips_per_video", "5")]
    learned = [("color_jitter", "0.2"), ("blur", "0.5"), ("flip", "false"), ("random_crop", "false")]
    for key, value in (*cut, *learned):
        settings = SMALL if key != "use_images" else [s for s in SMALL if not s.startswith("frames=")]
        monkeypatch.setattr("sys.argv", [])
        words = f"with latent_cache: its clips were cut from their files when it was built; leave {key} out"
        assert words in mistake(capsys, monkeypatch, train, *settings, plain, f"latent_cache={cache}", f"{key}={value}")
        if (key, value) in cut:
            assert f"{key}=" in mistake(capsys, monkeypatch, train, *settings, mine, f"{key}={value}")
    assert config.load_config(["demo", mine]).max_frame_delta == 5, "the preset's 2 is dropped"
    assert "clips_per_open=4 with clip_cache: no video is opened" in line(mine, "clips_per_open=4")
    assert "clips_per_open=4 with latent_cache: no video" in line(plain, f"latent_cache={cache}", "clips_per_open=4")
    holds = "holds clips of size=40 frames=6: set at most these, or build another"
    assert f"train.py: size=48, but the clip cache {stored} {holds}" in line(mine, "size=48")
    assert f"train.py: frames=8, but the clip cache {stored} {holds}" in line(mine, "frames=8")
    assert f"train.py: size=48, but the clip cache {stored} {holds}" in line(
        mine, "buckets=16x4:1:1,48x1:1:1", common=shapeless(SMALL))
    assert f"train.py: val_size=48, but the clip cache {stored} {holds}" in line(mine, "val_size=48")
    assert "val_data has to be a second clip cache: " in line(mine, f"val_data={clips}")
    assert "encoder_weight=1.0 needs teacher latents" in line(mine, "encoder_weight=1")
    assert f"holds clips without latents: set clip_cache={stored}" in line(plain, f"latent_cache={stored}")
    assert "clip cache nowhere: index.json is missing" in line("clip_cache=nowhere")
    assert "clip cache nowhere: index.json is missing" in line(mine, "val_data=nowhere")
    for name, words in (("shard_00001.json", "is missing"), ("shard_00001.clips.npy", "is missing")):
        shutil.copytree(stored, tmp_path / name)
        os.remove(tmp_path / name / name)
        assert words in line(f"clip_cache={tmp_path / name}")
    shutil.copytree(stored, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "shard_00002.clips.npy", 5000)
    assert "damaged, or no cache" in line(f"clip_cache={tmp_path / 'cut'}")
    shutil.copytree(stored, tmp_path / "changed")
    with open(tmp_path / "changed" / "shard_00002.clips.npy", "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"other")
    assert "shard_00002.clips.npy is damaged" in line(f"clip_cache={tmp_path / 'changed'}")


def test_checksums_of_many_clips_are_left_out_and_the_log_says_so(stored, here, monkeypatch, tmp_path):
    import clips
    monkeypatch.setattr(clips, "MOST_COMPARED", 1000)
    monkeypatch.setattr(cache_files, "file_crc", lambda path, original=cache_files.file_crc: (
        pytest.fail("compared") if path.endswith(".npy") else original(path)))
    assert "too large (0 GB) to compare checksums" in log_of(here(*SMALL, f"clip_cache={stored}", "max_steps=1"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_training_from_a_clip_cache_resumes_to_the_bit(stored, clips, tmp_path, ranks):
    asked = [TRAIN, *shapeless(SMALL), f"clip_cache={stored}", "buckets=16x4:0.6:2,24x1:0.4:2", "max_steps=5", "workers=2"]
    output = run(*asked, "name=whole", "save_every=2", "val_every=5", ranks=ranks, cwd=tmp_path)
    assert "clip cache: 10 clips of 40x40x6" in output and "validation psnr" in output
    half = f"resume={tmp_path}/runs/whole/step_00000002.pt"
    run(*asked, "name=parts", half, ranks=ranks, cwd=tmp_path)
    a, b = (checkpoint.read(str(tmp_path / "runs" / name / "step_00000005.pt")) for name in ("whole", "parts"))
    assert a["samples"] == b["samples"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(torch.equal(a["ema"][k], b["ema"][k]) for k in a["ema"])
    if ranks:  # one rank takes the same clips in each step
        run(*asked, "name=one", "accumulation=2", cwd=tmp_path)
        one = checkpoint.read(str(tmp_path / "runs" / "one" / "step_00000005.pt"))
        assert max((a["model"][k] - one["model"][k]).abs().max().item() for k in one["model"]) < 1e-6


@pytest.mark.slow
def test_other_models_train_from_a_clip_cache(stored, here):
    from conftest import FRAMES
    folder = here(*FRAMES, "data=", f"clip_cache={stored}", "frames=1", "max_steps=1", "name=vqgan")
    assert re.search(r"step 1: loss \d", log_of(folder))


@pytest.mark.slow
def test_what_is_wrong_with_one_ranks_cache_ends_all(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "c")
    with open(tmp_path / "c" / "shard_00002.clips.npy", "r+b") as file:  # some rank's share
        file.seek(-10, os.SEEK_END)
        file.write(b"other")
    output = run(TRAIN, *SMALL, f"clip_cache={tmp_path / 'c'}", "max_steps=1", ranks=2, cwd=tmp_path, expect=1)
    assert output.count("is damaged (its checksum does not match)") == 1 and "exitcode  : 2" in output


def test_validation_on_what_is_trained_on_is_said(stored, clips, here):
    quick = [*shapeless(SMALL), "size=16", "frames=4", "max_steps=1"]
    assert "warning: val_data was made from the same files" in log_of(
        here(*quick, f"clip_cache={stored}", f"val_data={stored}", "name=caches"))
    assert "warning: 6 of the 6 files of val_data are training files too" in log_of(
        here(*quick, f"data={clips}", f"val_data={clips}", "name=files"))
