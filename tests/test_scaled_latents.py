"""Teachers whose latents are too large or too small for a student's soft clamp at 3: its layers have them scaled."""

import sys

import pytest
import torch

import config
import export
import latent_cache
import objective
import prune_taehv
from clips import suit_to_teacher
from conftest import NARROW, same
from fast_taehv import fast
from init_taehv import REACH, scale_to_teacher
from cache_files import LatentCache
from model_taehv import TAEHV, load_taehv
from models import load_model

NARROW_NET = dict(encoder_widths=(32, 32, 32, 32), decoder_widths=(64, 48, 32, 32))
PER_FRAME = dict(latent_channels=12, encoder_time_downscale=(1, 1, 1), decoder_time_upscale=(1, 1, 1))
# The mean colours of the four quarters of each cell, in channels of very different means and deviations.
LOUD = """
import torch
import torch.nn.functional as F
GAIN = torch.linspace(10, 60, 12).view(-1, 1, 1) * SIZE
MEAN = torch.linspace(-40, 40, 12).view(-1, 1, 1) * SIZE
class Loud:
    def encode(self, video):
        quarters = F.pixel_unshuffle(F.avg_pool2d(video.flatten(0, 1), 4), 2).unflatten(0, video.shape[:2])
        return quarters * GAIN + MEAN
    def decode(self, latents):
        video = F.pixel_shuffle(((latents - MEAN) / GAIN).flatten(0, 1), 2)
        return F.interpolate(video, scale_factor=4).unflatten(0, latents.shape[:2])
def make():
    return Loud()
"""


def loud_cache(folder, clips, monkeypatch, size):
    """A finished cache of such a teacher's latents."""
    (folder / "loud.py").write_text(f"SIZE = {size}\n" + LOUD)
    monkeypatch.setattr(sys, "argv", [
        "latent_cache.py", "--teacher", f"python:{folder / 'loud.py'}:make", "--data", str(clips), "--clips", "24",
        "--size", "32", "--frames", "2", "--workers", "0", "--device", "cpu", "--precision", "fp32", "--out",
        str(folder / "cache")])
    with pytest.raises(SystemExit) as left:
        latent_cache.main()
    assert left.value.code == 0
    return folder / "cache"


def scaled_model(seed=0):
    """(a narrow model that has latents of the mean 20 k and the deviation 10 + k in channel k, such latents)."""
    torch.manual_seed(seed)
    model = TAEHV(**NARROW_NET, **PER_FRAME).eval()
    mean, deviation = 20.0 * torch.arange(12).view(-1, 1, 1), 10.0 + torch.arange(12).view(-1, 1, 1)
    latents = torch.randn(8, 4, 12, 4, 4) * deviation + mean
    scale_to_teacher(model, latents)
    return model, latents


def suit(model, latents, *settings):
    """What `suit_to_teacher` says for these settings."""
    return "".join(suit_to_teacher(config.load_config(["taehv_distill", "latent_cache=x", *settings]), model, latents))


@pytest.mark.parametrize(("mean", "deviation", "wanted"), [
    (0.0, 1.0, False), (1.0, 2.0, False), (0.0, 0.3, False), (0.0, REACH, True), (REACH + 1, 0.1, True),
    (0.0, 0.05, True), (-9.0, 1.0, True)])
def test_latents_are_scaled_where_the_layers_could_not_have_them(mean, deviation, wanted):
    torch.manual_seed(0)
    latents = torch.randn(16, 2, 12, 4, 4)
    latents[:, :, 3] = latents[:, :, 3] * deviation + mean
    if deviation == 0.05:
        latents = latents * deviation
    model = TAEHV(**NARROW_NET, **PER_FRAME)
    assert ("net.scaled_latents" in suit(model, latents)) is wanted
    assert model.config.get("scaled_latents", False) is wanted and ("latents_scale" in model.state_dict()) is wanted
    if wanted:
        within = model._own(latents).movedim(2, 0).flatten(1)
        assert within.mean(1).abs().max() < 1e-3 and within.std(1).max() < 1.001
        assert torch.allclose(model._normalised(model._own(latents)), latents, rtol=1e-3, atol=1e-3)


def test_a_channel_that_tells_nothing_is_not_blown_up():
    latents = 20 * torch.randn(16, 2, 12, 4, 4)
    latents[:, :, 5] = 7.0
    model = TAEHV(**NARROW_NET, **PER_FRAME)
    scale_to_teacher(model, latents)
    within = model._own(latents)
    assert within[:, :, 5].abs().max() < 1e-3 and model.latents_scale[5] < 0.6, "a tenth of the mean deviation, not 0"


def test_the_setting_decides():
    unit, large = torch.randn(16, 2, 12, 4, 4), 20 * torch.randn(16, 2, 12, 4, 4)
    model = TAEHV(**NARROW_NET, **PER_FRAME)
    for settings in (["net.scaled_latents=false"], ["init_from=x.pth"]):
        assert "too large or too small" in suit(model, large, *settings)
        assert suit(model, unit, *settings) == "" and model.latents_scale is None
    model = TAEHV(**NARROW_NET, **PER_FRAME, scaled_latents=True)
    assert "mean 0" in suit(model, 1.5 * unit, "net.scaled_latents=true")
    assert torch.allclose(model.latents_scale, torch.tensor(1 / 1.5), atol=0.05)


def test_a_variant_with_a_scale_keeps_it():
    model = TAEHV("lighttaew2_1")
    before = model.latents_scale.clone()
    assert "too large or too small" in suit(model, 50 * torch.randn(8, 2, 16, 4, 4))
    assert torch.equal(model.latents_scale, before) and "latents_scale" not in model.state_dict()
    with pytest.raises(ValueError, match="has a scale of its latents already"):
        model.scale_latents([0.0] * 16, [1.0] * 16)
    with pytest.raises(ValueError, match="leave out scaled_latents"):
        TAEHV("lighttaew2_1", scaled_latents=True)
    with pytest.raises(ValueError, match="scaled_latents='yes'"):
        TAEHV(scaled_latents="yes")


@torch.no_grad()
def test_weights_alone_tell_the_scale(tmp_path):
    model, latents = scaled_model()
    video = torch.rand(1, 4, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "student.pth")
    for other in (load_taehv(str(tmp_path / "student.pth")), TAEHV(str(tmp_path / "student.pth")),
                  load_model(tmp_path / "student.pth")[0], fast(model)):
        assert other.config == model.config
        assert torch.allclose(other.encode(video), model.encode(video), rtol=1e-4, atol=1e-2)
        assert torch.allclose(other.decode(latents), model.decode(latents), atol=1e-4)
    stream = model.stream()
    decoded = torch.cat([stream.decode(latents[:1, t:t + 1]) for t in range(4)], 1)
    assert torch.allclose(decoded, model.decode(latents[:1]), atol=1e-5)


@torch.no_grad()
def test_a_pruned_model_keeps_the_scale():
    model, latents = scaled_model()
    layers = prune_taehv.layers_of(model)
    kept = {(part, stage, kind): torch.arange(NARROW_NET[f"{part}_widths"][stage])
            for part, stage, kind in prune_taehv.groups_of(layers)}
    same_size = prune_taehv.cut(model, layers, kept)
    assert same(same_size.state_dict(), model.state_dict())
    assert torch.equal(same_size.decode(latents[:1]), model.decode(latents[:1]))


@pytest.mark.parametrize("target", ["comfyui", "diffusers", "taehv", "sdcpp"])
def test_programs_without_such_a_scale_are_not_given_it(target, tmp_path):
    options = export.parse([str(tmp_path / "x.pth"), "--to", target])
    with pytest.raises(export.ExportError, match="scale|published shape|would not decode"):
        getattr(export, target)(scaled_model()[0], options)


def test_the_loss_counts_in_the_teachers_deviations():
    cfg = config.load_config(["taehv_distill", "latent_cache=x", "train_decoder=false", "device=cpu"])
    model, latents = scaled_model()
    goal = objective.Objective(cfg, model.train(), torch.device("cpu"), torch.autocast("cpu", enabled=False))
    goal.begin(0)
    values = goal(torch.rand(8, 4, 3, 32, 32), latents, 1.0)
    variance = model.latents_scale.pow(-2).mean()
    assert variance > 100 and 0.5 < values["encoder_loss"] < 3, "fresh weights miss by about one deviation"
    assert values["teacher_square"] > variance, "what is logged of latents is in the teacher's units"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 0.001])
def test_a_run_takes_latents_of_any_scale(size, clips, tmp_path, monkeypatch, here):
    cache = loud_cache(tmp_path, clips, monkeypatch, size)
    settings = ["taehv_distill", *NARROW, f"latent_cache={cache}", "latent_channels=12", "size=32", "frames=2",
                "net.encoder_time_downscale=1,1,1", "net.decoder_time_upscale=1,1,1", "batch_size=2", "workers=0",
                "precision=fp32", "device=cpu", "max_steps=2", "save_every=1", "val_fraction=0.3"]
    scaled, plain = here(*settings, "name=scaled"), here(*settings, "net.scaled_latents=false", "name=plain")
    assert "come to the layers with mean 0" in (scaled / "train.log").read_text()
    batch = LatentCache(str(cache)).read(range(24))
    video, latents = batch["video"].float() / 255, batch["latents"].float()
    found = {}
    for folder in (scaled, plain):
        from_pth, from_checkpoint = load_taehv(str(folder / "model.pth")), load_model(folder)[0]
        assert same(from_pth.state_dict(), from_checkpoint.state_dict())
        with torch.no_grad():
            found[folder] = (from_pth.decode(latents) - video).square().mean().item()
    assert found[scaled] < found[plain] * (0.5 if size == 1 else 0.98)
    resumed = here(*settings, "max_steps=3", "name=scaled")
    assert "resumed from" in (resumed / "train.log").read_text()
    on = here(*settings, f"init_from={resumed}", "name=on")
    assert load_model(on)[0].config["scaled_latents"] is True
