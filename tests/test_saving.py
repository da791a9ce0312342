"""Saving where there is little room, no room, or no folder: what is saved, and what is said. Minutes: under one."""

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import data
import launch
import lock
import logbook
import objective
import saving
import train
import video_files
from conftest import FRAMES, ROOT, SERAENA, different, log_of, metrics_of, mistake, run, spoilt, state_of
from test_faults import run_state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and locks as Linux has them")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk for what checkpoint.py writes below tmp_path: `size` bytes, and whether it is `read_only`."""
    state = SimpleNamespace(size=1 << 40, read_only=False)

    class File(io.FileIO):
        def write(self, content):
            used = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(tmp_path) for name in names)
            if used + len(content) > state.size:
                super().write(bytes(content)[:max(0, state.size - used)])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    def open_file(path, mode):
        if state.read_only:
            raise OSError(errno.EROFS, "Read-only file system")
        return File(path, mode)

    monkeypatch.setattr(checkpoint, "open", open_file, raising=False)
    return state


def used(folder):
    return sum(os.path.getsize(folder / name) for name in os.listdir(folder))


def steps_in(folder):
    return sorted(map(checkpoint.step_of, checkpoint.checkpoints(str(folder))))


# ---- the files ---------------------------------------------------------------------------------------------------


def save(folder, step, keep_last=9):
    return checkpoint.save_run(str(folder), run_state(step), keep_last)


def test_a_full_disk_takes_older_checkpoints_but_never_the_newest_good_one(tmp_path, disk, capsys):
    """Nor best.pt. Their ranks' files go with them; those of the step that is being saved stay."""
    assert [save(tmp_path, step) for step in range(1, 5)] == [""] * 4
    assert checkpoint.save_best(str(tmp_path), run_state(3)) == ""
    path = tmp_path / "step_00000004.pt"
    path.write_bytes(path.read_bytes()[:-99])
    for step in (1, 3, 5):
        checkpoint.save_rank(str(tmp_path), step, 1, {"replay": 0})
    disk.size = used(tmp_path) + os.path.getsize(tmp_path / "step_00000001.pt") - 1
    assert save(tmp_path, 5) == "" and steps_in(tmp_path) == [2, 3, 4, 5]
    assert capsys.readouterr().out == f"the disk is full: {tmp_path}/step_00000001.pt was removed to make room\n"
    left = sorted(name for name in os.listdir(tmp_path) if not name.endswith(".pt"))
    assert left == ["model.pth", "step_00000003.rank1", "step_00000005.rank1"]
    path = tmp_path / "step_00000005.pt"
    path.write_bytes(b"")
    disk.size = used(tmp_path) - 100_000
    assert save(tmp_path, 6) == "[Errno 28] No space left on device"
    assert steps_in(tmp_path) == [3], "step 3 is the newest that can be read"
    assert (tmp_path / "best.pt").exists() and not list(tmp_path.glob("*.tmp"))
    disk.size = 1 << 40
    assert [save(tmp_path, 8, 1), steps_in(tmp_path)] == ["", [8]], "older ones go after the new one is there"


def test_best_pt_finds_room_too(tmp_path, disk):
    assert [save(tmp_path, step) for step in (1, 2)] == ["", ""]
    disk.size = used(tmp_path) + 1000
    assert checkpoint.save_best(str(tmp_path), run_state(2)) == "" and steps_in(tmp_path) == [2]
    assert "No space" in checkpoint.save_best(str(tmp_path), run_state(3)) and steps_in(tmp_path) == [2]


def test_what_is_saved_is_saved_though_older_ones_cannot_be_removed(tmp_path, monkeypatch, capsys):
    assert save(tmp_path, 1) == ""

    def refuse(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    monkeypatch.setattr(os, "remove", refuse)
    assert save(tmp_path, 2, 1) == "" and steps_in(tmp_path) == [1, 2]
    assert "warning: older checkpoints are not removed: [Errno 1] Operation not permitted" in capsys.readouterr().out


# ---- whole runs --------------------------------------------------------------------------------------------------


STEPS = [*FRAMES, "max_steps=6", "save_every=2"]


def test_a_run_ends_saved_where_a_checkpoint_less_makes_room(here, at, disk, tmp_path):
    at({5: lambda: setattr(disk, "size", used(tmp_path / "tight") + 2_000_000)})
    folder = here(*STEPS, "name=tight")
    assert steps_in(folder) == [4, 6] and "step_00000002.pt was removed to make room" in log_of(folder)
    assert "done: 6 steps" in log_of(folder)


def no_data(monkeypatch):
    def read(*_):
        raise video_files.DataError("injected")

    monkeypatch.setattr(data.TrainClips, "read", read)


ENDINGS = {
    "its last step": lambda monkeypatch: None,
    "SIGTERM": lambda monkeypatch: os.kill(os.getpid(), signal.SIGTERM),
    "Ctrl-C": lambda monkeypatch: os.kill(os.getpid(), signal.SIGINT),
    "no data": no_data,
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_run_that_could_not_save_says_so_however_it_ends(name, here, at, disk, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    at({3: lambda: setattr(disk, "size", used(folder)), 5: lambda: ENDINGS[name](monkeypatch)})
    end = re.escape(f"not saved: [Errno 28] No space left on device; on disk: step 2 ({folder})")
    with pytest.raises(saving.NotSaved, match=f"no data .* at step 5; {end}. Look at" if name == "no data" else end):
        here(*STEPS, "name=full")
    log = log_of(folder)
    assert ("the checkpoint of step 4 could not be saved: [Errno 28] No space left on device; the run goes on; on disk:"
            f" step 2 ({folder})") in log
    last, = [line for line in metrics_of(folder) if line["kind"] in launch.ENDINGS]
    assert last == {"step": 6 if name == "its last step" else 5, "kind": "not saved", "reason": last["reason"]}
    assert re.fullmatch(end, f"not saved: {last['reason']}") and metrics_of(folder)[-1] == last
    assert re.search(end + "\n$", log) and not re.search("done|goes on from here|run is saved", log)
    assert steps_in(folder) == [2] and not list(folder.glob("*.tmp"))


def test_the_exit_code_is_1(clips, at, disk, tmp_path, capsys, monkeypatch):
    """Of a disk that becomes read-only before anything is saved."""
    at({2: lambda: setattr(disk, "read_only", True)})
    monkeypatch.setattr(sys, "argv", ["train.py", *STEPS, f"data={clips}", f"out_dir={tmp_path}", "name=a"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 1
    words = "train.py: not saved: [Errno 30] Read-only file system; nothing is on disk"
    assert capsys.readouterr().err.splitlines()[-1] == words


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_refused_before_the_first_step(number, clips, disk, tmp_path, capsys, monkeypatch):
    disk.size, disk.read_only = 0, number == errno.EROFS
    line = mistake(capsys, monkeypatch, train, *STEPS, f"data={clips}", f"out_dir={tmp_path}/runs", "name=a")
    assert line == (f"train.py: out_dir={tmp_path}/runs: {tmp_path}/runs/a cannot be made or written to "
                    f"({os.strerror(number)})")
    assert os.listdir(tmp_path / "runs") == [], "nothing half-made"


def test_a_disk_without_room_for_one_checkpoint_is_told_before_the_first_step(here, tmp_path, monkeypatch):
    os.makedirs(tmp_path / "a")
    (tmp_path / "a" / "probe.1.tmp").write_bytes(b"of a killed run")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    folder = here(*FRAMES, "max_steps=1", "name=a")
    assert re.search(r"warning: a checkpoint takes 4 MB or more, and the disk of \S+ has 3 MB: make", log_of(folder))
    assert 4_000_000 < sum(os.path.getsize(folder / name) for name in ("step_00000001.pt", "model.pth")) < 5_000_000
    assert not list(folder.glob("probe*"))
    here(*FRAMES, "max_steps=2", "name=a")
    here(*FRAMES, "max_steps=3", "name=a")
    assert log_of(folder).count("warning: a checkpoint takes") == 2, "not where an older one can make room"


# ---- the folder goes away ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_full_disk_leaves_the_settings_of_before(tmp_path, monkeypatch, capsys):
    book = logbook.Logbook(str(tmp_path), 0)
    book.config = {"lr": 1.0}
    book.write_config()

    def full(path, content):
        open(f"{path}.part", "wb").close()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    book.config = {"lr": 2.0}
    book.write_config()
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1.0}
    assert "No space left on device; the run goes on" in capsys.readouterr().err


def remove(folder):
    """rmtree, though TensorBoard's thread may be writing there at the same time."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def test_a_folder_that_is_removed_is_made_and_locked_again(here, at, tmp_path):
    folder, holders = tmp_path / "gone", []
    at({4: lambda: remove(folder), 5: lambda: holders.append(lock.holder(str(folder)))})
    here(*STEPS, "val_fraction=0.3", "val_every=6", "name=gone")
    assert steps_in(folder) == [4, 6] and (folder / "best.pt").exists() and (folder / "model.pth").exists()
    assert json.loads((folder / "config.json").read_text())["max_steps"] == 6
    log = log_of(folder)
    assert f"{folder} was removed, and with it what was saved; it is made again" in log and "done: 6 steps" in log
    assert [(line["kind"], line["step"]) for line in metrics_of(folder)] == [
        ("saved", 4), ("train", 5), ("train", 6), ("val", 6), ("saved", 6), ("done", 6)]
    assert str(os.getpid()) in holders[0] and not (folder / ".lock").exists()
    assert "TensorBoard's curves go on, in a new file; some before this step are missing" in log


def test_a_removed_folder_that_another_run_has_made_is_left_alone(here, at, tmp_path):
    folder = tmp_path / "taken"

    def take():
        remove(folder)
        os.makedirs(folder)
        other = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        os.write(other, b"pid 77 on elsewhere since today (train.py)")
        assert lock.lock(other) == ""
        (folder / "step_00000099.pt").write_bytes(b"theirs")

    at({4: take})
    with pytest.raises(saving.NotSaved) as caught:
        here(*STEPS, "name=taken")
    assert str(caught.value) == (f"not saved: {folder} is in use by pid 77 on elsewhere since today (train.py), and "
                                 "was removed before; nothing is on disk")
    assert [name for name in os.listdir(folder) if re.search("pt|tmp|json", name)] == ["step_00000099.pt"]
    assert (folder / "step_00000099.pt").read_bytes() == b"theirs"


# ---- while training goes on ---------------------------------------------------------------------------------------


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_a_copy_is_saved_as_the_state_itself_to_the_bit():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    rows = torch.arange(12.0).view(3, 4)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "parts": (rows[1:], rows[:, 2], [rows]),
             "counts": {0: torch.arange(3)}, "names": ["loss", "loss"], "empty": torch.empty(0, 3), "step": 7}
    before, memory = saved(state), []
    copy = saving.copied(state, memory)
    places = [storage.data_ptr() for storage in memory]
    with torch.no_grad():
        for tensor in saving.tensors_in(state):
            tensor.add_(1)
    state["optimizer"]["state"][0]["step"] = None
    state["names"].clear()
    assert saved(copy) == before
    state["names"] += ["loss", "loss"]
    state["optimizer"]["state"][0]["step"] = torch.tensor(2.0)
    assert saved(saving.copied(state, memory)) == saved(state) != before
    assert [storage.data_ptr() for storage in memory] == places, "the same memory, again"


@pytest.fixture
def held(monkeypatch):
    """The file of step 2 is begun, and ended once `held.release` is set; `held.steps` are those that have begun."""
    held = SimpleNamespace(release=threading.Event(), steps=[])
    write, begin = checkpoint.write_atomically, objective.Objective.begin

    def write_late(path, content):
        assert ".pt" not in path or threading.current_thread() is not threading.main_thread()
        if "step_00000002" in path:
            with open(f"{path}.1.tmp", "wb") as file:
                file.write(bytes(999))
            assert held.release.wait(60)
        write(path, content)

    monkeypatch.setattr(objective.Objective, "begin",
                        lambda self, step: (held.steps.append(step + 1), begin(self, step))[1])
    monkeypatch.setattr(checkpoint, "write_atomically", write_late)
    return held


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_waits_for_it(here, held, monkeypatch):
    held.release.set()
    calm = here(*STEPS, "val_fraction=0.3", "val_every=6", "name=calm")
    held.release.clear()
    held.steps.clear()
    settle = saving.Saver.settle

    def settle_late(self, names=("run", "best")):
        if names and held.steps[-1:] == [4]:
            held.release.set()
        settle(self, names)

    monkeypatch.setattr(saving.Saver, "settle", settle_late)
    folder = here(*STEPS, "name=late", "val_fraction=0.3", "val_every=6")
    assert held.steps == [1, 2, 3, 4, 5, 6]
    assert "step 4: waits, as step 2 is still being written" in log_of(folder)
    kinds = [(line["kind"], line["step"]) for line in metrics_of(folder) if line["step"] in (2, 3, 4)]
    assert kinds[:4] == [("train", 2), ("train", 3), ("train", 4), ("saved", 2)]
    for step in (2, 4, 6):
        differences = different(state_of(calm, step), state_of(folder, step))
        assert set(differences) <= {"state.config.name"}, "what was saved is as it was in that step"
    assert not list(folder.glob("*.tmp"))


class Wrong(Exception):
    pass


def wrong():
    raise Wrong


def test_a_run_that_ends_by_an_error_finishes_what_it_writes(here, held, monkeypatch, tmp_path):
    close, begin, held_then = saving.Saver.close, objective.Objective.begin, []
    monkeypatch.setattr(objective.Objective, "begin",
                        lambda self, step: begin(self, step) if step < 2 else wrong())

    def close_late(self):
        held_then.extend([steps_in(tmp_path / "a"), lock.holds(str(tmp_path / "a"))])
        held.release.set()
        close(self)

    monkeypatch.setattr(saving.Saver, "close", close_late)
    with pytest.raises(Wrong):
        here(*STEPS, "name=a")
    assert held_then == [[], True] and steps_in(tmp_path / "a") == [2] and not lock.holds(str(tmp_path / "a"))
    assert metrics_of(tmp_path / "a")[-1] == {"step": 2, "kind": "saved"}


def test_an_unexpected_error_of_the_thread_ends_the_run(here, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_run", lambda *_: wrong())
    with pytest.raises(Wrong):
        here(*STEPS, "name=a")


def test_without_memory_for_a_copy_training_waits(here, monkeypatch):
    calm = here(*STEPS, "name=calm")

    def no_room(state, memory):
        raise MemoryError

    monkeypatch.setattr(saving, "copied", no_room)
    folder = here(*STEPS, "name=short")
    assert log_of(folder).count("warning: no memory for a copy of what is saved (4 MB): training waits while") == 3
    assert set(different(state_of(calm, 4), state_of(folder, 4))) <= {"state.config.name"}
    kinds = [(line["kind"], line["step"]) for line in metrics_of(folder)]
    assert kinds[2:5] == [("train", 2), ("saved", 2), ("train", 3)]


KILLED = """
import os, signal, sys, threading
sys.path.insert(0, {root!r})
import checkpoint, objective, train
write, begin = checkpoint.write_atomically, objective.Objective.begin
in_the_middle, later = threading.Event(), threading.Event()
def killed(path, content):
    if "step_00000004.pt" in path:
        with open(f"{{path}}.{{os.getpid()}}.tmp", "wb") as file:
            file.write(bytes(12345))
        in_the_middle.set()
        later.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
def note(self, step):
    if step == 5:  # the sixth: the fifth was done meanwhile
        in_the_middle.wait(60)
        later.set()
        threading.Event().wait(60)
    begin(self, step)
checkpoint.write_atomically, objective.Objective.begin = killed, note
train.main()
"""


@pytest.mark.slow
def test_a_run_killed_while_a_thread_writes_goes_on_from_the_checkpoint_before(here, clips, tmp_path):
    settings = [*FRAMES, "save_every=2", "max_steps=7", "keep_last=9"]
    whole = here(*settings, "name=whole")
    (tmp_path / "killed.py").write_text(KILLED.format(root=ROOT))
    run("killed.py", *settings, f"data={clips}", f"out_dir={tmp_path}", "name=killed", cwd=tmp_path,
        expect=-signal.SIGKILL)
    folder = tmp_path / "killed"
    assert steps_in(folder) == [2] and len(list(folder.glob("step_00000004.pt.*.tmp"))) == 1
    here(*settings, "name=killed")
    assert "step_00000002.pt at step 2" in log_of(folder) and not list(folder.glob("*.tmp"))
    assert set(different(state_of(whole, 7), state_of(folder, 7))) <= {"state.config.name"}


# ---- two ranks ---------------------------------------------------------------------------------------------------

FULL = """
write = checkpoint.write_atomically
def limited(path, content):
    folder, name = os.path.split(path)
    if "00003.rank" in name and os.path.exists(folder + "/step_00000001.pt") or "00004.pt" in name:
        raise OSError(28, "No space left on device")
    write(path, content)
checkpoint.write_atomically = limited
"""


@pytest.mark.slow
def test_ranks_make_room_together_and_end_alike(clips, tmp_path):
    """In step 3 the ranks' files find room once step 1 is removed; in step 4 nothing makes room for the step file."""
    output = run(spoilt(tmp_path, FULL), *SERAENA, f"data={clips}", "max_steps=4", "save_every=1", "name=two",
                 "timeout_minutes=1", "keep_last=9", ranks=2, cwd=tmp_path, expect=1)
    folder = tmp_path / "runs" / "two"
    assert "step_00000001.pt was removed to make room" in log_of(folder)
    assert "not saved: [Errno 28] No space left on device; on disk: step 3 (runs/two)\n" in log_of(folder)
    assert "done" not in log_of(folder) and output.count("train.py: not saved") == 1 and "rank 0: " not in output
    names = [name for name in os.listdir(folder) if name.startswith("step")]
    assert sorted(names) == ["step_00000003.pt", "step_00000003.rank0", "step_00000003.rank1"]
    assert re.search(r"exitcode *: 1\b", output)


WRONG = """
if dist_rank == {rank}:
    def wrong(*_):
        with open("failed", "w") as file:
            file.write(str(time.time()))
        raise ValueError("injected")
    checkpoint.{what} = wrong
"""


@pytest.mark.slow
@pytest.mark.parametrize("what, rank", [("save_run", 0), ("save_rank", 1)])
def test_an_unexpected_error_of_one_ranks_thread_ends_all(what, rank, clips, tmp_path):
    """save_run: rank 0 tells the others in their threads; save_rank: they wait for an answer."""
    faults = 'import time\ndist_rank = int(os.environ["RANK"])\n' + WRONG.format(rank=rank, what=what)
    output = run(spoilt(tmp_path, faults), *FRAMES, f"data={clips}", "max_steps=400", "save_every=2", ranks=2,
                 cwd=tmp_path, expect=1)
    assert time.time() - float((tmp_path / "failed").read_text()) < 30, "timeout_minutes is 30"
    assert f"rank {rank}: ValueError: injected" in output
    assert steps_in(tmp_path / "runs" / "vqgan_ema") == []
