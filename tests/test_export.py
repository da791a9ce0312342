"""Weights for other programs: each file is loaded by the rules of the program that it is for, retyped here, and decodes
to the frames of the model it is of. docs/export.md says which files of which commits the rules are from."""

import importlib.util
import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import export_step
import models
from bench import published
from conftest import mistake
from golden.fill import fill_, make_input
from model_dcae import DCAE
from model_taehv import RELATIVES, TAEHV, VARIANTS, load_taehv
from model_vq_latents import VQLatents
from model_vqgan import VQGAN
from model_vqvae import VQVAE2, VqVae2
from test_published import conv, decoder

NARROW = dict(encoder_widths=(16, 16, 16, 16), decoder_widths=(32, 16, 16, 16))
# The fp16 and bf16 weights of a file against the float32 ones of the model, in pixels of [0, 1].
TOLERANCES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """weights("taew2_1") -> (the path of a file of that variant, the model in it), made once."""
    folder, made = tmp_path_factory.mktemp("weights"), {}

    def weights_of(variant):
        if variant not in made:
            model = TAEHV(variant).eval()
            torch.save(fill_(model.state_dict()), folder / f"{variant}.pth")
            made[variant] = folder / f"{variant}.pth", model
        return made[variant]
    return weights_of


@pytest.fixture
def quick(monkeypatch):
    """Models without first weights of their own, which take most of the time: for tests that load or fill all."""
    monkeypatch.setattr(TAEHV, "fresh_weights", lambda model: None)
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda layer: None)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(FILE, "--to", ...) in an empty folder -> what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        export.main()
        return capsys.readouterr().out
    return run


def check(frames, model, latents, dtype="fp32"):
    """Frames T 3 H W of latents T C h w, not clamped, are those of the model."""
    with torch.no_grad():
        expected = model.decode(latents[None])[0]
    frames = frames.clamp(0, 1)
    assert frames.shape == expected.shape and ((expected > 0) & (expected < 1)).float().mean() > 0.2
    assert (frames - expected).abs().max() < TOLERANCES[dtype]


def latents_for(model, frames=2):
    return make_input("randn", (frames, model.latent_channels, 1, 2), 5)


def leaky(x):
    return F.leaky_relu(x, 0.2)


def loads_back(path, model):
    """infer.py's loader and model_taehv.py's know the file for what it is, whatever its name."""
    found, words = models.load_model(path)
    assert found.config == model.config and "exported" in words
    if os.path.isfile(path):
        assert load_taehv(str(path)).config == model.config


# ---- ComfyUI ---------------------------------------------------------------------------------------------------------

VIDEO_TAES = ["taehv", "lighttaew2_2", "lighttaew2_1", "lighttaehy1_5", "taeltx_2", "taeh3"]


def in_comfyui(path, x):
    """What ComfyUI decodes of T C h w latents as its VAE Decode has them; pixels in [0, 1]."""
    assert os.path.splitext(os.path.basename(path))[0] in VIDEO_TAES, "else it is looked for in models/vae"
    w = load_file(path)
    assert "decoder.22.bias" in w
    channels, fp16 = w["decoder.1.weight"].shape[1], w["decoder.1.weight"].dtype == torch.float16
    w = {key: value.float() for key, value in w.items()}
    patch = {48: 2, 32: 2, 128: 4, 24: 2}.get(channels, 1)
    scale = 1.03682 if channels == 32 else 0.476986 if channels == 16 and fp16 else 1
    raw = decoder(w, x * scale, leaky if channels == 32 else F.relu)
    frames = F.pixel_shuffle(raw, patch) if patch > 1 else raw
    if channels == 24:
        frames = F.pad(frames, (0, 0, 0, 0, 0, 0, 0, -len(frames) % 20)).unflatten(0, (-1, 20))
        return frames[:, 3:].flatten(0, 1)[:-12]
    frames = frames[(8 if channels == 128 else 4) - 1:]
    return (frames + 1) / 2 if channels == 32 else frames


@pytest.mark.parametrize("variant, dtype", [("taehv", "fp16"), ("taew2_1", "bf16"), ("lighttaew2_1", "fp32"),
                                            ("lighttaew2_2", "fp16"), ("taeltx2_3", "fp16"), ("lighttaehy1_5", "fp32"),
                                            ("taeh3", "fp32")])
def test_comfyui(variant, dtype, weights, quick, command):
    path, model = weights(variant)
    printed = command(path, "--to", "comfyui", "--dtype", dtype, "--out", "models/vae_approx/")
    (name,) = os.listdir("models/vae_approx")
    assert f"as {name}: " in printed and len(printed.splitlines()) == 3
    given = latents = latents_for(model)
    if variant == "taehv":
        given = latents / 0.476986  # of the big VAE
    elif variant == "lighttaehy1_5":
        given = latents / 1.03682 ** 2  # its authors' and ComfyUI's scale are each other's inverse, as export.py says
    elif variant in RELATIVES:
        mean, deviation = (torch.tensor(RELATIVES[variant][k]).view(-1, 1, 1) for k in ("mean", "deviation"))
        given = latents * deviation + mean  # of the big VAE
    check(in_comfyui(f"models/vae_approx/{name}", given), model, latents, dtype)
    loads_back(f"models/vae_approx/{name}", model)
    assert load_taehv(f"models/vae_approx/{name}").config == model.config


# ---- diffusers -------------------------------------------------------------------------------------------------------


def in_diffusers(folder, x):
    """What AutoencoderTinyVideo.from_pretrained(folder) decodes, by the names of its layers."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    assert config.pop("_class_name") == "AutoencoderTinyVideo"
    w = {key: value.float() for key, value in load_file(f"{folder}/diffusion_pytorch_model.safetensors").items()}
    expected = expected_shapes(**config)
    assert {key: tuple(value.shape) for key, value in w.items()} == expected, "it loads strictly"
    x = F.relu(conv(w, "decoder.conv_in", torch.tanh(x / 3) * 3))
    for i, grows in enumerate(config["decoder_time_upscale"]):
        for k in range(3):
            name = f"decoder.blocks.{i}.mem_blocks.{k}.conv"
            h = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            h = F.relu(conv(w, f"{name}2", F.relu(conv(w, f"{name}1", h))))
            x = F.relu(conv(w, f"{name}3", h) + x)
        x = conv(w, f"decoder.blocks.{i}.time_grow", F.interpolate(x, scale_factor=2, mode="nearest"))
        x = conv(w, f"decoder.blocks.{i}.conv_out", x.unflatten(1, (1 + grows, -1)).flatten(0, 1))
    frames = F.pixel_shuffle(conv(w, "decoder.conv_out", F.relu(x)), config["patch_size"])
    return frames[2 ** sum(config["decoder_time_upscale"]) - 1:]


def expected_shapes(in_channels, latent_channels, patch_size, encoder_block_out_channels, decoder_block_out_channels,
                    encoder_time_downscale, decoder_time_upscale):
    """Names and shapes of the class with these settings."""
    shapes, pixels = {}, in_channels * patch_size ** 2

    def add(name, out, given, side=3, bias=True):
        shapes[f"{name}.weight"] = out, given, side, side
        shapes.update({f"{name}.bias": (out,)} if bias else {})

    def add_blocks(name, n):
        for k in range(3):
            for i in (1, 2, 3):
                add(f"{name}.mem_blocks.{k}.conv{i}", n, 2 * n if i == 1 else n)

    widths = encoder_block_out_channels
    add("encoder.conv_in", widths[0], pixels)
    for i, (before, n, halves) in enumerate(zip([widths[0], *widths], widths, encoder_time_downscale)):
        add(f"encoder.blocks.{i}.time_pool", before, before * (1 + halves), 1, False)
        add(f"encoder.blocks.{i}.conv_down", n, before, bias=False)
        add_blocks(f"encoder.blocks.{i}", n)
    add("encoder.conv_out", latent_channels, widths[-1])
    widths = decoder_block_out_channels
    add("decoder.conv_in", widths[0], latent_channels)
    for i, (before, n, grows) in enumerate(zip(widths, widths[1:], decoder_time_upscale)):
        add_blocks(f"decoder.blocks.{i}", before)
        add(f"decoder.blocks.{i}.time_grow", before * (1 + grows), before, 1, False)
        add(f"decoder.blocks.{i}.conv_out", n, before, bias=False)
    add("decoder.conv_out", pixels, widths[-1])
    return shapes


@pytest.mark.parametrize("variant, own", [("taew2_2", {}), ("taeltx_2", NARROW)])
def test_diffusers(variant, own, quick, command):
    model = TAEHV(variant, **own).eval()
    fill_(model.state_dict())
    torch.save(model.state_dict(), f"{variant}.pth")
    printed = command(f"{variant}.pth", "--to", "diffusers")
    assert f"from_pretrained('{variant}_diffusers')" in printed
    latents = latents_for(model)
    check(in_diffusers(f"{variant}_diffusers", latents), model, latents)
    loads_back(f"{variant}_diffusers", model)
    folder = f"{variant}_diffusers/diffusion_pytorch_model.safetensors"
    save_file(load_file(folder), folder)  # as diffusers itself writes it: nothing tells the variant but shapes
    assert torch.equal(models.load_model(f"{variant}_diffusers")[0].decode(latents[None]), model.decode(latents[None]))


@pytest.mark.slow
def test_diffusers_itself(weights, quick, command):
    """Where a diffusers with the class is installed: its own loader."""
    found = importlib.util.find_spec("diffusers")  # without its import, which takes long
    file = found and os.path.join(os.path.dirname(found.origin), "models/autoencoders/autoencoder_tiny_video.py")
    if not file or not os.path.exists(file):
        pytest.skip("no diffusers with AutoencoderTinyVideo")
    import diffusers
    path, model = weights("taew2_2")
    command(path, "--to", "diffusers", "--out", "folder")
    theirs = diffusers.AutoencoderTinyVideo.from_pretrained("folder")
    latents = latents_for(model)
    with torch.no_grad():
        frames = theirs.decode(latents.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    check((frames + 1) / 2, model, latents)


# ---- LightX2V, stable-diffusion.cpp, taehv.py ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["taew2_1", "lighttaew2_2", "lighttaehy1_5"])
def test_lightx2v(variant, weights, quick, command):
    path, model = weights(variant)
    printed = command(path, "--to", "lightx2v", "--dtype", "bf16")
    path = json.loads("{" + printed.splitlines()[-1].partition(": ")[2] + "}")["tae_path"]
    w = load_file(path)
    plain = {"taew2_1": "taew2_1", "lighttaew2_2": "taew2_2", "lighttaehy1_5": "taehv1_5"}[variant]
    assert {k: v.shape for k, v in w.items()} == {k: v.shape for k, v in TAEHV(plain).state_dict().items()}, "strict"
    w, x = {key: value.float() for key, value in w.items()}, latents_for(model)
    latents = x
    if model.latent_channels == 32:  # a class of its own
        frames = (F.pixel_shuffle(decoder(w, x / 1.03682, leaky).clamp(-1, 1), 2)[3:] + 1) / 2
    else:
        if "lighttae" in path:
            mean, deviation = (torch.tensor(RELATIVES[variant][k]).view(-1, 1, 1) for k in ("mean", "deviation"))
            x = x * deviation + mean
        frames = decoder(w, x, F.relu).clamp(0, 1)[3:]
        frames = F.pixel_shuffle(frames, 2) if model.latent_channels == 48 else frames
    check(frames, model, latents, "bf16")
    loads_back(path, model)


@pytest.mark.parametrize("variant", ["taeltx2_3_wide", "taeh3"])
def test_sdcpp(variant, weights, quick, command):
    path, model = weights(variant)
    command(path, "--to", "sdcpp", "--dtype", "fp16", "--out", "x.safetensors")
    w = load_file("x.safetensors")
    channels, patch, growth = {"taehv1_5": (32, 2, 4), "taeltx2_3_wide": (128, 4, 8), "taeh3": (24, 2, 4)}[variant]
    wide = any("decoder.3.conv.6.weight" in key for key in w)
    widths = (1024, 512, 256, 64) if wide else (256, 128, 64, 64)
    assert w["decoder.1.weight"].shape == (widths[0], channels, 3, 3)
    assert [w[f"decoder.{i}.weight"].shape[0] for i in (8, 14, 20)] == list(widths[1:])
    assert w["encoder.0.weight"].shape[1] == w["decoder.22.weight"].shape[0] == 3 * patch ** 2
    latents = latents_for(model)
    frames = F.pixel_shuffle(decoder({k: v.float() for k, v in w.items()}, latents, F.relu), patch)[growth - 1:]
    if variant == "taeh3":  # of each 20 frames, now without the first three, the first 17; then the last 12 go
        frames = F.pad(frames, (0, 0, 0, 0, 0, 0, 0, -len(frames) % 20)).unflatten(0, (-1, 20))
        frames = frames[:, :17].flatten(0, 1)[:-12]
    check(frames, model, latents, "fp16")
    loads_back("x.safetensors", model)


@pytest.mark.parametrize("variant", ["taew2_2_super"])
def test_taehv(variant, weights, quick, command):
    path, model = weights(variant)
    printed = command(path, "--to", "taehv", "--dtype", "fp16", "--out", "new/folder")
    path = f"new/folder/{variant}.pth"
    assert f"TAEHV('{path}')" in printed and os.listdir("new/folder") == [f"{variant}.pth"]
    shape = dict(patch_size=2, latent_channels=48) if "taew2_2" in path else {}
    theirs = TAEHV("taehv", **shape, arch_variant="super" if "_super" in path else None).eval()
    theirs.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    latents = latents_for(model)
    with torch.no_grad():
        frames = published(theirs.decoder, latents[None])[0][3:]
    check(F.pixel_shuffle(frames, model.patch_size), model, latents, "fp16")
    assert models.load_model(path)[0].config == model.config


# ---- files of our own ------------------------------------------------------------------------------------------------

OTHERS = {
    "vqgan": lambda: VQGAN(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8,
                           embed_dim=8, n_embed=16, quantizer="fsq"),
    "vqvae2": lambda: VQVAE2(16, 8, 1, 2, 4, 32, (4, 2)),
    "vqvae_video": lambda: VqVae2(group_count=2, n_hid=8, n_init=16, vocab_size=16, n_blk_per_group=1,
                                  sequence_length=4),
    "vq_latents": lambda: VQLatents(n_embed=16, width=8, taehv=dict(variant="taew2_2", **NARROW)),
    "dcae": lambda: DCAE((16, 16, 32, 32, 32, 32), (1,) * 6, (1,) * 6, latent_channels=32),
    "taehv": lambda: TAEHV("lighttaew2_1", **NARROW, activation="leaky_relu", output_range=(-1, 1),
                           decoder_space_upscale=(True, True, False)),
    "taehv of its own shape": lambda: TAEHV(**NARROW, latent_channels=32, encoder_time_downscale=(1, 1, 1),
                                            decoder_time_upscale=(1, 1, 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_model_as_safetensors_comes_back_to_the_bit(name, command):
    model, name = OTHERS[name]().eval(), name.split()[0]
    fill_(model.state_dict())
    torch.save(dict(model_name=name, model_config=model.config, step=3, ema=model.state_dict()), "x.pt")
    command("x.pt", "--to", "safetensors", "--out", "y.safetensors")
    with safe_open("y.safetensors", "pt") as file:
        about = file.metadata()
    assert about["model_name"] == name and json.loads(about["model_config"]) == json.loads(json.dumps(model.config))
    found = models.load_model("y.safetensors")[0]
    assert json.dumps(found.config) == json.dumps(model.config)
    video = make_input("rand", (1, 4, 3, 32, 32), 1)
    with torch.no_grad():
        assert torch.equal(found(video)[0], model(video)[0])
    if name == "taehv" and model.space_upscale == model.space_factor:  # of a preview, weights tell too little
        assert load_taehv("y.safetensors").config == model.config
    command("x.pt", "--to", "safetensors", "--out", "y.safetensors", "--dtype", "bf16", "--force")
    assert all(a.dtype == torch.bfloat16 for a in load_file("y.safetensors").values() if a.is_floating_point())


def test_what_a_file_says_of_itself_is_checked(tmp_path):
    state, path = TAEHV("taew2_1", **NARROW).state_dict(), str(tmp_path / "x.safetensors")
    for name, config, words in (("taehv", "{", "no JSON object"), ("taehv", "[" * 100_000, "no JSON object"),
                                ("taehv", '{"variant": "taew2_2"}', "not of variant taew2_2"),
                                ("taehv", '{"variant": []}', "not of variant"),
                                ("taehv", '{"activation": ["relu"]}', "unknown activation")):
        save_file(state, path, {"model_name": name, "model_config": config})
        if words != "not of variant":
            with pytest.raises(ValueError, match=words):
                load_taehv(path)
        with pytest.raises(models.CheckpointError):
            models.load_model(path)
    save_file(state, path, {"model_name": "another", "model_config": "{}"})
    assert models.load_model(path)[0].variant == load_taehv(path).variant == "taehv"


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["taeh3", "taecvx", "taeltx_2", "lighttaehy1_5", "taew2_2_super"])
def test_a_step_carries_what_a_stream_does(variant, quick):
    model = TAEHV(variant).eval()
    fill_(model.state_dict())
    for kind in (export_step.DecoderStep, export_step.EncoderStep):
        step = kind(model)
        assert export_step.difference(step, step, model) < 1e-4
    broken = lambda x, *memories: step(x, *map(torch.zeros_like, memories))
    assert export_step.difference(step, broken, model) > 1e-3, "without its memories it differs"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch-export", "onnx"])
def test_a_step_runs_elsewhere(target, command, monkeypatch):
    if target == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        monkeypatch.setattr(export, "STEPS", (export_step.DecoderStep,))  # the other one takes as long, the same way
    model = TAEHV("taew2_1", **NARROW).eval()
    fill_(model.state_dict())
    torch.save(model.state_dict(), "taew2_1.pth")
    printed = command("taew2_1.pth", "--to", target, "--out", "steps")
    assert printed.count("differs from the model's stream by") == len(export.STEPS)
    video, stream = make_input("rand", (2, 12, 3, 16, 40), 2), model.stream()
    latents = stream.encode(video)
    expected = {"encoder": latents, "decoder": torch.cat([stream.decode(latents), stream.flush_decoder()], 1)}
    pieces_of = {"encoder": video.split(4, 1), "decoder": latents.split(1, 1)}
    for part in [kind.part for kind in export.STEPS]:
        channels = (16,) * 9 if part == "encoder" else (32,) * 3 + (16,) * 6
        scales = (4, 4, 4, 2, 2, 2, 1, 1, 1) if part == "encoder" else (1, 1, 1, 2, 2, 2, 4, 4, 4)
        memories = [torch.zeros(2, c, 2 * s, 5 * s) for c, s in zip(channels, scales)]
        if target == "onnx":
            session = onnxruntime.InferenceSession(f"steps/{part}_step.onnx")
            names = [entry.name for entry in session.get_inputs()]
            about = session.get_modelmeta().custom_metadata_map
            assert about["variant"] == "taew2_1" and names[1:] == [f"memory_{i}" for i in range(9)]
            step = lambda *given: map(torch.from_numpy, session.run(None, {n: t.numpy() for n, t in zip(names, given)}))
        else:
            extra = {"about.json": ""}
            program = torch.export.load(f"steps/{part}_step.pt2", extra_files=extra)
            about, step = json.loads(extra["about.json"]), program.module()
        assert int(about["drop_first_frames"]) == (3 if part == "decoder" else 0)
        done = []
        for piece in pieces_of[part]:
            result, *memories = step(piece, *memories)
            done.append(result)
        found = torch.cat(done, 1)[:, int(about["drop_first_frames"]):]
        assert found.shape == expected[part].shape and (found - expected[part]).abs().max() < 1e-4


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_write_nothing(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def load(path, variant, load=models.load_model):
        return (TAEHV(path), "") if path in VARIANTS else load(path, variant)

    monkeypatch.setattr(models, "load_model", load)
    torch.save(fill_(TAEHV("taew2_1", **NARROW).state_dict()), "narrow.pth")
    vqgan = OTHERS["vqgan"]()
    state = {key: torch.zeros_like(value) for key, value in vqgan.state_dict().items()}
    torch.save(dict(model_name="vqgan", model_config=vqgan.config, step=1, ema=state), "vqgan.pt")
    huge = torch.load("narrow.pth")
    huge["decoder.22.bias"][0] = 1e6
    torch.save(huge, "huge.pth")
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(os.listdir())
    for variant, target, arguments, words in [
        ("taew2_1", "unknown", [], "invalid choice: 'unknown'"),
        ("taew2_1", "comfyui", ["--dtype", "fp16"], "takes fp16 files for Hunyuan's"),
        ("taehv", "comfyui", ["--dtype", "fp32"], "takes all files but fp16 ones for Wan's"),
        ("taecvx", "comfyui", [], "Hunyuan's or Wan's latents"),
        ("taehv1_5", "comfyui", [], "LeakyReLU"),
        ("taehv1_5_super", "comfyui", [], "decoder.1.weight"),
        ("taew2_1", "comfyui", ["--out", "mine.safetensors"], "lighttaew2_1.safetensors"),
        ("narrow.pth", "comfyui", ["--variant", "taew2_1"], "encoder_widths [16, 16, 16, 16]"),
        ("taeh3", "diffusers", [], "chunks of 17 frames"),
        ("lighttaew2_1", "diffusers", [], "the big VAE's own"),
        ("taew2_1", "diffusers", ["--out", "file"], "file is a file"),
        ("taehv", "lightx2v", [], "it takes taew2_1, lighttaew2_1"),
        ("taew2_1", "lightx2v", ["--out", "lighttae/"], "lighttae in their path"),
        ("lighttaew2_2", "lightx2v", ["--out", "a.safetensors"], "lighttae in their path"),
        ("lighttaehy1_5", "sdcpp", [], "ReLU"),
        ("taehv", "sdcpp", [], "read 16 as Wan's"),
        ("taew2_1", "taehv", ["--out", "taecvx.pth"], "'taecvx' has to be absent"),
        ("taeltx2_3_wide", "taehv", [], "the plain and the super one"),
        ("taew2_1", "taehv", ["--out", "a.safetensors"], "reads .pth files"),
        ("vqgan.pt", "comfyui", [], "--to safetensors takes it"),
        ("vqgan.pt", "onnx", [], "--to safetensors takes it"),
        ("taew2_1", "onnx", ["--dtype", "bf16"], "fp32 or fp16"),
        ("taew2_1", "safetensors", ["--out", "there.safetensors"], "--force"),
        ("taew2_1", "safetensors", ["--out", "file/x.safetensors"], "file"),
        ("taew2_1", "safetensors", ["--out", "/proc/new/x.safetensors"], "/proc"),
        ("huge.pth", "safetensors", ["--dtype", "fp16", "--out", "new/folder/"], "decoder.22.bias holds numbers too"),
        ("no.pth", "safetensors", [], "does not exist"),
    ]:
        if target == "onnx" and "bf16" in arguments:
            monkeypatch.setattr(export_step, "missing_packages", list)
        assert words in mistake(capsys, monkeypatch, export, variant, "--to", target, *arguments), (variant, target)
    assert sorted(os.listdir()) == before and open("there.safetensors").read() == "mine"


@pytest.mark.parametrize("settings, target, words", [
    ({}, "comfyui", "its own, without a teacher"), ({}, "sdcpp", "its own, without a teacher"),
    ({}, "safetensors", "note: its latents are its own"),
    ({"init_from": "taew2_1"}, "comfyui", "warning: this run began with taew2_1"),
    ({"init_from": "taew2_1", "train_encoder": False}, "comfyui", ""), ({"latent_cache": "cache"}, "comfyui", "")])
def test_a_run_with_latents_of_its_own_is_for_no_diffusion_model(settings, target, words, weights, quick, command,
                                                                 tmp_path, capsys, monkeypatch):
    (tmp_path / "runs/mine").mkdir(parents=True)
    path = tmp_path / "runs/mine/taew2_1.pth"
    path.write_bytes(weights("taew2_1")[0].read_bytes())
    settings = {"model": "taehv", "train_encoder": True, "latent_cache": "", "init_from": "", **settings}
    (tmp_path / "runs/mine/config.json").write_text(json.dumps(settings))
    if "without a teacher" in words:
        assert words in mistake(capsys, monkeypatch, export, str(path), "--to", target)
        assert not (tmp_path / "lighttaew2_1.safetensors").exists()
        return
    printed = command(path, "--to", target)
    assert words in printed and (words or "latents are" not in printed)


def test_a_missing_package_is_named(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else name)
    path = weights("taew2_1")[0]
    assert "pip install onnx onnxruntime onnxscript" in mistake(capsys, monkeypatch, export, path, "--to", "onnx")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in mistake(capsys, monkeypatch, export, path, "--to", "sdcpp")
    assert os.listdir() == []


def test_a_step_that_differs_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(TAEHV("taew2_1", **NARROW).state_dict(), "taew2_1.pth")
    monkeypatch.setattr(export_step, "as_torch", lambda step, model: b"")
    monkeypatch.setattr(export_step, "open_torch", lambda content: None)
    monkeypatch.setattr(export_step, "difference", lambda *_: float("nan"))
    told = "taew2_1.pth", "--to", "torch-export", "--out", "new/folder"
    assert "differs from the model by nan" in mistake(capsys, monkeypatch, export, *told)
    monkeypatch.setattr(export_step, "difference", lambda *_: 0.0)

    def full(number, original=os.fsync):
        if os.path.exists("new/folder/encoder_step.pt2.%d.tmp" % os.getpid()):
            raise OSError(28, "No space left on device")
        original(number)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in mistake(capsys, monkeypatch, export, *told)
    assert os.listdir() == ["taew2_1.pth"]
