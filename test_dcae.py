"""The Video DC-AE, and tiles of any model. Minutes: under one."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import l1_loss

from conftest import ROOT
from golden.fill import fill_, make_input
from model_dcae import DCAE, linear_attention, load_dcae, recognise
from model_taehv import TAEHV
from tiling import Tiled, normalised_windows, seam_figure, window


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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These maps are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def names_and_shapes(state_dict):
    return [(name, tuple(tensor.shape)) for name, tensor in state_dict.items()]


# ---- the model ---------------------------------------------------------------------------------------------------


def test_dcae_computes_what_the_published_code_does():
    golden = torch.load(os.path.join(ROOT, "golden", "dcae.pt"), weights_only=True)
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
    published = torch.load(os.path.join(ROOT, "golden", "dcae_f32t4c128_params.pt"), weights_only=True)
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


def test_bfloat16_autocast_is_finite_and_close():
    model, video = small().train(), torch.rand(2, 8, 3, 32, 32)
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


def test_fresh_weights_can_learn():
    torch.manual_seed(0)
    model = small(fill=False).train()
    images = F.interpolate(torch.rand(8, 3, 4, 4), (32, 32), mode="bilinear")[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = l1_loss(model(images)[0], images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    grey = l1_loss(torch.full_like(images, 0.5), images).item()
    assert losses[0] < 1.5 * grey and losses[-1] < 0.7 * grey, (grey, losses)


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


def test_the_files_work_alone(tmp_path):
    for name in ("model_dcae", "tiling"):
        with open(os.path.join(ROOT, f"{name}.py")) as source:
            (tmp_path / f"{name}.py").write_text(source.read())
    script = "import model_dcae, tiling, sys; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True)


# ---- tiles -------------------------------------------------------------------------------------------------------


class StandIn:
    """A model by the contract without weights: exact for videos of one colour per cell of a frame.

    trim: frames that a decode lacks at its end, as TAEHV's does. Outside a tile is black, which shades its edge by `dark`.
    """

    time_factor, space_factor, latent_channels = 4, 32, 12

    def __init__(self, trim=0, dark=0.0):
        self.trim, self.dark = trim, dark

    def latent_frames(self, frames):
        return -(-frames // 4)

    def frame_index(self, frames):
        return list(range(4 * self.latent_frames(frames) - self.trim))[: None if self.trim else frames]

    def targets(self, video):
        return video[:, : len(self.frame_index(video.shape[1]))]

    def encode(self, video):
        cells = video[..., ::32, ::32]
        cells = torch.cat([cells, cells[:, -1:].expand(-1, -cells.shape[1] % 4, -1, -1, -1)], 1)
        return cells.unflatten(1, (-1, 4)).flatten(2, 3)

    def decode(self, latents):
        cells = latents.unflatten(2, (4, 3)).flatten(1, 2)[:, : 4 * latents.shape[1] - self.trim]
        x = cells[..., None, :, None].expand(-1, -1, -1, -1, 32, -1, 32).flatten(5, 6).flatten(3, 4)
        if self.dark:
            inside = F.avg_pool2d(torch.ones(1, 1, *x.shape[-2:]), 33, 1, 16)
            x = x * (1 - self.dark * (1 - inside[0, 0]))
        return x


def cells_video(frames, height, width, seed=0):
    """A random colour for each 32 x 32 cell of each frame, cut to size."""
    cells = make_input("rand", (1, frames, 3, -(-height // 32), -(-width // 32)), seed)
    return cells.repeat_interleave(32, 3).repeat_interleave(32, 4)[..., :height, :width]


@pytest.mark.parametrize("size, tile, overlap", [(34, 8, 2), (8, 8, 2), (11, 8, 0), (60, 8, 4), (3, None, 0)])
def test_weights_of_all_tiles_add_up_to_one(size, tile, overlap):
    total = torch.zeros(size * 5)
    for start, weights in normalised_windows(size, tile, overlap, 5):
        assert len(weights) == 5 * min(size, tile or size) and weights.min() > 0
        total[start * 5 : start * 5 + len(weights)] += weights
    assert torch.allclose(total, torch.ones(size * 5), atol=1e-6)
    assert torch.equal(window(6, 2), torch.tensor([0.25, 0.75, 1, 1, 0.75, 0.25]))


@pytest.mark.parametrize("frames", [1, 3, 17, 32, 33, 47, 96])
def test_any_length_and_size_comes_back_exactly(frames):
    """Also: what tiles agree on is not changed by blending them, at corners either, and frames stay in order."""
    tiled, video = Tiled(StandIn()), cells_video(frames, 250, 333)
    output, info = tiled(video)
    assert output.shape == video.shape and info["latents"].shape == (1, -(-frames // 4), 12, 8, 11)
    assert (output - video).abs().max() < 1e-6
    results = []
    for cut in (1, 13, frames):
        stream = tiled.stream()
        pieces = [stream.decode(stream.encode(piece)) for piece in video.split(cut, 1)]
        results.append(torch.cat([*pieces, stream.flush()], 1))
    assert all(torch.equal(output, other) for other in results)
    latents = torch.cat([*(stream.encode(piece) for piece in video.split(cut, 1)), stream.flush()], 1)
    assert torch.equal(latents, info["latents"])


SCRIPT_1080P = """
import resource, sys, torch
torch.set_num_threads(1)
from test_dcae import StandIn
from tiling import Tiled

tiled, black = Tiled(StandIn()), torch.zeros(1, 8, 3, 1080, 1920, dtype=torch.bfloat16)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tiled(black)  # what the first call of everything takes
before, lengths = peak(), []
for frames in (17, 32, 33, 47, 96):
    stream, count = tiled.stream(), 0
    for start in range(0, frames, 8):
        output = stream.decode(stream.encode(black[:, start - frames:] if frames - start < 8 else black))
        count += output.shape[1]
    output = stream.flush()
    lengths.append(count + output.shape[1])
    print(lengths[-1], tuple(output.shape), peak() - before, tiled.stream_memory(1080, 1920, 2))
"""


def test_1080p_of_any_length_within_the_stated_memory(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT_1080P)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [[int(number) for number in re.findall(r"\d+", line)] for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [17, 32, 33, 47, 96]
    assert all(row[4:6] == [1080, 1920] for row in rows)
    peaks, limit = [row[6] for row in rows], rows[0][7]
    tile = 9 * 2**20 * 32 * 4  # the stand-in's own work: some copies of 256 x 256 x 3 x 32 values
    assert max(peaks) < limit + tile, (peaks, limit)


def test_one_tile_is_the_untiled_result():
    for model in (small(), StandIn()):
        video = torch.rand(2, 9, 3, 64, 32)
        with torch.no_grad():
            latents = model.encode(video)
            output = model.decode(latents)[:, :9]
        tiled_output, info = Tiled(model)(video)
        assert torch.allclose(info["latents"], latents, atol=1e-6)
        assert torch.allclose(tiled_output, output, atol=1e-6)
    image = torch.rand(1, 1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(Tiled(small())(image)[0], small()(image)[0], atol=1e-6)


@pytest.mark.parametrize("frames", [4, 21])
def test_tiled_dcae_gives_exact_sizes(frames):
    model = small()
    tiled = Tiled(model, spatial_tile_size=64, temporal_tile_size=16, tile_overlap_factor=0.5)
    video = torch.rand(2, frames, 3, 40, 70)
    output, info = tiled(video)
    assert output.shape == video.shape and info["latents"].shape == (1, model.latent_frames(frames), 32, 2, 3)
    stream = tiled.stream()
    pieces = [stream.decode(stream.encode(piece)) for piece in video.split(5, 1)]
    assert torch.equal(torch.cat([*pieces, stream.flush()], 1), output)


def test_frames_keep_their_places_for_models_that_drop_some():
    """In time: a stand-in whose tiles lack their last three frames, and TAEHV where all is one colour in time."""
    video = cells_video(49, 64, 64)
    tiled = Tiled(StandIn(trim=3))
    output, _ = tiled(video)
    assert output.shape[1] == 49 and torch.allclose(output, video, atol=1e-6)
    stream = tiled.stream()
    pieces = [stream.decode(stream.encode(piece)) for piece in video.split(3, 1)]
    assert torch.equal(torch.cat([*pieces, stream.flush()], 1), output)
    model, video = TAEHV().eval(), torch.rand(1, 9, 3, 64, 96)
    tiled = Tiled(model, use_temporal_tiling=False, spatial_tile_size=64)
    with torch.no_grad():
        expected, _ = model(video)
    output, info = tiled(video)
    assert output.shape == expected.shape and info["latents"].shape == (1, 3, 16, 8, 12)
    assert (output[..., :16] - expected[..., :16]).abs().max() < 0.2  # far from other tiles, but not beyond their reach
    assert Tiled(model)(video)[0].shape == expected.shape


def test_what_cannot_be_tiled_is_refused():
    model = StandIn()
    for make, message in (
        (lambda: Tiled(model, spatial_tile_size=100), "spatial_tile_size must be a multiple of 32, got 100"),
        (lambda: Tiled(model, temporal_tile_size=2), "temporal_tile_size must be a multiple of 4, got 2"),
        (lambda: Tiled(model, tile_overlap_factor=0.6), "from 0 to 0.5, got 0.6"),
        (lambda: Tiled(StandIn(trim=3), tile_overlap_factor=0), "must overlap by 4 frames"),
        (lambda: Tiled(small(), temporal_tile_size=8), "tile_overlap_factor of 0.5 or more"),
        (lambda: Tiled(TAEHV("taecvx")), "use_temporal_tiling=False"),
        (lambda: Tiled(TAEHV("taeh3")), "use_temporal_tiling=False"),
        (lambda: Tiled(TAEHV(decoder_time_upscale=(False, False))), "use_temporal_tiling=False"),
        (lambda: Tiled(model, use_temporal_tiling=False).stream(), "cannot hold the whole clip"),
        (lambda: Tiled(model)(torch.rand(1, 3, 64, 64)), "expected video as N T 3 H W"),
        (lambda: Tiled(model).stream().flush(), "given nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    preview = Tiled(TAEHV(decoder_space_upscale=(False, True, True)).eval(), use_temporal_tiling=False)
    with pytest.raises(ValueError, match="preview decoders cannot be tiled"):
        preview(torch.rand(1, 4, 3, 64, 64))


def test_seams_are_measured_and_overlap_lowers_them():
    still = torch.rand(1, 2, 3, 8, 8)
    stepped = still.clone()
    stepped[..., 4:] += 0.5
    figure = seam_figure(stepped, still, [4])
    assert figure["added"] == pytest.approx(0.5) and seam_figure(stepped, still, [3, 5])["added"] < 1e-6
    assert seam_figure(still, still, [4])["tiled"] == seam_figure(still, still, [4])["untiled"] > 0
    torch.manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 6, 6), (224, 416), mode="bicubic").clamp(0, 1)[:, None]
    for model in (small(), StandIn(dark=0.5)):
        with torch.no_grad():
            whole = model.decode(model.encode(image))[:, :1]
        added = []
        for overlap in (0, 0.25):
            tiled = Tiled(model, use_temporal_tiling=False, spatial_tile_size=128, tile_overlap_factor=overlap)
            positions = tiled.seam_positions(1, 224, 416)
            output, _ = tiled(image)
            added.append([seam_figure(output, whole, positions[name], axis)["added"]
                          for name, axis in (("height", -2), ("width", -1))])
        assert all(blended < 0.5 * cut for cut, blended in zip(*added)), added
