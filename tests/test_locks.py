"""One command, one folder: who has it, who is refused, what is left when a command was killed. Minutes: under one."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import cache_files
import codec
import config
import infer
import latent_cache
import latent_file
import lock
import pictures
import reconstruct
import synthetic
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
    with pytest.raises(config.ConfigError, match="size=17"):
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
    assert caught.value.code == 0 and len(cache_files.LatentCache(tmp_path / "cache")) == 2
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


# ---- what is left ----------------------------------------------------------------------------------------------------


def kept(folder, elsewhere):
    """Copies all that is in a folder at this moment: what kill -9 would leave there now."""
    shutil.copytree(folder, elsewhere, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))


def files(folder):
    return sorted(os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder)
                  for name in names)


def test_the_next_infer_removes_what_a_killed_one_left_and_nothing_else(small_infer, monkeypatch):
    clip = write_clip(os.path.abspath("a.mp4"), frames=4, height=32, width=32)

    def decode(self, pieces, original=codec.Codec.decode):
        for frame in original(self, pieces):
            yield frame
            kept("inference_results", "killed")  # half of three videos and of the latents

    def replace(part, path, original=os.replace):
        kept("inference_results", "killed")
        original(part, path)

    monkeypatch.setattr(codec.Codec, "decode", decode)
    monkeypatch.setattr(os, "replace", replace)
    assert small_infer(clip, "--save-latents") == 0
    monkeypatch.undo()
    os.chdir(os.path.dirname(clip))
    whole, half = files("inference_results"), set(files("killed")) - set(files("inference_results"))
    assert len(half) == 7 and all(re.search(r"\.part$|\.part\.webm$|\.\d+\.tmp$", name) for name in half), half
    users = ["a.1.tmp", "latents/mine.tmp", "comparison_videos/a.part.webm", "tokens/a.tokens"]
    for name in users:
        os.makedirs(os.path.dirname(f"killed/{name}"), exist_ok=True)
        open(f"killed/{name}", "w").close()
    assert small_infer(clip, "--save-latents", "--out", "killed") == 0
    assert files("killed") == sorted(whole + users)


@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_full_disk_leaves_no_half_latents(size, tmp_path):
    model, reader = SimpleNamespace(config={}), SimpleNamespace(fps=1, height=800, width=800)
    path = str(tmp_path / "latents" / "a.latents.npz")
    with pytest.raises(OSError, match="too large"), files_of_at_most(size):
        with latent_file.LatentWriter(path, model, reader, frames=4, total=4) as writer:
            for _ in range(4):
                writer.write(torch.zeros(1, 1, 16, 5 if size < 9000 else 100, 100))
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing_unfinished_of_infers_files(small_infer, capsys, monkeypatch):
    clip = write_clip(os.path.abspath("a.mp4"), frames=4, height=32, width=32)
    with files_of_at_most(300):
        assert small_infer(clip, "--save-latents") == 2
    assert files("inference_results") == []
    draw = pictures.latent_picture
    with contextlib.ExitStack() as until:  # it is full when the videos are there
        monkeypatch.setattr(reconstruct, "latent_picture",
                            lambda *a, **k: (draw(*a, **k), until.enter_context(files_of_at_most(99)))[0])
        assert small_infer(clip) == 2
    assert "infer.py: [Errno 27] File too large" in capsys.readouterr().err
    assert {os.path.dirname(name) for name in files("inference_results")} == {"comparison_videos"}, "whole videos"


def test_a_cache_keeps_no_half_shards(clips, teacher, tmp_path, monkeypatch, capsys):
    """Neither after a full disk nor of a builder that was killed."""
    out = tmp_path / "cache"
    asked = ["--teacher", f"taehv:{teacher}", "--data", clips, "--out", out, *SMALL_CACHE, "--clips", 2]
    with files_of_at_most(20000):  # a shard has 73 kB of clips
        monkeypatch.setattr(sys, "argv", ["latent_cache.py", *map(str, asked)])
        with pytest.raises(SystemExit) as caught:
            latent_cache.main()
    assert caught.value.code == 2 and "latent_cache.py: [Errno 27] File too large" in capsys.readouterr().err
    assert files(out) == ["index.json"]
    half = [f"{name}.77.tmp" for name in ("shard_00000.clips.npy", "shard_00000.latents.npy", "shard_00000.json",
                                          "index.json")]
    for name in [*half, "shard_00000.notes.tmp", "mine.1.tmp"]:
        (out / name).touch()
    with pytest.raises(SystemExit) as caught:
        latent_cache.main()
    assert caught.value.code == 0 and not set(half) & set(files(out))
    assert {"shard_00000.notes.tmp", "mine.1.tmp"} < set(files(out)), "the user's own"


def test_the_demos_clips_are_made_by_two_at_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, small = str(tmp_path / "demo"), dict(videos=4, frames=3, size=32)
    for age, name in ((0, "demo.7.tmp"), (9999, "demo.8.tmp"), (9999, "demo.mine.tmp")):
        os.mkdir(tmp_path / name)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with pytest.raises(OSError, match="is not whole; is the disk full"), files_of_at_most(1500):
        synthetic.make_demo(folder, **small)
    assert sorted(os.listdir(tmp_path)) == ["demo.7.tmp", "demo.mine.tmp"], "a killed one's is gone, one at work stays"

    def rename(*names, original=os.rename):  # the other is quicker
        monkeypatch.setattr(os, "rename", original)
        monkeypatch.setattr(os, "getpid", lambda: 99)
        synthetic.make_demo(folder, **small)
        monkeypatch.undo()
        original(*names)

    monkeypatch.setattr(os, "rename", rename)
    synthetic.make_demo(folder, **small)
    assert sorted(os.listdir(tmp_path)) == ["demo", "demo.7.tmp", "demo.mine.tmp"] and len(files(folder)) == 5


# ---- the output among the input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["videos/../videos/results", ".", "link"])
def test_outputs_are_no_inputs_of_the_next_command(out, small_infer, capsys):
    write_clip("videos/a.mp4", frames=4, height=32, width=32)
    os.symlink("videos", "link")
    for _ in range(2):
        assert small_infer("." if out == "." else "videos", "--out", out) == 0
        with open(f"{out}/metrics.json") as file:
            assert [row["name"] for row in json.load(file)["rows"]] == ["a"]
    os.remove(f"{out}/summary_report.html")  # by which outputs are known otherwise
    assert small_infer("." if out == "." else "videos", "--out", out) == 0
    assert re.search(r": 4 files that are outputs of --out \S+ are left out\n", capsys.readouterr().out)
    assert small_infer(f"{out}/comparison_videos", "--out", out) == 2
    assert "holds nothing but what is written to --out" in capsys.readouterr().err


def test_a_cache_among_its_videos_and_a_run_among_its_own_are_no_inputs(here, teacher, tmp_path, monkeypatch):
    write_clip(str(tmp_path / "a.mp4"), frames=12, height=32, width=32)
    write_clip(str(tmp_path / "b.mp4"), frames=12, height=32, width=32)
    asked = ["--teacher", f"taehv:{teacher}", "--data", tmp_path, "--out", tmp_path / "cache", *SMALL_CACHE]
    monkeypatch.setattr(sys, "argv", ["latent_cache.py", *map(str, asked)])
    with pytest.raises(SystemExit) as caught:
        latent_cache.main()
    assert caught.value.code == 0
    settings = [*FRAMES, f"data={tmp_path}", "val_fraction=0.5", "val_every=1", "name=a"]
    folder = here(*settings, "max_steps=1")
    here(*settings, "max_steps=2")
    assert log_of(folder).count("training: 1 files") == log_of(folder).count("validation: 1 files") == 2
