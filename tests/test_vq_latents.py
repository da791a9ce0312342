"""The tokenizer of a frozen TAEHV's latents: model, stream, training from a cache, token files."""

import os

import numpy as np
import pytest
import torch

import checkpoint
import config
import models
import step_taehv
import train
import video_files
from conftest import ROOT, mistake, run
from model_taehv import load_taehv
from model_vq_latents import VQLatents

TRAIN, INFER = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "infer.py")
QUANTIZERS = {
    "vq": dict(quantizer="vq", n_embed=32),
    "ema": dict(quantizer="ema", n_embed=32),
    "optvq": dict(quantizer="optvq", n_embed=32, num_head=2),
    "rvq": dict(quantizer="rvq", n_embed=32, depth=2, kind="ema"),
    "fsq": dict(quantizer="fsq", levels=(5, 4, 4)),
}


def make(name="ema", **changes):
    """A model in eval mode with a calibrated quantizer and a rectifier that does something."""
    torch.manual_seed(0)
    model = VQLatents(**QUANTIZERS[name], width=8, **changes)
    model.calibrate(model.taehv.encode(clip()))
    torch.nn.init.normal_(model.rectifier.conv_out.weight, std=0.05)
    return model.eval()


def clip(frames=16, height=16, width=32):
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", QUANTIZERS)
@torch.no_grad()
def test_codes_stand_for_the_reconstruction(name):
    model, video = make(name), clip()
    output, info = model(video)
    codes = model.tokenize(video)
    assert all(torch.equal(a, b) for a, b in zip(codes, info["codes"]))
    assert [tuple(c.shape) for c in codes] == [(2, 4, 2, 4)] * len(model.codebook_sizes)
    assert all(0 <= c.min() and c.max() < size for c, size in zip(codes, model.codebook_sizes))
    assert torch.allclose(model.detokenize(codes), output, atol=1e-6)
    assert torch.equal(model.decode(model.encode(video)), output)
    assert output.shape == model.targets(video).shape == (2, 13, 3, 16, 32)
    again = VQLatents(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(video)[0], output)


@pytest.mark.parametrize("cut", [1, 3, 16])
@torch.no_grad()
def test_a_stream_does_not_depend_on_the_cutting(cut):
    model, video = make("rvq"), clip(18)
    expected = model.tokenize(video)
    stream, codes, frames = model.stream(), [], []
    for piece in video.split(cut, 1):
        codes.append(stream.tokenize(piece))
        frames.append(stream.detokenize(codes[-1]))
    codes.append(stream.flush_encoder())
    frames += [stream.detokenize(codes[-1]), stream.flush_decoder()]
    assert all(torch.equal(torch.cat(parts, 1), whole) for parts, whole in zip(zip(*codes), expected))
    assert torch.allclose(torch.cat(frames, 1), model(video)[0], atol=1e-6)
    stream = model.stream()
    latents = torch.cat([*map(stream.encode, video.split(cut, 1)), stream.flush()], 1)
    assert torch.allclose(latents, model.encode(video), atol=1e-6)
    stream = model.stream()
    shown = [stream.detokenize(stream.tokenize(piece)) for piece in video.split(cut, 1)] + [stream.flush()]
    assert torch.equal(torch.cat(shown, 1), torch.cat(frames, 1))
    with pytest.raises(ValueError, match="given nothing"):
        stream.flush()


def test_the_rectifier_looks_back_and_never_ahead():
    model = make()
    vectors = torch.randn(1, 5, 16, 2, 4, requires_grad=True)
    reach, = torch.autograd.grad(model.rectify(vectors)[:, 2].sum(), vectors)
    assert [bool(reach[:, k].any()) for k in range(5)] == [False, True, True, False, False]


def test_calibration_gives_zero_mean_and_unit_deviation():
    model, latents = make(), 5 + 3 * torch.randn(4, 3, 16, 8, 8) * torch.linspace(0.5, 1.5, 16).view(-1, 1, 1)
    model.calibrate(latents)
    z = (latents.movedim(2, -1) - model.shift) / model.scale
    assert z.mean((0, 1, 2, 3)).abs().max() < 1e-5 and abs(z.square().mean() - 1) < 1e-5


@pytest.fixture(scope="module")
def tokenizer(cache, teacher, tmp_path_factory):
    """A folder with a run of two ranks, twelve steps."""
    folder = tmp_path_factory.mktemp("vq_latents")
    settings = [f"latent_cache={cache}", f"init_from={teacher}", "size=32", "batch_size=2", "net.n_embed=16",
                "net.width=16", "warmup_steps=2", "val_every=6", "log_every=1", "val_fraction=0.3", "device=cpu",
                "schedule=constant", "precision=fp32", "lr=1e-3", "net.kmeans_init=false"]
    output = run(TRAIN, "vq_latents", *settings, "max_steps=12", "name=a", ranks=2, cwd=folder)
    return folder, settings, output


@pytest.mark.slow
def test_training_on_cached_latents(tokenizer, teacher):
    folder, settings, output = tokenizer
    assert "codebook use" in output and "psnr from the teacher's" in output
    model, words = models.load_model(folder / "runs" / "a")
    original = load_taehv(teacher).state_dict()
    assert words.startswith("vq_latents, step ")
    assert all(torch.equal(v, original[k]) for k, v in model.taehv.state_dict().items()), "it is frozen"
    assert model.rectifier.conv_out.weight.abs().max() > 0 and model.scale > 0
    log = (folder / "runs" / "a" / "train.log").read_text()
    losses = [float(line.split("encoder ")[1].split(",")[0]) for line in log.splitlines() if ", gradient norm" in line]
    assert len(losses) == 12 and losses[-1] < losses[0]
    plain, _ = models.load_model(folder / "runs" / "a" / "model.pth")
    newest, _ = models.load_model(folder / "runs" / "a" / "step_00000012.pt")
    with torch.no_grad():
        assert torch.equal(plain(clip())[0], newest(clip())[0])


@pytest.mark.slow
def test_resuming_is_exact_and_one_rank_equals_two(tokenizer):
    folder, settings, _ = tokenizer
    run(TRAIN, "vq_latents", *settings, "max_steps=5", "name=b", ranks=2, cwd=folder)
    run(TRAIN, "vq_latents", *settings, "max_steps=12", "name=b", ranks=2, cwd=folder)
    run(TRAIN, "vq_latents", *settings, "max_steps=12", "name=c", "accumulation=2", cwd=folder)
    a, b, c = (checkpoint.read(str(folder / "runs" / name / "step_00000012.pt"))["model"] for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert max((a[k].float() - c[k].float()).abs().max().item() for k in a) < 1e-5


@pytest.mark.slow
def test_learning_through_the_decoder(tokenizer, monkeypatch):
    folder, settings, _ = tokenizer
    output = run(TRAIN, "vq_latents", *settings, "max_steps=2", "pixel_weight=1", "name=d", cwd=folder)
    assert "reconstruction" in output
    again, whole = [], step_taehv.checkpoint
    monkeypatch.setattr(step_taehv, "checkpoint", lambda *call, **how: again.append(1) or whole(*call, **how))
    train.train(config.load_config(["vq_latents", *settings, "max_steps=2", "pixel_weight=1", "name=e",
                                    "gradient_checkpointing=true", f"out_dir={folder / 'runs'}"]))
    assert again, "its decoder computes activations again"
    spared, plain = (checkpoint.read(str(folder / "runs" / name / "step_00000002.pt"))["model"] for name in "ed")
    assert all(torch.allclose(plain[k].float(), spared[k].float(), atol=1e-6) for k in plain)
    model, _ = models.load_model(folder / "runs" / "d")
    start, _ = models.load_model(folder / "runs" / "a")
    assert all(torch.equal(v, start.taehv.state_dict()[k]) for k, v in model.taehv.state_dict().items())


@pytest.mark.slow
@pytest.mark.auto_precision
def test_tokens_in_a_file(tokenizer, clips, tmp_path):
    run_folder, video = tokenizer[0] / "runs" / "a", os.path.join(clips, "sub0", "clip0.mp4")
    run(INFER, run_folder, video, "--save-tokens", "--lpips", "none", "--out", "a", cwd=tmp_path)
    run(INFER, run_folder, tmp_path / "a" / "tokens" / "clip0.tokens", "--out", "b", cwd=tmp_path)
    direct, restored = (np.stack(list(video_files.VideoReader(str(tmp_path / out / "comparison_videos" /
                                                           "clip0_reconstructed.webm")))) for out in "ab")
    assert np.array_equal(direct, restored) and len(direct) == 24


@pytest.mark.any_precision
def test_mistakes(cache, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = [f"latent_cache={cache}", f"init_from={teacher}", "size=32"]
    for settings, words in (
        (both[1:], "needs latents: set latent_cache=FOLDER"),
        (both[:1], "init_from=FILE, the TAEHV around its quantizer"),
        ([*both, "gan_weight=0.1"], "its decoder is frozen"),
        ([*both, "decoder_input=teacher"], "its decoder is frozen"),
        ([*both, "encoder_weight=0"], "set encoder_weight above 0"),
        ([*both, "variant=taew2_2"], "set variant, patch_size and latent_channels to match"),
        ([*both, "net.quantizer=emma"], "unknown quantizer 'emma'"),
        ([*both, "train_decoder=false"], "only taehv can be trained by halves"),
    ):
        assert words in mistake(capsys, monkeypatch, train, "vq_latents", *settings)
