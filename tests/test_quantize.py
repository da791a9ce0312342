"""Vector quantizers: parity with the published ones, statistics over batches and ranks, memory, use of the codebook."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT, run, transport_plan
from golden.fill import fill_
from quantize import (
    FSQ,
    EMAQuantizer,
    ResidualQuantizer,
    SinkhornQuantizer,
    VectorQuantizer,
    ema_update,
    kmeans,
    nearest,
    quantizers,
)

KINDS = {
    "vq": lambda: VectorQuantizer(16, 6),
    "ema": lambda: EMAQuantizer(16, 6),
    "sinkhorn": lambda: SinkhornQuantizer(16, 6, num_head=3),
    "sinkhorn_plain": lambda: SinkhornQuantizer(16, 6, use_proj=False, normalize_mode="dim", loss_q_type="l1"),
    "residual": lambda: ResidualQuantizer(3, 16, 6, kind="ema"),
    "residual_shared": lambda: ResidualQuantizer(3, 16, 6, shared=True, restart_below=0.5),
    "fsq": lambda: FSQ((5, 4, 3), 6),
    "fsq_plain": lambda: FSQ((3, 3, 4, 5, 6, 7)),
}


def golden(name):
    return torch.load(os.path.join(ROOT, "tests", "golden", f"{name}.pt"), weights_only=True)


def filled(quantizer, expected):
    """The quantizer in eval mode with the golden file's weights; its names and shapes are the published ones."""
    state = {"quantize." + name: value for name, value in quantizer.state_dict().items()}
    published = [(name, tuple(shape)) for name, shape in expected["params"] if name.startswith("quantize.")]
    assert [(name, tuple(value.shape)) for name, value in state.items()] == published
    fill_(state)
    return quantizer.eval()


def images(seed, n=4, dim=6, size=8):
    return torch.randn(n, dim, size, size, generator=torch.Generator().manual_seed(seed))


# ---- the published quantizers ------------------------------------------------------------------------------------


def test_vq_computes_what_taming_does():
    expected = golden("taming_vqmodel")
    quantizer, out = filled(VectorQuantizer(64, 32, beta=0.25), expected), expected["outputs"]
    quantized, info = quantizer(out["pre_quant"])
    assert torch.equal(info["codes"][0], out["indices"])
    assert torch.allclose(info["vq_loss"], out["vq_loss"], rtol=1e-5)
    assert torch.equal(quantized.movedim(1, -1), quantizer.embedding.weight[out["indices"]])


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_is_on_the_side_that_legacy_says(legacy):
    quantizer = VectorQuantizer(16, 6, beta=0.25, legacy=legacy)
    z = images(0).requires_grad_()
    quantized, info = quantizer(z)
    info["vq_loss"].backward()
    pull = 2 * (z - quantized).detach() / z.numel()
    assert torch.allclose(z.grad, pull * (1 if legacy else 0.25))
    pushed = torch.zeros(16, 6).index_add_(0, info["codes"][0].flatten(), -pull.movedim(1, -1).reshape(-1, 6))
    assert torch.allclose(quantizer.embedding.weight.grad, pushed * (0.25 if legacy else 1), atol=1e-6)


def test_ema_computes_what_taming_does():
    expected = golden("taming_emavq")
    quantizer, out = filled(EMAQuantizer(64, 16), expected), expected["outputs"]
    _, info = quantizer(out["pre_quant"])
    assert torch.equal(info["codes"][0], out["indices"])
    assert torch.allclose(info["vq_loss"], out["vq_loss"], rtol=1e-5)
    quantizer.train()(out["pre_quant"])
    assert torch.allclose(quantizer.embedding.weight, out["codebook_after_one_step"], atol=1e-5)
    assert torch.allclose(quantizer.embedding.cluster_size, out["cluster_size_after_one_step"], atol=1e-5)


@pytest.mark.parametrize("chunk", [1 << 24, 64 * 50])
def test_sinkhorn_computes_what_optvq_does(chunk):
    expected = golden("optvq")
    quantizer, out = filled(SinkhornQuantizer(64, 16, num_head=2, chunk=chunk), expected), expected["outputs"]
    _, info = quantizer(out["pre_quant"])
    assert torch.equal(torch.stack(info["codes"], 1), out["indices"])
    assert torch.allclose(info["vq_loss"], out["vq_loss"], rtol=1e-5)
    assert (transport_plan(quantizer, out["pre_quant"]) - out["transport_plan"]).abs().max() < 1e-4


def test_sinkhorn_gives_each_code_its_share_and_nearest_ignores_the_batch():
    quantizer = SinkhornQuantizer(16, 6, n_iters=50, normalize_mode="null", epsilon=2.0)
    plan = transport_plan(quantizer, images(0))
    assert torch.allclose(plan.sum(0), torch.tensor(256 / 16), rtol=0.02) and plan.std() > 0.01
    alone = SinkhornQuantizer(16, 6, eval_nearest=True).eval()
    codes = alone(images(0))[1]["codes"][0]
    assert torch.equal(codes[:1], alone(images(0)[:1])[1]["codes"][0])
    drawn = SinkhornQuantizer(16, 6, use_prob=True)
    torch.manual_seed(0)
    assert not torch.equal(drawn(images(0))[1]["codes"][0], drawn(images(0))[1]["codes"][0])


def test_cross_entropy_in_blocks_is_that_of_all_distances():
    """OptVQ's "ce": minus the distances are the logits, the code that was taken is the class."""
    results = []
    for chunk in (1 << 24, 16 * 10):
        torch.manual_seed(0)
        quantizer, z = SinkhornQuantizer(16, 6, num_head=2, loss_q_type="ce", chunk=chunk), images(0).requires_grad_()
        _, info = quantizer(z)
        info["vq_loss"].backward()
        results.append([info["vq_loss"].detach(), z.grad, quantizer.embedding.weight.grad, quantizer.proj.weight.grad])
    codes, z = torch.stack(info["codes"], -1).flatten(), images(0).requires_grad_()
    pieces = z.movedim(1, -1).reshape(-1, 1, 3)
    distances = (pieces - quantizer.proj(quantizer.embedding.weight)).square().sum(-1).sqrt()
    loss = (torch.logsumexp(-distances, 1) + distances[torch.arange(len(codes)), codes]).mean()
    results.append([loss.detach(), *torch.autograd.grad(loss, [z, quantizer.embedding.weight, quantizer.proj.weight])])
    for values in zip(*results):
        assert all(torch.allclose(values[0], value, rtol=1e-3, atol=1e-6) for value in values[1:])


# ---- what all have in common -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 3, 5, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_give_the_vectors_back(kind, shape):
    quantizer = KINDS[kind]().eval()
    z = torch.randn(shape)
    quantized, info = quantizer(z)
    assert quantized.shape == z.shape and torch.equal(quantizer.codes_to_vectors(info["codes"]), quantized)
    assert set(info) == {"vq_loss", "codes", "perplexity", "usage"}
    assert len(info["codes"]) == quantizer.codes_per_position
    for codes in info["codes"]:
        assert codes.shape == (shape[0], *shape[2:]) and codes.dtype == torch.int64
        assert codes.min() >= 0 and codes.max() < quantizer.num_codes
    assert 1 <= info["perplexity"] <= quantizer.num_codes and 0 < info["usage"] <= 1
    assert torch.equal(quantizer(z.contiguous(memory_format=torch.channels_last) if z.ndim == 4 else z)[0], quantized)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("fsq")])
def test_the_gradient_goes_straight_through(kind):
    quantizer = KINDS[kind]()
    z, weights = images(1).requires_grad_(), images(2)
    (quantizer(z)[0] * weights).sum().backward()
    assert torch.equal(z.grad, weights)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_code(kind):
    quantizer, z = KINDS[kind]().eval(), images(3, n=16)
    quantized, info = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower, under = quantizer(z)
        half, _ = quantizer(z.bfloat16())
        decoded = quantizer.codes_to_vectors(under["codes"])
    assert all(torch.equal(a, b) for a, b in zip(info["codes"], under["codes"]))
    assert under["vq_loss"] == info["vq_loss"] and torch.equal(lower, quantized) and torch.equal(decoded, quantized)
    assert half.dtype == torch.bfloat16
    cast = quantizer.bfloat16()  # a whole model in half precision
    output, info = cast(z.bfloat16())
    assert torch.equal(cast.codes_to_vectors(info["codes"]).bfloat16(), output)
    assert info["vq_loss"].dtype == torch.float32


def test_perplexity_and_usage():
    quantizer = VectorQuantizer(4, 1).eval()
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.arange(4.0).unsqueeze(1))
    _, info = quantizer(torch.tensor([0.1, 0.2, 2.9, 3.3]).view(1, 1, 2, 2))
    assert info["codes"][0].flatten().tolist() == [0, 0, 3, 3]
    assert torch.isclose(info["perplexity"], torch.tensor(2.0)) and info["usage"] == 0.5


@pytest.mark.parametrize("make", [
    lambda: VectorQuantizer(16, 6)(torch.zeros(2, 5, 4, 4)),
    lambda: EMAQuantizer(16, 6)(torch.zeros(2, 6, 4)),
    lambda: SinkhornQuantizer(16, 6, num_head=4),
    lambda: SinkhornQuantizer(16, 6, normalize_mode="rows"),
    lambda: SinkhornQuantizer(16, 6, loss_q_type="kl"),
    lambda: ResidualQuantizer(2, 16, 6, kind="fsq"),
    lambda: ResidualQuantizer(2, 16, 6, kind="sinkhorn", num_head=2),
    lambda: FSQ((8, 1)),
    lambda: FSQ((8, 2)),
    lambda: FSQ((8, 5, 5))(torch.zeros(2, 4, 4, 4)),
    lambda: VectorQuantizer(16, 6).codes_to_vectors([torch.zeros(2, 4, 4, dtype=torch.int64)] * 2),
    lambda: VectorQuantizer(16, 6).codes_to_vectors([torch.zeros(2, 4, dtype=torch.int64)]),
    lambda: ResidualQuantizer(2, 16, 6).codes_to_vectors([torch.zeros(1, 2, n, dtype=torch.int64) for n in (3, 4)]),
])  # fmt: skip
def test_wrong_shapes_and_settings_are_named(make):
    with pytest.raises(ValueError):
        make()


# ---- search, averages, memory ------------------------------------------------------------------------------------


def test_blocks_find_the_codes_that_a_full_matrix_finds():
    rows, codebook = torch.randn(1000, 8), torch.randn(77, 8)
    full = torch.cdist(rows.double(), codebook.double()).argmin(1)
    for chunk in (1, 77 * 300, 1 << 24):
        assert torch.equal(nearest(rows, codebook, chunk), full)


def test_ema_is_that_of_one_hot_matrices():
    size, average = torch.ones(16), torch.randn(16, 6)
    codebook, total = average.clone(), 16.0
    quantizer = EMAQuantizer(16, 6, decay=0.9)
    quantizer.embedding.weight.copy_(codebook), quantizer.embedding.embed_avg.copy_(average)
    for step in range(5):
        rows = images(step).movedim(1, -1).reshape(-1, 6)
        one_hot = F.one_hot(torch.cdist(rows, codebook).argmin(1), 16).float()
        size, average = 0.9 * size + 0.1 * one_hot.sum(0), 0.9 * average + 0.1 * one_hot.t() @ rows
        total = 0.9 * total + 0.1 * len(rows)
        codebook = average / ((size + 1e-5) / (total + 16e-5) * total).unsqueeze(1)
        quantizer(images(step))
        assert torch.allclose(quantizer.embedding.weight, codebook, atol=1e-5)
    stored = torch.randn(6, 16)  # a published layout is (dim, count): views are updated in place
    kept, sizes = stored.clone(), torch.ones(16)
    ema_update(sizes, stored.t(), torch.ones(16), torch.zeros(16, 6), 0.9, 1e-5)
    assert torch.allclose(stored, 0.9 * kept)


MEMORY = """
import torch
from quantize import EMAQuantizer, SinkhornQuantizer, VectorQuantizer
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
torch.set_num_threads(1)
z = torch.randn(4, 64, 32, 32, requires_grad=True)
made = [kind(16384, 64, chunk=1 << 22) for kind in (VectorQuantizer, EMAQuantizer, SinkhornQuantizer)]
made[2].n_iters = 2
torch.randn(500, 500) @ torch.randn(500, 500)
before = peak()
for quantizer in made:
    quantized, info = quantizer(z)
    (quantized.mean() + info["vq_loss"]).backward()
print("grown by", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read there")
def test_memory_stays_below_one_matrix_of_distances(tmp_path):
    (tmp_path / "memory.py").write_text(MEMORY)
    grown = float(run("memory.py", cwd=tmp_path, fresh=True).split("grown by")[1])
    assert 4 < grown < 100  # MB; 4096 x 16384 distances are 256, and a one-hot matrix as much again


# ---- start, restart, and use of the codebook ---------------------------------------------------------------------


def stream(seed, n=8):
    """n x 256 vectors of 64 clusters, as n 8 16 16."""
    centres = 2 * torch.randn(64, 8, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    chosen = centres[torch.randint(64, (n, 16, 16), generator=generator)]
    return (chosen + 0.3 * torch.randn(chosen.shape, generator=generator)).movedim(-1, 1)


def used_after_training(quantizer, steps):
    """Share of the codebook that a large batch uses, in eval mode."""
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, 0.1) if parameters else None
    for step in range(steps):
        loss = quantizer(stream(step))[1]["vq_loss"]
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return quantizer.eval()(stream(10**6, 64))[1]["usage"].item()


@pytest.mark.slow
def test_the_whole_codebook_is_used_where_plain_vq_collapses():
    torch.manual_seed(0)
    restart = {"decay": 0.9, "restart_below": 0.4}
    use = {name: used_after_training(kind(1024, 8, **options), steps) for name, kind, options, steps in (
        ("vq", VectorQuantizer, {}, 40),
        ("ema", EMAQuantizer, {}, 40),
        ("vq, restart", VectorQuantizer, restart, 40),
        ("ema, restart", EMAQuantizer, restart, 40),
        ("ema, k-means", EMAQuantizer, {"kmeans_init": True}, 2),
        ("sinkhorn", SinkhornQuantizer, {"eval_nearest": True}, 40),
    )}  # fmt: skip
    assert max(use.pop("vq"), use.pop("ema")) < 0.2 and use.pop("vq, restart") > 0.9
    assert min(use.values()) > 0.95, use


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer, SinkhornQuantizer])
def test_kmeans_start_lowers_the_first_error(kind):
    z, errors = stream(0), []
    for start in (False, True):
        torch.manual_seed(0)
        quantized, _ = kind(256, 8, kmeans_init=start)(z)
        errors.append(F.mse_loss(quantized, z))
    assert errors[1] < 0.2 * errors[0]
    quantizer = kind(256, 8, kmeans_init=True, seed=3)
    quantizer(z)
    assert torch.equal(quantizer.started, torch.tensor(True))
    rows = z.movedim(1, -1).reshape(-1, 8)
    centres = [kmeans(rows, 256, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*centres) and kmeans(rows[:9], 16).isfinite().all()
    fresh = kind(256, 8, kmeans_init=True)
    weights = {name: value for name, value in quantizer.state_dict().items() if name != "started"}
    fresh.load_state_dict(weights)  # published weights have no such entry: they are not overwritten by a start
    assert not fresh.waits_for_start()


def test_optvq_starts_from_the_pieces_of_its_first_step():
    torch.manual_seed(0)
    quantizer, z = SinkhornQuantizer(32, 6, num_head=3, kmeans_init=True, deferred=True), images(0)
    quantizer.begin()
    quantizer(z)
    quantizer.update()
    pieces = z.movedim(1, -1).reshape(-1, 2)
    codebook = quantizer.proj(quantizer.embedding.weight)
    assert quantizer.started and F.mse_loss(codebook[nearest(pieces, codebook)], pieces) < 0.1, "0.3 before"
    centres = quantizer.embedding.weight.detach().clone()
    quantizer.begin()
    quantizer(images(1))
    quantizer.update()
    assert torch.equal(centres, quantizer.embedding.weight), "it starts once"


def test_a_restarted_code_stays_where_it_was_put():
    quantizer = EMAQuantizer(16, 6, restart_below=0.5)
    quantizer.embedding.weight[3] = quantizer.embedding.embed_avg[3] = 100.0  # out of all reach
    quantizer.embedding.cluster_size[3] = 0.1
    z = images(0)
    quantizer(z)
    restarted = quantizer.embedding.weight[3].clone()
    assert (z.movedim(1, -1).reshape(-1, 6) == restarted).all(1).any()
    quantizer.restart_below = 0  # from here on, only its own averages move it
    quantizer(z)
    assert (quantizer.embedding.weight[3] - restarted).norm() < 2


def test_a_restart_takes_finite_vectors_only():
    quantizer, z = VectorQuantizer(16, 6, restart_below=9.0, deferred=True), images(0)
    before = quantizer.embedding.weight.detach().clone()
    quantizer.usage_count.zero_()
    z[:, :, ::2] = float("nan")
    quantizer(z)
    finite = quantizer.collected().isfinite().all(1).sum()
    quantizer.update()
    assert 0 < finite < 16 and quantizer.embedding.weight.isfinite().all()
    assert (quantizer.embedding.weight != before).any(1).sum() == finite


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAQuantizer])
def test_resuming_continues_exactly(kind):
    def step(quantizer, i):
        quantizer.begin()
        info = quantizer(images(i))[1]
        if list(quantizer.parameters()):
            info["vq_loss"].backward()
            with torch.no_grad():
                quantizer.embedding.weight -= quantizer.embedding.weight.grad
            quantizer.embedding.weight.grad = None
        quantizer.update()

    def make():
        return kind(32, 6, kmeans_init=True, restart_below=4.0, deferred=True)

    torch.manual_seed(0)
    whole = make()
    for i in range(6):
        if i == 3:
            saved, state = {k: v.clone() for k, v in whole.state_dict().items()}, torch.get_rng_state()
        step(whole, i)
    resumed = make()
    resumed.load_state_dict(saved)
    torch.set_rng_state(state)
    for i in range(3, 6):
        step(resumed, i)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


# ---- residual, FSQ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_residual_depths_lower_the_error(shared):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(3, 32, 6, shared=shared, kind="ema", kmeans_init=True)
    for i in range(3):
        quantizer(images(i, n=16))
    z = images(9, n=16)
    _, info = quantizer.eval()(z)
    rows = torch.stack([codes.flatten() for codes in info["codes"]], 1)
    partial, errors = 0, []
    for depth, layer in enumerate(quantizer.depths()):
        partial = partial + layer.vectors(rows[:, depth : depth + 1])
        errors.append(F.mse_loss(partial, z.movedim(1, -1).reshape(-1, 6)))
    assert errors[0] > errors[1] > errors[2]
    assert torch.allclose(info["vq_loss"], 0.25 * torch.stack(errors).mean(), rtol=1e-4)
    assert len(quantizer.layers) == (1 if shared else 3)


def test_deferred_kmeans_starts_depth_by_depth():
    quantizer = ResidualQuantizer(2, 16, 6, kind="vq", kmeans_init=True, deferred=True)
    waiting = []
    for i in range(3):
        quantizer.begin()
        quantizer(images(i))
        quantizer.update()
        waiting.append([layer.waits_for_start() for layer in quantizer.layers])
    assert waiting == [[False, True], [False, False], [False, False]]
    assert quantizer.layers[1].embedding.weight.norm() < quantizer.layers[0].embedding.weight.norm()


def test_fsq_is_what_the_paper_defines():
    quantizer = FSQ((8, 5, 3))
    every = torch.arange(120).view(1, 12, 10)
    vectors = quantizer.codes_to_vectors([every])
    assert quantizer.num_codes == 120 and len(vectors.movedim(1, -1).reshape(-1, 3).unique(dim=0)) == 120
    assert vectors[0, 0].unique().tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert vectors[0, 1].unique().tolist() == [-1, -0.5, 0, 0.5, 1] and vectors[0, 2].unique().tolist() == [-1, 0, 1]
    assert vectors[0, :, 0, 1].tolist() == [-0.75, -1, -1], "the first channel counts ones"
    z = (torch.rand(4, 3, 64, 64) * 6 - 3).requires_grad_()
    quantized, info = quantizer(z)
    assert info["usage"] == 1 and info["vq_loss"] == 0 and quantized.abs().max() <= 1
    quantized.sum().backward()
    size = z.detach().abs()
    assert z.grad[size < 1].min() > 0.1 and 0 < z.grad[size > 2.8].max() < 0.05  # straight, but for the tanh
    assert list(FSQ((8, 5), 4).state_dict()) == ["proj_in.weight", "proj_in.bias", "proj_out.weight", "proj_out.bias"]


# ---- several batches and ranks -----------------------------------------------------------------------------------


def test_begin_forgets_and_eval_learns_nothing():
    quantizers_ = [EMAQuantizer(16, 6, restart_below=0.1, deferred=True) for _ in range(2)]
    quantizers_[1].load_state_dict(quantizers_[0].state_dict())
    before = quantizers_[0].embedding.weight.clone()
    quantizers_[0](images(5))  # a step that is then redone
    assert torch.equal(quantizers_[0].embedding.weight, before)
    for quantizer in quantizers_:
        quantizer.begin()
        quantizer(images(6))
        assert len(quantizer.collected()) == 16, "vectors for restarts, of this step alone"
    statistics = [quantizer.update() for quantizer in quantizers_]
    counts = [s.pop("counts") for s in statistics]
    assert torch.equal(*counts) and counts[0].sum() == images(6).numel() / 6
    assert statistics[0] == statistics[1] and not torch.equal(quantizers_[0].embedding.weight, before)
    assert torch.equal(quantizers_[0].embedding.weight, quantizers_[1].embedding.weight)
    frozen = quantizers_[0].eval()
    before = frozen.state_dict()["embedding.embed_avg"].clone()
    frozen(images(7)), frozen.update()
    assert torch.equal(frozen.embedding.embed_avg, before)
    frozen.train().update()  # a step whose micro-batches were all dropped: nothing breaks
    assert frozen.embedding.weight.isfinite().all()


def test_quantizers_of_a_model():
    residual, fsq = ResidualQuantizer(2, 8, 4), FSQ()
    model = nn.ModuleDict({"a": nn.Sequential(residual, nn.Identity()), "b": fsq, "c": fsq})
    assert quantizers(model) == [residual, fsq]
    assert quantizers(residual) == [residual] and quantizers(nn.Linear(1, 1)) == []


RANKS = """
import sys
import torch, torch._dynamo
import torch.distributed as dist
from test_quantize import many_steps
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)  # what ranks draw differs; what they hold may not
torch.save(many_steps([rank]), f"rank{rank}.pt")
if rank == 0:  # eval mode does not communicate: the other rank does nothing here
    from test_quantize import EMAQuantizer, images
    EMAQuantizer(16, 6).eval()(images(0))
dist.barrier()
dist.destroy_process_group()
"""


def many_steps(parts):
    """What quantizers hold after three steps, each on the given parts of its batch."""
    def made(seed, which, *args, **options):
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        quantizer = which(*args, **options)
        torch.set_rng_state(state)
        return quantizer

    deferred = [made(1, EMAQuantizer, 16, 6, deferred=True),
                made(2, ResidualQuantizer, 2, 16, 6, kind="ema", deferred=True),
                made(3, EMAQuantizer, 32, 6, kmeans_init=True, restart_below=2.0, deferred=True),
                made(4, VectorQuantizer, 32, 6, kmeans_init=True, restart_below=2.0, deferred=True)]  # fmt: skip
    at_once, sinkhorn = made(1, EMAQuantizer, 16, 6), made(5, SinkhornQuantizer, 32, 6, num_head=2, chunk=1000)
    results = {"statistics": [], "at_once": [], "codes": []}
    for step in range(3):
        batch = images(step, n=8).chunk(2)
        for quantizer in deferred:
            quantizer.begin()
            for part in parts:
                quantizer(batch[part])
            results["statistics"].append(quantizer.update())
        whole = torch.cat([batch[part] for part in parts])
        info = at_once(whole)[1]
        results["at_once"].append({key: info[key] for key in ("perplexity", "usage")})
        results["codes"].append(torch.stack(sinkhorn(whole)[1]["codes"], 1))
    results["tables"] = [quantizer.state_dict() for quantizer in (*deferred, at_once)]
    return results


@pytest.mark.slow
def test_two_ranks_hold_what_one_rank_would(tmp_path):
    (tmp_path / "two_ranks.py").write_text(RANKS)
    run("two_ranks.py", ranks=2, cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for tables in zip(first["tables"], second["tables"]):
        assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])
    alone = many_steps([0, 1])
    for i in (0, 1, 4):  # without random restarts: equal to one rank that has seen both parts
        for name, value in alone["tables"][i].items():
            assert torch.allclose(first["tables"][i][name], value, atol=1e-5), (i, name)
    equal = [i for i in range(12) if i % 4 < 2]
    for ours, theirs in zip([first["statistics"][i] for i in equal] + first["at_once"],
                            [alone["statistics"][i] for i in equal] + alone["at_once"]):  # fmt: skip
        assert all(torch.isclose(ours[key], theirs[key]) for key in ("perplexity", "usage"))
        assert "counts" not in ours or torch.equal(ours["counts"], theirs["counts"])
    for ours, theirs, whole in zip(first["codes"], second["codes"], alone["codes"]):
        assert torch.equal(torch.cat([ours, theirs]), whole)
    for table in first["tables"][2:4]:
        assert table["started"]
