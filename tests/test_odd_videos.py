"""Videos of odd kinds, made by PyAV: video_files.py gives their frames in their order, upright; and files that change."""
import json
import os
import shutil
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

import data_files
import infer
import reconstruct
import video_files
from conftest import mistake
from model_taehv import TAEHV

av = pytest.importorskip("av")

HEIGHT, WIDTH, FRAMES = 48, 64, 30
B_FRAMES = {"g": "12", "bf": "3"}
ONE = 1 << 16  # in the matrix of an MP4 file


def picture(t, height=HEIGHT, width=WIDTH):
    """The number t, below 64, as bright and dark fields in the lower half; red in the corner at the top left."""
    frame = np.full((height, width, 3), 30, np.uint8)
    for bit in range(6):
        frame[height // 2:, bit * width // 6:(bit + 1) * width // 6] = 200 if t >> bit & 1 else 30
    frame[:height // 4, :width // 3, 0] = 220
    return frame


def number(frame, upright=lambda frame: frame):
    """The number in a frame H W 3 RGB; -1 if its red corner is elsewhere."""
    frame = upright(frame).astype(int)
    height, width = frame.shape[:2]
    corner = frame[1:height // 4 - 1, 1:width // 3 - 1].mean((0, 1))
    if corner[0] - corner[2] < 100:
        return -1
    fields = frame[height // 2 + 3:].mean((0, 2))
    return sum(1 << bit for bit in range(6) if fields[bit * width // 6 + 3:(bit + 1) * width // 6 - 3].mean() > 115)


def write(path, codec="libx264", pixels="yuv420p", options=None, time=lambda t: 40 * t, height=HEIGHT, width=WIDTH,
          matrix=None, aspect=None, flags=None, frames=FRAMES):
    """`time`: of each, in milliseconds. `matrix`: of an MP4 file, how the frames are to be turned."""
    with av.open(str(path), "w", options={"movflags": flags} if flags else {}) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, pixels, options or {}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for t in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(t, height, width), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time(t), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    if matrix:
        content = bytearray(path.read_bytes())
        place = content.index(b"tkhd") + 44
        assert struct.unpack(">9i", content[place:place + 36]) == (ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
        content[place:place + 36] = struct.pack(">9i", *matrix)
        path.write_bytes(content)
    return str(path)


X265 = {"x265-params": "log-level=none:keyint=10"}
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=10:min-keyint=10:scenecut=0"}
ODD = dict(
    b_frames=("a.mp4", dict(options=B_FRAMES)),
    open_groups=("a.mp4", dict(options=OPEN_GOP)),
    ten_bit=("a.mp4", dict(codec="libx265", pixels="yuv420p10le", options=X265)),
    prores=("a.mov", dict(codec="prores_ks", pixels="yuv422p10le")),
    all_colour_and_odd_sizes=("a.mkv", dict(pixels="yuv444p", height=49, width=63, options=B_FRAMES)),
    rgb=("a.mkv", dict(codec="ffv1", pixels="bgr0")),
    alpha=("a.webm", dict(codec="libvpx-vp9", pixels="yuva420p", options={"g": "12", "auto-alt-ref": "0"})),
    wide_pixels=("a.mp4", dict(options=B_FRAMES, aspect=Fraction(2, 1))),
    turned_right=("a.mp4", dict(matrix=(0, ONE, 0, -ONE, 0, 0, HEIGHT * ONE, 0, 1 << 30))),
    upside_down=("a.mp4", dict(matrix=(-ONE, 0, 0, 0, -ONE, 0, WIDTH * ONE, HEIGHT * ONE, 1 << 30))),
    turned_left=("a.mp4", dict(matrix=(0, -ONE, 0, ONE, 0, 0, 0, WIDTH * ONE, 1 << 30))),
    starts_late=("a.mkv", dict(time=lambda t: 40 * t + 5000, options=B_FRAMES)),
    an_edit_list_leaves_ten_out=("a.mp4", dict(time=lambda t: 40 * t - 400, options=B_FRAMES)),
    a_gap_in_time=("a.mp4", dict(time=lambda t: 40 * t + 2000 * (t > 10), options=B_FRAMES)),
    in_fragments=("a.mp4", dict(options=B_FRAMES, flags="frag_keyframe+empty_moov")),
    two_rates=("a.mkv", dict(time=lambda t: 20 * t if t < 15 else 300 + 70 * (t - 15), options=B_FRAMES)),
)
SOUGHT_BY_TIME = "a_gap_in_time", "in_fragments", "two_rates"  # a clip may begin some frames late
TURNS = dict(turned_right=1, upside_down=2, turned_left=3)  # np.rot90 brings them back


@pytest.mark.parametrize("kind", ODD)
def test_frames_of_odd_videos_are_those_of_the_file_whole_or_in_clips(kind, tmp_path):
    name, how = ODD[kind]
    path = write(tmp_path / name, **how)

    def numbers(frames):
        return [number(frame, lambda f: np.rot90(f, TURNS.get(kind, 0))) for frame in frames]

    with av.open(path) as file:
        theirs = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    [source], refused = data_files.probe([data_files.Source(path, name)])
    reader = video_files.VideoReader(path)
    whole = list(reader)
    first = 10 if kind == "an_edit_list_leaves_ten_out" else 0
    assert not refused and numbers(whole) == list(range(first, 30))
    assert video_files.count_frames(path) == len(whole) == len(theirs)
    assert (reader.height, reader.width) == whole[0].shape[:2]
    if kind not in TURNS:  # PyAV gives them as they are stored
        assert all(np.abs(a.astype(int) - b).mean() < 3 for a, b in zip(whole, theirs))
    for place in (0.0, 0.5, 0.99):
        for frames, delta in ((1, 1), (8, 1), (8, 2)):
            clip, start, spacing, notes = video_files.read_frames(path, place, frames, delta)
            seen = numbers(frame[..., ::-1] for frame in clip)
            begin = seen[0] - first
            assert begin == start or kind in SOUGHT_BY_TIME and 0 <= begin - start < 4
            assert seen == [seen[0] + spacing * k for k in range(frames)] and spacing == delta
            assert not any("repeated" in note for note in notes), notes


@pytest.mark.parametrize("name, how", [
    ("a.mp4", dict(options={"x264-params": "interlaced=1:tff=1"})),
    ("a.avi", dict(codec="mpeg4", options={"flags": "+ildct+ilme"}))])
def test_interlaced_videos_are_read_or_refused_but_never_what_memory_held(name, how, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / name, **how)
    readable, refused = data_files.probe([data_files.Source(path, name)])
    if readable:  # by an OpenCV that converts them
        assert [number(frame) for frame in video_files.VideoReader(path)] == list(range(FRAMES))
        return
    assert "interlaced" in refused[0][1]
    with pytest.raises(video_files.DataError, match="interlaced"):
        video_files.read_frames(path, 0.5, 4, 1)
    assert "interlaced" in mistake(capsys, monkeypatch, infer, "none.pt", path, "--precision", "fp32", "--out",
                                   tmp_path / "results")


def test_sound_is_no_video_and_a_cover_is_not_taken_for_the_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        sound.sample_rate = 44100
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with av.open(str(tmp_path / "cover.mp4"), "w") as file:
        cover, video = file.add_stream("mjpeg"), file.add_stream("libx264", rate=25)
        cover.disposition = av.stream.Disposition.attached_pic
        for stream, side, pixels in (cover, 96, "yuvj420p"), (video, 48, "yuv420p"):
            stream.width, stream.height, stream.pix_fmt = side, side, pixels
        for t in range(FRAMES):
            for stream in (cover, video) if t == 0 else (video,):
                frame = av.VideoFrame.from_ndarray(picture(t, stream.height, stream.width), format="rgb24")
                frame.pts, frame.time_base = t, Fraction(1, 25)
                file.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        file.mux(video.encode())
    [cover], [(sound, why)] = data_files.probe(data_files.find_sources(str(tmp_path)))
    assert cover.frames == FRAMES and [number(f) for f in video_files.VideoReader(cover.path)] == list(range(FRAMES))
    assert sound.endswith("sound.mp4") and why == "not a video"


def test_a_grey_video_is_not_taken_for_one_without_pictures(tmp_path, monkeypatch):
    grey = np.full((HEIGHT, WIDTH, 3), video_files.FILL, np.uint8)
    monkeypatch.setattr("test_odd_videos.picture", lambda *_: grey)
    path = write(tmp_path / "a.mkv", codec="ffv1", pixels="bgr0")
    assert np.array_equal(next(iter(video_files.VideoReader(path))), grey)


# ---- files that change while they are read ---------------------------------------------------------------------------


CHANGES = dict(  # what happens to a video of 10 frames after these were encoded, and what is said of it
    grows=(lambda path, more: path.open("ab").write(more.read_bytes()), "the file was written to while it was read"),
    is_another=(lambda path, more: os.replace(shutil.copy(more, f"{path}2"), path), "was changed while it was read"),
    shrinks=(lambda path, more: os.truncate(path, path.stat().st_size * 3 // 4), "of 10 frames could be read a second"),
    is_gone=(lambda path, more: path.unlink(), "no such file or directory"),
    has_no_frames=(lambda path, more: os.truncate(path, 600), "only 0 of 10 frames could be read a second time"),
    stays=(lambda path, more: None, ""))


def test_a_file_that_changes_while_infer_reads_it_is_told_and_costs_only_itself(tmp_path, monkeypatch, one_thread):
    small = dict(codec="ffv1", pixels="bgr0", height=24, width=32, frames=10)
    more = tmp_path / "more"
    write(tmp_path / "more.mkv", time=lambda t: 50 * t, **small)
    os.rename(tmp_path / "more.mkv", more)
    opened = {**CHANGES, "has_no_frames": (CHANGES["has_no_frames"][0], "no frame could be read"),
              "shrinks": (CHANGES["shrinks"][0], "was changed while it was read")}
    for changes, name in ((CHANGES, "frames_and_notes"), (opened, "open_reader")):  # after it was read once, or as it is opened
        with monkeypatch.context() as context:
            look_at_changes(tmp_path, context, more, small, changes, name)


def look_at_changes(tmp_path, monkeypatch, more, small, changes, name):
    for change in changes:
        write(tmp_path / f"{change}.mkv", **small)

    def change(first, *arguments, original=getattr(reconstruct, name)):
        found = original(first, *arguments)
        key = os.path.basename(first.path)
        changes[key.removesuffix(".mkv")][0](tmp_path / key, more)
        return found

    monkeypatch.setattr(reconstruct, name, change)
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    torch.manual_seed(0)
    torch.save(TAEHV(encoder_widths=(8,) * 4, decoder_widths=(8,) * 4).state_dict(), tmp_path / "taehv.pth")
    monkeypatch.setattr("sys.argv", ["infer.py", str(tmp_path / "taehv.pth"), str(tmp_path), "--lpips", "none",
                                     "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "results")])
    assert infer.main() is None
    rows = json.loads((tmp_path / "results" / "metrics.json").read_text())["rows"]
    assert {row["name"] for row in rows} == set(changes)
    for row in rows:
        said = row.get("failed") or "; ".join(row["notes"])
        assert changes[row["name"]][1] in said and ("failed" in row) == (row["name"] not in ("grows", "stays")), row
        assert row.get("frames", 10) == 10 or name == "open_reader" and row["name"] == "grows"
    assert not (tmp_path / "results" / "errors.log").exists()


def test_a_folder_is_searched_through_links_and_without_reports(tmp_path):
    (tmp_path / "mine/sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for path in ("mine/a.mp4", "mine/sub/b.mp4", "other/c.mp4"):
        (tmp_path / path).write_bytes(b"0")
    os.symlink(tmp_path / "other", tmp_path / "mine/clips")  # as on clusters
    os.symlink(tmp_path / "mine", tmp_path / "mine/sub/round")  # leads back
    os.symlink(tmp_path, tmp_path / "mine/up")
    os.symlink("/", tmp_path / "other/root")
    for report, folder in (("summary_report.html", "comparison_videos"), ("leaderboard.html", "videos")):
        (tmp_path / "mine" / report / folder).mkdir(parents=True)
        (tmp_path / "mine" / report / report).write_text("")
        (tmp_path / "mine" / report / folder / "a_reconstructed.mp4").write_bytes(b"0")
    found = [source.key for source in data_files.find_sources(str(tmp_path / "mine"))]
    assert found == ["a.mp4", "clips/c.mp4", "sub/b.mp4"]
    alone = data_files.find_sources(str(tmp_path / "mine/summary_report.html/comparison_videos"))
    assert [source.key for source in alone] == ["a_reconstructed.mp4"], "asked for by name, they are taken"
