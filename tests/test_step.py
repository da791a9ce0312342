"""The quicker training step: the numbers and gradients of the plain path, for all variants and ways to train."""
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import model_taehv
import step_taehv
from conftest import COMMON, NARROW, ROOT, SCRATCH, run
from model_taehv import TAEHV, MemBlock


def make(variant="taehv", dtype=torch.float32, **changes):
    """A model in training mode, all of whose weights matter, channels-last as train.py has it."""
    torch.manual_seed(0)
    model = TAEHV(variant, **changes).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=(1.6 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
    return model.to(dtype=dtype, memory_format=torch.channels_last)


def clips(model, frames=8, dtype=torch.float32):
    size = (2, frames, 3, model.space_factor, 2 * model.space_factor)
    return torch.rand(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def passes(model, video, quick=True, autocast=False):
    """[reconstruction, latents, gradients of all weights that learn]."""
    model.zero_grad()
    model.run_with_gradients = step_taehv.run_blocks if quick else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, info = model(video)
    pattern = torch.linspace(-1, 1, output.numel()).view_as(output)  # the mean alone would reach few weights
    (output.float() if autocast else output).mul(pattern).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "latents": info["latents"].detach(), **gradients}


def error(ours, theirs):
    """The largest relative distance of two results of `passes`."""
    assert list(ours) == list(theirs)
    return max(((ours[k].double() - theirs[k].double()).norm() / theirs[k].double().norm()).item() for k in ours)


PREVIEWS = [{"decoder_time_upscale": (False, False)}, {"decoder_space_upscale": (True, False, True)}]
CASES = [(v, {}) for v in ("taehv", "taew2_2", "taeltx_2", "taecvx", "taeh3", "taew2_2_super")] + [
    ("taehv", changes) for changes in [*PREVIEWS, dict(activation="leaky_relu", output_range=(-1, 1))]] + [
    ("taeltx2_3_wide", dict(decoder_widths=(128, 64, 32, 16)))]


@pytest.mark.parametrize(("variant", "changes"), CASES)
def test_results_and_gradients_are_the_plain_paths(variant, changes):
    model = make(variant, torch.float64, **changes)  # in float32 a ReLU at zero may open in one and not in the other
    before = {k: v.clone() for k, v in model.state_dict().items()}
    video = clips(model, {"taeh3": 20, "taew2_2_super": 5}.get(variant, 8), torch.float64)
    results = passes(model, video), passes(model, video, quick=False)
    assert error(*results) < 1e-12 and len(results[0]) == 2 + len(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("frames", [1, 4, 12])  # one latent: no memory block has a frame before
def test_float32_is_within_rounding_and_repeats_to_the_bit(frames):
    model = make()
    video = clips(model, frames)
    ours, again, theirs = passes(model, video), passes(model, video), passes(model, video, quick=False)
    assert error({"output": ours["output"]}, {"output": theirs["output"]}) < 1e-5
    assert all(torch.equal(ours[k], again[k]) for k in ours)
    exact = passes(copy.deepcopy(model).double(), video.double(), quick=False)
    assert error(ours, exact) < 2 * error(theirs, exact) + 1e-5


def test_bf16_is_within_its_own_error():
    model = make()
    video = clips(model)
    exact = passes(model, video, quick=False)
    ours, theirs = (passes(model, video, quick, autocast=True) for quick in (True, False))
    assert ours["output"].dtype == theirs["output"].dtype == torch.bfloat16
    assert 0 < error(ours, exact) < 1.5 * error(theirs, exact)


@pytest.mark.parametrize("variant", ["taehv", "taew2_2_super"])
def test_checkpointing_changes_no_gradient(variant):
    model = make(variant)
    video = clips(model)
    plain = passes(model, video)
    model.gradient_checkpointing = True
    again = passes(model, video)
    assert all(torch.equal(again[k], plain[k]) for k in plain)


@pytest.mark.parametrize("frozen", ["encoder", "decoder"])
def test_a_half_can_be_frozen(frozen):
    model = make(dtype=torch.float64)
    video = clips(model, dtype=torch.float64)
    whole = passes(model, video)
    getattr(model, frozen).requires_grad_(False)
    half = passes(model, video)
    assert half and not any(k.startswith(frozen) for k in half)
    assert error(half, {k: v for k, v in whole.items() if not k.startswith(frozen)}) < 1e-12


def test_what_needs_no_gradient_is_not_computed(monkeypatch):
    wanted, original = [], step_taehv.conv_backward
    monkeypatch.setattr(step_taehv, "conv_backward", lambda g, x, w, *t: (wanted.append(t), original(g, x, w, *t))[1])
    block, x = MemBlock(4, 4), torch.rand(6, 4, 5, 5)
    block.conv[0].weight.requires_grad_(False)
    step_taehv.remember(block, x, 2).sum().backward()
    assert wanted == [(True, True, True), (True, True, True), (False, False, True), (False, False, False)]
    assert block.conv[0].weight.grad is None and block.conv[0].bias.grad is not None


def test_without_gradients_the_plain_path_runs():
    model = make().eval()
    results = []
    for model.run_with_gradients in (lambda *_: pytest.fail("no gradient is wanted"), None):
        with torch.no_grad():
            results.append(model(clips(model))[0])
    assert torch.equal(*results)


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    torch.manual_seed(0)
    blocks = [MemBlock(8, 8), torch.nn.Upsample(scale_factor=2), model_taehv.TGrow(8, 2),
              torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)]
    blocks, video = torch.nn.Sequential(*blocks), torch.rand(2, 3, 8, 4, 4)
    gradients = []
    for call in (step_taehv.run_blocks, torch.compile(step_taehv.run_blocks, backend="aot_eager", fullgraph=True)):
        blocks.zero_grad()
        call(blocks, video).square().sum().backward()
        gradients.append([p.grad.clone() for p in blocks.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*gradients))


@pytest.mark.slow
@pytest.mark.any_precision
def test_bench_compares_it_with_the_published_routine(tmp_path):
    run(os.path.join(ROOT, "tests", "bench_in_forks.py"), "train", "--quick", "--precision", "fp32", "--json",
        "rows.json", cwd=tmp_path)
    plain, ours = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (plain["how"], ours["how"], plain["ratio"]) == ("plain fp32", "ours fp32", 1)
    assert 0 < ours["memory"] < plain["memory"] and ours["value"] > 0


@pytest.mark.slow
@pytest.mark.any_precision
def test_bench_compares_the_loop_with_the_bare_step(tmp_path):
    run(os.path.join(ROOT, "tests", "bench_in_forks.py"), "loop", "--quick", "--json", "rows.json",
        cwd=tmp_path, timeout=900)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["how"].split(",")[0] for row in rows] == ["step alone", "step alone", "loop", "loop with its loader",
                                                          "a save", "a save", "a validation of 8 clips"]
    assert rows[0]["ratio"] == 1 and all(row["value"] > 0 for row in rows)


def test_threads_of_train_py_that_wait_give_their_core_away():
    """libgomp says as it is loaded what it has read."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "--help"], capture_output=True, text=True,
                          env={**os.environ, "OMP_DISPLAY_ENV": "true"}, check=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr, done.stderr


@pytest.mark.parametrize("train_decoder", [True, False])
def test_train_py_attaches_it(train_decoder, here, monkeypatch):
    seen, original = [], step_taehv.run_blocks
    monkeypatch.setattr(step_taehv, "run_blocks", lambda *a: (seen.append(len(a[1])), original(*a))[1])
    here(*SCRATCH, "size=16", "frames=4", "batch_size=2", "max_steps=1", f"train_decoder={train_decoder}", *COMMON,
         *NARROW)
    assert seen == [2, 2]  # encoder and decoder, each with its two clips: a frozen decoder passes gradients on


ALONE = """
import hashlib, sys, torch
import model_dcae, model_taehv, model_vqgan, model_vqvae
digests = []
for make, shape in (
        (lambda: model_taehv.TAEHV(encoder_widths=(8,) * 4, decoder_widths=(16, 8, 8, 8)), (2, 8, 3, 16, 24)),
        (lambda: model_vqgan.VQGAN(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=16,
                                   z_channels=8, embed_dim=8, n_embed=16), (2, 1, 3, 16, 16)),
        (lambda: model_vqvae.VQVAE2(hidden_channels=8, res_channels=4, nb_res_layers=1, nb_levels=2, embed_dim=4,
                                    nb_entries=8, scaling_rates=(4, 2)), (2, 1, 3, 16, 16)),
        (lambda: model_dcae.DCAE(width_list=(8, 16, 32, 32, 32, 32), encoder_depth_list=(1,) * 6,
                                 decoder_depth_list=(1,) * 6, latent_channels=8), (1, 4, 3, 32, 32))):
    torch.manual_seed(0)
    model, video = make(), torch.rand(shape)
    output, info = model(video)
    (output.square().mean() + info.get("vq_loss", 0)).backward()
    results = [output, info["latents"], *(p.grad for p in model.parameters() if p.grad is not None)]
    results += [model.eval().decode(info["latents"])]
    digests += [hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()[:8] for t in results]
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
own = {name for name, file in files.items() if file.startswith(sys.path[0])}
print(sorted(own - {"__main__", "__mp_main__"}), *digests)
"""


def test_model_files_compute_the_same_copied_alone_as_beside_the_others(tmp_path):
    """To the bit, forward and backward, and without a look at what lies beside them."""
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
    printed, parts = [], sorted(name for name in os.listdir(ROOT) if name.startswith("quantize"))
    for folder, names in (("alone", [*(f"model_{name}.py" for name in ("dcae", "taehv", "vqgan", "vqvae")),
                                     *parts]), ("beside", [n for n in os.listdir(ROOT) if n.endswith(".py")])):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(os.path.join(ROOT, name), tmp_path / folder)
        (tmp_path / folder / "alone.py").write_text(ALONE)
        printed.append(subprocess.run([sys.executable, "alone.py"], cwd=tmp_path / folder, env=environment, check=True,
                                      capture_output=True, text=True).stdout)
    assert printed[0] == printed[1]
    own = ["model_dcae", "model_taehv", "model_vqgan", "model_vqvae", *(name[:-3] for name in parts)]
    assert printed[0].startswith(f"{sorted(own)} ") and len(printed[0].split()) > 100
