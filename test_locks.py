"""One command, one folder: who has it, who is refused, and what is left when a command was killed. Minutes: under one."""

import errno
import os
import re
import signal
import sys

import pytest
import torch

import codec
import config
import infer
import latent_cache
import lock
import train
from conftest import FRAMES, SMALL_CACHE, log_of, mistake, write_clip
from model_taehv import TAEHV
from test_launch import begin, end, task

pytestmark = pytest.mark.usefixtures("one_thread")
US = rf"is in use by pid {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \(.*\): wait for its end, or "


@pytest.fixture
def small_infer(tmp_path, monkeypatch):
    """Runs infer.py in this process, in a folder with the weights taehv.pth; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    torch.save(TAEHV(encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32)).state_dict(), "taehv.pth")

    def infer_py(*arguments):
        monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", *map(str, arguments), "--lpips", "none", "--device",
                                          "cpu", "--precision", "fp32"])
        try:
            return infer.main() or 0
        except SystemExit as caught:
            return caught.code

    return infer_py


def refusal(capsys, *arguments):
    capsys.readouterr()  # the bars of the command that goes on
    return mistake(capsys, *arguments)


# ---- the lock itself -------------------------------------------------------------------------------------------------


def test_a_folder_is_had_by_one_until_its_block_ends_and_what_is_made_goes(tmp_path):
    folder = str(tmp_path / "runs" / "a")
    with pytest.raises(ZeroDivisionError), lock.locked(folder, "leave it") as unlocked:
        assert unlocked == "" and str(os.getpid()) in lock.holder(folder)
        with pytest.raises(lock.InUse, match=US + "leave it"), lock.locked(folder, "leave it"):
            pass
        assert os.listdir(folder) == [".lock"]
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "runs") == [] and lock.holder(folder) == ""
    os.mkdir(folder)
    with open(f"{folder}/.lock", "w") as file:
        file.write("pid 1 on here since yesterday (a command that was killed)\n" * 99)
    assert lock.holder(folder) == ""
    with lock.locked(folder, "leave it"):
        assert "yesterday" not in lock.holder(folder)
    assert os.listdir(folder) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_death_gives_a_folder_back_though_a_child_lives_on(tmp_path):
    """kill -9 of a process, whose forked child goes on, with all descriptors that it has inherited."""
    child_ends, mine = os.pipe()
    killed = os.fork()
    if killed == 0:
        try:
            os.close(mine)
            with lock.locked(str(tmp_path), "leave it"):
                if os.fork() == 0:
                    os.read(child_ends, 1)  # until the test is over
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    assert f"pid {killed} on " in (tmp_path / ".lock").read_text(), "what it has written is there"
    with lock.locked(str(tmp_path), "leave it"):
        pass
    os.close(mine)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_nothing_can_be_locked_it_is_said_and_the_command_goes_on(number, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    for _ in range(2):
        with lock.locked(str(tmp_path), "leave it") as one, lock.locked(str(tmp_path), "leave it") as two:
            assert one == two == f"{tmp_path} cannot be locked ({os.strerror(number)}): start no other command that " \
                                 "writes there"
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.locked(str(tmp_path), "leave it") as unlocked:
        assert "this system has no flock" in unlocked


@pytest.mark.parametrize(("host", "limit"), [("", 10), ("x", 120)])
def test_torchruns_new_ranks_wait_for_the_old_ones_to_die(host, limit, tmp_path, monkeypatch, capsys):
    """And longer for those of a machine that may be dead, whose locks a server keeps for a while."""
    monkeypatch.setenv("RANK", "0")
    before, slept, own_host = lock.locked(str(tmp_path), ""), [], lock.socket.gethostname()
    monkeypatch.setattr(lock.socket, "gethostname", lambda: own_host + host * (not slept))
    before.__enter__()
    monkeypatch.setattr(lock.socket, "gethostname", lambda: own_host)

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            before.__exit__(None, None, None)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with lock.locked(str(tmp_path), "leave it"):
        pass
    said = capsys.readouterr().err
    assert len(slept) == 3 and said.count("\n") == 1 and f"waiting up to {limit} seconds for its end" in said


# ---- each command ----------------------------------------------------------------------------------------------------


def test_a_second_run_of_one_name_is_refused_and_the_first_goes_on(here, at, clips, tmp_path, monkeypatch, capsys):
    second = ["keep_last=1", "max_steps=1", f"data={clips}", f"out_dir={tmp_path}", "name=a"]
    lines = []
    at({2: lambda: lines.append(refusal(capsys, monkeypatch, train, *FRAMES, *second))})
    folder = here(*FRAMES, "max_steps=3", "save_every=1", "name=a")
    assert re.fullmatch(rf"train.py: {re.escape(str(folder))} {US}choose another name=", lines[0])
    names = os.listdir(folder)
    assert sorted(n for n in names if n.endswith(".pt")) == [f"step_0000000{n}.pt" for n in (1, 2, 3)]
    assert ".lock" not in names and log_of(folder).count("config: ") == 1
    with pytest.raises(config.ConfigError, match="size 17"):
        here(*FRAMES, "size=17", "name=b")
    assert not os.path.exists(tmp_path / "b"), "a run that is refused leaves nothing"
    (tmp_path / "file").touch()
    line = refusal(capsys, monkeypatch, train, *FRAMES, f"data={clips}", f"out_dir={tmp_path}/file")
    assert re.match(r"train.py: out_dir=.*file: .* cannot be made or written to \(.*\)$", line)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_task_of_launch_whose_folder_a_run_has_fails_with_that_reason(tmp_path):
    with lock.locked(str(tmp_path / "runs" / "taken"), "leave it"):
        output = end(begin(tmp_path, [task("taken"), task("free")], "--slots", "1"), 1)
    assert re.search(rf"taken +failed .* runs/taken is in use by pid {os.getpid()} on ", output), output
    assert re.search("free +done", output) and "failed: taken" in output
    assert "not started: runs/taken is in use by" in (tmp_path / "runs" / "taken" / "launch.log").read_text()


def test_a_second_builder_of_one_cache_is_refused(clips, teacher, tmp_path, monkeypatch, capsys):
    asked = ["--teacher", f"taehv:{teacher}", "--data", clips, "--out", tmp_path / "cache", *SMALL_CACHE, "--clips", 2]
    lines = []

    def write_shards(*arguments, original=latent_cache.write_shards, **keywords):
        lines.append(refusal(capsys, monkeypatch, latent_cache, *asked))
        original(*arguments, **keywords)

    monkeypatch.setattr(latent_cache, "write_shards", write_shards)
    monkeypatch.setattr(sys, "argv", ["latent_cache.py", *map(str, asked)])
    with pytest.raises(SystemExit) as caught:
        latent_cache.main()
    assert caught.value.code == 0 and len(latent_cache.LatentCache(tmp_path / "cache")) == 2
    assert re.fullmatch(rf"latent_cache.py: \S+cache {US}choose another --out", lines[0])
    assert sorted(name.split(".")[0] for name in os.listdir(tmp_path / "cache")) == ["index", *["shard_00000"] * 3]


def test_a_second_infer_of_one_out_is_refused(small_infer, monkeypatch, capsys):
    clip, lines = write_clip(os.path.abspath("a.mp4"), frames=4, height=32, width=32), []

    def decode(self, pieces, original=codec.Codec.decode):
        lines.append(refusal(capsys, monkeypatch, infer, "taehv.pth", clip))
        yield from original(self, pieces)

    monkeypatch.setattr(codec.Codec, "decode", decode)
    assert small_infer(clip) == 0
    assert re.fullmatch(rf"infer.py: inference_results {US}choose another --out", lines[0])
    assert sorted(os.listdir("inference_results")) == ["comparison_videos", "latent_visualizations", "metrics.json",
                                                       "summary_report.html"]
    assert small_infer("nowhere.mp4", "--out", "new") == 2 and not os.path.exists("new")
