"""The tokenizers: VQGAN, VQ-VAE-2 and VqVae2, against the published results, and the contract that they share."""

import copy
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import model_vqgan
import model_vqvae
import models
from conftest import ROOT, transport_plan
from golden.fill import fill_, make_input
from model_vqgan import VQGAN, load_vqgan
from model_vqvae import VQVAE2, VqVae2, load_vqvae
from quantize import quantizers

SMALL = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "resolution": 16, "z_channels": 8}
MODELS = {
    "vq": lambda: VQGAN(**SMALL, embed_dim=8, n_embed=32),
    "ema": lambda: VQGAN(**SMALL, embed_dim=8, n_embed=32, quantizer="ema"),
    "optvq": lambda: VQGAN(**SMALL, embed_dim=8, n_embed=32, quantizer="optvq", num_head=2),
    "rvq": lambda: VQGAN(**SMALL, embed_dim=8, n_embed=32, quantizer="rvq", depth=3),
    "fsq": lambda: VQGAN(**SMALL, embed_dim=8, quantizer="fsq", levels=(5, 4, 4)),
    "vqvae2": lambda: VQVAE2(16, 8, 1, 3, 4, 32, (2, 4, 2)),
    "vqvae2_optvq": lambda: VQVAE2(16, 8, 1, 2, 4, 32, (4, 2), quantizer="optvq", num_head=2),
    "vqvae2_vq": lambda: VQVAE2(16, 8, 1, 2, 4, 32, (4, 2), quantizer="vq"),
    "video": lambda: VqVae2(3, 8, 24, 32, 2, sequence_length=4),
}


def make(name):
    """A model in eval mode whose weights spread its latents over the codebook."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fill_(model.state_dict())
    return model


def clip(frames=6, height=16, width=32, seed=0):
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def golden(name):
    return torch.load(os.path.join(ROOT, "tests", "golden", f"{name}.pt"), weights_only=True)


def close(ours, theirs):
    return ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


# ---- parity ------------------------------------------------------------------------------------------------------


def published_vqgan(name):
    """(golden file, the VQGAN that it describes)."""
    file = golden(name)
    settings = {k: v for k, v in file["config"].items() if k not in ("ddconfig", "cls")}
    network = {k: file["config"]["ddconfig"][k] for k in (*SMALL,)}
    if name == "optvq":
        settings["eval_nearest"] = False  # as published, codes depend on the batch
    kind = {"taming_vqmodel": "vq", "taming_emavq": "ema", "optvq": "optvq"}[name]
    return file, VQGAN(**network, **settings, quantizer=kind)


@pytest.mark.parametrize("name", ["taming_vqmodel", "taming_emavq", "optvq"])
def test_vqgan_computes_what_the_published_code_does(name):
    file, model = published_vqgan(name)
    assert [(k, tuple(v.shape)) for k, v in model.state_dict().items()] == [(k, tuple(s)) for k, s in file["params"]]
    fill_(model.eval().state_dict())
    expected = file["outputs"]
    video = (make_input(*file["inputs"]["image"])[:, None] + 1) / 2
    with torch.no_grad():
        output, info = model(video)
        features = model._features(video)
    assert close(features[:, 0], expected["pre_quant"]) and close(info["vq_loss"], expected["vq_loss"])
    assert close(output[:, 0] * 2 - 1, expected["decoded"].clamp(-1, 1))
    codes = torch.stack([codes[:, 0] for codes in info["codes"]], 1)
    assert torch.equal(codes if name == "optvq" else codes[:, 0], expected["indices"])
    if name == "optvq":
        assert close(transport_plan(model.quantize, features.transpose(1, 2)), expected["transport_plan"])
    if name == "taming_emavq":
        model.train().encode(video)
        assert close(model.quantize.embedding.weight, expected["codebook_after_one_step"])
        assert close(model.quantize.embedding.cluster_size, expected["cluster_size_after_one_step"])


def test_vqvae2_computes_what_the_published_code_does():
    file = golden("vqvae2")
    model = VQVAE2(**file["config"], beta=1.0).eval()
    assert [(k, tuple(v.shape)) for k, v in model.state_dict().items()] == [(k, tuple(s)) for k, s in file["params"]]
    fill_(model.state_dict())
    expected = file["outputs"]
    video = (make_input(*file["inputs"]["image"])[:, None] + 1) / 2
    with torch.no_grad():
        output, info = model(video)
        again = model.detokenize(model.tokenize(video))
    assert close(output[:, 0] * 2 - 1, expected["decoded"]) and close(info["vq_loss"], expected["vq_loss"])
    assert close(again[:, 0] * 2 - 1, expected["decoded_from_codes"])
    assert all(torch.equal(info["codes"][i][:, 0], expected[f"indices_{i}"]) for i in (0, 1))
    model.train()(video)
    assert all(close(model.codebooks[i].embed, expected[f"codebook_{i}_after_one_step"]) for i in (0, 1))


def test_vqvae_video_folds_and_unfolds_frames_as_published():
    """The rearrangements 'b (c d) h w', written out: channel c's frames lie side by side, for a group of their own."""
    model, video = make("video"), clip(8)
    with torch.no_grad():
        x = model.encoder.blocks_spatial(video.flatten(0, 1) * 2 - 1)
        x = x.view(4, 4, 24, 4, 8)  # clips, frames, channels
        folded = torch.stack([x[:, :, c] for c in range(24)], 1).flatten(1, 2)
        vectors = model.vq_vae(model.encoder.blocks_tempo(folded))[0]
        assert torch.allclose(model.encode(video), vectors.view(2, 2, 24, 4, 8), atol=1e-6)
        y = model.decoder.blocks_tempo(vectors).view(4, 24, 4, 4, 8)
        y = torch.cat([model.decoder.blocks_spatial(y[:, :, d])[:, None] for d in range(4)], 1)
        expected = ((y.view(2, 8, 3, 16, 32) + 1) / 2).clamp(0, 1)
        assert torch.allclose(model.decode(model.encode(video)), expected, atol=1e-5)
    names = set(model.state_dict())
    assert names >= {
        "encoder.blocks_spatial.spatial_2.block_1.res_path.conv_4.weight", "encoder.blocks_tempo.tempo.conv.weight",
        "decoder.blocks_spatial.spatial_3.block_2.res_path.conv_1.bias", "decoder.blocks_spatial.output.conv.weight",
        "vq_vae.embedding.weight", "vq_vae.ema_cluster_size", "vq_vae.ema_w"}


# ---- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_codes_give_the_reconstruction(name):
    model, video = make(name), clip()
    with torch.no_grad():
        output, info = model(video)
        latents, codes = model.encode(video), model.tokenize(video)
        decoded = model.decode(latents)
    assert torch.equal(model.detokenize(codes), decoded), "to the bit"
    assert torch.allclose(output, decoded, atol=1e-5) and output.min() >= 0 and output.max() <= 1
    assert output.shape == model.targets(video).shape
    assert len(codes) == len(model.codebook_sizes) == len(model.code_strides)
    t = model.latent_frames(6)
    for ours, whole, size, stride in zip(codes, info["codes"], model.codebook_sizes, model.code_strides):
        assert torch.equal(ours, whole) and ours.dtype == torch.int64
        assert ours.shape == (2, t, 16 // stride, 32 // stride)
        assert ours.min() >= 0 and ours.max() < size and len(ours.unique()) > 1
    s = model.space_factor
    assert latents.shape == info["latents"].shape == (2, t, model.latent_channels, 16 // s, 32 // s)
    assert info["vq_loss"].shape == info["perplexity"].shape == info["usage"].shape == ()
    with torch.no_grad():
        fill_({"weight": model.last_layer})
        model.last_layer.mul_(100)
        assert model.decode(latents).max() == 1 and model.train().decode(latents).max() > 1, "clamped in eval mode"


@pytest.mark.parametrize("name", MODELS)
def test_a_config_rebuilds_the_model(name):
    model = make(name)
    twin = type(model)(**json.loads(json.dumps(model.config))).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config == json.loads(json.dumps(model.config))
    video = clip(4)
    with torch.no_grad():
        assert torch.equal(twin(video)[0], model(video)[0])


@pytest.mark.parametrize("name", ["ema", "optvq", "rvq", "vqvae2", "vqvae2_optvq", "video"])
def test_a_stream_gives_the_whole_clip_however_it_is_cut(name):
    model, video = make(name), clip(7)[:1]
    with torch.no_grad():
        whole, info = model(video)
    firsts = None
    for cut in (1, 3, 7):
        stream = model.stream()
        frames = torch.cat([*(stream.decode(stream.encode(p)) for p in video.split(cut, 1)), stream.flush()], 1)
        pieces = [stream.tokenize(p) for p in video.split(cut, 1)] + [stream.flush()]
        codes = [torch.cat(parts, 1) for parts in zip(*pieces)]
        pieces = [stream.detokenize(stream.tokenize(p)) for p in video.split(cut, 1)]
        both = torch.cat([*pieces, stream.flush_decoder(), stream.detokenize(stream.flush_encoder(), last=True)], 1)
        assert torch.equal(frames, both), "by way of codes"
        firsts = firsts or (frames, codes)
        assert torch.equal(frames, firsts[0]) and all(map(torch.equal, codes, firsts[1])), "the cutting changes bits"
    assert frames.shape == whole.shape and torch.allclose(frames, whole, atol=1e-5)
    assert all(map(torch.equal, codes, info["codes"]))
    grouped = model.stream(memory_limit=3 * 16 * 32 * 4 * model.numbers_per_pixel * model.time_factor)
    counts = [grouped.encode(frame).shape[1] for frame in video.split(1, 1)]
    assert max(counts) == (3 if model.time_factor == 1 else 0), "groups of three latents"
    assert sum(counts) + grouped.flush().shape[1] == codes[0].shape[1]
    with pytest.raises(ValueError, match="given nothing"):
        grouped.flush()


def test_frames_that_fill_a_sequence_repeat_the_last_one():
    model, video = make("video"), clip(6)
    assert (model.time_factor, model.space_factor, model.latent_frames(6)) == (4, 4, 2)
    assert model.frame_index(6) == list(range(8)) and model.frame_index(8, latents=1) == list(range(4))
    target = model.targets(video)
    assert torch.equal(target[:, :6], video) and torch.equal(target[:, 6:], video[:, [5, 5]])
    assert torch.equal(model.targets(video, latents=1), video[:, :4])
    with torch.no_grad():
        assert torch.equal(model(video)[0], model(target)[0])
    image = make("vq")
    assert image.frame_index(5) == list(range(5)) and torch.equal(image.targets(video), video)


def test_a_hierarchical_latent_holds_every_level():
    model, video = make("vqvae2"), clip(2, 32, 64)
    with torch.no_grad():
        latents, codes = model.encode(video), model.tokenize(video)
    assert model.ratios == [1, 2, 8] and model.latent_channels == 4 * (1 + 4 + 64) and model.code_strides == [16, 8, 2]
    coarse, _, fine = model._unpack(latents)
    for vectors, layer, code in ((coarse, model.codebooks[2], codes[0]), (fine, model.codebooks[0], codes[2])):
        assert torch.equal(vectors.movedim(2, -1), layer.embed.t()[code])
    assert torch.equal(latents[:, :, :4], coarse), "the coarsest first"


@pytest.mark.parametrize("name", ["vq", "vqvae2", "video"])
def test_wrong_inputs_are_named(name):
    model = make(name)
    s = model.space_factor
    with pytest.raises(ValueError, match=f"multiples of {s}, got {s + 1}x{s}"):
        model.encode(torch.rand(1, 4, 3, s + 1, s))
    for shape in ((1, 4, 1, 32, 32), (4, 3, 32, 32), (1, 0, 3, 32, 32)):
        with pytest.raises(ValueError, match="N T 3 H W"):
            model.encode(torch.rand(shape))
    with pytest.raises(ValueError, match=f"N T {model.latent_channels} H W"):
        model.decode(torch.rand(1, 4, 5, 4, 4))
    with torch.no_grad():
        assert model(torch.rand(1, 1, 3, 3 * 16, 16))[0].shape[-2:] == (48, 16), "a single image that is not square"


@pytest.mark.parametrize("build, words", [
    (lambda: VQGAN(ch=48), "ch must be a multiple of 32"),
    (lambda: VQGAN(**{**SMALL, "resolution": 15}), "resolution 15 is no multiple of 2"),
    (lambda: VQGAN(**{**SMALL, "attn_resolutions": (32,)}), r"attn_resolutions \(32,\).*\[16, 8\]"),
    (lambda: VQGAN(**SMALL, quantizer="gumbel"), "unknown quantizer 'gumbel'; there are vq, ema"),
    (lambda: VQGAN(**SMALL, quantizer="optvq", embed_dim=8, num_head=3), "num_head 3"),
    (lambda: VQGAN(**SMALL, quantizer="ema", warmth=3), "'ema'.*warmth"),
    (lambda: VQGAN(**SMALL, quantizer="rvq"), "'rvq'.*depth"),
    (lambda: VQVAE2(nb_levels=2), r"nb_levels=2 powers of two, got \[8, 4, 2\]"),
    (lambda: VQVAE2(nb_levels=1, scaling_rates=(6,)), "powers of two"),
    (lambda: VQVAE2(quantizer="fsq"), "unknown quantizer 'fsq'; there are ema, vq, optvq"),
    (lambda: VQVAE2(hidden_channels=17), "must be even"),
    (lambda: VqVae2(group_count=4, n_hid=256, n_init=128), "n_init=128 must be a multiple of .* 1024"),
    (lambda: VqVae2(warmth=3), "warmth"),
])
def test_constructors_name_what_does_not_fit(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, steps", [("ema", 30), ("optvq", 30), ("vqvae2", 60), ("video", 60)])
def test_one_clip_can_be_overfitted(name, steps):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 3, 16), indexing="ij")
    video = torch.stack([0.5 + 0.4 * torch.sin(x + c + t / 2) * torch.cos(y) for t in range(4) for c in range(3)])
    video = video.view(1, 4, 3, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for _ in range(steps):
        output, info = model(video)
        errors.append(F.mse_loss(output, model.targets(video)))
        optimizer.zero_grad()
        (errors[-1] + 0.1 * info["vq_loss"]).backward()
        optimizer.step()
    assert sum(errors[-5:]) / 5 < errors[0] / 4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p is model.last_layer for p in model.parameters())


@pytest.mark.parametrize("name", ["vq", "vqvae2", "video"])
def test_gradient_checkpointing_changes_nothing(name):
    plain, video = make(name).train(), clip(4)
    twin = copy.deepcopy(plain)
    twin.gradient_checkpointing = True
    for model in (plain, twin):
        output, info = model(video)
        loss = F.mse_loss(output, video) + info["vq_loss"]
        last, = torch.autograd.grad(loss, model.last_layer, retain_graph=True)  # as the adaptive GAN weight takes it
        assert last.abs().sum() > 0
        loss.backward()
    for (key, a), b in zip(plain.named_parameters(), twin.parameters()):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad, atol=1e-6), key
    for (key, a), b in zip(plain.named_buffers(), twin.buffers()):
        assert torch.equal(a, b), f"{key}: running means move once a step"


@pytest.mark.parametrize("name", ["vq", "optvq", "vqvae2", "video"])
def test_bf16_autocast_trains(name):
    model, video = make(name).train(), clip(4)
    with torch.autocast("cpu", torch.bfloat16):
        output, info = model(video)
    assert info["vq_loss"].dtype == torch.float32 and output.shape == video.shape
    (F.mse_loss(output.float(), video) + info["vq_loss"]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        model.eval()
        exact = model(video)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.decode(model.encode(video))
        assert F.mse_loss(rounded.float(), exact) < 0.1 * exact.var()


@pytest.mark.parametrize("name, count", [("ema", 1), ("rvq", 1), ("vqvae2", 3), ("video", 1)])
def test_codebooks_learn_when_the_step_says_so(name, count):
    """Deferred to the end of the step, two micro-batches move the codebook as both in one batch."""
    whole, video = make(name).train(), clip(4)
    for module in whole.modules():  # batch norm would see a difference
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    parts = copy.deepcopy(whole)
    assert len(quantizers(parts)) == count
    whole(video)
    for q in quantizers(parts):
        q.defer()
        q.begin()
    before = copy.deepcopy(parts.state_dict())
    parts(video[:1]), parts(video[1:])
    assert all(torch.equal(v, before[k]) for k, v in parts.state_dict().items())
    for q in quantizers(parts):
        q.update()
    books = [k for k in before if "embed" in k or "ema" in k]
    assert any(not torch.equal(before[k], whole.state_dict()[k]) for k in books) or name == "rvq"
    assert all(torch.allclose(parts.state_dict()[k], whole.state_dict()[k], atol=1e-5) for k in books)


# ---- weights -----------------------------------------------------------------------------------------------------


def training_entries():
    return {"loss.discriminator.main.0.weight": torch.rand(4, 3, 4, 4), "loss.perceptual_loss.lin0": torch.rand(1),
            "discriminator.0.weight": torch.rand(2)}


@pytest.mark.parametrize("name", ["vq", "ema", "optvq", "rvq"])
def test_a_taming_checkpoint_is_recognised(name, tmp_path):
    model, path = make(name), tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": {**model.state_dict(), **training_entries()}}, path)
    loaded, words = load_vqgan(path)
    assert "2 entries of 'loss' ignored" in words and "1 entries of 'discriminator' ignored" in words
    assert f"quantizer {name}, 32 codes" in words and not loaded.training
    same = {k: v for k, v in loaded.config.items() if k not in ("resolution", "attn_resolutions")}
    assert {k: v for k, v in model.config.items() if k in same} == {k: v for k, v in same.items() if k in model.config}
    video = clip(2)
    with torch.no_grad():
        assert torch.equal(loaded(video)[0], model(video)[0])
    plain = {f"model.{k}": v for k, v in model.state_dict().items()}  # OptVQ's Hugging Face files
    assert load_vqgan({"model": plain})[0].config == loaded.config
    assert load_vqgan(path, beta=0.5)[0].quantize.num_codes == 32


def test_published_settings_are_recognised():
    for name in ("taming_vqmodel", "taming_emavq", "optvq"):
        file, model = published_vqgan(name)
        found = model_vqgan.recognise(model.state_dict())
        twin = VQGAN(**found)
        assert [(k, tuple(v.shape)) for k, v in twin.state_dict().items()] == [(k, tuple(s)) for k, s in file["params"]]
    file = golden("vqvae2")
    kind, found = model_vqvae.recognise(VQVAE2(**file["config"]).state_dict())
    assert kind is VQVAE2 and found == file["config"]


@pytest.mark.parametrize("name", ["vqvae2", "vqvae2_vq", "vqvae2_optvq", "video"])
def test_vqvae_weights_are_recognised(name, tmp_path):
    model, path = make(name), tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    loaded, words = load_vqvae(path)
    assert loaded.config == json.loads(json.dumps(model.config)) and type(model).__name__ in words
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    # as the published trainers save them: within a dict, from several GPUs
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, path)
    for again, _ in (load_vqvae(path), models.load_model(path)):
        assert again.config == loaded.config and torch.equal(*(next(m.parameters()) for m in (again, loaded)))
    with pytest.raises(ValueError, match="no state_dict"):
        load_vqvae({"state_dict": [1]})


def test_a_whole_number_stands_for_a_tuple_of_one():
    model = models.build_model("vqgan", {**SMALL, "attn_resolutions": 8, "embed_dim": 8, "n_embed": 32})
    assert model.config["attn_resolutions"] == [8]


def test_codebooks_with_training_options_load_into_plain_ones():
    model = VQGAN(**SMALL, embed_dim=8, n_embed=32, quantizer="vq", kmeans_init=True, restart_below=0.5)
    _, words = load_vqgan(model.state_dict())
    assert "quantize.started" in model.state_dict() and "2 entries of 'quantize' ignored" in words
    state = VQVAE2(16, 8, 1, 2, 4, 32, (4, 2), kmeans_init=True).state_dict()
    assert "codebooks.0.started" in state and load_vqvae(state)[0].config["quantizer"] == "ema"


def test_weights_that_do_not_fit_are_named():
    state = make("vq").state_dict()
    for change, words in (
        ({"encoder.conv_in.weight": torch.rand(32, 1, 3, 3)}, "images of 1 channels"),
        ({"decoder.conv_out.weight": torch.rand(3, 32, 1, 1)}, "do not fit.*decoder.conv_out.weight"),
        ({"quantize.embed.weight": torch.rand(3)}, "Gumbel"),
        ({"strange": torch.rand(3)}, "do not fit.*strange"),
    ):
        with pytest.raises(ValueError, match=words):
            load_vqgan({**state, **change})
    fsq = make("fsq")
    with pytest.raises(ValueError, match="give the levels"):
        load_vqgan(fsq.state_dict())
    assert load_vqgan(fsq.state_dict(), levels=(5, 4, 4))[0].quantize.num_codes == 80
    with pytest.raises(ValueError, match="no VQGAN weights: encoder.conv_in.weight is missing"):
        load_vqgan({"a": torch.rand(1)})
    with pytest.raises(ValueError, match="no VQ-VAE-2 or VqVae2 weights"):
        load_vqvae(state)
    with pytest.raises(ValueError, match="do not fit VQVAE2.*alpha"):
        load_vqvae({k: v for k, v in make("vqvae2").state_dict().items() if "alpha" not in k})


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "evil.ckpt"
    torch.save({"state_dict": make("vq").state_dict(), "callbacks": Malice(trace)}, path)
    for load in (load_vqgan, load_vqvae):
        with pytest.raises(ValueError, match="evil.ckpt.*not run") as error:
            load(path)
        assert not trace.exists() and "\n" not in str(error.value)
    path.write_bytes(path.read_bytes()[:3000])
    for load in (load_vqgan, load_vqvae):
        with pytest.raises(ValueError, match="no file of weights"):
            load(path)


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch 2.5 or newer")
def test_lightning_objects_beside_the_weights_are_left_out(tmp_path):
    """Published taming files hold a callback's class as a key, and settings; neither package is needed, nor run."""
    path, name = tmp_path / "last.ckpt", "pytorch_lightning.callbacks.model_checkpoint"
    def must_not_run(self, state):
        raise SystemExit("code of the file was run")

    module, model = types.ModuleType(name), make("vq")
    callback = module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name, "__setstate__": must_not_run})
    one = callback()
    one.best = 0.1
    sys.modules.update({"pytorch_lightning": module, "pytorch_lightning.callbacks": module, name: module})
    try:
        torch.save({"callbacks": {callback: one}, "state_dict": model.state_dict()}, path)
    finally:
        for known in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            del sys.modules[known]
    allowed = torch.serialization.get_safe_globals()
    loaded, _ = load_vqgan(path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert set(torch.serialization.get_safe_globals()) == set(allowed), "for this file alone"


# ---- the files ---------------------------------------------------------------------------------------------------


def test_a_copied_file_works_with_quantize_alone(tmp_path):
    for name in ("model_vqgan", "model_vqvae"):
        os.makedirs(tmp_path / name)
        for file in os.listdir(ROOT):
            if file == f"{name}.py" or file.startswith("quantize"):
                shutil.copy(os.path.join(ROOT, file), tmp_path / name)
    script = "\n".join(["import sys", "for name in ('model_vqgan', 'model_vqvae'):", "    sys.path[0] = name",
                        "    [sys.modules.pop(n) for n in list(sys.modules) if n.startswith('quantize')]",
                        "    __import__(name)",
                        "    print(sys.modules['quantize_base'].__file__)"])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [os.path.basename(os.path.dirname(p)) for p in done.stdout.splitlines()] == ["model_vqgan", "model_vqvae"]
