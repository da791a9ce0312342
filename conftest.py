"""Clips and helpers that the tests share."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(ROOT, "latent_cache.py")
SMALL_CACHE = "--size 32 --frames 12 --clips 10 --shard-clips 4 --batch-size 2 --workers 0 --precision fp32".split()


# ---- what precision=auto means ---------------------------------------------------------------------------------------
# AUTO_PRECISION=bf16 or fp32 says it for all tests and for the commands that they start, whatever this machine has;
# "other" takes what it would not take. Tests of commands that choose for themselves are marked `auto_precision`:
# .ci/run runs these both ways. Those that ask and end the same either way (mistakes, say) are marked `any_precision`.
# A test that compares numbers says which precision it means.

AT_START = tempfile.TemporaryDirectory()  # on the path of all processes: Python runs its sitecustomize.py
ASKED = os.path.join(AT_START.name, "asked")
with open(os.path.join(AT_START.name, "auto_precision.py"), "w") as file:
    file.write(f"""
import importlib.machinery, os, sys
def change(torch_cpu):
    names = "_is_amx_tile_supported", "_is_avx512_bf16_supported"
    here = [getattr(torch_cpu, name, bool) for name in names]
    def is_supported():
        open({ASKED!r}, "w").close()
        meant = os.environ.get("AUTO_PRECISION", "")
        if meant in ("bf16", "fp32"):
            return meant == "bf16"
        return any(has() for has in here) != (meant == "other")
    for name in names:
        setattr(torch_cpu, name, is_supported)
class AfterItsImport:  # processes that do without torch, which takes seconds, still do
    def find_spec(name, path, target=None):
        if name == "torch.cpu":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), change(module))
            return spec
sys.meta_path.insert(0, AfterItsImport)
""")
with open(os.path.join(AT_START.name, "sitecustomize.py"), "w") as file:
    file.write("import auto_precision\n")
os.environ["PYTHONPATH"] = os.pathsep.join([AT_START.name, ROOT, os.path.join(ROOT, "tests")])
sys.path.insert(0, AT_START.name)
import auto_precision  # noqa: E402

auto_precision.change(torch.cpu)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds, for its ranks, runs or measurements; CI runs it too")
    config.addinivalue_line("markers", "auto_precision: runs commands that choose their precision by the machine")
    config.addinivalue_line("markers", "any_precision: asks what the machine would take, and is the same either way")


@pytest.fixture(autouse=True)
def auto_precision_is_marked(request):
    """No test lets the machine choose a precision without the mark, in any of its processes."""
    yield
    if os.path.exists(ASKED):
        os.remove(ASKED)
        marks = {mark.name for mark in request.node.iter_markers()}
        assert marks & {"auto_precision", "any_precision"}, "precision=auto: say which, or mark the test (conftest.py)"


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


@pytest.fixture(params=["PyAV", "OpenCV"])
def video_encoder(request, monkeypatch):
    """What video_writer.VideoWriter writes through in this test: PyAV, or OpenCV as where PyAV is not installed."""
    if request.param == "PyAV":
        pytest.importorskip("av")
    else:
        monkeypatch.setitem(sys.modules, "av", None)
    return request.param


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


def run(*arguments, ranks=0, cwd, expect=0, timeout=240, fresh=False):
    """Run it to its end; returns what it printed. Fails if the exit code is not `expect`. Unless it is to be fresh, it
    runs in a fork of a process that has imported PyTorch, its ranks too (tests/warm.py): 2 s less, and 8 s with two
    ranks. fresh: for tests of what torchrun says or does, or of how the interpreter starts and ends. FRESH=1 before the
    test command makes all of them so."""
    if fresh or "FRESH" in os.environ or sys.platform != "linux":
        done = subprocess.run(
            command(*arguments, ranks=ranks),
            cwd=cwd,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code, output = done.returncode, done.stdout
    else:
        code, output = run_warm(list(map(str, arguments)), ranks, str(cwd), timeout)
    assert code == expect, output[-4000:]
    return output


@functools.cache
def warm():
    line = [sys.executable, os.path.join(ROOT, "tests", "warm.py")]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)  # it ends with this process


def run_warm(arguments, ranks, cwd, timeout):
    """(exit code, what it printed)"""
    with tempfile.NamedTemporaryFile("r") as output:
        asked = dict(arguments=arguments, ranks=ranks, cwd=cwd, output=output.name, environment=dict(os.environ))
        warm().stdin.write(json.dumps(asked).encode() + b"\n")
        pid, ended = int(warm().stdout.readline()), False
        try:
            ended = bool(select.select([warm().stdout], [], [], timeout)[0])
            assert ended, f"still running after {timeout} s: {output.read()[-4000:]}"
            return int(warm().stdout.readline()), output.read()
        finally:
            if not ended:
                kill_with_descendants(pid)
                warm().stdout.readline()


def kill_with_descendants(pid):
    for child in open(f"/proc/{pid}/task/{pid}/children").read().split():  # each rank leads a session of its own
        kill_with_descendants(int(child))
    os.kill(pid, signal.SIGKILL)


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
    from init_taehv import colours
    from model_taehv import TAEHV

    path = tmp_path_factory.mktemp("teacher") / "taehv.pth"
    torch.manual_seed(3)
    torch.save(colours(TAEHV()).state_dict(), path)
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


@torch.no_grad()
def transport_plan(quantizer, z):
    """The whole plan of a SinkhornQuantizer for a small batch (N C H W or N C T H W): (pieces, n_embed), rows sum to
    1."""
    from quantize import true_float32

    pieces = z.movedim(1, -1).reshape(-1, quantizer.code_dim).float()
    with true_float32(z.device.type):
        plan = quantizer.plan(pieces, quantizer.proj(quantizer.embedding.weight).float())
        return torch.cat([p / p.sum(1, keepdim=True) for p in plan])


@pytest.fixture(scope="module")
def one_thread():
    """These maps are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sums_are_channels_last(monkeypatch):
    """Fails at a convolution that adds its result to a map of another layout: PyTorch does not hand that to oneDNN, and
    refuses it in bfloat16 where the CPU has that ("Unsupported datatype for add_relu"). Returns the shapes seen."""
    import fast_taehv

    seen, original = [], fast_taehv.Conv.__call__

    def checked(self, x, into=None, relu=False):
        if into is not None:
            seen.append(tuple(into.shape))
            assert into.is_contiguous(memory_format=torch.channels_last), (seen[-1], into.stride())
            assert x.dtype == into.dtype == self.weight.dtype
        return original(self, x, into, relu)

    monkeypatch.setattr(fast_taehv.Conv, "__call__", checked)
    return seen


# ---- small runs, and faults in them ----------------------------------------------------------------------------------

COMMON = "workers=0 val_fraction=0 warmup_steps=2 schedule=constant precision=fp32 device=cpu log_every=1".split()
COMMON += "save_every=100 val_every=100 color_jitter=0.1 perceptual_weight=0 gan_ramp=2 gan_start=0".split()
SCRATCH = ["taehv", "init=colours"]  # init=clips reads 48 clips first
NET = "net.ch=32 net.ch_mult=(1,1) net.num_res_blocks=1 net.attn_resolutions=() net.resolution=32 net.z_channels=8"
CODES = [*COMMON, *NET.split(), "net.embed_dim=8", "batch_size=2"]
FRAMES = ["vqgan_ema", *CODES, *"net.n_embed=16 net.kmeans_init=false net.restart_below=0 size=16 gan_weight=0".split()]
BATCH_NORM = "vqvae2 net.hidden_channels=8 net.res_channels=4 net.nb_res_layers=1 net.nb_levels=2".split()
BATCH_NORM += [*"net.embed_dim=4 net.nb_entries=8 net.scaling_rates=(4,2) size=16 batch_size=2".split(), *COMMON]
# What presets want besides: these are checked by config.py, which opens no file.
NEEDS = {"taehv_finetune": ["init_from=FILE.pth"], "vq_latents": ["init_from=FILE.pth", "latent_cache=FOLDER"],
         "taehv_distill": ["latent_cache=FOLDER"], "taehv_seraena": ["latent_cache=FOLDER"]}
NARROW = ["net.encoder_widths=32,32,32,32", "net.decoder_widths=64,32,32,32"]  # for what width has no part in
PLAIN = [*SCRATCH, "size=16", "frames=4", "batch_size=1", *COMMON]
SERAENA = [*PLAIN, "seraena_weight=0.5", "seraena_replay_mb=2", *NARROW]


def shapeless(settings):
    """Settings without those that buckets have themselves."""
    return [word for word in settings if not word.startswith(("size=", "frames=", "batch_size="))]


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    """(a folder, the run in it after 4 steps of two ranks, with validation, what training printed)."""
    folder = tmp_path_factory.mktemp("trained")
    output = run(os.path.join(ROOT, "train.py"), *PLAIN, f"data={clips}", "val_fraction=0.3", "max_steps=4",
                 "val_every=2", "save_every=2", "name=two", "val_clips=3", ranks=2, cwd=folder)
    return folder, str(folder / "runs" / "two"), output


@pytest.fixture
def here(clips, tmp_path):
    """Runs training in this process; returns the run's folder. `data=` is the shared clips unless it or a cache is
    given."""
    import config
    import train

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}

    def train_here(*settings):
        data = [] if any(word.startswith(("latent_cache=", "clip_cache=")) for word in settings) else [f"data={clips}"]
        cfg = config.load_config([settings[0], *data, f"out_dir={tmp_path}", *settings[1:]])
        train.train(cfg)
        return tmp_path / cfg.name

    yield train_here
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def at(monkeypatch):
    """at({step: action}): calls action() as that step begins, when what was to be saved by then has been written."""
    from objective import Objective
    from saving import Saver

    savers = []

    def write(self, *arguments, original=Saver.begin):
        savers.append(self)
        original(self, *arguments)

    monkeypatch.setattr(Saver, "begin", write)

    def set_actions(actions):
        def begin(self, step, original=Objective.begin):
            if step + 1 in actions:
                for saver in savers:
                    saver.settle()
                actions.pop(step + 1)()
            original(self, step)

        monkeypatch.setattr(Objective, "begin", begin)

    return set_actions


def log_of(folder):
    return (folder / "train.log").read_text()


def metrics_of(folder):
    """The lines of metrics.jsonl, each of which must be JSON without NaN or Infinity."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def state_of(folder, step):
    from checkpoint import read

    state = read(str(folder / f"step_{step:08d}.pt"))
    assert state.pop("seconds") > 0  # the clock is no part of what runs have in common
    return state


def different(a, b, place="state"):
    """Where two nested states differ, to the bit: a list of places."""
    if torch.is_tensor(a):
        return [] if torch.is_tensor(b) and torch.equal(a, b) else [place]
    if isinstance(a, dict):
        return [d for k in a.keys() | b.keys() for d in different(a.get(k), b.get(k), f"{place}.{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in different(x, y, f"{place}.{i}")]
    return [] if a == b else [place]


SPOILT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import adversary, checkpoint, data, models, objective, quantize, ranks, seraena, train
ranks.SLICE = 1000  # many, though the models are small
now = [0]
def spoil(owner, name, faults):  # faults: (step, rank): what happens instead, once
    original = getattr(owner, name)
    def spoilt(*arguments, **keywords):
        fault = faults.pop((now[0], dist.get_rank()), lambda call: call())
        return fault(lambda: original(*arguments, **keywords))
    setattr(owner, name, spoilt)
def memory(_):
    raise torch.cuda.OutOfMemoryError("injected")
def in_backward(fault):
    def call_and_hook(call):
        loss = call()
        loss.register_hook(fault)
        return loss
    return call_and_hook
def kill(number):
    return lambda _: os.kill(number(), signal.SIGKILL)
def note_step(self, step, begin=objective.Objective.begin):
    now[0] = step + 1
    begin(self, step)
objective.Objective.begin = note_step
def note_weights(self, state=objective.Objective.rank_state):  # every rank calls it as it saves
    weights = [models.fingerprint(part) for part in (self.model, self.adversary, self.seraena)]
    os.write(1, f"\\nweights of {{dist.get_rank()}} after {{now[0]}} are {{weights}}\\n".encode())
    return state(self)
objective.Objective.rank_state = note_weights
{faults}
train.main()
"""


def spoilt(folder, faults):
    (folder / "spoilt.py").write_text(SPOILT.format(root=ROOT, faults=faults))
    return "spoilt.py"
