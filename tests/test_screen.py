"""What a command writes to may go away, a screen or a disk for its curves: the work goes on, and ends as it would."""

import ast
import errno
import glob
import io
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import logbook
import progress
import screen
import train
import video_writer
from conftest import FRAMES, ROOT, log_of, metrics_of, run, state_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /dev/full as Linux has them")

# ---- screens -----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, warnings
sys.path.insert(0, {root!r})
from screen import guard_screen, nobody_reads, text_is_lost
guard_screen()
guard_screen()  # as where one command calls another's main()
"""
WORK = """
with open("work", "w") as file:
    for number in range(4):
        print("a file's name: \\udcff" + "x" * 10_000)
        print("to stderr", file=sys.stderr)
        warnings.warn(str(number))
    os.system("echo of another process; echo there too >&2")
    file.write(f"done {file.fileno()}")
print("last words", end="")
sys.exit(3)
"""


def shell(folder, work, ending):
    """Runs `work` after guard_screen(), the shell's `ending` behind it: (exit code, stdout, stderr) of the shell."""
    (folder / "script.py").write_text(SCRIPT.format(root=ROOT) + work)
    line = f'set -o pipefail; "{sys.executable}" script.py {ending}'
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("ending", ["> /dev/full 2>&1", "2>&1 | head -c1", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_work_goes_on_without_a_screen_and_ends_with_its_own_code(tmp_path, ending):
    assert shell(tmp_path, WORK, ending)[0] == 3, "Python's own is 120 where its last words find no room"
    done, descriptor = (tmp_path / "work").read_text().split()
    assert done == "done" and int(descriptor) > 2, "no file of the work's is what other processes take for the screen"


@pytest.mark.parametrize("ending, expected", [("", (0, "text", "")), ("| true", (0, "", "")), ("> /dev/full", (
    1, "", "script.py: not all of the output could be written: [Errno 28] No space left on device\n"))])
def test_a_command_whose_product_is_text_tells_a_full_disk_from_a_reader_who_has_enough(tmp_path, ending, expected):
    work = "print('text', end='')\n" + "while not nobody_reads():\n    print()\n" * ("|" in ending)
    assert shell(tmp_path, f"{work}\nsys.exit(text_is_lost())", ending) == expected


def test_a_disk_that_has_room_again_gets_what_comes_then(monkeypatch):
    class Disk(io.RawIOBase):
        full, content = False, b""

        def writable(self):
            return True

        def write(self, content):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.content += bytes(content)
            return len(content)

    disk = Disk()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(disk), "ascii"))
    screen.guard_screen()

    def say(word):
        held = io.BytesIO()
        print(word, flush=True)
        return weakref.ref(held)

    for word, disk.full in (("one", False), ("two", True), ("three", False)):
        assert say(word)() is None, "an error that is kept keeps alive, by its frames, what they hold: data processes"
    assert disk.content == b"one\nthree\n" and "No space left" in screen.flushed_stdout().lost
    sys.stdout.detach().detach()  # or it closes what it writes to as it goes


def test_each_command_guards_the_screen_first():
    guarded = []
    for path in set(glob.glob(os.path.join(ROOT, "*.py"))) - set(glob.glob(os.path.join(ROOT, "test_*.py"))):
        with open(path, encoding="utf-8") as file:
            source = file.read()
        if "\nif __name__ ==" in source:
            main, = (f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and f.name == "main")
            steps = [step for step in main.body if not isinstance(getattr(step, "value", None), ast.Constant)]
            assert ast.unparse(steps[0]) == "guard_screen()", path
            guarded.append(os.path.basename(path))
    assert {"train.py", "infer.py", "latent_cache.py", "launch.py", "bench.py"} <= set(guarded)


@pytest.mark.parametrize("command", ["train", "infer", "latent_cache", "leaderboard", "prune", "export", "bench"])
def test_ctrl_c_while_pytorch_is_imported_leaves_no_traceback(command, tmp_path):
    (tmp_path / "torch.py").write_text("import sys, signal\nprint('importing', flush=True)\nsignal.pause()\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    script = f"import runpy; runpy.run_path({os.path.join(ROOT, command)!r} + '.py', run_name='__main__')"
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {ROOT!r}]; {script}"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_a_run_whose_screen_has_gone_saves_after_ctrl_c(here, at, clips, tmp_path, monkeypatch):
    """`train.py 2>&1 | tee log`, where Ctrl-C reaches tee first. (`here` gives the signals' handlers back.)"""
    reader, writer = os.pipe()
    at({2: lambda: os.close(reader), 4: lambda: os.kill(os.getpid(), signal.SIGINT)})
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open(writer, "w", closefd=False))  # noqa: SIM115 (closed by nobody)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which main() sets
    monkeypatch.setattr(sys, "argv", ["train.py", *FRAMES, f"data={clips}", f"out_dir={tmp_path}", "max_steps=9",
                                      "name=piped"])
    try:
        with pytest.raises(SystemExit) as ended:
            train.main()
    finally:
        os.close(writer)
    assert ended.value.code == 128 + signal.SIGINT
    assert "stopped by a signal after step 4 of 9" in log_of(tmp_path / "piped")
    assert (tmp_path / "piped" / "step_00000004.pt").exists()


def test_a_video_is_written_where_stderr_takes_nothing(tmp_path):
    """Its writer holds back what OpenCV prints, and prints the rest itself."""
    screen_of_c, full = os.dup(2), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 2)
    try:
        with video_writer.VideoWriter(str(tmp_path / "a.webm"), 25, 32, 32) as video:
            video.write(np.zeros((32, 32, 3), np.uint8))
    finally:
        os.dup2(screen_of_c, 2)
        os.close(screen_of_c)
        os.close(full)
    assert (tmp_path / "a.webm").stat().st_size > 0


# ---- curves ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_moment_of_full_disk_the_curves_go_on(tmp_path, capsys, monkeypatch):
    """Also where it is full as the run begins, which goes on from step 2 of an earlier one that had gone further."""
    # Files of one second are read in the order of their names, which end with a count of this process's: 9 before 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    log = logbook.Logbook(str(tmp_path), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def draw(*steps):
        for step in steps:
            log.scalars(step, "train", loss=step, other=1)
            log.scalars(step, "val", psnr=step, missing=None)

    def full(room, *steps):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            draw(*steps)
            if log.board:
                with pytest.raises(OSError, match="File too large"):
                    log.board.flush()  # its thread has met it now, or the test would end before
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    log.start({}, 0)
    draw(1, 2, 3, 4)
    log.close()
    log = logbook.Logbook(str(tmp_path), 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        log.start({}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    draw(3, 4)
    log.board.flush()
    newest = max(glob.glob(str(tmp_path / "events*")), key=os.path.getmtime)
    full(os.path.getsize(newest) + 20, 5, 6, 7)  # a record is cut off
    draw(8, 9)
    log.close()
    assert len(list(tmp_path.glob("events*"))) == 3 and not (tmp_path / "curves.tmp").exists()
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("train/loss")] == [(s, s) for s in (1, 2, 3, 4, 8, 9)]
    assert [e.step for e in curves.Scalars("val/psnr")] == [1, 2, 3, 4, 8, 9]
    told = [line[20:] for line in log_of(tmp_path).splitlines() if "missing" in line]
    assert len(told) == 2 and "go on, in a new file; some before this step are missing: [Errno 27]" in told[1]
    assert [line.split(":")[0] for line in told] == ["step 3", "step 8"]
    assert capsys.readouterr().err.count("cannot be written: [Errno 27] File too large; the run goes on") == 1


def test_metrics_are_lines_of_json_and_go_on_after_a_moment_of_full_disk(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = logbook.Logbook(str(tmp_path), 0)
    log.scalars(1, "train", loss=math.nan, psnr=-math.inf, ssim=0.5, missing=None)
    log.event("not saved", 2, "not saved: r\udce4ume", reason="r\udce4ume\n", screen=False)
    logbook.Logbook(str(tmp_path), 1).record("train", 3, loss=1.0)  # not the first rank
    assert metrics_of(tmp_path) == [{"step": 1, "kind": "train", "loss": None, "psnr": None, "ssim": 0.5},
                                    {"step": 2, "kind": "not saved", "reason": "r\udce4ume\n"}]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
    try:
        for step in (3, 4):
            log.record("train", step, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.record("train", 5, loss=1.0)
    with path.open("ab") as file:
        file.write(b'{"step": 6, "ki')  # a machine that lost its power
    logbook.Logbook(str(tmp_path), 0).record("start", 5)
    found = [progress.parse(line) for line in path.read_bytes().splitlines()]
    assert [line and line["step"] for line in found] == [1, 2, None, 5, None, 5]
    assert capsys.readouterr().err.count("cannot be written: [Errno 27] File too large; the run goes on") == 1
    path.unlink()
    os.mkfifo(path)
    logbook.Logbook(str(tmp_path), 0).record("start", 5)
    assert "the run goes on" in capsys.readouterr().err, "a FIFO is not waited for"


def test_a_clock_that_jumps_costs_no_curve_and_no_step(here, at, monkeypatch):
    """Forward and back while the run goes on, and back before each time that it is resumed."""
    now, ahead, day = time.time, [2], 86400
    monkeypatch.setattr(time, "time", lambda: now() + day * ahead[0])
    at({2: lambda: ahead.append(ahead.pop() + 5), 3: lambda: ahead.append(ahead.pop() - 4)})
    for steps in (4, 6, 8):
        folder = here(*FRAMES, "save_every=1", f"max_steps={steps}", "max_minutes=20", "name=clock")
        ahead[0] -= 2
    assert "done: 8 steps" in log_of(folder) and state_of(folder, 8)["samples"] == 16
    curves = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in curves.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(list(folder.glob("events*"))) == 3
    assert len(re.findall("files of the future are renamed", log_of(folder))) == 2


def test_in_a_file_log_lines_stand_in_the_place_of_the_bar(clips, tmp_path):
    output = run(os.path.join(ROOT, "train.py"), *FRAMES, f"data={clips}", f"out_dir={tmp_path}", "log_every=2", "max_steps=4",
                 cwd=tmp_path)
    assert re.findall(r"^step (\d+): loss", output, re.M) == ["2", "4"] and "step/s" not in output


def test_in_a_file_a_bar_is_drawn_seldom(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in screen.progress_bar(range(1000)):
        pass
    assert 1 <= sys.stderr.getvalue().count("\r") <= 3
