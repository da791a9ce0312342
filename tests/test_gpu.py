"""What matters on GPUs, as far as it can be tested without one: memory errors, process groups, waits of the host."""

import json
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import config
import infer
import models
import objective
import ranks
import train
from conftest import mistake, transport_plan, write_clip
from data import Bucket
from device import is_out_of_memory
from model_taehv import TAEHV
from quantize import SinkhornQuantizer

aten = torch.ops.aten


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "MPS backend out of memory (MPS allocated: 17.00 GB)",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 34359738368 bytes.",
])  # fmt: skip
def test_memory_that_ran_out_is_recognised_however_it_is_worded(message):
    assert is_out_of_memory(RuntimeError(message))


def test_other_errors_are_no_lack_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.cuda.OutOfMemoryError("injected"))
    for message in ("The size of tensor a (3) must match the size of tensor b (4)", "CUDNN_STATUS_BAD_PARAM",
                    "CUDA error: an illegal memory access was encountered", "CUBLAS_STATUS_EXECUTION_FAILED"):
        assert not is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(OSError("disk out of memory"))


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_process_group_knows_its_gpu(device, monkeypatch):
    device, made = torch.device(device), []
    for name, value in {"RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(ranks.sys, "excepthook", ranks.sys.excepthook)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or "control")
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    found, timeout = ranks.start_ranks(device, 5), timedelta(minutes=5)
    of_gradients = ("gloo", {}) if device.type == "cpu" else ("nccl", {"device_id": device})
    assert found == (3, 8, "control")  # a second group: what ranks agree on never waits behind gradients
    assert made == [(of_gradients[0], {"timeout": timeout, **of_gradients[1]}), {"backend": "gloo", "timeout": timeout}]


class Waits(TorchDispatchMode):
    """Notes calls that would make the host wait for a GPU: numbers that come from it, or go to it from pageable memory.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.lift_fresh):
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [
    "taehv gan_weight=0.5 gan_start=100 gan_ramp=0",
    "taehv gan_weight=0.5 gan_start=0 gan_lecam=0.1 seraena_weight=0.5 seraena_replay_mb=8",
    "taehv variant=taeh3",
    "vqgan_optvq net.num_head=2 net.kmeans_init=false net.normalize_mode=dim net.use_prob=true gan_weight=0",
    "vqgan_ema net.kmeans_init=false net.restart_below=0.1 gan_weight=0",
])  # fmt: skip
def test_a_micro_batch_makes_no_host_wait(settings):
    words = settings.split()
    net = "net.ch=32 net.ch_mult=(1,1) net.num_res_blocks=1 net.attn_resolutions=() net.resolution=32 net.z_channels=8"
    words += f"{net} net.embed_dim=8 net.n_embed=16".split() if "vqgan" in words[0] else []
    cfg = config.load_config([*words, "size=32", "frames=5", "perceptual_weight=0", "precision=fp32", "data=x"])
    model, _ = models.make_model(cfg, [Bucket(32, 5, 1.0, 2)])
    minimised = objective.Objective(cfg, model.train(), torch.device("cpu"), torch.autocast("cpu", enabled=False))
    video = torch.rand(2, 5, 3, 32, 32)
    for step in range(2):
        minimised.begin(step)
        with Waits() as waits:
            values = minimised(video, None, 1.0)
            (values["loss"] * 1.0).backward()
        assert waits.seen == [], "a number from or to the host"
        minimised.step(torch.zeros(()))
    assert set(minimised.names) <= values.keys() and all(torch.is_tensor(values[name]) for name in minimised.names)


def test_drawn_codes_are_those_of_multinomial():
    torch.manual_seed(0)
    quantizer, z = SinkhornQuantizer(16, 6, use_prob=True), torch.randn(2, 6, 8, 8)
    torch.manual_seed(1)
    codes = quantizer(z)[1]["codes"][0].flatten()
    torch.manual_seed(1)
    assert torch.equal(codes, torch.multinomial(transport_plan(quantizer, z), 1)[:, 0])


@pytest.mark.parametrize(("settings", "reason"), [
    (["vqgan", "net.quantizer=fsq", "net.levels=(8,2)", "net.embed_dim=2"], "of 2 one is dead"),
    (["taehv", "precision=fp16"], "loss scaling"),
])  # fmt: skip
@pytest.mark.any_precision
def test_what_cannot_be_trained_is_refused_in_one_line(settings, reason, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert reason in mistake(capsys, monkeypatch, train, *settings, "data=demo", "device=cpu")
    assert not (tmp_path / "demo_data").exists(), "nothing was begun"


def test_infer_runs_in_fp16_and_says_that_a_cpu_emulates_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip("./a.mp4", frames=5, height=40, width=48)
    torch.manual_seed(0)
    torch.save(TAEHV(encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32)).state_dict(), "taehv.pth")
    rows = {}
    for precision in ("fp16", "fp32"):
        monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", "a.mp4", "--device", "cpu", "--lpips", "none",
                                          "--precision", precision])
        infer.main()
        assert ("a CPU emulates it" in capsys.readouterr().out) == (precision == "fp16")
        rows[precision] = json.loads(open("inference_results/metrics.json").read())["rows"][0]
    assert rows["fp16"]["metrics"]["psnr"] == pytest.approx(rows["fp32"]["metrics"]["psnr"], abs=0.1)
