"""What matters on GPUs. First what can be tested without one: memory errors, process groups, waits of the host.

Then what needs one, and is skipped elsewhere. What compares devices runs on a CPU too: so the tests are tested.
"""

import json
import os
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import config
import fast_cuda
import infer
import models
import objective
import ranks
import train
from conftest import (BATCH_NORM, FRAMES, NARROW, PLAIN, ROOT, SERAENA, log_of, metrics_of, mistake, run,
                      transport_plan, write_clip)
from data import Bucket
from device import free_memory, is_out_of_memory, peak_memory, reset_peak_memory, to_device
from model_taehv import TAEHV
from quantize import SinkhornQuantizer
from test_fast import make as make_taehv
from test_fast_models import dcae, parts, vqgan
from test_tokenizers import make as make_tokenizer

aten = torch.ops.aten
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


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


# ---- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_tf32():
    """Each test begins without it; device.tune switches it on for the whole process. Ends with PyTorch's defaults."""
    backends = torch.backends
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = backends.cudnn.benchmark = False
    yield
    backends.cuda.matmul.allow_tf32 = backends.cudnn.benchmark = False
    backends.cudnn.allow_tf32 = True


TAEHVS = {"taehv": {}, "taew2_2": {}, "taew2_2_super": {}, "taeh3": {}, "lighttaehy1_5": {},
          "taeltx2_3_wide": {"decoder_widths": (128, 64, 32, 16)}}
FAMILIES = {**{name: lambda name=name: make_taehv(name, **TAEHVS[name]) for name in TAEHVS}, "vqgan": vqgan,
            "dcae": dcae, "vqvae2": lambda: make_tokenizer("vqvae2"), "video": lambda: make_tokenizer("video")}
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the values' root mean square


def halves(model):
    """(encode or None, decode), as far as no codes are chosen between: those may differ."""
    if isinstance(model, TAEHV):
        return model.encode, model._decode
    return parts(model) if hasattr(model, "_decoded") else (None, model.decode)


def distance(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours.float().cpu() - theirs).norm() / theirs.norm()).item()


def expected_of(model, frames=20):
    """(video, latents, what decoding them gives) in float32 on the CPU."""
    size = max(32, model.space_factor)
    video = torch.rand(2, frames, 3, size, 2 * size, generator=torch.Generator().manual_seed(1))
    encode, decode = halves(model)
    latents = encode(video) if encode else model.encode(video)
    return video, latents, decode(latents)


@on_both
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_computes_what_it_does_on_a_cpu(name, dtype, device):
    if (device, dtype) == ("cpu", torch.float16):
        pytest.skip("a CPU emulates it")
    model = FAMILIES[name]()
    video, latents, frames = expected_of(model)
    encode, decode = halves(to_device(model, torch.device(device), dtype))
    if encode:
        assert distance(encode(video.to(device, dtype)), latents) < ERRORS[dtype]
    assert distance(decode(latents.to(device, dtype)), frames) < ERRORS[dtype]


@gpu
@pytest.mark.parametrize("dtype", ERRORS)
def test_cudnn_has_the_fused_calls(dtype):
    """If it has not, fast_cuda.py works without them: all other tests can pass where this one fails."""
    assert fast_cuda.has_fused(torch.device("cuda", torch.cuda.current_device()), dtype)


@gpu
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("name", TAEHVS)
@torch.no_grad()
def test_fast_copies_with_and_without_graphs(name, dtype):
    model = FAMILIES[name]()
    video, latents, frames = expected_of(model)
    to_device(model, torch.device("cuda"), dtype)
    video = video.to("cuda", dtype)
    for graph in (False, True):
        quick = fast_cuda.fast(model, graph)
        for _ in range(3):  # as it comes, recorded, replayed
            assert distance(quick.encode(video), latents) < ERRORS[dtype]
            assert distance(quick._decode(latents.to("cuda", dtype)), frames) < ERRORS[dtype]
        streams, done = [quick.stream(), quick.stream(memory_limit=1 << 22)], [[], []]
        for piece in video.split(3, 1):
            for stream, found in zip(streams, done):  # in turns
                found.append(stream.encode(piece))
        for stream, found in zip(streams, done):
            assert distance(torch.cat([*found, stream.flush()], 1), latents) < ERRORS[dtype]


@gpu
def test_graphs_under_inference_mode_and_on_large_frames():
    model = to_device(make_taehv(), torch.device("cuda"), torch.bfloat16)
    quick, video = fast_cuda.fast(model, graph=True), torch.rand(1, 16, 3, 256, 448, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = model.decode(model.encode(video)).float().cpu()
        for _ in range(3):
            assert distance(quick.decode(quick.encode(video)), plain) < ERRORS[torch.bfloat16]


def losses_of(folder):
    return [line["loss"] for line in metrics_of(folder) if line["kind"] == "train"]


GAN = [*FRAMES, "gan_weight=0.5", "gan_start=0", "size=32"]
RUNS = {"taehv": [*PLAIN, *NARROW], "seraena": SERAENA, "vqgan with a GAN": GAN, "vqvae2": BATCH_NORM,
        "dcae": ["dcae_small", *PLAIN[1:], "size=32", "frames=8"]}


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RUNS)
def test_training_goes_as_on_a_cpu(name, precision, here):
    cpu = losses_of(here(*RUNS[name], "name=cpu", "max_steps=1"))
    settings = [*RUNS[name], "device=cuda", f"precision={precision}"]
    ours = losses_of(here(*settings, "name=gpu", "max_steps=3"))
    assert len(ours) == 3 and ours[0] == pytest.approx(cpu[0], rel=0.02 if precision == "fp32" else 0.1)


@gpu
def test_a_run_on_a_gpu_is_resumed(here):
    settings = [*PLAIN, *NARROW, "device=cuda", "save_every=2"]
    whole = losses_of(here(*settings, "name=whole", "max_steps=4"))
    here(*settings, "name=parts", "max_steps=2")
    parts = losses_of(here(*settings, "name=parts", "max_steps=4"))
    assert len(whole) == len(parts) == 4 and parts == pytest.approx(whole, rel=1e-3)


@gpu
def test_memory_that_really_runs_out_splits_the_batch(here, tmp_path):
    for k in range(2):
        write_clip(str(tmp_path / f"videos/{k}.mp4"), height=144, width=144, seed=k)
    settings = [*PLAIN, f"data={tmp_path / 'videos'}", "device=cuda", "size=128", "frames=12", "max_steps=2"]
    torch.cuda.empty_cache()
    device, total = torch.device("cuda"), torch.cuda.mem_get_info()[1]
    peaks = []
    for batch in (2, 8):
        reset_peak_memory(device)
        here(*settings, f"batch_size={batch}", f"name=free{batch}")
        peaks.append(peak_memory(device))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + sum(peaks) / 2) / total)
    try:
        folder = here(*settings, "batch_size=8", "name=tight")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory; micro-batches are split in" in log_of(folder)
    assert losses_of(folder) == pytest.approx(losses_of(folder.parent / "free8"), rel=0.02)


@gpu
def test_real_errors_are_recognised_and_memory_is_counted():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
    device = torch.device("cuda")
    reset_peak_memory(device)
    before = peak_memory(device)
    block = torch.empty(1 << 24, dtype=torch.uint8, device=device)
    assert peak_memory(device) - before >= len(block) and free_memory(device) > 0


@gpu
def test_a_loss_that_is_not_finite_is_skipped(here, monkeypatch):
    calls, loss = [], objective.pixel_loss

    def spoilt(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(objective, "pixel_loss", spoilt)
    folder = here(*PLAIN, *NARROW, "device=cuda", "max_steps=4")
    assert "1 steps skipped (not finite)" in log_of(folder)
    state = torch.load(folder / "model.pth", weights_only=True)
    assert all(value.isfinite().all() for value in state.values())


@gpu
def test_compiled_training(here):
    settings = [*PLAIN, *NARROW, "device=cuda", "max_steps=2"]
    plain, compiled = (losses_of(here(*settings, f"compile={flag}", f"name=compile_{flag}"))
                       for flag in ("false", "true"))
    assert compiled == pytest.approx(plain, rel=0.02)


@gpu
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs"))])
def test_nccl(ranks, clips, tmp_path):
    run(os.path.join(ROOT, "train.py"), *PLAIN, *NARROW, f"data={clips}", "batch_size=2", "device=cuda", "max_steps=3",
        "name=run", ranks=ranks, cwd=tmp_path, fresh=True)
    folder = tmp_path / "runs" / "run"
    assert f"{ranks} rank" in log_of(folder) and len(losses_of(folder)) == 3


@gpu
@pytest.mark.parametrize("settings", ["taehv", "taehv gan_weight=0.5 gan_start=0", " ".join(GAN)])
def test_the_host_never_waits_within_a_micro_batch(settings):
    device = torch.device("cuda")
    cfg = config.load_config([*settings.split(), "size=32", "frames=5", "perceptual_weight=0", "data=x"])
    model, _ = models.make_model(cfg, [Bucket(32, 5, 1.0, 2)])
    model = to_device(model, device).train()
    minimised = objective.Objective(cfg, model, device, torch.autocast("cuda", torch.bfloat16))
    video = torch.rand(2, 5, 3, 32, 32, device=device)
    for step in range(2):
        minimised.begin(step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one sets libraries up
        try:
            minimised(video, None, 1.0)["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        minimised.step(torch.zeros((), device=device))


@gpu
def test_norms_keep_bf16_under_autocast():
    """Of VQGAN; PyTorch's own, beside it, does not."""
    from model_vqgan import enlarge, norm
    x = torch.randn(2, 64, 8, 8, device="cuda").bfloat16()
    ours, plain = norm(64).cuda(), torch.nn.GroupNorm(32, 64).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert plain(x).dtype == torch.float32
        assert ours(x).dtype == enlarge(x).dtype == torch.bfloat16
        assert distance(ours(x), plain(x).cpu()) < 0.01


@gpu
def test_infer_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("./a.mp4", frames=21, height=40, width=48)
    torch.save(make_taehv().state_dict(), "taehv.pth")
    found = []
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "fp16")):
        monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", "a.mp4", "--device", device, "--lpips", "none",
                                          "--precision", precision])
        infer.main()
        found.append(json.loads(open("inference_results/metrics.json").read())["rows"][0]["metrics"]["psnr"])
    assert found[1:] == [pytest.approx(found[0], abs=0.1)] * 2


@gpu
def test_bench_on_a_gpu(tmp_path):
    run(os.path.join(ROOT, "bench.py"), "codec", "train", "--quick", "--families", "taehv", "--precision", "bf16",
        "--device", "cuda", "--json", "rows.json", cwd=tmp_path, fresh=True)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["peak"]["bf16"] > 1e12
    assert {row["how"] for row in found["rows"]} >= {"plain bf16", "fast bf16", "graph bf16", "ours bf16"}
    assert all(row["value"] > 0 for row in found["rows"])
