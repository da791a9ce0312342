"""Channels that are cut: what is left computes what the model does without them, and the least important go first."""

import os

import pytest
import torch

import config
import data
import data_files
import models
import prune
from conftest import mistake
from fit_taehv import fit
from model_taehv import TAEHV, load_taehv
from model_vqvae import VqVae2
from prune_taehv import (by_chance, by_magnitude, by_taylor, channel_indices, choose_channels, compensate, count, cut,
                         layers_of, per_row, widths_of)

NARROW = dict(encoder_widths=(24, 16, 16, 24), decoder_widths=(40, 24, 16, 24))
KINDS = [dict(variant="taehv"), dict(variant="lighttaehy1_5"), dict(variant="taeltx_2"), dict(variant="taeh3"),
         dict(latent_channels=32, encoder_time_downscale=(1, 1, 1), decoder_time_upscale=(1, 1, 1))]  # fmt: skip


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def random_model(**arguments):
    """All its weights random, also those with which memory blocks begin at zero."""
    torch.manual_seed(0)
    model = TAEHV(**arguments, **NARROW).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) / max(1, weight[0].numel()) ** 0.5)
    return model


@pytest.mark.parametrize("arguments", KINDS, ids=lambda a: a.get("variant", "strides of 1"))
@torch.no_grad()
def test_what_is_left_computes_what_the_model_does_without_the_channels(arguments, one_thread):
    model = random_model(**arguments)
    layers = layers_of(model)
    assert {layer.name for layer in layers} == {n.removesuffix(".weight") for n in model.state_dict() if "weight" in n}
    scores = by_chance(model, layers)
    kept = choose_channels(model, layers, scores, int(0.5 * parameters(model)), multiple=8)
    small = cut(model, layers, kept)
    assert parameters(small) == count(model, layers, widths_of(small)) <= 0.5 * parameters(model)
    video = torch.rand(1, 17, 3, 2 * model.space_factor, model.space_factor)
    for layer in filter(lambda layer: layer.reads, layers):  # nothing reads them any more
        weight = model.get_submodule(layer.name).weight
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[channel_indices(kept, layer.reads, layer.copies, weight.shape[1])] = False
        weight[:, gone] = 0
    (wanted, info), (output, own) = model(video), small(video)
    assert torch.allclose(own["latents"], info["latents"], atol=1e-5)
    assert torch.allclose(output, wanted, atol=1e-5) and wanted.std() > 0.01


@torch.no_grad()
def test_dead_channels_go_first_and_nobody_misses_them(one_thread):
    model = random_model()
    layers, dead = layers_of(model), {}
    for layer in filter(lambda layer: layer.writes, layers):
        conv = model.get_submodule(layer.name)
        width = len(per_row(conv.weight, layer.frames))
        dead[layer.writes] = dead.get(layer.writes, torch.randperm(width)[:8])
        for frame in range(layer.frames):
            conv.weight[dead[layer.writes] + frame * width] = 0
            if conv.bias is not None:
                conv.bias[dead[layer.writes]] = 0
    samples = [{"video": (torch.rand(8, 3, 16, 16) * 255).byte()} for _ in range(2)]
    budget = count(model, layers, {stage: width - 8 for stage, width in widths_of(model).items()})
    video = samples[0]["video"][None] / 255  # on other clips, others than the dead ones may live
    wanted, _ = model(video)
    for scores in (by_taylor(model, layers, samples, torch.device("cpu")), by_magnitude(model, layers)):
        kept = choose_channels(model, layers, scores, budget, multiple=8)
        gone = {group: sorted({*range(len(scores[group]))} - {*kept[group].tolist()}) for group in dead}
        assert all(scores[group][gone[group]].sum() == 0 and len(gone[group]) == 8 for group in dead)
        small = cut(model, layers, kept)
        assert torch.allclose(small(video)[0], wanted, atol=1e-6)
    compensate(model, small, layers, kept, samples, torch.device("cpu"))  # all that went by magnitude is dead
    assert torch.allclose(small(video)[0], wanted, atol=1e-5), "there was nothing to make up for"


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(clips, tmp_path_factory):
    """Weights of a TAEHV that reconstructs the clips, and these clips."""
    torch.manual_seed(0)
    found = data.ValClips(data_files.find_sources(clips), 32, 12, per_video=2).share(0, 1, lambda notes: None)
    video = torch.stack([sample["video"] for sample in found]).float().div_(255)
    model = fit(TAEHV(encoder_widths=(32, 32, 32, 32), decoder_widths=(64, 32, 32, 32)), video).eval()
    path = tmp_path_factory.mktemp("fitted") / "fitted.pth"
    torch.save(model.state_dict(), path)
    return str(path), model, video


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, one_thread):
    """command(FILE, ...) in an empty folder -> what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prune, "TIMED", (1, 4, 3, 32, 32))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["prune.py", *map(str, arguments), "--device", "cpu"])
        prune.main()
        return capsys.readouterr().out
    return run


@torch.no_grad()
def test_a_pruned_model_loads_anywhere_and_is_better_than_chance(fitted, clips, command):
    path, model, video = fitted
    errors = {}
    for name, options in (("taylor", []), ("plain", ["--no-compensation"]),
                          ("random", ["--by", "random", "--no-compensation"])):  # fmt: skip
        printed = command(path, "--keep", "0.6", "--data", clips, "--size", "32", "--clips", "6", "--val-clips", "3",
                          "--out", f"{name}.pth", *options)  # fmt: skip
        small, _ = models.load_model(f"{name}.pth")
        assert parameters(small) <= 0.6 * parameters(model) and f"{parameters(small):,}" in printed
        errors[name] = (small(video)[0] - model(video)[0]).square().mean().item()
    assert errors["taylor"] < 0.8 * errors["plain"] and errors["plain"] < 0.5 * errors["random"], errors
    small = load_taehv("taylor.pth")
    stream = small.stream()
    pieces = [stream.decode(stream.encode(piece)) for piece in video[:1].split(5, 1)]
    assert torch.allclose(torch.cat([*pieces, stream.flush()], 1), small(video[:1])[0], atol=1e-5)
    command_line = printed.split("python train.py ")[1].split()
    cfg = config.load_config(command_line)  # what it says to run
    student, _ = models.make_model(cfg, [data.Bucket(64, 12, 1.0, 1)])
    assert student.decoder_widths == load_taehv("random.pth").decoder_widths


def test_a_latent_cache_cuts_one_half_and_leaves_the_other(fitted, cache, command):
    path, model, _ = fitted
    printed = command(path, "--parameters", "0.4M", "--part", "decoder", "--data", cache, "--clips", "4", "--val-clips",
                      "2", "--out", "new/half.safetensors")  # fmt: skip
    assert "PSNR from the teacher's latents" in printed and "train_encoder=false" in printed
    small, words = models.load_model("new/half.safetensors")
    assert parameters(small) <= 400_000 and small.encoder_widths == (32, 32, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(small.encoder.parameters(), model.encoder.parameters()))
    config.load_config(printed.split("python train.py ")[1].split())


def test_mistakes_are_one_line_and_leave_nothing(fitted, clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, model, _ = fitted
    wide, other = "taehv1_5_super.pth", "tokens.pt"
    narrow = TAEHV("taehv1_5_super", encoder_widths=(8, 8, 8, 8), decoder_widths=(16, 16, 16, 16))
    torch.save(narrow.state_dict(), wide)
    tokens = VqVae2(group_count=1, n_hid=8, n_init=8, vocab_size=8, n_blk_per_group=1, sequence_length=1)
    about = {"model_name": "vqvae_video", "model_config": tokens.config, "step": 0}
    torch.save({**about, "ema": tokens.state_dict()}, other)
    torch.save({}, "there.pth")
    os.mkdir("empty")
    before = sorted(os.listdir())
    for arguments, words in (
        ([path], "--parameters --keep"),
        ([path, "--keep", "1.5"], "1.5"),
        ([path, "--parameters", "90M"], "90,000,000"),
        ([path, "--parameters", "20k"], "still has"),
        (["none.pth", "--keep", "0.5"], "none.pth"),
        ([wide, "--keep", "0.5"], "super decoder"),
        ([other, "--keep", "0.5"], "VqVae2"),
        ([path, "--keep", "0.5", "--out", "there.pth"], "--force"),
        ([path, "--keep", "0.5", "--out", "weights.bin"], ".safetensors"),
        ([path, "--keep", "0.5", "--out", "taew2_1.pth"], "taken for taew2_1"),
        ([path, "--keep", "0.5", "--out", "there.pth/new.pth"], "there.pth"),
        ([path, "--keep", "0.5", "--data", "empty"], "no video"),
        ([path, "--keep", "0.5", "--data", os.path.join(clips, "sub0", "clip0.mp4")], "--val-data"),
        ([path, "--keep", "0.5", "--data", clips, "--size", "20"], "multiples of 8"),
        ([path, "--keep", "0.5", "--val-data", clips], "needs --data"),
        ([path, "--keep", "0.5", "--data", clips, "--device", "abacus"], "abacus"),
    ):
        assert words in mistake(capsys, monkeypatch, prune, *arguments), arguments
        assert sorted(os.listdir()) == before
