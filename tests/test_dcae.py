"""The Video DC-AE."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import l1_loss

from conftest import ROOT
from device import to_device
from golden.fill import fill_, make_input
from model_dcae import DCAE, linear_attention, load_dcae, recognise
from model_taehv import TAEHV

pytestmark = pytest.mark.usefixtures("one_thread")


def small(fill=True, **changes):
    """The golden file's small model, or with `changes`; filled weights are no autoencoder, but every layer matters."""
    arguments = dict(
        width_list=(32, 32, 64, 64, 64, 64),
        encoder_depth_list=(1,) * 6,
        decoder_depth_list=(1,) * 6,
        latent_channels=32,
    )
    model = DCAE(**{**arguments, **changes}).eval()
    if fill:
        fill_(model.state_dict())
    return model


def names_and_shapes(state_dict):
    return [(name, tuple(tensor.shape)) for name, tensor in state_dict.items()]


# ---- the model ---------------------------------------------------------------------------------------------------


def test_dcae_computes_what_the_published_code_does():
    golden = torch.load(os.path.join(ROOT, "tests", "golden", "dcae.pt"), weights_only=True)
    model = small(**{k: golden["config"][k] for k in small(fill=False).config})
    assert names_and_shapes(model.state_dict()) == [(k, tuple(s)) for k, s in golden["params"]]
    inputs = {k: make_input(*spec) for k, spec in golden["inputs"].items()}
    with torch.no_grad():  # theirs is N C T H W in [-1, 1], and decoding is not clamped
        encoded = model.encode(inputs["video"].transpose(1, 2) / 2 + 0.5).transpose(1, 2)
        decoded = model.train().decode(inputs["latent"].transpose(1, 2)).transpose(1, 2) * 2 - 1
    for ours, theirs in ((encoded, golden["outputs"]["encoded"]), (decoded, golden["outputs"]["decoded"])):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_full_size_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = DCAE()
    published = torch.load(os.path.join(ROOT, "tests", "golden", "dcae_f32t4c128_params.pt"), weights_only=True)
    assert names_and_shapes(model.state_dict()) == [(k, tuple(s)) for k, s in published]
    assert sum(p.numel() for p in model.parameters()) == 459_462_147
    assert recognise(model.state_dict()) == model.config
    assert (model.time_factor, model.space_factor, model.latent_channels) == (4, 32, 128)


def test_weights_are_read_from_files(tmp_path):
    from safetensors.torch import save_file

    model = small(encoder_depth_list=(1, 2, 1, 2, 1, 1), decoder_depth_list=(2, 1, 1, 1, 1, 3))
    save_file(model.state_dict(), str(tmp_path / "w.safetensors"))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for source in (str(tmp_path / "w.safetensors"), tmp_path / "w.pth", model.state_dict()):
        loaded = load_dcae(source)
        assert loaded.config == model.config == json.loads(json.dumps(loaded.config)) and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    state = model.state_dict()
    state["decoder.project_out.op_list.2.conv.bias"] = torch.zeros(4)
    state["decoder.more"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"op_list.2.conv.bias is \(4,\), not \(3,\) \(and 1 more\)"):
        load_dcae(state)
    with pytest.raises(ValueError, match="no Video DC-AE weights"):
        load_dcae(TAEHV().state_dict())


def test_lists_that_do_not_fit_are_refused():
    for changes, message in (
        (dict(width_list=(32,) * 5), "six or more widths"),
        (dict(encoder_depth_list=(0, 1, 1, 1, 1, 1)), "one block at least"),
        (dict(width_list=(32, 32, 64, 48, 64, 64)), "multiple of 32"),
        (dict(width_list=(32, 256, 256, 256, 256, 256)), "at most 4 times"),
        (dict(latent_channels=48), "whole groups"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 9])
def test_exactly_the_frames_that_go_in_come_out(frames):
    model = small()
    video = torch.rand(2, frames, 3, 32, 64)
    with torch.no_grad():
        output, info = model(video)
        latents = info["latents"]
        decoded = model.decode(latents)
        padded = torch.cat([video, video[:, -1:].repeat(1, 3, 1, 1, 1)], 1)[:, : max(8, frames + -frames % 4)]
        assert frames == 1 or torch.equal(latents, model.encode(padded)), "the last frame is repeated"
    assert latents.shape == (2, model.latent_frames(frames), 32, 1, 2)
    assert output.shape == video.shape == model.targets(video).shape
    assert model.frame_index(frames) == list(range(frames))
    assert torch.equal(output, decoded[:, :frames]) and 0 <= output.min() and output.max() <= 1
    assert decoded.shape[1] == (1 if frames == 1 else 4 * latents.shape[1]), "latents alone tell images from clips"


def test_shapes_that_cannot_be_used_are_named():
    model = small()
    for call, value, message in (
        (model.encode, torch.rand(1, 4, 3, 40, 64), "multiples of 32, got 40x64"),
        (model.encode, torch.rand(1, 0, 3, 32, 32), "T at least 1"),
        (model.encode, torch.rand(4, 3, 32, 32), "expected video as N T 3 H W"),
        (model.decode, torch.rand(1, 2, 16, 1, 1), "expected latents as N T 32 H W"),
    ):
        with pytest.raises(ValueError, match=message):
            call(value)


def test_reconstruction_is_clamped_outside_training_only():
    model = small()
    latents = make_input("randn", (1, 2, 32, 1, 1), 0)
    with torch.no_grad():
        clamped, raw = model.decode(latents), model.train().decode(latents)
    assert raw.min() < 0 and raw.max() > 1 and torch.equal(clamped, raw.clamp(0, 1))


def test_checkpointing_changes_no_gradient_and_spares_the_last_layer():
    model, video = small().train(), torch.rand(2, 8, 3, 32, 32)
    calls = dict.fromkeys(("first", "last"), 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    model.encoder.stages[0].op_list[0].main.conv1.register_forward_hook(count("first"))
    model.decoder.project_out.op_list[2].register_forward_hook(count("last"))
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        calls.update(first=0, last=0)
        model.zero_grad()
        output, _ = model(video)
        loss = l1_loss(output, video)
        (adaptive,) = torch.autograd.grad(loss, model.last_layer, retain_graph=True)
        assert calls == dict(first=1, last=1), "the adaptive weight's gradient recomputes nothing"
        loss.backward()
        assert calls == dict(first=2 if checkpointing else 1, last=1)
        assert torch.equal(adaptive, model.last_layer.grad) and adaptive.abs().max() > 0
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(a.abs().max() > 0 and torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients))


@pytest.mark.slow
def test_bfloat16_autocast_is_finite_and_close():
    model, video = small().train(), torch.rand(1, 8, 3, 32, 32)
    exact, _ = model(video)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model(video)
    l1_loss(output.float(), video).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (output - exact).abs().mean() < 0.1 * exact.std()


def test_linear_attention_is_float32_inside_autocast():
    """In float16 these sums overflow; in bfloat16 the errors are some percent."""
    for dtype, size in ((torch.float16, 100), (torch.bfloat16, 1)):
        qkv = (size * torch.randn(1, 96, 8, 16, 16)).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_attention(qkv)
        q, k, v = qkv.double().flatten(2).chunk(3, 1)
        q, k = q.relu(), k.relu()
        weights = k.transpose(1, 2) @ q  # positions attended x positions
        expected = (v @ (weights / weights.sum(1, keepdim=True))).unflatten(2, (8, 16, 16))
        assert out.dtype == dtype
        assert (out - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="PyTorch's own bf16 has another layout")
@pytest.mark.parametrize("frames", [1, 8])
def test_convolutions_see_channels_last(frames):
    """Whatever shuffles, attends or enlarges between them: else each of them copies its input into that layout. (In
    bf16, as a CPU's float32 convolutions of few channels have another layout themselves.)"""
    model, seen = to_device(small(), torch.device("cpu")), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, frames, 3, 64, 96))
    others = [name for name, pair in seen.items()
              if not all(x.is_contiguous(memory_format=torch.channels_last_3d) for x in pair)]
    assert len(seen) > 60 and others == ["encoder.project_in.conv"], "but for the video itself"
    assert {out.dtype for _, out in seen.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_stream_is_stable_and_computes_what_it_says():
    model = small()
    for frames in (1, 36, 37, 65):
        video = make_input("rand", (2, frames, 3, 32, 32), frames)  # two: PyTorch is slow at single small clips
        segments = {65: (32, 33), 37: (32, 5)}.get(frames, (frames,))  # 33: a rest of one latent is joined
        with torch.no_grad():
            expected = torch.cat([model(piece)[0] for piece in video.split(segments, 1)], 1)
        results = []
        for cut in (7, frames):
            stream = model.stream()
            pieces = [stream.decode(stream.encode(piece)) for piece in video.split(cut, 1)]
            results.append(torch.cat([*pieces, stream.flush()], 1))
        assert all(torch.equal(results[0], other) for other in results), "the cutting changes bits"
        assert results[0].shape == video.shape and torch.allclose(results[0], expected, atol=1e-5)
        latents = torch.cat([*(stream.encode(piece) for piece in video.split(5, 1)), stream.flush()], 1)
        assert latents.shape[1] == model.latent_frames(frames)
        decoded = torch.cat([stream.decode(latents), stream.flush()], 1)
        assert torch.equal(decoded[:, :frames], results[0])
    assert max(stream._frames, stream._latents, key=len) == [], "a flushed stream holds nothing"
    with pytest.raises(ValueError, match="given nothing"):
        model.stream().flush()


def test_the_file_works_alone(tmp_path):
    with open(os.path.join(ROOT, "model_dcae.py")) as source:
        (tmp_path / "model_dcae.py").write_text(source.read())
    script = "import model_dcae, sys; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True)
