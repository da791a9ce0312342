"""Clips and helpers that the tests share."""

import os
import subprocess
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(ROOT, "latent_cache.py")
SMALL_CACHE = "--size 32 --frames 12 --clips 10 --shard-clips 4 --batch-size 2 --workers 0".split()


def write_clip(path, frames=24, height=72, width=96, seed=0, fps=25):
    """A small moving-texture video; frame t is brighter than frame t - 1, for the first 32."""
    rng = np.random.default_rng(seed)
    texture = cv2.resize(rng.integers(0, 160, (12, 16, 3), dtype=np.uint8), (width * 2, height * 2))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fourcc = cv2.VideoWriter_fourcc(*("MJPG" if path.endswith(".avi") else "mp4v"))
    writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, fourcc, fps, (width, height))
    assert writer.isOpened()
    for t in range(frames):
        y, x = t % height, 2 * t % width
        writer.write(texture[y : y + height, x : x + width] + np.uint8(3 * t % 96))
    writer.release()
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of six readable videos."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        write_clip(str(folder / f"sub{i % 2}" / f"clip{i}.mp4"), seed=i)
    return str(folder)


def command(*arguments, ranks=0):
    """The command line that runs a script of the repository, on `ranks` processes if that is not 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, *map(str, arguments)]


def run(*arguments, ranks=0, cwd, expect=0, timeout=240):
    """Run it to its end; returns what it printed. Fails if the exit code is not `expect`."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=cwd,
        env=environment,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, done.stdout[-4000:]
    return done.stdout


def mistake(capsys, monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        module.main()
    output = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len(output) == 1, output
    return output[0]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Weights of a TAEHV."""
    from model_taehv import TAEHV

    path = tmp_path_factory.mktemp("teacher") / "taehv.pth"
    torch.manual_seed(3)
    torch.save(TAEHV().state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def cache(clips, teacher, tmp_path_factory):
    """A finished cache: 10 clips in 3 shards."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    run(CACHE, "--teacher", f"taehv:{teacher}", "--data", clips, "--out", folder, *SMALL_CACHE, cwd=folder.parent)
    return str(folder)


def same(a, b):
    """Equal to the bit, in nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.fixture(scope="module")
def one_thread():
    """These maps are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
