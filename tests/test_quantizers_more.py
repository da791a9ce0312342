"""The newer quantizers against closed forms, their levels in token files, and what their options may be."""

import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import infer
from conftest import FRAMES, different, mistake, run, state_of, write_clip
from model_vq_latents import VQLatents
from model_vqgan import VQGAN, load_vqgan
from quantize import (
    BSQ,
    LFQ,
    EMAQuantizer,
    ProductQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
    rotated,
    use_levels,
)
from test_quantize import images
from token_file import TokenReader, keep_maps

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "rotation": dict(quantizer="ema", n_embed=16, estimator="rotation"),
    "cosine": dict(quantizer="vq", n_embed=16, cosine=True),
    "cosine_ema": dict(quantizer="ema", n_embed=16, cosine=True),
    "simvq": dict(quantizer="simvq", n_embed=16),
    "lfq": dict(quantizer="lfq", n_embed=16),
    "bsq": dict(quantizer="bsq", n_embed=256),
    "product": dict(quantizer="product", groups=2, kind="ema", n_embed=16),
    "levels": dict(quantizer="rvq", depth=3, kind="ema", n_embed=16, quantizer_dropout=0.5, estimator="rotation"),
}
SMALL = dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=8, embed_dim=8)


# ---- closed forms ------------------------------------------------------------------------------------------------


def test_the_rotation_trick_turns_the_gradient_as_the_vector():
    """In the plane a rotation by the angle between the two, times the ratio of their lengths; elsewhere only that."""
    rows, codes = torch.tensor([[2.0, 0, 0]], requires_grad=True), torch.tensor([[0.0, 1, 0]])
    quantized = rotated(rows, codes)
    assert torch.equal(quantized, codes)
    turn = 0.5 * torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # it takes the row to its code
    assert torch.allclose(turn @ rows[0], codes[0])
    for i in range(3):
        gradient, = torch.autograd.grad(quantized[0, i], rows, retain_graph=True)
        assert torch.allclose(gradient[0], turn[i], atol=1e-6)
    rows, codes = torch.randn(2, 50, 6)
    rows.requires_grad_()
    gradient, = torch.autograd.grad((rotated(rows, codes) * (g := torch.randn(50, 6))).sum(), rows)
    assert torch.allclose(F.cosine_similarity(gradient, rows), F.cosine_similarity(g, codes), atol=1e-5)
    nothing = torch.zeros(2, 6, requires_grad=True)
    gradient, = torch.autograd.grad((rotated(nothing, codes[:2]) * g[:2]).sum(), nothing)
    assert torch.equal(gradient, g[:2]), "what has no direction is not turned"


@pytest.mark.parametrize("kind, size", [(LFQ, 1.0), (BSQ, 3 ** -0.5)])
def test_signs_and_entropies_are_those_of_all_codes(kind, size):
    quantizer = kind(8, 3, entropy_weight=1.0, diversity=2.0, temperature=0.5, beta=0.0)
    z = torch.tensor([[0.3, -2.0, 0.1], [-1.0, 0.5, 0.5]]).t().reshape(1, 3, 1, 2)
    quantized, info = quantizer(z)
    assert info["codes"][0].flatten().tolist() == [1 + 4, 2 + 4], "the first channel counts ones"
    signs = torch.tensor([[1, -1, 1], [-1, 1, 1]]) * size
    assert torch.allclose(quantized[0, :, 0].t(), signs)
    rows = z[0, :, 0].t()
    rows = F.normalize(rows, dim=1) if kind is BSQ else rows
    every = torch.tensor([[2 * (code >> bit & 1) - 1 for bit in range(3)] for code in range(8)]) * size
    p = (-torch.cdist(rows, every).square() / 0.5).softmax(1)
    expected = torch.special.entr(p).sum(1).mean() - 2 * torch.special.entr(p.mean(0)).sum()
    assert torch.allclose(info["vq_loss"], expected, atol=1e-5)
    parts = kind(8, 3, entropy_weight=1.0, diversity=2.0, temperature=0.5, beta=0.0, entropy_bits=1, chunk=2)
    ones = p @ (every > 0).float()
    apart = torch.special.entr(p).sum(1).mean() - 2 * torch.special.entr(torch.stack([ones, 1 - ones])
                                                                         .mean(1)).sum()
    assert torch.allclose(parts(z)[1]["vq_loss"], apart, atol=1e-5), "bits held to be independent"
    quantizer.beta = 1.0
    distance = (rows - signs).square()
    commitment = distance.sum(1).mean() if kind is BSQ else distance.mean()
    assert torch.allclose(quantizer.eval()(z)[1]["vq_loss"], commitment)


def test_product_codes_are_those_of_separate_quantizers():
    product = ProductQuantizer(3, 16, 6, kind="ema", estimator="rotation")
    apart = [EMAQuantizer(16, 2, estimator="rotation") for _ in range(3)]
    for one, layer in zip(apart, product.layers):
        one.load_state_dict(layer.state_dict())
    z = images(0).requires_grad_()
    for _ in range(2):  # the second after a step of learning
        quantized, info = product(z)
        found = [one(part) for one, part in zip(apart, z.chunk(3, 1))]
        assert torch.equal(quantized, torch.cat([vectors for vectors, _ in found], 1))
        assert all(torch.equal(a, b["codes"][0]) for a, (_, b) in zip(info["codes"], found))
        assert torch.isclose(info["vq_loss"], torch.stack([b["vq_loss"] for _, b in found]).mean())


def test_cosine_codes_have_length_one_and_ignore_lengths():
    for kind in (VectorQuantizer, EMAQuantizer):
        quantizer = kind(16, 6, cosine=True, kmeans_init=True, restart_below=0.1)
        for step in range(3):
            quantizer(images(step))
        quantized, info = quantizer.eval()(images(9))
        assert torch.allclose(quantized.norm(dim=1), torch.ones(()))
        longer = quantizer(images(9) * torch.rand(4, 1, 8, 8).add(0.1))
        assert torch.equal(longer[1]["codes"][0], info["codes"][0]) and info["usage"] > 0.5
        table = quantizer.tables()[0][None, :, :, None, None]
        assert torch.equal(F.cosine_similarity(images(9)[:, None], table, dim=2).argmax(1), info["codes"][0])


def test_simvq_moves_codes_that_nothing_uses():
    torch.manual_seed(0)
    quantizer = SimVQ(64, 6)
    optimizer, frozen = torch.optim.Adam(quantizer.parameters(), 0.05), quantizer.embedding.weight.clone()
    losses, before = [], quantizer.codebook().detach()
    for step in range(30):
        _, info = quantizer(3 + images(step))
        losses.append(info["vq_loss"].item())
        optimizer.zero_grad()
        info["vq_loss"].backward()
        optimizer.step()
    assert torch.equal(quantizer.embedding.weight, frozen) and losses[-1] < 0.5 * losses[0]
    moved = (quantizer.codebook() - before).norm(dim=1)
    assert moved.median() > 0.5 and moved.min() > 0 and info["usage"] < 0.5, "not only the codes that are used"


def test_dropout_gives_the_decoder_fewer_levels():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(4, 16, 6, kind="vq", quantizer_dropout=0.5)
    z = images(0, n=400, size=2)
    quantized, info = quantizer(z)
    sums = torch.stack([quantizer.codes_to_vectors(info["codes"][:k]) for k in range(1, 5)])
    kept = (sums == quantized).flatten(2).all(2).float()  # (levels, clips)
    assert (kept.sum(0) == 1).all(), "each clip is the sum of its first codes, and of all its positions' as many"
    shares = kept.mean(1)
    assert (shares[:3] - 0.125).abs().max() < 0.06 and abs(shares[3] - 0.625) < 0.1
    whole, again = quantizer.eval()(z)
    assert torch.equal(whole, quantizer.codes_to_vectors(again["codes"])) and len(again["codes"]) == 4


# ---- in models and runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_is_restored_from_its_codes_and_recognised(name):
    model, video = VQGAN(**SMALL, **KINDS[name]), torch.rand(1, 3, 3, 16, 16)
    model(video)[1]["vq_loss"].backward()
    model.eval()
    with torch.no_grad():
        codes = model.tokenize(video)
        expected = model(video)[0]
    assert torch.equal(model.detokenize(codes), expected) and len(codes) == len(model.codebook_sizes)
    told = {key: KINDS[name][key] for key in ("cosine", "quantizer_dropout") if key in KINDS[name]}
    told.update({"quantizer": name, "n_embed": KINDS[name]["n_embed"]} if name in ("lfq", "bsq") else {})
    loaded, _ = load_vqgan(model.state_dict(), **told)
    assert torch.equal(loaded.detokenize(codes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfq", "levels"])
def test_a_resumed_run_is_exact(here, name):
    net = [f"net.{key}={value}" for key, value in KINDS[name].items()]
    settings = [item for item in FRAMES if "kmeans" not in item and "restart" not in item and "n_embed" not in item]
    settings += [*net, "frames=2", "max_steps=4", "val_fraction=0.3", "val_every=4", "val_clips=2"]
    whole = here(*settings, "name=whole")
    here(*settings, "name=parts", "max_steps=2")
    parts = here(*settings, "name=parts")
    a, b = (state_of(folder, 4) for folder in (whole, parts))
    assert not [d for d in different(a, b) if ".config" not in d and "trend" not in d and "random" not in d]
    bits = 4 * (3 if name == "levels" else 1)  # of 16 codes, one for 2 x 2 pixels
    assert f"bits per pixel {bits / 4:.4f} (" in (whole / "train.log").read_text()


RANKS = """
import torch, torch.distributed as dist
from test_quantizers_more import after_steps
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.save(after_steps([rank]), f"rank{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def after_steps(parts):
    """What quantizers hold after three steps on the given parts of each batch, and the mean of their gradients."""
    torch.manual_seed(0)
    made = [ProductQuantizer(2, 16, 6, deferred=True), LFQ(16, 6, entropy_bits=3, deferred=True),
            BSQ(64, 6, deferred=True), EMAQuantizer(16, 6, cosine=True, deferred=True), SimVQ(16, 6, deferred=True)]
    found = []
    for step in range(3):
        for quantizer in made:
            quantizer.begin()
            z = torch.cat([images(step, n=8).chunk(2)[part] for part in parts]).requires_grad_()
            quantized, info = quantizer(z)
            (quantized.square().mean() + info["vq_loss"]).backward()
            gradients = [p.grad for p in quantizer.parameters()]
            for gradient in gradients:
                if len(parts) == 1:
                    torch.distributed.all_reduce(gradient)
                    gradient /= 2
            with torch.no_grad():
                for p in quantizer.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
            found.append(quantizer.update()["counts"])
    return [*found, *(value for quantizer in made for value in quantizer.state_dict().values())]


@pytest.mark.slow
def test_two_ranks_hold_what_one_rank_would(tmp_path):
    (tmp_path / "two_ranks.py").write_text(RANKS)
    run("two_ranks.py", ranks=2, cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    alone = after_steps([0, 1])
    for ours, theirs, whole in zip(first, second, alone, strict=True):
        assert torch.equal(ours, theirs) and torch.allclose(ours.float(), whole.float(), atol=1e-5)


# ---- levels in files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """A folder with rvq.pth (three levels), vq.pth, and clip.avi."""
    folder = tmp_path_factory.mktemp("levels")
    torch.manual_seed(0)
    for name, options in (("rvq", KINDS["levels"]), ("vq", dict(quantizer="vq", n_embed=16))):
        model = VQGAN(**SMALL, **options)
        model(torch.rand(4, 4, 3, 16, 16))
        torch.save(model.state_dict(), folder / f"{name}.pth")
    write_clip(str(folder / "clip.avi"), frames=5, height=32, width=48)
    return folder


def infer_py(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["infer.py", *map(str, arguments), "--lpips", "none", "--device", "cpu",
                                     "--precision", "fp32"])
    infer.main()


def test_a_tokenizer_of_latents_has_levels_too():
    torch.manual_seed(0)
    narrow = dict(encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32))
    model, video = VQLatents(narrow, **KINDS["levels"], width=8).eval(), torch.rand(1, 8, 3, 16, 16)
    model.calibrate(model.taehv.encode(video))
    torch.nn.init.normal_(model.rectifier.conv_out.weight, std=0.05)
    with torch.no_grad():
        every = model.tokenize(video)
        use_levels(model, 2)
        output, stream = model(video)[0], model.stream()
        codes = model.tokenize(video)
        assert len(every) == 3 and len(codes) == 2 and all(map(torch.equal, codes, every))
        assert torch.allclose(model.detokenize(every[:2]), output, atol=1e-6)
        pieces = [stream.tokenize(video), stream.flush_encoder()]
        shown = [*(stream.detokenize(piece) for piece in pieces), stream.flush_decoder()]
    assert torch.allclose(torch.cat(shown, 1), output, atol=1e-6)
    assert not torch.allclose(model.detokenize(every), output, atol=1e-3)


def frames_of(path):
    video, frames = cv2.VideoCapture(str(path)), []
    while (frame := video.read()[1]) is not None:
        frames.append(frame)
    return np.stack(frames)


def test_a_token_file_is_cut_after_any_level_and_decodes(levels, monkeypatch, capsys):
    monkeypatch.chdir(levels)
    infer_py(monkeypatch, "rvq.pth", "clip.avi", "--save-tokens", "--out", "full")
    infer_py(monkeypatch, "rvq.pth", "clip.avi", "--save-tokens", "--levels", 2, "--out", "two")
    infer_py(monkeypatch, "rvq.pth", "full/tokens/clip.tokens", "--save-tokens", "--levels", 2, "--out", "cut")
    assert "wrote cut/tokens/clip.tokens, of 2 levels" in capsys.readouterr().out
    full, two, cut = (TokenReader(f"{name}/tokens/clip.tokens") for name in ("full", "two", "cut"))
    assert len(full.maps) == 3 and two.maps == cut.maps == full.maps[:2] and cut.bits < full.bits
    for a, b, c in zip(*(np.concatenate([np.stack(piece) for piece in reader], 1) for reader in (full, two, cut))):
        assert (a == b).all() and (b == c).all()
    infer_py(monkeypatch, "rvq.pth", "cut/tokens/clip.tokens", "--out", "again")
    infer_py(monkeypatch, "rvq.pth", "full/tokens/clip.tokens", "--levels", 2, "--out", "full")
    assert (frames_of("full/comparison_videos/clip_2_levels_reconstructed.webm")
            == frames_of("two/comparison_videos/clip_reconstructed.webm")).all(), "the report keeps its own video"
    decoded = [frames_of(f"{name}_reconstructed.webm") for name in (
        "two/comparison_videos/clip", "cut/comparison_videos/clip_2_levels", "again/comparison_videos/clip")]
    assert (decoded[0] == decoded[1]).all() and (decoded[1] == decoded[2]).all()
    assert (frames_of("full/comparison_videos/clip_reconstructed.webm") != decoded[0]).any()
    row, = json.load(open("two/metrics.json"))["rows"]
    assert row["metrics"]["bits_per_pixel"] == pytest.approx(8 * os.path.getsize("two/tokens/clip.tokens")
                                                             / (5 * 32 * 48))


def test_levels_that_are_not_there_are_named(levels, monkeypatch, capsys):
    monkeypatch.chdir(levels)
    if not os.path.exists("one.tokens"):
        infer_py(monkeypatch, "rvq.pth", "clip.avi", "--save-tokens", "--out", "whole")
        keep_maps("whole/tokens/clip.tokens", "one.tokens", 1)
    capsys.readouterr()
    half = open("whole/tokens/clip.tokens", "rb").read()[:-40]
    open("half.tokens", "wb").write(half)
    common = ["--out", "out", "--device", "cpu", "--precision", "fp32"]
    for arguments, words in (
        (["rvq.pth", "one.tokens", "--levels", 2], "one.tokens: holds 1 level of codes; --levels 2 asks for more"),
        (["rvq.pth", "half.tokens", "--levels", 1], "half.tokens: truncated"),
        (["rvq.pth", "clip.avi", "--levels", 4], "--levels 4: rvq.pth is .*1 to 3 are possible"),
        (["rvq.pth", "clip.avi", "--levels", 0], "--levels 0: 1 or more"),
        (["rvq.pth", "one.tokens", "--max-frames", 2], "--max-frames is for videos and images, and one.tokens is"),
        (["rvq.pth", "one.tokens", "--fid", 64], "--fid is for videos and images"),
        (["rvq.pth", "clip.avi", "--teacher-frames", 4], "--teacher-frames 4 wants --teacher"),
        (["vq.pth", "clip.avi", "--levels", 1], "--levels 1: vq.pth is .*only a residual quantizer's"),
        (["rvq.pth", "whole/tokens/clip.tokens", "--levels", 1, "--save-tokens", "--out", "whole"], "another --out"),
    ):
        error = mistake(capsys, monkeypatch, infer, *common, *arguments)
        assert re.search(words, error), error
    with pytest.raises(ValueError, match="holds 1 code maps, and 2 are to be kept"):
        keep_maps("one.tokens", "two.tokens", 2)
    assert not os.path.exists("two.tokens")


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ("quantizer=vq net.estimator=spin", "net.estimator=spin: one of straight_through, rotation"),
    ("quantizer=fsq net.estimator=rotation", "only vq, ema, simvq, rvq, product take it"),
    ("quantizer=rvq net.depth=2 net.cosine=true", "only vq, ema, product take it"),
    ("quantizer=ema net.quantizer_dropout=0.5", "only rvq take it"),
    ("quantizer=rvq net.depth=4 net.quantizer_dropout=1.5", "a probability from 0 to 1"),
    ("quantizer=rvq net.depth=1 net.quantizer_dropout=0.5", "no level to leave out"),
    ("quantizer=lfq net.n_embed=1000", "a power of 2"),
    ("quantizer=vq net.groups=2", "only product take it"),
])
def test_options_that_a_quantizer_has_not_are_refused(given, words):
    with pytest.raises(config.ConfigError, match=words):
        config.load_config(["vqgan", *f"net.{given}".split()])


@pytest.mark.parametrize("make", [
    lambda: VectorQuantizer(16, 6, estimator="spin"), lambda: ProductQuantizer(4, 16, 6),
    lambda: ResidualQuantizer(2, 16, 6, cosine=True), lambda: ResidualQuantizer(2, 16, 6, quantizer_dropout=1.1),
    lambda: LFQ(12), lambda: BSQ(16, temperature=0.0), lambda: use_levels(VQGAN(**SMALL), 1),
    lambda: ProductQuantizer(2, 16, 6, kind="fsq"), lambda: LFQ(16, entropy_bits=20)])
def test_settings_that_make_no_sense_are_named(make):
    with pytest.raises(ValueError):
        make()
