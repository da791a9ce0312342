"""Many files and many clips: the index of files, several clips from one opening, compact lists of files."""

import json
import os
import pickle
import time

import cv2
import numpy as np
import pytest
import torch

import checkpoint
import data
import data_files
import file_index
import video_files
from conftest import COMMON, NARROW, ROOT, SCRATCH, run, write_clip

TRAIN = os.path.join(ROOT, "train.py")
SMALL = [*SCRATCH, "size=16", "frames=4", "batch_size=2", *COMMON, *NARROW]


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of more files than are looked at without an index, some of them broken, and the index's folder."""
    monkeypatch.setattr(data_files, "MANY", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(6):
        write_clip(str(tmp_path / "v" / f"{i}.mp4"), frames=8 + i, height=24, width=32, seed=i)
    (tmp_path / "v" / "text.mp4").write_text("no video")
    (tmp_path / "v" / "empty.png").touch()
    return tmp_path / "v"


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the files that were looked at, since it was emptied."""
    names, original = [], data_files.look_at

    def look_at(sources, *arguments):
        names.extend(source.key for source in sources)
        return original(sources, *arguments)

    monkeypatch.setattr(data_files, "look_at", look_at)
    return names


# ---- the index of files ------------------------------------------------------------------------------------------


def test_files_that_are_as_they_were_are_not_looked_at_again(many, looked_at):
    find = lambda: file_index.probe(data_files.find_sources(str(many)), video_files.MAX_PIXELS, str(many))
    first, refused, notes = find()
    assert (first, refused) == data_files.probe(data_files.find_sources(str(many))) and notes == []
    assert [s.frames for s in first] == [8, 9, 10, 11, 12, 13] and len(refused) == 2
    looked_at.clear()
    again, refused_again, notes = find()
    assert (again, refused_again, looked_at) == (first, refused, []) and "8 of 8 files are as they were" in notes[0]

    write_clip(str(many / "2.mp4"), frames=20, height=24, width=32)  # changed
    os.replace(many / "3.mp4", many / "9.mp4")  # another name
    os.remove(many / "4.mp4")
    write_clip(str(many / "text.mp4"), frames=7, height=24, width=32)  # a video now
    changed, refused, notes = find()
    assert looked_at == ["2.mp4", "9.mp4", "text.mp4"] and "4 of 7" in notes[0] and len(refused) == 1
    assert {s.key: s.frames for s in changed} == {"0.mp4": 8, "1.mp4": 9, "2.mp4": 20, "5.mp4": 13, "9.mp4": 11,
                                                  "text.mp4": 7}
    index = open(file_index.index_path(str(many))).read()
    assert "3.mp4" not in index and "4.mp4" not in index
    looked_at.clear()
    assert find()[0] == changed and looked_at == []
    os.remove(many / "9.mp4")
    assert len(find()[0]) == 5 and looked_at == [] and "9.mp4" not in open(file_index.index_path(str(many))).read()
    write_clip(str(many / "9.mp4"), frames=11, height=24, width=32)
    find()
    looked_at.clear()
    file_index.probe(data_files.find_sources(str(many)), 24 * 32 - 1, str(many))  # another limit: other answers
    assert len(looked_at) == 7

    times = os.stat(many / "0.mp4")
    content = (many / "0.mp4").read_bytes()
    (many / "0.mp4").write_bytes(content[:100] + bytes(len(content) - 100))  # as large, and as old, as before
    os.utime(many / "0.mp4", ns=(times.st_atime_ns, times.st_mtime_ns))
    find()
    looked_at.clear()
    _, refused, _ = find()
    assert str(many / "0.mp4") in dict(refused)


def test_few_files_have_no_index(many, monkeypatch):
    monkeypatch.setattr(data_files, "MANY", 8)
    assert file_index.probe(data_files.find_sources(str(many)), video_files.MAX_PIXELS, str(many))[2] == []
    assert not os.path.exists(os.environ["XDG_CACHE_HOME"])


def test_an_index_that_cannot_be_used_is_named_and_made_again(many, looked_at):
    find = lambda: file_index.probe(data_files.find_sources(str(many)), video_files.MAX_PIXELS, str(many))
    whole, path = find()[:2], file_index.index_path(str(many))
    content = open(path, "rb").read()
    head, _, lines = content.partition(b"\n")
    sealed = lambda lines: file_index.written({k: v for k, v in json.loads(head).items() if k != "crc32"}, lines)
    damaged = [b"", content[:-20], content.replace(b"0.mp4", b"1.mp4"), b"[]\n", b"[" * 10 ** 5, b"\xff\n", b"{}\n",
               sealed([["0.mp4", 1]]), sealed([["0.mp4", 1, 2, 3, None]]), sealed([[[], 1, 2, 3, 4]]), sealed([3])]
    for bad in damaged:
        with open(path, "wb") as file:
            file.write(bad)
        looked_at.clear()
        *found, notes = find()
        assert tuple(found) == whole and len(looked_at) == 8, bad
        assert len(notes) == 1 and "damaged, or no index: all files are looked at again" in notes[0], bad
        assert open(path, "rb").read() == content
    os.remove(path)
    os.mkfifo(path)
    assert "not a regular file" in find()[2][0]
    other = json.loads(head)
    other.pop("crc32")
    with open(path, "wb") as file:
        file.write(file_index.written({**other, "opencv": "4.0.0"}, []))
    looked_at.clear()
    assert find()[:2] == whole and len(looked_at) == 8


def test_an_index_that_cannot_be_written_costs_a_line(many, monkeypatch):
    (many / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(many / "file"))
    *found, notes = file_index.probe(data_files.find_sources(str(many)), video_files.MAX_PIXELS, str(many))
    assert tuple(found) == data_files.probe(data_files.find_sources(str(many)))
    assert len(notes) == 2 and "cannot be written (Not a directory): each start looks at all files" in notes[1]


def test_what_was_found_before_ctrl_c_is_kept(many, monkeypatch):
    original = data_files.look_at

    def interrupted(*arguments):
        for n, found in enumerate(original(*arguments)):
            if n == 3:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_files, "look_at", interrupted)
        file_index.probe(data_files.find_sources(str(many)), video_files.MAX_PIXELS, str(many))
    assert "3 of 8 files" in file_index.probe(data_files.find_sources(str(many)), video_files.MAX_PIXELS, str(many))[2][0]


def test_ctrl_c_does_not_wait_for_all_files(tmp_path, monkeypatch):
    seen = []

    def slow(path, _):
        seen.append(path)
        time.sleep(0.01)
        return 1, 0.0, None

    monkeypatch.setattr(data_files, "open_source", slow)
    looking = data_files.look_at([data_files.Source(f"{i}.mp4", f"{i}.mp4") for i in range(150)], workers=2)
    next(looking)
    looking.close()
    assert len(seen) < 100


@pytest.mark.slow
def test_ranks_share_the_index(many, tmp_path):
    """Rank 0 looks; what it finds, and what is wrong, reaches the other."""
    start = tmp_path / "start.py"
    start.write_text(f"import sys\nsys.path.insert(0, {ROOT!r})\nimport data_files, train\ndata_files.MANY = 5\ntrain.main()\n")
    asked = [start, *SMALL, f"data={many}", "max_steps=1"]
    run(*asked, "name=a", ranks=2, cwd=tmp_path)
    output = run(*asked, "name=b", ranks=2, cwd=tmp_path)
    assert "8 of 8 files are as they were" in output
    for i in range(6):
        (many / f"{i}.mp4").write_text("no video any more")
    output = run(*asked, "name=c", ranks=2, cwd=tmp_path, expect=1)  # torchrun's code; the ranks' is 2
    assert "none of the 8 files" in output and "exitcode  : 2" in output


# ---- lists of files ----------------------------------------------------------------------------------------------


def test_sources_in_few_arrays_are_the_same_and_small():
    odd = [data_files.Source("/x/a.mp4", "a.mp4", 7), data_files.Source("/x/\udcff.mp4", "\udcff.mp4"),
           data_files.Source("/x/b.mp4", "a"), data_files.Source("/x/ü/雪.png", "ü/雪.png", 1),
           data_files.Source("c.mp4", "c.mp4", 10 ** 8)]
    assert list(data_files.Sources(odd)) == odd and len(data_files.Sources([])) == 0
    names = [f"{i % 100}/clip_{i:06d}.mp4" for i in range(5000)]
    many = [data_files.Source(f"/data/videos/{name}", name, i) for i, name in enumerate(names)]
    clips = pickle.dumps(data.TrainClips(many))
    assert len(clips) < 100 * len(many) and pickle.loads(clips).sources[4321] == many[4321]


def test_the_split_of_many_files_takes_no_time_squared():
    sources = [data_files.Source(f"/x/{i}.mp4", f"{i}.mp4") for i in range(40000)]
    start = time.process_time()
    train_sources, val = data_files.split_sources(sources, 0.1)
    assert time.process_time() - start < 5  # it takes 0.2 s; 10 s and more when each file was looked for in a new set
    assert len(train_sources) + len(val) == 40000


# ---- several clips from one opening ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Videos whose frame t has the brightness 8 t, in each file with another amount of red."""
    folder = tmp_path_factory.mktemp("counted")
    for i in range(5):
        codec = cv2.VideoWriter_fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(folder / f"{i}.avi"), cv2.CAP_FFMPEG, codec, 10, (32, 32))
        for t in range(30):
            writer.write(np.full((32, 32, 3), (8 * t, 8 * t, 50 * i), np.uint8))
        writer.release()
    return data_files.probe(data_files.find_sources(str(folder)))[0]


def frames_of(video):
    """(number of the file, numbers of the frames) of a clip of `counted`."""
    means = video.float().mean((-1, -2))
    return round(means[0, 0].item() / 50), [round(blue / 8) for blue in means[:, 2].tolist()]


def test_clips_of_one_opening_are_those_that_they_say(counted, monkeypatch):
    opened, original = [], video_files.open_video
    monkeypatch.setattr(video_files, "open_video", lambda path, **how: opened.append(path) or original(path, **how))
    clips = data.TrainClips(counted, 3, 1, 3, data.Augment(color_jitter=0), clips_per_open=4)
    keys = [data.Key(0, index, 16, 3, part) for part in range(4) for index in range(5)]
    samples = clips.__getitems__(keys)
    assert len(opened) == 5, "each file once"
    spacings, crops = set(), set()
    for key, sample in zip(keys, samples):
        origin = sample["origin"]
        file, numbers = frames_of(sample["video"])
        assert origin["file"] == f"{file}.avi" and sample["notes"] == []
        assert numbers == list(range(origin["first"], origin["first"] + 3 * origin["spacing"], origin["spacing"]))
        spacings.add(origin["spacing"])
        crops.add((*origin["crop"], origin["flip"]))
        assert torch.equal(clips[key]["video"], sample["video"]), "alone, it is the same"
    assert spacings == {1, 2, 3} and len(crops) > 14
    for index in range(5):
        firsts = sorted(s["origin"]["first"] for k, s in zip(keys, samples) if k.index == index)
        assert len(set(firsts)) == 4 and firsts[-1] - firsts[0] < 28, "near each other"


def test_clips_of_one_opening_of_short_and_lying_videos(tmp_path, monkeypatch):
    short = data_files.Source(write_clip(str(tmp_path / "short.mp4"), frames=6), "short.mp4", 6)
    clips = data.TrainClips([short], 0, 1, 3, clips_per_open=3)
    samples = clips.__getitems__([data.Key(0, 0, 16, 5, part) for part in range(3)])
    assert all(s["video"].shape == (5, 3, 16, 16) and s["origin"]["spacing"] == 1 and not s["notes"] for s in samples)
    tiny = data_files.Source(write_clip(str(tmp_path / "tiny.mp4"), frames=2), "tiny.mp4", 2)
    sample = data.TrainClips([tiny], clips_per_open=3)[data.Key(0, 0, 16, 5, 2)]
    assert sample["video"].shape == (5, 3, 16, 16) and "only 2 frames" in sample["notes"][0][1]
    gone = data_files.Source(str(tmp_path / "gone.mp4"), "gone.mp4", 9)
    clips = data.TrainClips([short, gone], clips_per_open=2)
    samples = clips.__getitems__([data.Key(0, i, 16, 5, part) for part in range(2) for i in range(2)])
    assert sum(bool(s["notes"]) for s in samples) == 1, "named once for all parts"
    assert {s["origin"]["file"] for s in samples} == {"short.mp4"}
    from test_parts import claim
    claim(monkeypatch, 1000.0)
    long = data_files.Source(write_clip(str(tmp_path / "long.mp4"), frames=30), "long.mp4", 1000)
    samples = data.TrainClips([long], clips_per_open=3).__getitems__([data.Key(0, 0, 16, 5, p) for p in range(3)])
    assert all("the container says 1000 frames, 30 can be read" in s["notes"][0][1] for s in samples)


def test_blocks_give_each_step_other_files_and_each_file_in_each_step(counted):
    buckets = [data.Bucket(16, 4, 0.6, 2), data.Bucket(24, 3, 0.4, 1)]
    clips = data.TrainClips(counted, 0, clips_per_open=3)

    def steps(world, accumulation, count, step=0, sample=0):
        """The samples of each step, and the number of samples that were taken."""
        ranks = [data.TrainSchedule(clips, buckets, 0, world, rank, accumulation, step, sample)
                 for rank in range(world)]
        found = []
        for blocks in zip(*ranks):
            size = ranks[0].bucket(len(found) + step - (len(found) + step) % 3).batch * accumulation
            for start in range(0, len(blocks[0]), size):
                found.append(sorted(key for block in blocks for key in block[start:start + size]))
            if len(found) >= count:
                return found[:count]

    whole = steps(1, 4, 30)
    assert steps(2, 2, 30) == steps(4, 1, 30) == whole
    for begin in range(0, 30, 3):
        block = whole[begin:begin + 3]
        files = [[key[:2] for key in step] for step in block]
        assert files[0] == files[1] == files[2], "a block is of the same files"
        assert all({key.part for step in block for key in step if key[:2] == file} == {0, 1, 2} for file in files[0])
    assert {key.size for step in whole for key in step} == {16, 24}
    opened = [key[:2] for step in whole[::3] for key in step]
    assert sorted(opened[:5]) == [(0, i) for i in range(5)] and len(set(opened)) == len(opened), "an epoch is one pass"
    for step in (6, 7, 8):  # a run that is resumed within a block goes on with it
        assert steps(2, 2, 8, step, sum(map(len, whole[:step]))) == whole[step:step + 8]


def test_micro_batches_of_blocks_are_independent_of_workers_and_ranks(counted):
    bucket, clips = [data.Bucket(16, 3, 1.0, 1)], data.TrainClips(counted, 0, 1, 2, clips_per_open=2)

    def taken(world, accumulation, workers):
        ranks = [clips.batches(data.TrainSchedule(clips, bucket, 0, world, rank, accumulation), workers)
                 for rank in range(world)]
        try:
            return [sorted(video.tobytes() for _ in range(accumulation) for rank in ranks
                           for video in next(rank)["video"].numpy()) for _ in range(4)]
        finally:
            for rank in ranks:
                rank.close()

    assert taken(1, 2, 0) == taken(2, 1, 0) == taken(1, 2, 2)


@pytest.mark.slow
def test_a_run_with_several_clips_per_opening_resumes_to_the_bit(clips, tmp_path):
    asked = [TRAIN, *SMALL, f"data={clips}", "clips_per_open=3", "val_every=100"]
    run(*asked, "max_steps=5", "name=whole", "workers=1", cwd=tmp_path)
    run(*asked, "max_steps=5", "name=cut", "save_every=2", cwd=tmp_path)
    run(*asked, "max_steps=5", "name=parts", f"resume={tmp_path}/runs/cut/step_00000002.pt", cwd=tmp_path)
    a, b = (checkpoint.read(str(tmp_path / "runs" / name / "step_00000005.pt"))["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
