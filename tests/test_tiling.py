"""Tiles of any model: exact sizes, weights, seams, memory, and infer.py with them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infer
import video_files
from conftest import ROOT, mistake, write_clip
from golden.fill import fill_, make_input
from model_dcae import DCAE
from model_taehv import TAEHV
from model_vqgan import VQGAN
from video_writer import VideoWriter
from tiling import Tiled, starts, windows

pytestmark = pytest.mark.usefixtures("one_thread")


def small_dcae():
    """Filled weights are no autoencoder, but every layer matters."""
    model = DCAE((32, 32, 64, 64, 64, 64), (1,) * 6, (1,) * 6, 32).eval()
    fill_(model.state_dict())
    return model


class StandIn:
    """A model by the contract without weights: exact for videos of one colour per cell of a frame.

    Outside a tile is black, which shades its edge by `dark`.
    """

    time_factor, space_factor, latent_channels = 4, 32, 12

    def __init__(self, dark=0.0):
        self.dark = dark

    def latent_frames(self, frames):
        return -(-frames // 4)

    def frame_index(self, frames):
        return list(range(frames))

    def encode(self, video):
        cells = video[..., ::32, ::32]
        cells = torch.cat([cells, cells[:, -1:].expand(-1, -cells.shape[1] % 4, -1, -1, -1)], 1)
        return cells.unflatten(1, (-1, 4)).flatten(2, 3)

    def decode(self, latents):
        cells = latents.unflatten(2, (4, 3)).flatten(1, 2)
        x = cells[..., None, :, None].expand(-1, -1, -1, -1, 32, -1, 32).flatten(5, 6).flatten(3, 4)
        if self.dark:
            inside = F.avg_pool2d(torch.ones(1, 1, *x.shape[-2:]), 33, 1, 16)
            x = x * (1 - self.dark * (1 - inside[0, 0]))
        return x


def cells_video(frames, height, width, seed=0):
    """A random colour for each 32 x 32 cell of each frame, cut to size."""
    cells = make_input("rand", (1, frames, 3, -(-height // 32), -(-width // 32)), seed)
    return cells.repeat_interleave(32, 3).repeat_interleave(32, 4)[..., :height, :width]


def streamed(model, video, cut):
    """(latents, reconstruction) of a video in pieces of `cut` frames, encoded and decoded by one stream."""
    stream, latents, frames = model.stream(), [], []
    for piece in video.split(cut, 1):
        latents.append(stream.encode(piece))
        frames.append(stream.decode(latents[-1]))
    latents.append(stream.flush_encoder())
    frames += [stream.decode(latents[-1]), stream.flush_decoder()]
    return torch.cat(latents, 1), torch.cat(frames, 1)


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, tile, overlap", [(34, 8, 2), (8, 8, 2), (9, 8, 2), (11, 8, 0), (60, 8, 4), (3, 0, 0)])
def test_weights_of_all_tiles_add_up_to_one(size, tile, overlap):
    total = torch.zeros(size * 5)
    for start, weights in windows(size, tile, overlap, 5):
        assert len(weights) == 5 * min(size, tile or size) and weights.min() > 0
        total[start * 5 : start * 5 + len(weights)] += weights
    assert torch.allclose(total, torch.ones(size * 5), atol=1e-6)


def test_a_crossing_holds_its_four_tiles_the_diagonal_one_too():
    """Each tile comes out as a plane of its own channel, so what comes out are the weights themselves."""

    class Numbered(StandIn):
        def __init__(self):
            super().__init__()
            self.tiles = 0

        def decode(self, latents):
            plane = torch.zeros(*latents.shape[:2], 8, *latents.shape[-2:])
            plane[:, :, self.tiles] = 1
            self.tiles += 1
            return plane.repeat_interleave(4, 1).repeat_interleave(32, 3).repeat_interleave(32, 4)

    latents = torch.zeros(1, 7, 12, 7, 7)  # 2 tiles of 4 on each axis, 1 latent of overlap
    weights = Tiled(Numbered(), spatial_tile_size=128, temporal_tile_size=16).decode(latents)
    ramp = torch.cat([torch.zeros(96), (torch.arange(32) + 0.5) / 32, torch.ones(96)])
    time = torch.cat([torch.zeros(12), (torch.arange(4) + 0.5) / 4, torch.ones(12)])
    for i in range(8):
        t, y, x = (second if i & bit else 1 - second for bit, second in ((4, time), (2, ramp), (1, ramp)))
        assert torch.allclose(weights[0, :, i], t[:, None, None] * y[:, None] * x, atol=1e-6), i


# ---- exact sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 17, 24, 25, 31, 32, 33, 47, 96])
def test_any_length_and_size_comes_back_exactly(frames):
    """Also: what tiles agree on is not changed by blending them, at corners either, and frames stay in order."""
    tiled, video = Tiled(StandIn()), cells_video(frames, 250, 333)
    output, info = tiled(video)
    assert output.shape == video.shape and info["latents"].shape == (1, -(-frames // 4), 12, 8, 11)
    assert (output - video).abs().max() < 1e-6
    for cut in (13,) if frames > 33 else (1, 13, frames):
        latents, frames_out = streamed(tiled, video, cut)
        assert torch.equal(frames_out, output) and torch.equal(latents, info["latents"]), cut
    stream = tiled.stream()
    latents = torch.cat([*(stream.encode(piece) for piece in video.split(5, 1)), stream.flush()], 1)
    assert torch.equal(latents, info["latents"]), "a stream that only encodes"
    decoded = torch.cat([*(stream.decode(piece) for piece in latents.split(3, 1)), stream.flush()], 1)
    assert torch.equal(decoded[:, :frames, :, :250, :333], output), "one that only decodes"


@pytest.mark.parametrize("frames", [1, 2, 13, 17])
def test_tiled_dcae_gives_exact_sizes(frames):
    model = small_dcae()
    tiled = Tiled(model, spatial_tile_size=32, temporal_tile_size=16)
    video = torch.rand(2 if frames == 2 else 1, frames, 3, 20, 40)
    output, info = tiled(video)
    assert output.shape == video.shape and info["latents"].shape == (len(video), model.latent_frames(frames), 32, 1, 2)
    latents, frames_out = streamed(tiled, video, 5)
    assert torch.equal(frames_out, output) and torch.equal(latents, info["latents"])


def test_one_tile_is_the_untiled_result():
    for model in (small_dcae(), StandIn()):
        for frames in (1, 9):
            video = torch.rand(1, frames, 3, 64, 32)
            with torch.no_grad():
                latents = model.encode(video)
                expected = model.decode(latents)[:, :frames]
            for tiled in (Tiled(model), Tiled(model, use_temporal_tiling=False), Tiled(model, False, False)):
                output, info = tiled(video)
                assert torch.equal(info["latents"], latents) and torch.equal(output, expected)


def test_bfloat16_stays_bfloat16_and_is_blended_in_float32():
    """256 tiles' worth of equal values: a sum in bfloat16 would be off by its own rounding."""
    video = cells_video(40, 96, 416).bfloat16()
    output, info = Tiled(StandIn(), spatial_tile_size=96, tile_overlap_factor=0.5)(video)
    assert output.dtype == info["latents"].dtype == torch.bfloat16 and torch.equal(output, video)


def test_taehv_is_tiled_in_space_and_streams_in_time():
    model, video = TAEHV().eval(), torch.rand(1, 10, 3, 64, 90)
    tiled = Tiled(model, use_temporal_tiling=False, spatial_tile_size=64)
    with torch.no_grad():
        expected, _ = model(F.pad(video[0], (0, 6, 0, 0), mode="replicate")[None])
    output, info = tiled(video)
    assert output.shape == (1, 9, 3, 64, 90) and info["latents"].shape == (1, 3, 16, 8, 12)
    assert (output[..., :16] - expected[..., :16]).abs().max() < 0.2  # far from other tiles, but not beyond their reach
    for cut in (1, 7):
        latents, frames = streamed(tiled, video, cut)
        assert torch.allclose(latents, info["latents"], atol=1e-5) and torch.allclose(frames, output, atol=1e-5)
    video = video[..., :64]
    with torch.no_grad():
        expected, _ = model(video)
    assert torch.equal(tiled(video)[0], expected), "one tile"


def test_what_cannot_be_tiled_is_refused():
    model = StandIn()
    for make, message in (
        (lambda: Tiled(model, spatial_tile_size=100), "spatial_tile_size must be a multiple of 32, got 100"),
        (lambda: Tiled(model, temporal_tile_size=2), "temporal_tile_size must be a multiple of 4, got 2"),
        (lambda: Tiled(model, tile_overlap_factor=0.6), "from 0 to 0.5, got 0.6"),
        (lambda: Tiled(model, tile_overlap_factor=float("nan")), "from 0 to 0.5, got nan"),
        (lambda: Tiled(model, temporal_tile_size=8), "tile_overlap_factor of 0.5 or more"),
        (lambda: Tiled(TAEHV()), "use_temporal_tiling=False"),
        (lambda: Tiled(TAEHV("taecvx")), "use_temporal_tiling=False"),
        (lambda: Tiled(TAEHV("taeh3")), "use_temporal_tiling=False"),
        (lambda: Tiled(TAEHV(decoder_space_upscale=(False, True, True))), "preview decoder"),
        (lambda: Tiled(VQGAN(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=())), "a tokenizer"),
        (lambda: Tiled(model)(torch.rand(1, 3, 64, 64)), "expected video as N T 3 H W"),
        (lambda: Tiled(model).stream().flush(), "given nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- seams and memory --------------------------------------------------------------------------------------------


def seam_figure(tiled, untiled, positions, axis=-1):
    """How much seams show, from the steps between `position - 1` and each `position` along `axis`.

    tiled, untiled: equal shapes, any layout. Returns {"tiled": mean absolute step, "untiled": the same in the untiled
    result, "added": mean absolute difference of the two steps, 0 where there is no seam}, in the units of the values.
    """
    a, b = (
        x.index_select(axis, torch.tensor(positions)) - x.index_select(axis, torch.tensor(positions) - 1)
        for x in (tiled, untiled)
    )
    return {"tiled": a.abs().mean().item(), "untiled": b.abs().mean().item(), "added": (a - b).abs().mean().item()}


def seam_positions(tiled, frames, height, width):
    """Where tiles begin or end in a video: {"time": [...], "height": [...], "width": [...]}, for `seam_figure`."""
    time, space = tiled.model.time_factor, tiled.model.space_factor
    latents, step = tiled.model.latent_frames(frames), tiled.time_tile - tiled.time_overlap
    begins = range(0, max(1, latents - tiled.time_overlap), step) if tiled.time_tile else [0]
    found = {"time": (begins, tiled.time_tile, time, frames)}
    for name, size in (("height", height), ("width", width)):
        begins = starts(-(-size // space), tiled.space_tile, tiled.space_overlap)
        found[name] = (begins, tiled.space_tile, space, size)
    return {
        name: sorted({p * unit for start in begins for p in (start, start + tile) if 0 < p * unit < size})
        for name, (begins, tile, unit, size) in found.items()
    }


def stream_memory(tiled, height, width, itemsize=4):
    """Bytes that a stream with temporal tiling may hold of one clip, beside the model's own work on one tile: input
    that waits, the sums of one temporal tile, what it shares with the next, and finished frames on their way out.
    `itemsize`: bytes of a value in the input. Latents are not counted."""
    factor = tiled.model.space_factor
    frame = 3 * (height + -height % factor) * (width + -width % factor)
    tile, overlap = (latents * tiled.model.time_factor for latents in (tiled.time_tile, tiled.time_overlap))
    return frame * (tile * (4 + 2 * itemsize) + 2 * overlap * 4)


def test_seams_are_measured_and_overlap_lowers_them():
    still = torch.rand(1, 2, 3, 8, 8)
    stepped = still.clone()
    stepped[..., 4:] += 0.5
    figure = seam_figure(stepped, still, [4])
    assert figure["added"] == pytest.approx(0.5) and seam_figure(stepped, still, [3, 5])["added"] < 1e-6
    assert seam_figure(still, still, [4])["tiled"] == seam_figure(still, still, [4])["untiled"] > 0
    assert seam_positions(Tiled(StandIn()), 47, 250, 333) == {"time": [24, 32], "height": [], "width": [96, 256]}
    image = F.interpolate(make_input("rand", (1, 3, 6, 6), 0), (192, 192), mode="bicubic").clamp(0, 1)[:, None]
    model, added = StandIn(dark=0.5), []
    whole = model.decode(model.encode(image))[:, :1]
    for overlap in (0, 0.25):
        tiled = Tiled(model, use_temporal_tiling=False, spatial_tile_size=128, tile_overlap_factor=overlap)
        positions, output = seam_positions(tiled, 1, 192, 192), tiled(image)[0]
        added.append([seam_figure(output, whole, positions[name], axis)["added"]
                      for name, axis in (("height", -2), ("width", -1))])
    assert all(blended < 0.2 * cut for cut, blended in zip(*added)), added


SCRIPT_1080P = """
import torch
torch.set_num_threads(1)
from test_tiling import StandIn, stream_memory
from tiling import Tiled


def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


tiled, black = Tiled(StandIn()), torch.zeros(1, 8, 3, 1080, 1920, dtype=torch.bfloat16)
tiled(black[..., :256, :256])  # what the first call of everything takes
before = peak()
frames, stream, count = 57, tiled.stream(), 0
for start in range(0, frames, 8):
    output = stream.decode(stream.encode(black[:, start - frames:] if frames - start < 8 else black))
    count += output.shape[1]
output = stream.flush()
print(count + output.shape[1], *output.shape[-2:], peak() - before, stream_memory(tiled, 1080, 1920, 2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc")
def test_three_temporal_tiles_of_1080p_stay_within_the_stated_memory(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT_1080P)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    frames, height, width, used, stated = map(int, done.stdout.split())
    assert (frames, height, width) == (57, 1080, 1920)
    pieces = 4 * 8 * 3 * 1080 * 1920 * 2  # the pieces that the script itself makes, padded ones included
    tile = 9 * 2**20 * 32 * 4  # the stand-in's own work: some copies of 256 x 256 x 3 x 32 values
    assert 0.4 * stated < used < stated + pieces + tile, (used, stated)


# ---- infer.py ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_infer_tiles_the_dcae_and_decodes_its_latents_to_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(small_dcae().state_dict(), "dcae.pth")
    write_clip("./a.mp4", frames=13, height=40, width=70)
    write, written = VideoWriter.write, []
    monkeypatch.setattr(VideoWriter, "write", lambda self, frame: (
        self.path.endswith("_reconstructed.webm") and written.append(frame), write(self, frame)))
    fp32 = ("--lpips", "none", "--precision", "fp32")
    tiles = ("--tile", "64", "--tile-frames", "8", "--tile-overlap", "0.5", *fp32)

    def infer_py(*arguments):
        written.clear()
        monkeypatch.setattr(sys, "argv", ["infer.py", "dcae.pth", *arguments, *tiles])
        infer.main()
        return np.stack(written).astype(int)

    direct = infer_py("a.mp4", "--save-latents")
    assert "tiles of 64 x 64 px x 8 frames" in capsys.readouterr().out
    with open("inference_results/metrics.json") as file:
        (row,) = json.load(file)["rows"]
    assert (row["frames"], row["height"], row["width"], row["latent_shape"]) == (13, 40, 70, [4, 32, 2, 3])
    video = torch.from_numpy(np.stack([*video_files.VideoReader("a.mp4")])).permute(0, 3, 1, 2)[None] / 255
    tiled = Tiled(small_dcae(), spatial_tile_size=64, temporal_tile_size=8, tile_overlap_factor=0.5)
    expected, info = tiled(video)
    assert expected.shape == video.shape == (1, 13, 3, 40, 70)
    latents = "inference_results/latents/a.latents.npz"
    assert np.allclose(np.load(latents)["latents"], info["latents"][0].numpy(), atol=1e-5)
    assert np.abs(direct - (expected[0] * 255).round().permute(0, 2, 3, 1).numpy()).max() <= 1
    assert np.array_equal(infer_py(latents, "--out", "again"), direct)
    assert "encoded" not in capsys.readouterr().out
    tiles = ("--tile", "0", "--tile-frames", "0", *fp32)
    infer_py(latents, "--out", "other")
    assert "encoded in tiles of 64 x 64 px x 8 frames, overlap 0.5, decoded without tiles" in capsys.readouterr().out


@pytest.mark.any_precision
def test_infer_names_tiles_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(small_dcae().state_dict(), "dcae.pth")
    torch.save(TAEHV().state_dict(), "taehv.pth")
    write_clip("./a.mp4", frames=2)
    for arguments, words in (
        (("--tile", 100), "spatial_tile_size must be a multiple of 32, got 100"),
        (("--tile", -32), "--tile -32: 0 to 16384 is wanted"),
        (("--tile-frames", 6), "temporal_tile_size must be a multiple of 4, got 6"),
        (("--tile-overlap", 0.7), "--tile-overlap 0.7: 0 to 0.5 is wanted"),
    ):
        assert words in mistake(capsys, monkeypatch, infer, "dcae.pth", "a.mp4", *arguments)
    assert "its own stream" in mistake(capsys, monkeypatch, infer, "taehv.pth", "a.mp4", "--tile-frames", 32)


def test_the_file_works_alone(tmp_path):
    with open(os.path.join(ROOT, "tiling.py")) as source:
        (tmp_path / "tiling.py").write_text(source.read())
    subprocess.run(
        [sys.executable, "-c", "import tiling"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True
    )
