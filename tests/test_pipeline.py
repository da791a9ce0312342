"""Stages beside each other: order, bounds, errors and signals; and infer.py when one of its stages fails."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import codec
import infer
import metrics
import reconstruct
import video_files
import video_writer
from conftest import ROOT, write_clip
from model_taehv import TAEHV
from pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    left = [thread for thread in threading.enumerate() if thread.name in (*infer.STAGES, "a", "b", "c")]
    assert not left


# ---- the pipeline itself ---------------------------------------------------------------------------------------------


def test_items_keep_their_order_and_seconds_are_counted():
    seen = {"b": [], "c": []}
    with Pipeline(depth=2) as line:
        numbers = line.ahead("a", line.ahead("a", range(500)))
        give = [line.beside(name, seen[name].extend) for name in "bc"]
        for number in numbers:
            for one in give:
                one(number)
    assert seen["b"] == seen["c"] == list(range(500))
    assert line.busy.keys() == {"a", "b", "c"} and all(0 <= seconds < 60 for seconds in line.busy.values())


def test_no_more_is_made_than_the_queues_hold():
    made, full = [], threading.Event()

    def numbers():
        for number in range(100):
            made.append(number)
            if number == 3:
                full.set()
            yield number

    with Pipeline(depth=3) as line:
        ahead = line.ahead("a", numbers())
        assert full.wait(20) and next(ahead) == 0
        assert len(made) <= 5, "three wait, one more is in hand, one was taken"
    assert len(made) <= 6, "and a block that wants no more ends it"


def fails(items):
    for number, _ in enumerate(items):
        if number == 5:
            raise ZeroDivisionError("of a stage")


def failing():
    yield from range(5)
    raise ZeroDivisionError("of a stage")


def give_for_ever(*functions):
    while True:
        for give in functions:
            give(0)


def take_all(line, items):
    for _ in items:
        pass


BLOCKS = dict(
    source=lambda line: take_all(line, line.ahead("a", failing())),
    source_of_a_source=lambda line: take_all(line, line.ahead("b", line.ahead("a", failing()))),
    sink=lambda line: give_for_ever(line.beside("a", fails)),
    sink_beside_another=lambda line: give_for_ever(line.beside("a", fails), line.beside("b", list)),
    sink_at_its_end=lambda line: line.beside("a", lambda items: [list(items), failing_now()]),
    the_block=lambda line: (line.ahead("a", iter(int, 1)), line.beside("b", list)(0), failing_now()))


def failing_now():
    raise ZeroDivisionError("of a stage")


@pytest.mark.parametrize("where", BLOCKS)
def test_an_error_anywhere_ends_all_and_is_the_one_that_is_raised(where):
    with pytest.raises(ZeroDivisionError, match="of a stage") as caught, Pipeline(depth=2) as line:
        BLOCKS[where](line)
    assert "of a stage" in str(caught.value) and threading.active_count() < 20


@pytest.fixture
def ctrl_c():
    """Whatever other tests have left: Ctrl-C raises KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("block", ["gives", "takes"])
def test_ctrl_c_while_all_wait_ends_all(block, ctrl_c):
    """The block stands at a full queue, or at an empty one; and so do the stages."""
    block_thread = threading.get_ident()

    def interrupts(items):
        next(items)
        for _ in range(3000):
            if sys._current_frames()[block_thread].f_code.co_name == "wait":  # that of threading.Condition
                break
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.2)
        list(items)

    with pytest.raises(KeyboardInterrupt), Pipeline(depth=1) as line:
        empty = line.ahead("c", line._taken_from([]))
        give = line.beside("a", interrupts)
        line.ahead("b", iter(int, 1))
        give(1)
        if block == "gives":
            give_for_ever(give)
        next(empty)


def test_pipeline_works_alone(tmp_path):
    with open(os.path.join(ROOT, "pipeline.py")) as source:
        (tmp_path / "pipeline.py").write_text(source.read())
    subprocess.run([sys.executable, "-S", "-c", "import pipeline"], cwd=tmp_path, env={}, check=True)


# ---- infer.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs infer.py in this process on three clips, in a folder with the weights taehv.pth; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(TAEHV(encoder_widths=(8,) * 4, decoder_widths=(8,) * 4).state_dict(), "taehv.pth")
    for name in "abc":
        write_clip(os.path.abspath(f"{name}.mp4"), frames=24, height=32, width=32, seed=ord(name))

    def infer_py(*arguments):
        monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", *arguments, "--lpips", "none", "--device", "cpu",
                                          "--precision", "fp32"])
        try:
            return infer.main() or 0
        except SystemExit as end:
            return end.code

    return infer_py


def files(folder="inference_results"):
    return sorted(name for _, _, names in os.walk(folder) for name in names)


def rows():
    with open("inference_results/metrics.json") as file:
        return json.load(file)["rows"]


def after(calls, error):
    """A function that raises the error at this call, and before it is `original`."""
    def wrap(original):
        done = []

        def call(*arguments, **keywords):
            done.append(1)
            if len(done) == calls:
                raise error
            return original(*arguments, **keywords)
        return call
    return wrap


def reader_fails(monkeypatch):
    def read(self, original=video_files.VideoReader.__iter__):
        for number, frame in enumerate(original(self)):
            if self.path.endswith("b.mp4") and number == 10:
                raise video_files.DataError("damaged in the middle")
            yield frame
    monkeypatch.setattr(video_files.VideoReader, "__iter__", read)
    return 0, "damaged in the middle"


def reader_fails_the_second_time(monkeypatch):
    taken = []

    def read(self, original=video_files.VideoReader.__iter__):
        taken.append(os.path.basename(self.path))
        for number, frame in enumerate(original(self)):
            if taken.count("b.mp4") == 2 and number == 10 and self.path.endswith("b.mp4"):
                raise video_files.DataError("damaged in the middle")
            yield frame
    monkeypatch.setattr(video_files.VideoReader, "__iter__", read)
    return 0, "damaged in the middle"


def encoder_fails(monkeypatch):
    monkeypatch.setattr(codec.Codec, "encode", after(24 + 10, RuntimeError("of a kernel"))(codec.Codec.encode))
    return 1, "RuntimeError: of a kernel"


def decoder_fails(monkeypatch):
    monkeypatch.setattr(reconstruct, "to_uint8", after(24 + 10, RuntimeError("of a kernel"))(codec.to_uint8))
    return 1, "RuntimeError: of a kernel"


def metric_fails(monkeypatch):
    wrong = after(2, RuntimeError("no such metric"))(metrics.ssim)
    monkeypatch.setitem(metrics.MEASURES, "ssim", metrics.MEASURES["ssim"]._replace(function=wrong))
    return 1, "RuntimeError: no such metric"


def writer_fails(monkeypatch):
    write = video_writer.VideoWriter.write

    def full(self, frame):
        if self.path.endswith("b_comparison.webm") and self.frames == 10:
            raise OSError(28, "No space left on device")
        write(self, frame)
    monkeypatch.setattr(video_writer.VideoWriter, "write", full)
    return 0, "[Errno 28] No space left on device"


@pytest.mark.parametrize("fault", [reader_fails, reader_fails_the_second_time, encoder_fails, decoder_fails,
                                   metric_fails, writer_fails])
def test_a_stage_that_fails_costs_only_its_input_and_leaves_nothing(fault, command, monkeypatch, capsys):
    monkeypatch.setattr(reconstruct, "stack_size", lambda *_: 24)  # as many calls of a metric as inputs
    code, reason = fault(monkeypatch)
    assert command("a.mp4", "b.mp4", "c.mp4", "--save-latents") == code
    assert [row.get("failed") for row in rows()] == [None, reason, None]
    assert files() == sorted([*(f"{name}_{kind}.webm" for name in "ac" for kind in reconstruct.KINDS["all"]),
                              *(f"{name}.latents.npz" for name in "ac"), *(f"{name}_latents.png" for name in "ac"),
                              "metrics.json", "summary_report.html", *["errors.log"] * code])
    printed = capsys.readouterr()
    assert f"failed: {reason}" in printed.out and "Traceback" not in printed.err


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.parametrize("size", [300, 20000])
def test_a_full_disk_ends_an_input_in_one_line(size, command, capsys, monkeypatch, video_encoder):
    """It has no room for any video (300 bytes), or for the largest of them; what was encoded found some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def measured(*arguments, original=reconstruct.frames_and_notes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return original(*arguments)

    monkeypatch.setattr(reconstruct, "frames_and_notes", measured)
    with contextlib.ExitStack() as until:
        until.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        assert command("a.mp4") == 2
    assert files() == []
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("infer.py: ") and ("File too large" in last or "is the disk full?" in last)


STOPPED = """
import os, sys
sys.path.insert(0, {root!r})
import codec, infer, reconstruct
original = reconstruct.to_uint8
done = []
def stop(*arguments):
    done.append(1)
    if len(done) == 10:
        os.kill(os.getpid(), {number})
    return original(*arguments)
reconstruct.to_uint8 = stop
infer.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux has them")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_the_middle_ends_in_one_line_and_leaves_no_half_file(name, command, tmp_path):
    number = getattr(signal, name)
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=ROOT, number=int(number)))
    done = subprocess.run([sys.executable, "stopped.py", "taehv.pth", "a.mp4", "b.mp4", "--save-latents", "--lpips",
                           "none", "--device", "cpu", "--precision", "fp32"], capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"infer.py: stopped by {name}; what was not finished is removed"
    assert "Traceback" not in done.stderr and files() == []


def test_a_signal_does_no_more_than_before_once_infer_has_ended(command):
    before = signal.getsignal(signal.SIGTERM)
    assert command("a.mp4", "--max-frames", "2") == 0 and signal.getsignal(signal.SIGTERM) is before


# ---- what is written, and the line of times --------------------------------------------------------------------------


def test_videos_are_all_or_the_comparison_or_none_and_numbers_are_the_same(command, capsys):
    found = {}
    for option in (["--videos", "all"], ["--videos", "comparison"], ["--no-videos"]):
        out = f"out_{option[-1]}"
        assert command("a.mp4", *option, "--out", out) == 0
        with open(f"{out}/metrics.json") as file:
            row, = json.load(file)["rows"]
        page = open(f"{out}/summary_report.html", encoding="utf-8").read()
        assert sorted(row["videos"]) == sorted(reconstruct.KINDS[{"--no-videos": "none"}.get(option[-1], option[-1])])
        assert [name for name in files(out) if name.endswith(".webm")] == sorted(
            os.path.basename(path) for path in row["videos"].values())
        assert page.count("<video ") == len(row["videos"]) and "a_latents.png" in page
        found[out] = row["metrics"]
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]
        assert all(f"{stage} " in line for stage in ("reading", "model", "metrics"))
        assert ("writing" in line) == (option[-1] != "--no-videos")
    assert found["out_all"] == found["out_comparison"] == found["out_--no-videos"]


def test_latents_without_a_video_are_a_mistake(command, capsys):
    assert command("a.mp4", "--save-latents") == 0
    assert command("inference_results/latents/a.latents.npz", "--no-videos", "--out", "other") == 2
    assert "a video is all that is made of it" in capsys.readouterr().err and not os.path.exists("other/metrics.json")


def test_without_videos_a_picture_may_be_longer_than_a_video_can_be(command):
    import cv2
    cv2.imwrite("long.png", np.zeros((16, 17000, 3), np.uint8))
    assert command("long.png") == 2 and command("long.png", "--no-videos") == 0


def test_stacks_are_measured_as_single_frames_are(command, monkeypatch):
    found = []
    for size in (1, 7, 24):
        monkeypatch.setattr(reconstruct, "stack_size", lambda *_, size=size: size)
        assert command("a.mp4", "--no-videos") == 0
        found.append(rows()[0]["metrics"])
    assert all(found[0][name] == pytest.approx(one[name], rel=1e-6) for one in found for name in one
               if one[name] is not None)


def test_groups_follow_from_free_memory(monkeypatch):
    class Reader:
        height, width = 1080, 1920

    for free, depth in ((1 << 24, 2), (5 << 30, 4), (1 << 40, 8)):
        monkeypatch.setattr(codec, "free_memory", lambda device, free=free: free)
        assert codec.queue_depth(Reader) == depth
    monkeypatch.setattr(reconstruct, "free_memory", lambda device: 40 << 30)
    assert reconstruct.stack_size(Reader, torch.device("cpu")) == 1
    assert reconstruct.stack_size(Reader, torch.device("cuda")) == 6
    monkeypatch.setattr(reconstruct, "free_memory", lambda device: 0)
    assert reconstruct.stack_size(Reader, torch.device("cuda")) == 1
