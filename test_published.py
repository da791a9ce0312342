"""Weights and code that others published for TAEHV: relatives, the published calls, weights by name, torch.hub."""

import ast
import importlib.util
import os
import re

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from golden.fill import fill_, make_input
from model_taehv import RELATIVES, TAEHV, load_taehv, recognise

# ---- relatives: one clip, retyped from the published files, straight from the weights -----------------------------


def conv(w, name, x, **options):
    weight = w[name + ".weight"]
    return F.conv2d(x, weight, w.get(name + ".bias"), padding=weight.shape[-1] // 2, **options)


def memory_block(w, name, x, act):
    h = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
    places = [0, 2, 4, 6] if f"{name}.conv.6.weight" in w else [0, 2, 4]
    for i in places:
        weight = w[f"{name}.conv.{i}.weight"]
        h = conv(w, f"{name}.conv.{i}", h, groups=h.shape[1] // weight.shape[1])
        h = h if i == places[-1] else act(h)
    return act(h + x)


def encoder(w, x, act):
    """T C H W -> latents."""
    x = act(conv(w, "encoder.0", x))
    for i in (2, 7, 12):
        stride = w[f"encoder.{i}.conv.weight"].shape[1] // x.shape[1]
        x = conv(w, f"encoder.{i}.conv", x.reshape(-1, stride * x.shape[1], *x.shape[2:]))
        x = conv(w, f"encoder.{i + 1}", x, stride=2)
        for j in range(i + 2, i + 5):
            x = memory_block(w, f"encoder.{j}", x, act)
    return conv(w, "encoder.17", x)


def decoder(w, x, act):
    """Latents T C H W -> pixels, all frames."""
    x = act(conv(w, "decoder.1", torch.tanh(x / 3) * 3))
    for i in (3, 9, 15):
        for j in range(i, i + 3):
            x = memory_block(w, f"decoder.{j}", x, act)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = conv(w, f"decoder.{i + 4}.conv", x).reshape(-1, *x.shape[1:])
        x = conv(w, f"decoder.{i + 5}", x)
    return conv(w, "decoder.22", act(x))


def filled(variant):
    return {k: v.clone() for k, v in fill_(TAEHV(variant).state_dict()).items()}


SHAPED_LIKE = {"lighttaehy1_5": "taehv1_5", "lighttae_hy1_5": "taehv1_5", "lighttaew2_1": "taew2_1",
               "lighttaew2_2": "taew2_2"}


@pytest.mark.parametrize("name", SHAPED_LIKE)
@torch.no_grad()
def test_weights_of_lightx2v_give_what_its_code_gives(name, tmp_path):
    weights = filled(SHAPED_LIKE[name])
    torch.save(weights, tmp_path / f"{name}.pth")
    model, words = checkpoint.load_model(tmp_path / f"{name}.pth")
    leaky = "hy" in name
    act = (lambda x: F.leaky_relu(x, 0.2)) if leaky else F.relu
    if leaky:
        mean, deviation = 0, 1 / 1.03682
    else:
        mean, deviation = (torch.tensor(RELATIVES[name][k]).view(-1, 1, 1) for k in ("mean", "deviation"))
    patch, size = model.patch_size, model.space_factor
    video = make_input("rand", (1, 8, 3, size, 2 * size), 1)
    latents = make_input("randn", (1, 2, model.latent_channels, 1, 2), 2)
    pixels = F.pixel_unshuffle(video[0] * 2 - 1 if leaky else video[0], patch)
    encoded = (encoder(weights, pixels, act) - mean) / deviation
    decoded = F.pixel_shuffle(decoder(weights, latents[0] * deviation + mean, act), patch)[3:]
    decoded = (decoded.clamp(-1, 1) + 1) / 2 if leaky else decoded.clamp(0, 1)
    assert ((decoded > 0) & (decoded < 1)).float().mean() > 0.2, "what is clamped compares nothing"
    stream, quick = model.stream(), model.fast()
    for ours in (model.encode(video), quick.encode(video), torch.cat([*map(stream.encode, video.split(3, 1))], 1)):
        assert (ours[0] - encoded).abs().max() < 1e-4 * encoded.abs().max()
    for ours in (model.decode(latents), quick.decode(latents), model.stream().decode(latents),
                 model.decode_video(latents, parallel=False, show_progress_bar=False)):
        assert (ours[0] - decoded).abs().max() < 1e-4
    variant = name.replace("lighttae_", "lighttae")
    assert model.variant == variant and f"variant {variant} (by name" in words and SHAPED_LIKE[name] in words
    assert list(model.state_dict()) == list(weights), "mean and deviation are no part of the weights"
    assert TAEHV(**model.config).config == model.config and TAEHV(**model.config).activation == model.activation


def test_what_the_name_does_not_tell_the_caller_does(tmp_path):
    torch.save(filled("taew2_1"), tmp_path / "model.pth")
    assert load_taehv(str(tmp_path / "model.pth"), variant="lighttaew2_1").latents_std is not None
    assert load_taehv(str(tmp_path / "model.pth"), variant="taew2_1").latents_std is None
    model, words = checkpoint.load_model(tmp_path / "model.pth")
    assert model.variant == "taehv" and "lighttaew2_1" in words.split("(by name or default:")[1]


def test_means_and_deviations_are_those_of_the_big_vaes():
    if not (diffusers := importlib.util.find_spec("diffusers")):
        pytest.skip("diffusers is not installed")
    folder = os.path.join(diffusers.submodule_search_locations[0], "models", "autoencoders")
    with open(os.path.join(folder, "autoencoder_kl_wan.py"), encoding="utf-8") as file:  # read: importing takes seconds
        source = file.read()
    for ours, theirs in (("mean", "latents_mean"), ("deviation", "latents_std")):
        values = re.search(theirs + r": [\w\[\]]+ = (\[.*?\])", source, re.DOTALL)[1]
        assert RELATIVES["lighttaew2_1"][ours] == ast.literal_eval(values)


@torch.no_grad()
def test_the_wide_decoder_is_the_published_one(tmp_path):
    fresh = TAEHV("taeltx2_3_wide")
    assert [fresh.decoder[i].conv[2].weight.shape for i in (3, 9, 15)] == [(1024, 64, 3, 3), (512, 64, 3, 3),
                                                                          (256, 64, 3, 3)]
    small = TAEHV("taeltx2_3_wide", decoder_widths=(128, 128, 64, 16)).eval()  # the rule at a fraction of the size
    weights = fill_(small.state_dict())
    video, latents = make_input("rand", (1, 8, 3, 32, 32), 1), make_input("randn", (1, 2, 128, 1, 1), 2)
    encoded = encoder(weights, F.pixel_unshuffle(video[0], 4), F.relu)
    decoded = F.pixel_shuffle(decoder(weights, latents[0], F.relu), 4)[7:].clamp(0, 1)
    for model in (small, small.fast()):
        assert (model.encode(video)[0] - encoded).abs().max() < 1e-4 * encoded.abs().max()
        assert (model.decode(latents)[0] - decoded).abs().max() < 1e-4


def test_widths_are_read_off_the_weights(tmp_path):
    models = [TAEHV(encoder_widths=(8, 16, 24, 32), decoder_widths=(48, 40, 24, 24)),
              TAEHV("taew2_2_super", decoder_widths=(32, 24, 16, 8)),
              TAEHV("taeltx2_3_wide", decoder_widths=(128, 64, 32, 16), encoder_widths=(16,) * 4)]
    for model in models:
        torch.save(model.state_dict(), tmp_path / "model.pth")
        loaded = load_taehv(str(tmp_path / "model.pth"))
        assert loaded.encoder_widths == model.encoder_widths and loaded.decoder_widths == model.decoder_widths
        assert TAEHV(**loaded.config).config == loaded.config
        assert "decoder_widths" in loaded.config
        assert loaded.decode(torch.randn(1, 2, loaded.latent_channels, 2, 2)).shape[1] == 1 + loaded.time_factor
    assert "decoder_widths" not in TAEHV("taew2_2_super").config, "checkpoints from before widths still fit"
    assert recognise(TAEHV("taehv1_5").state_dict(), "lighttaehy1_5.pth")["variant"] == "lighttaehy1_5"


@pytest.mark.parametrize("changes", [
    dict(activation="leaky_relu"), dict(output_range=(-1, 1)),
    dict(activation="leaky_relu", output_range=[-1, 1], decoder_widths=[48, 40, 24, 24])])
def test_fresh_weights_start_from_colours_all_the_same(changes):
    torch.manual_seed(0)
    model, video = TAEHV(**changes).eval(), torch.rand(1, 12, 3, 4, 4)
    video = F.interpolate(video[0], scale_factor=8, mode="nearest")[None]
    with torch.no_grad():
        error = (model(video)[0] - model.targets(video)).square().mean()
    assert error < 0.02, "each cell's mean colour comes back: random weights give 0.08 and more"


@pytest.mark.parametrize(("changes", "message"), [
    (dict(activation="gelu"), "unknown activation 'gelu'"),
    (dict(output_range=(0, 255)), r"output_range \(0, 255\)"),
    (dict(decoder_widths=(64, 64)), "decoder_widths takes four"),
    (dict(encoder_widths=64), "encoder_widths takes four"),
    (dict(variant="taeltx2_3_wide", decoder_widths=(200, 64, 64, 64)), "multiples of 64"),
    (dict(variant="lighttaew2_1", latent_channels=8), "16 latent channels, not 8"),
])
def test_shapes_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        TAEHV(**changes)
