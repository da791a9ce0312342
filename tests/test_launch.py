"""Several tasks at once: queueing, the table, a crash, signals, and mistakes in the file. Minutes: under one."""

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

import launch
import train
from conftest import ROOT, mistake
from logbook import Logbook

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")

# What test tasks run instead of torchrun. The first word of the task's name says what it does.
FAKE = """
import os, shutil, signal, subprocess, sys, time
def note(words):
    with open("events", "a") as file:
        file.write(f"{name} {words}\\n")
def saved(number, _):
    note(f"got {number}")
    time.sleep(0.3)
    note("saved")
    sys.exit(0)
def events():
    return open("events").read()
def wait_for(words):
    while words not in events():
        time.sleep(0.02)
name = sys.argv[1]
kind = name.split("-")[0]
if kind in ("saves", "stubborn"):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, saved if kind == "saves" else signal.SIG_IGN)
if kind == "stubborn":  # with a rank in a session of its own, as torchrun starts them
    rank = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    note(f"pid {rank.pid}")
note(f"pid {os.getpid()}")
note(f"start {os.environ.get('CUDA_VISIBLE_DEVICES')}")
if kind == "crash":
    print("10%|#  |\\r20%|## |")
    print("the reason of the crash")
    sys.exit(3)
if kind == "removes":
    shutil.rmtree("runs")
    sys.exit(3)
if kind == "leaves":
    rank = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    note(f"pid {rank.pid}")
if kind == "meets":
    wait_for("meets-a start")
    wait_for("meets-b start")
if kind == "outlasts":
    wait_for(name.split("-")[1] + " end")
if kind in ("saves", "stubborn", "sleeps"):
    time.sleep(1000)
note("end")
"""
DRIVER = """
import sys
sys.path.insert(0, {root!r})
import launch
gpus = {gpus!r}
launch.visible_gpus = lambda: gpus
launch.check_models = lambda tasks: None  # it imports PyTorch, for seconds; one test asks it
def command(task):
    torchrun = ["-m", "torch.distributed.run", "--standalone"] if task.name == "crash" else []
    return [sys.executable, *torchrun, "fake.py", task.name]
sys.exit(launch.main(sys.argv[1:], command))
"""
TINY = {
    "size": 16,
    "frames": 4,
    "batch_size": 1,
    "workers": 0,
    "warmup_steps": 2,
    "precision": "fp32",
    "device": "cpu",
    "log_every": 1,
    "init": "colours",  # init=clips reads 48 clips first
    "net.encoder_widths": [32, 32, 32, 32],
    "net.decoder_widths": [64, 32, 32, 32],
}


def task(name, gpus=1, preset="taehv", **overrides):
    return {"name": name, "preset": preset, "overrides": {"data": ".", **overrides}, "gpus": gpus}


def begin(folder, tasks, *options, gpus=(), fake=True, **kwargs):
    """Start launch.py there; with `fake`, its tasks run FAKE, and `gpus` are those that the machine has."""
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    (folder / "fake.py").write_text(FAKE)
    (folder / "driver.py").write_text(DRIVER.format(root=ROOT, gpus=list(gpus)))
    (folder / "events").touch()
    return subprocess.Popen(
        [sys.executable, "driver.py" if fake else os.path.join(ROOT, "launch.py"), "tasks.json", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs},
    )


def end(process, expect, timeout=60):
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    assert process.returncode == expect, output
    return output


def events(folder, *kinds):
    lines = [line.split() for line in (folder / "events").read_text().splitlines()]
    return [f"{name} {what}" for name, what, *_ in lines if what in kinds]


def wait(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to that"
        time.sleep(0.05)


def pids(folder):
    return [int(pid) for pid in re.findall(r" pid (\d+)", (folder / "events").read_text())]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes(folder):
    """Those whose working folder it is, but for this one."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == str(folder) and pid != os.getpid() and alive(pid):
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_outlives_a_test(tmp_path):
    yield
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)


# ---- real training -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_tasks_finish_and_the_same_command_passes_over_them(clips, tmp_path):
    tiny = {**TINY, "data": clips, "max_steps": 2}
    tasks = [
        task("a", **tiny, val_fraction=0.3, val_clips=2, val_every=2),
        task("b", **tiny, lr=1e-4, val_fraction=0),
    ]
    output = end(begin(tmp_path, tasks, "--slots", "2", fake=False), 0, 200)
    rows = {line.split()[1]: line.split()[2:] for line in output.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)}
    log = (tmp_path / "runs" / "a" / "train.log").read_text()
    assert rows["a"] == ["done", "2/2", re.findall(r"loss (\d\.\d+)", log)[-1], re.findall(r"on psnr (\S+)", log)[-1]]
    assert rows["b"][:2] == ["done", "2/2"] and len(rows["b"]) == 3, "b has no validation"
    assert '"lr": 0.0001' in (tmp_path / "runs" / "b" / "config.json").read_text()

    before = (tmp_path / "runs" / "a" / "launch.log").read_bytes()
    again = end(begin(tmp_path, tasks, "--slots", "2", fake=False), 0)
    assert again.count("nothing to do") == 2 and "running" not in again
    assert (tmp_path / "runs" / "a" / "launch.log").read_bytes() == before
    tasks[0]["overrides"]["max_steps"] = 3
    dry = end(begin(tmp_path, tasks, "--slots", "2", "--dry-run", fake=False), 0).splitlines()
    assert "max_steps=3" in dry[0] and dry[1] == "b: nothing to do", "other settings are train.py's to judge"


@pytest.mark.slow
@pytest.mark.any_precision
def test_ctrl_c_saves_a_task_of_two_ranks(clips, tmp_path, monkeypatch, capsys):
    """And nobody else trains in its folder before."""
    one = task("interrupted", 2, **TINY, data=clips, max_steps=100000, val_fraction=0, save_every=100000)
    process = begin(tmp_path, [one], "--slots", "2", fake=False)
    log = tmp_path / "runs" / "interrupted" / "train.log"
    wait(lambda: process.poll() is not None or log.exists() and "step 3: loss" in log.read_text())
    assert len(processes(tmp_path)) >= 4, "launch.py, torchrun and two ranks"
    line = mistake(capsys, monkeypatch, train, "taehv", f"data={clips}", f"out_dir={tmp_path}/runs", "name=interrupted")
    assert re.search(r"/interrupted is in use by pid \d+ on .* \(train.py taehv ", line), "rank 0 has it"
    process.send_signal(signal.SIGINT)
    output = end(process, 130)
    assert "stopped: interrupted; the same command goes on" in output and "failed" not in output
    step = re.search(r"stopped by a signal after step (\d+) of", log.read_text())[1]
    assert f"step_{int(step):08d}.pt" in os.listdir(log.parent)
    assert "rror" not in (log.parent / "launch.log").read_text(), "torchrun saw its ranks end well"
    assert processes(tmp_path) == []


# ---- queueing ----------------------------------------------------------------------------------------------------


def test_tasks_queue_for_the_only_place(tmp_path):
    output = end(begin(tmp_path, [task("a"), task("b")], "--slots", "1"), 0)
    assert events(tmp_path, "start", "end") == ["a start", "a end", "b start", "b end"]
    assert re.search(r" b +queued .* b +running .* b +done", output, re.DOTALL)


def test_tasks_run_side_by_side_and_a_small_one_overtakes(tmp_path):
    end(begin(tmp_path, [task("meets-a"), task("meets-b")], "--slots", "2"), 0)  # each waits for the other
    (tmp_path / "events").unlink()
    end(begin(tmp_path, [task("outlasts-small"), task("big", 2), task("small")], "--slots", "2"), 0)
    assert events(tmp_path, "end") == ["small end", "outlasts-small end", "big end"]


def test_each_task_sees_its_own_gpus(tmp_path):
    tasks = [task("outlasts-b"), task("b"), task("c", 2)]
    output = end(begin(tmp_path, tasks, gpus=["4", "GPU-ab"]), 0)
    seen = (tmp_path / "events").read_text()
    assert "outlasts-b start 4\n" in seen and "b start GPU-ab\n" in seen and "c start 4,GPU-ab\n" in seen
    assert "GPU 4,GPU-ab" in output
    end(begin(tmp_path, [task("d")], "--gpus", "GPU-ab", gpus=["4", "GPU-ab"]), 0)
    assert "d start GPU-ab\n" in (tmp_path / "events").read_text()
    assert "--gpus 5: each once, of those" in end(begin(tmp_path, [task("d")], "--gpus", "5", gpus=["4"]), 2)
    assert "gpus=2 of 1" in end(begin(tmp_path, [task("d", 2)], gpus=["4"]), 2)


# ---- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_crash_leaves_the_others_alone(tmp_path):
    output = end(begin(tmp_path, [task("outlasts-b"), task("crash"), task("b")], "--slots", "2"), 1)
    assert events(tmp_path, "start", "end")[-3:] == ["b start", "b end", "outlasts-b end"], "in its place"
    assert "    20%|## |\n    the reason of the crash\nfailed: crash (runs/crash/launch.log)\n" in output[-120:]
    assert "crash: exit code 1; the end of runs/crash/launch.log:" in output and "ChildFailedError" not in output
    assert "ChildFailedError" in (tmp_path / "runs" / "crash" / "launch.log").read_text(), "all of it is there"


def test_what_a_task_leaves_behind_is_ended_before_its_place_is_given_on(tmp_path):
    end(begin(tmp_path, [task("leaves")], "--slots", "1"), 0)
    assert len(pids(tmp_path)) == 2 and not any(map(alive, pids(tmp_path)))


def test_a_terminals_ctrl_c_reaches_launch_alone_which_ends_all(tmp_path):
    tasks = [task("saves-a"), task("saves-b"), task("c")]
    process = begin(tmp_path, tasks, "--slots", "2", start_new_session=True)
    wait(lambda: len(events(tmp_path, "start")) == 2)
    os.killpg(process.pid, signal.SIGINT)
    output = end(process, 130)
    assert "stopped: saves-a, saves-b, c; the same command goes on" in output
    assert sorted(events(tmp_path, "got", "saved")) == [f"saves-{n} {w}" for n in "ab" for w in ("got", "saved")]
    assert f"got {signal.SIGINT:d}" not in (tmp_path / "events").read_text(), "a save must not be cut short"
    assert "c start" not in events(tmp_path, "start") and not any(map(alive, pids(tmp_path)))


def test_a_second_signal_kills_what_does_not_listen(tmp_path):
    process = begin(tmp_path, [task("stubborn")], "--slots", "1")
    wait(lambda: len(events(tmp_path, "start")) == 1)
    first = time.monotonic()
    while process.poll() is None and time.monotonic() < first + 30:
        process.send_signal(signal.SIGTERM)  # those of the first two seconds count as one
        time.sleep(0.2)
    assert 2 < time.monotonic() - first < 10
    output = end(process, 130)
    assert re.search(r" stubborn +killed +0/\d+ +not saved since step 0\n", output) and "stopped" not in output
    assert "killed: stubborn (not saved since step 0); the same command goes on from what is saved\n" in output
    assert len(pids(tmp_path)) == 2 and not any(map(alive, pids(tmp_path)))


def test_the_tasks_of_a_killed_launch_end_and_nobody_joins_their_folder_before(tmp_path):
    process = begin(tmp_path, [task("sleeps"), task("stubborn")], "--slots", "2")
    wait(lambda: len(events(tmp_path, "start")) == 2)
    listening = int(re.search(r"sleeps pid (\d+)", (tmp_path / "events").read_text())[1])
    assert "in use by another launch.py" in end(begin(tmp_path, [task("sleeps")], "--slots", "1"), 2)
    process.kill()
    wait(lambda: not alive(listening))
    process.communicate()
    assert "stubborn is in use" in end(begin(tmp_path, [task("stubborn")], "--slots", "1"), 2)


NOT_SAVED = "not saved: [Errno 28] No space left on device; on disk: step 4 (runs/a)"


@pytest.mark.parametrize("code, kind, room, stopping, state, note, step", [
    (1, "not saved", True, False, "failed", NOT_SAVED, 4),
    (1, "not saved", True, True, "failed", NOT_SAVED, 4),
    (1, "", False, False, "failed", "exit code 1, and its disk is full", 4),
    (1, "", False, True, "failed", "exit code 1, and its disk is full", 4),
    (1, "", True, False, "failed", "exit code 1", 9),
    (1, "", True, True, "stopped", "", 9),
    (1, "stopped", True, False, "stopped", "", 9),
    (0, "nothing to do", True, True, "done", "", 9),
    (0, "done", False, False, "done", "", 9)], ids=str)
def test_a_task_that_could_not_save_has_failed(code, kind, room, stopping, state, note, step, tmp_path, monkeypatch):
    """With the step that is on disk. On a full disk metrics.jsonl may say nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "no_room", lambda folder: not room)
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [task("a", max_steps=9)]}))
    one = launch.read_tasks("tasks.json")[0]
    launch.claim(one)
    launch.start(one, ["0"], False, lambda task: [sys.executable, "-c", f"raise SystemExit({code})"])
    for name in ("step_00000004.pt", "step_00000002.pt", "best.pt"):
        (tmp_path / "runs" / "a" / name).touch()
    log = Logbook(one.folder, 0)
    log.record("train", 9, loss=1.0)
    if kind:
        log.record(kind, 9, reason=NOT_SAVED.removeprefix("not saved: ") if kind == "not saved" else None)
    (tmp_path / "runs" / "a" / "config.json").write_text(
        json.dumps({**dataclasses.asdict(one.config), "variant": "taehv"}))
    assert one.process.wait(60) == code
    launch.finish(one, stopping)
    assert (one.state, one.note, one.seen["step"]) == (state, note, step)
    assert not launch.finished(one)
    (tmp_path / "runs" / "a" / "step_00000009.pt").touch()
    assert launch.finished(one)


def test_a_task_whose_folder_was_removed_is_reported(tmp_path):
    output = end(begin(tmp_path, [task("removes")], "--slots", "1"), 1)
    assert "removes: exit code 3; the end of runs/removes/launch.log:\n    [Errno 2] No such file" in output
    assert "failed: removes" in output and "Traceback" not in output


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_table_is_redrawn_on_a_terminal(tmp_path):
    theirs, ours = pty.openpty()
    process = begin(tmp_path, [task("a"), task("b")], "--slots", "1", stdout=ours)
    os.close(ours)
    text = b""
    try:
        while piece := os.read(theirs, 4096):
            text += piece
    except OSError:  # how a terminal says that the other end is closed
        pass
    os.close(theirs)
    assert process.wait(60) == 0
    screens = text.decode().split("\x1b[4F")  # four lines up
    assert len(screens) >= 3 and all(screen.count("\n") == 4 for screen in screens)
    assert "1 running, 1 queued; Ctrl-C saves and ends" in screens[0] and re.search(r"b +done", screens[-1])


def test_metrics_are_read_in_pieces_and_whatever_they_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [task("a")]}))
    one = launch.read_tasks("tasks.json")[0]
    launch.follow(one)
    assert one.seen == {}
    os.makedirs(one.folder)
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    odd = [b"\xff\x00", b"", b"null", b"8", b"[" * 100_000, b'{"step": 8, "kind": "train", "loss": 1.0',
           b'{"step": 8, "loss": 1.0}', b'{"kind": "train", "loss": 1.0}', b'{"step": 8, "kind": ["train"]}']
    odd += [b'{"step": %s, "kind": "done"}' % step for step in (b'"8"', b"true", b"8.5", b"NaN", b"-1", b"9" * 5000,
                                                               b"1" + b"0" * 400, b"null", b"[]")]
    odd += [b'{"step": 4, "kind": "train", "loss": %s}' % loss for loss in (b'"1.0"', b"true", b"NaN", b"1e999", b"[]",
                                                                            b"{}", b"1" + b"0" * 400)]
    odd += [b'{"step": 4, "kind": "\\u001b[2J", "loss": 1.0}', b'{"step": 4, "kind": "train", "loss": null} x']
    path.write_bytes(b'{"step": 4, "kind": "train", "loss": 0.0431, "clips_per_second": 2.5}\n'
                     b'{"step": 4, "kind": "val", "psnr": 20.449}\n' + b"\n".join(odd)
                     + b'\n{"step": 5, "kind": "train", "lo')
    launch.follow(one)
    assert one.seen == {"step": 4, "loss": "0.04310", "speed": "2.50", "psnr": "20.45"}
    with path.open("ab") as file:
        file.write(b'ss": null, "clips_per_second": 2e40}\n{"step": 5, "kind": "stopped"}\n')
    launch.follow(one)
    assert one.seen == {"step": 5, "loss": "nan", "speed": "2e+40", "psnr": "20.45", "ending": "stopped"}
    path.write_bytes(b"x" * (3 << 20) + b'\n{"step": 7, "kind": "resumed"}\n')
    launch.follow(one)
    assert one.seen["step"] == 7, "a huge file: its end"
    os.truncate(path, 1 << 40)  # a hole, without a line in it
    tracemalloc.start()
    launch.follow(one)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23 and one.seen["step"] == 7
    tracemalloc.stop()
    path.unlink()
    os.mkfifo(path)
    launch.follow(one)
    path.unlink()
    path.write_bytes(b'{"step": 8, "kind": "not saved", "reason": "\\u001b[2J"}\n')
    launch.follow(one)
    assert one.seen["step"] == 8 and launch.one_line(one.seen["ending"]) == "not saved: \\x1b[2J", "read anew"


# ---- mistakes: one line, exit code 2, nothing started ------------------------------------------------------------


@pytest.mark.parametrize("words, entry", [
    ("task 2 (b): unknown key 'preste' (did you mean 'preset'?)", {"name": "b", "preste": "taehv"}),
    ("task 2 (b): unknown preset 'taehvv' (did you mean 'taehv'?)", task("b", preset="taehvv")),
    ("unknown preset 'lr=1'", task("b", preset="lr=1")),
    ("task 2 (b): unknown key 'frame' (did you mean 'frames'?)", task("b", frame=3)),
    ("task 2 (b): size=big: a whole number is wanted", task("b", size="big")),
    ("task 2 (b): lr=-1.0: at least 0 is wanted", task("b", lr=-1)),
    ("task 2 (b): data: 'nowhere' does not exist", task("b", data="nowhere")),
    ("task 2 (b): no data given", task("b", data="")),
    ("task 2 (b): init_from: 'runs/a' does not exist (tasks run in any order", task("b", init_from="runs/a")),
    ("task 2 (b): resume: 'a.pt' does not exist", task("b", resume="a.pt")),
    ("task 2 (b): device=cuda:1: launch.py chooses the GPUs", task("b", device="cuda:1")),
    ("task 2 (b): gpus=0: at least 1", task("b", 0)),
    ("task 2 (b): gpus=true: a whole number", task("b", True)),
    ("task 2 (b): gpus=1.5: a whole number", task("b", 1.5)),
    ("task b: gpus=3 of 2", task("b", 3)),
    ("task 2 (a): the name a is another task's already", task("a")),
    ("is another task's already", task("b", out_dir="link")),
    ("task 2: name=null: a text is wanted", {"preset": "taehv"}),
    ("task 2 (../b): name=../b: letters, digits", task("../b")),
    ("task 2 (): a name is wanted", task("")),
    ("task 2: an object", [1]),
    ("task 2 (b): overrides=[]: an object", {"name": "b", "preset": "taehv", "overrides": []}),
    ("'name' is set beside overrides, as the task's name", task("b", **{"name ": 1, "lr": 1}) | {"overrides": {"name": "c"}}),
    ("'--lr' is no setting", task("b", **{"--lr": 1})),
    ("'x=1' is no setting", task("b", **{"x=1": 1})),
    ("lr=null: a finite number", task("b", lr=None)),
    ("net=", task("b", net={"ch": 64})),
    ("size=[1]: a finite number", task("b", size=[1])),
    ("net.ch=[[1]]: a finite number, true, false or a text is wanted, or a list", task("b", **{"net.ch": [[1]]})),
    ("data='a\\x00b': a text of up to 4096", task("b", data="a\0b")),
    ("a text of up to 4096", task("b", data="\ud800")),
    ("a text of up to 4096", task("b", data="x" * 5000)),
    ("task 2 (b): ", task("b", max_steps=10**400)),
    ("task 2 (b\\x1b[2J): name=b\\x1b[2J: letters", task("b\x1b[2J")),
])
def test_a_mistake_in_a_task_is_one_line_that_names_it(words, entry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "link" in str(entry):
        os.makedirs("runs/a")
        os.makedirs("link")
        os.symlink("../runs/a", "link/b")
    assert words in refused(tmp_path, monkeypatch, capsys, json.dumps({"tasks": [task("a"), entry]}).encode())


@pytest.mark.parametrize("words, content", [
    ("holds no tasks", b'{"tasks": []}'),
    ("holds no tasks", b"{}"),
    ('{"tasks": [...]} is wanted', b"[]"),
    ('{"tasks": [...]} is wanted', b'{"tasks": {}}'),
    ("unknown key 'task' (did you mean 'tasks'?)", b'{"task": []}'),
    ("cannot be read as JSON: Expecting", b""),
    ("cannot be read as JSON: Expecting", b'{"tasks": [}'),
    ("line 2", b'{"tasks": [],\n}'),
    ("cannot be read as JSON: maximum recursion", b"[" * 500000),
    ("cannot be read as JSON: 'utf-8' codec", b'{"tasks": ["\xff"]}'),
    ("gpus=NaN: a whole number", b'{"tasks": [{"name": "a", "preset": "taehv", "gpus": NaN}]}'),
    ("lr=NaN: a finite number", b'{"tasks": [{"name": "a", "preset": "taehv", "overrides": {"lr": NaN}}]}'),
    ("lr=Infinity: a finite number",
     b'{"tasks": [{"name": "a", "preset": "taehv", "overrides": {"data": ".", "lr": 1e999}}]}'),
    ("cannot be read as JSON: Exceeds the limit", b'{"tasks": [' + b"9" * 9999 + b"]}"),
    ("a key twice in {lr, lr}", b'{"tasks": [{"overrides": {"lr": 1, "lr": 2}}]}'),
    ("task 1 (a): ", b'{"tasks": [{"name": "a", "preset": "taehv", "gpus": ' + b"[" * 900 + b"]" * 900 + b"}]}"),
    ("more than 1 MiB", b" " * 2000000),
])
def test_a_file_that_is_none_of_tasks(words, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in refused(tmp_path, monkeypatch, capsys, content)


def refused(folder, monkeypatch, capsys, content):
    """The line that launch.py says, without having started or written anything."""
    monkeypatch.setattr(launch, "run_all", None)
    (folder / "tasks.json").write_bytes(content)
    before = sorted(os.listdir(folder))
    assert launch.main(["tasks.json", "--slots", "2"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and len(output.err) < 450, output
    assert sorted(os.listdir(folder)) == before
    return output.err.removeprefix("launch.py: ").rstrip("\n")


@pytest.mark.slow
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_task_whose_model_cannot_be_built_is_named_before_any_starts(dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = task("bad", preset="vqgan", **{"net.chh": 64})
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [task("good"), bad]}))
    assert launch.main(["tasks.json", "--slots", "2", *dry], lambda task: pytest.fail("started")) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.match("launch.py: task bad: .*'chh'.*\n$", captured.err)
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_not_there_and_no_places(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["tasks.json"]) == 2 and "No such file" in capsys.readouterr().err
    assert launch.main([str(tmp_path)]) == 2 and "directory" in capsys.readouterr().err
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [task("a")]}))
    assert launch.main(["tasks.json", "--slots", "0"]) == 2 and "--slots 0: 1 to" in capsys.readouterr().err
    (tmp_path / "runs").write_text("a file")
    monkeypatch.setattr(launch, "check_models", lambda tasks: None)  # it imports PyTorch in another process
    assert launch.main(["tasks.json", "--slots", "1"]) == 2 and "runs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_of_the_help_is_a_file_of_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(SystemExit) as caught:
        launch.main(["--help"])
    text = capsys.readouterr().out
    (tmp_path / "tasks.json").write_text(re.search(r'^ *\{"tasks".*?^ *\]\}', text, re.DOTALL | re.MULTILINE)[0])
    assert caught.value.code == 0 and launch.main(["tasks.json", "--slots", "2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"wide: .* --nproc_per_node 2 .*train.py taehv data=videos/ lr=0.0001 name=wide$", lines[0])
    assert lines[1].endswith("net.ch=64 'net.ch_mult=(1, 2, 4)' name=codes") and os.listdir(tmp_path / "videos") == []
