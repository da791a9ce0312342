"""A TAEHV with a shape of its own, through all commands: what a checkpoint knows need not be said again."""

import json
import sys

import pytest
import torch

import config
import infer
import latent_cache
import models
import train
from conftest import BATCH_NORM, COMMON, SCRATCH, mistake
from model_taehv import TAEHV, load_taehv

OWN = dict(patch_size=2, latent_channels=8)
WIDTHS = dict(encoder_widths=(8, 8, 8, 16), decoder_widths=(48, 32, 24, 24))
SHORT = ["size=16", "frames=8", "batch_size=1", "max_steps=1", *COMMON]


@pytest.fixture
def own(here):
    """A run folder of a TAEHV whose shape no variant has."""
    here(*SCRATCH, *SHORT, "val_every=1", "val_fraction=0.3", "name=own", *(f"{k}={v}" for k, v in OWN.items()),
         *(f"net.{k}={','.join(map(str, v))}" for k, v in WIDTHS.items()))
    return here


def check(folder, name="model.pth"):
    model = models.load_model(folder / name)[0]
    taehv = getattr(model, "taehv", model)
    assert all(getattr(taehv, key) == value for key, value in {**OWN, **WIDTHS}.items())
    return model


@pytest.mark.any_precision
@pytest.mark.slow
def test_a_run_of_its_own_shape_is_taken_everywhere(own, clips, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "own"
    for name in ("", "model.pth", "best.pt", "step_00000001.pt"):
        check(folder, name)
    assert load_taehv(str(folder / "model.pth")).config == check(folder).config
    monkeypatch.setattr(sys, "argv", ["infer.py", str(folder / "model.pth"), clips + "/sub0/clip0.mp4", "--max-frames",
                                      "4", "--lpips", "none", "--quiet", "--precision", "fp32", "--out",
                                      str(tmp_path / "out")])
    infer.main()
    assert "weights of variant taehv" in capsys.readouterr().out

    for number, start in enumerate(("", "/model.pth", "/best.pt")):
        again = own("taehv", *SHORT, f"init_from={folder}{start}", f"name=again{number}")
        check(again)
        settings = json.loads((again / "config.json").read_text())
        assert {key: settings[key] for key in OWN} == OWN and settings["variant"] == "taehv"
    own("taehv", *SHORT, f"init_from={folder}", "name=again0", "max_steps=2")  # goes on
    assert (tmp_path / "again0" / "step_00000002.pt").is_file()
    own("taehv", *SHORT, f"init_from={folder}", "name=said", "patch_size=2", "latent_channels=8", "variant=taehv")

    capsys.readouterr()
    for settings, words in (
        (["patch_size=1"], "which does not fit patch_size=1: set variant"),
        (["latent_channels=16"], "which does not fit latent_channels=16"),
        (["variant=taew2_2"], "which does not fit variant=taew2_2"),
        (["net.decoder_widths=24,24,24,24"], "net.decoder_widths"),
    ):
        line = mistake(capsys, monkeypatch, train, "taehv", *SHORT, f"data={clips}", f"out_dir={tmp_path}",
                       f"init_from={folder}", "name=wrong", *settings)
        assert words in line and str(folder) in line, line


@pytest.mark.any_precision
@pytest.mark.slow
def test_latents_of_its_own_shape_are_learnt_from(own, clips, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    small = "--size 16 --frames 8 --clips 4 --batch-size 2 --workers 0 --precision fp32".split()
    monkeypatch.setattr(sys, "argv", ["latent_cache.py", "--teacher", f"taehv:{tmp_path / 'own'}", "--data", clips,
                                      "--out", str(cache), *small])
    with pytest.raises(SystemExit) as done:
        latent_cache.main()
    assert done.value.code in (0, None)
    settings = [*SHORT, "color_jitter=0", f"latent_cache={cache}", "data=", f"init_from={tmp_path / 'own'}"]
    vq = ["vq_latents", *settings, "net.n_embed=8", "net.width=8", "net.kmeans_init=false"]
    model = check(own(*vq, "name=vq"))
    check(tmp_path / "vq", "")
    assert model.quantize.num_codes == 8
    again = own("vq_latents", *settings[:-1], f"init_from={tmp_path / 'vq'}", "net.kmeans_init=false", "net.n_embed=8",
                "name=vq2")  # width is the checkpoint's
    assert check(again).config == model.config
    check(own("taehv_distill", *settings, "name=distilled"))
    check(own("taehv_seraena", *settings, "seraena_replay_mb=2", "name=sharp"))


def test_published_weights_bring_their_variant(here, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(TAEHV("taehv1_5", **WIDTHS).state_dict(), tmp_path / "lighttaehy1_5.pth")
    folder = here("taehv", *SHORT, f"init_from={tmp_path / 'lighttaehy1_5.pth'}", "name=light")
    model, words = models.load_model(folder / "model.pth")
    assert (model.variant, model.activation, model.decoder_widths) == ("lighttaehy1_5", "leaky_relu", (48, 32, 24, 24))
    assert "lighttaehy1_5" in words and "variant=taehv1_5" not in words
    told = here("taehv", *SHORT, f"init_from={tmp_path / 'lighttaehy1_5.pth'}", "name=told", "variant=taehv1_5")
    assert models.load_model(told)[0].activation == "relu", "what looks alike is settled by variant="


@pytest.mark.parametrize("settings, words", [
    ("seraena_weight=1 size=16", "seraena_weight=1.0: frames of 16 pixels or more are wanted, and the model decodes 8"),
    ("gan_weight=1 size=32", "gan_weight=1.0: frames of 24 pixels or more are wanted, and the model decodes 16"),
    ("gan_weight=1 buckets=64x8:1:1,16x8:1:1", "gan_weight=1.0: frames of 24 pixels or more are wanted"),
    ("temporal_weight=1 frames=4", "temporal_weight=1.0: of 4 frames the model decodes one"),
    ("best_by=ssim size=16", "best_by=ssim needs frames of 11 pixels, and validation decodes 8"),
    ("best_by=lpips val_metrics=lpips size=64 val_size=32", "best_by=lpips needs frames of 32 pixels"),
    ("perceptual_weight=1 perceptual_net=alex size=32", "perceptual_net=alex: frames of 32 pixels or more are wanted")])
def test_what_is_too_small_for_a_loss_or_a_metric_is_refused_by_what_is_decoded(settings, words, clips, capsys,
                                                                                monkeypatch, tmp_path):
    """A preview's frames are half as high here."""
    frames = [] if "buckets" in settings else ["frames=8"]
    line = mistake(capsys, monkeypatch, train, "taehv", *COMMON, f"data={clips}", f"out_dir={tmp_path}", *frames,
                   "net.decoder_space_upscale=true,true,false", *settings.split())
    assert words in line


def test_a_single_value_for_batch_norm_is_refused(clips, capsys, monkeypatch, tmp_path):
    line = mistake(capsys, monkeypatch, train, *BATCH_NORM, f"data={clips}", f"out_dir={tmp_path}", "frames=1",
                   "net.nb_levels=1", "net.scaling_rates=16,", "batch_size=1")
    assert "BatchNorm a single value" in line


def test_a_tokenizers_shape_comes_along(here, tmp_path, capsys, monkeypatch, clips):
    from conftest import FRAMES
    here(*FRAMES, "max_steps=1", "name=first")
    plain = [item for item in FRAMES if not item.startswith("net.") or "kmeans" in item or "restart" in item]
    again = here(*plain, "max_steps=1", "name=second", f"init_from={tmp_path / 'first'}")
    assert models.load_model(again)[0].config == models.load_model(tmp_path / "first")[0].config
    capsys.readouterr()
    line = mistake(capsys, monkeypatch, train, *plain, f"data={clips}", f"out_dir={tmp_path}", "name=third",
                   f"init_from={tmp_path / 'first'}", "net.n_embed=32")
    assert "net.n_embed is 32, and 16 there" in line


def test_without_weights_a_config_says_as_much_as_was_said():
    given = config.load_config(["taehv", "latent_channels=8"])
    settled = models.with_shape(given, TAEHV(latent_channels=8, **WIDTHS))
    assert (settled.variant, settled.patch_size, settled.latent_channels) == ("taehv", 0, 8)
    assert settled.net == {key: list(value) for key, value in WIDTHS.items()} and given.net == {}
