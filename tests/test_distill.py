"""Teachers, the latent cache, and training from it."""

import importlib.util
import json
import os
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch

import cache_files
import check_config
import checkpoint
import compare
import config
import data
import data_files
import infer
import latent_cache
import models
import objective
import optimizer
import train
import video_files
from clips import from_latent_cache
from conftest import CACHE, NARROW, ROOT, SMALL_CACHE as SMALL, run, shapeless, write_clip
from model_taehv import TAEHV
from teachers import TeacherError, load_teacher, per_channel

TRAIN = os.path.join(ROOT, "train.py")
DISTILL = [
    "taehv_distill",
    "size=32",
    "batch_size=1",
    "warmup_steps=2",
    "schedule=constant",
    "precision=fp32",
    "device=cpu",
    "log_every=1",
    "save_every=100",
    "val_every=100",
    "val_fraction=0.3",
    "seraena_replay_mb=1",
]
# Latent k is the brightness of input frame 4 k; with LATENTS = 4, frame 11 is repeated to make a frame 12.
REVEALING = """
import torch
import torch.nn.functional as F
class Revealing:
    def encode(self, video):
        video = torch.cat([video, video[:, -1:]], 1)[:, ::4][:, :LATENTS].mean(2)
        return F.avg_pool2d(video, 8)[:, :, None].expand(-1, -1, 16, -1, -1)
    def decode(self, latents):
        video = latents[:, :, :3].repeat_interleave(4, 1)[:, 3:].flatten(0, 1)
        return F.interpolate(video, scale_factor=8).unflatten(0, (len(latents), -1))
def make():
    return Revealing()
"""


# Halves time twice as CogVideoX's VAE does: an odd number of frames keeps its first alone.
PAIRS = """
import torch
import torch.nn.functional as F
class Pairs:
    pools_pairs = True
    def encode(self, video):
        for _ in range(2):
            first, rest = video[:, :video.shape[1] % 2], video[:, video.shape[1] % 2:]
            video = torch.cat([first, rest.unflatten(1, (-1, 2)).mean(2)], 1)
        return F.avg_pool3d(video, (1, 8, 8)).repeat(1, 1, 6, 1, 1)[:, :, :16]
    def decode(self, latents):
        video = latents[:, :, :3].repeat_interleave(4, 1)[:, 3 if latents.shape[1] % 2 else 0:].flatten(0, 1)
        return F.interpolate(video, scale_factor=8).unflatten(0, (len(latents), -1))
def make():
    return Pairs()
"""


def build(folder, monkeypatch, *arguments):
    """latent_cache.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["latent_cache.py", *map(str, arguments), "--out", str(folder)])
    with pytest.raises(SystemExit) as end:
        latent_cache.main()
    return end.value.code


def revealing(folder, latents):
    path = folder / f"revealing{latents}.py"
    path.write_text(REVEALING.replace("LATENTS", str(latents)))
    return f"python:{path}:make"


# ---- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cache_holds_clips_latents_and_where_they_are_from(cache, clips, teacher):
    kept = cache_files.LatentCache(cache)
    assert len(kept) == 10 and kept.latent_shape == (3, 16, 4, 4) and kept.problem() == ""
    batch = kept.read([1, 9])
    with torch.no_grad():
        latents = load_teacher(f"taehv:{teacher}").encode(batch["video"].float() / 255)
    assert (latents - batch["latents"].float()).abs().max() < 2e-3 * latents.abs().max()
    for i, clip in zip((1, 9), batch["video"]):
        origin = kept.origins[i]
        frames = list(video_files.VideoReader(os.path.join(clips, origin["file"])))
        top, left, edge = origin["crop"]
        for t in (0, 11):
            frame = frames[origin["first"] + t * origin["spacing"]][top : top + edge, left : left + edge]
            how = data.cv2.INTER_AREA if edge > 32 else data.cv2.INTER_CUBIC
            frame = data.cv2.resize(frame, (32, 32), interpolation=how) if edge != 32 else frame
            frame = frame[:, ::-1] if origin["flip"] else frame
            assert np.abs(frame.astype(int) - clip[t].permute(1, 2, 0).numpy()).max() <= 1
    assert {o["flip"] for o in kept.origins} == {True, False} and len({o["file"] for o in kept.origins}) == 6


@pytest.mark.slow
def test_an_interrupted_build_goes_on_and_two_ranks_build_the_same(cache, clips, teacher, tmp_path):
    index = json.load(open(os.path.join(cache, "index.json")))
    asked = [CACHE, "--teacher", f"taehv:{teacher}", "--data", clips, *SMALL, "--out"]
    run(*asked, tmp_path / "two", ranks=2, cwd=tmp_path)
    assert json.load(open(tmp_path / "two" / "index.json"))["shards"] == index["shards"]
    shutil.copytree(cache, tmp_path / "cut")
    os.remove(tmp_path / "cut" / "shard_00001.json")  # as if it was stopped in shard 1
    os.remove(tmp_path / "cut" / "shard_00001.latents.npy")
    before = os.stat(tmp_path / "cut" / "shard_00000.clips.npy").st_mtime_ns
    output = run(*asked, tmp_path / "cut", cwd=tmp_path)
    assert "6 of them from before" in output
    assert json.load(open(tmp_path / "cut" / "index.json")) == index
    assert os.stat(tmp_path / "cut" / "shard_00000.clips.npy").st_mtime_ns == before


def test_growing_keeps_what_is_there(clips, tmp_path, monkeypatch):
    asked = ["--teacher", revealing(tmp_path, 3), "--data", clips, *SMALL]
    assert build(tmp_path / "c", monkeypatch, *asked) == 0
    before = cache_files.LatentCache(tmp_path / "c").read(range(10))
    assert build(tmp_path / "c", monkeypatch, *asked, "--clips", "13") == 0
    after = cache_files.LatentCache(tmp_path / "c").read(range(13))
    assert torch.equal(after["video"][:10], before["video"]) and torch.equal(after["latents"][:10], before["latents"])


def test_bfloat16_latents_and_their_limits(clips, tmp_path, monkeypatch, capsys):
    spec = revealing(tmp_path, 3)
    large = tmp_path / "large.py"
    large.write_text(REVEALING.replace("LATENTS", "3").replace("expand(-1", "mul(1e6).expand(-1"))
    assert build(tmp_path / "c", monkeypatch, "--teacher", spec, "--data", clips, *SMALL, "--latent-dtype",
                 "bfloat16") == 0
    kept = cache_files.LatentCache(tmp_path / "c").read([0, 5])
    expected = load_teacher(spec).encode(kept["video"].float() / 255)
    assert kept["latents"].dtype == torch.bfloat16
    assert (kept["latents"].float() - expected).abs().max() <= expected.abs().max() / 128
    capsys.readouterr()
    asked = ["--teacher", f"python:{large}:make", "--data", clips, *SMALL]
    assert build(tmp_path / "d", monkeypatch, *asked) == 2
    assert "not finite as float16: try --latent-dtype bfloat16" in capsys.readouterr().err
    assert build(tmp_path / "d2", monkeypatch, *asked, "--latent-dtype", "bfloat16") == 0


def damaged(cache, folder, name):
    """A copy of the cache in which one byte of a file differs."""
    shutil.copytree(cache, folder)
    with open(folder / name, "r+b") as file:
        file.seek(os.path.getsize(folder / name) * 2 // 3)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    return folder


def refused(folder, monkeypatch, capsys, *more):
    """The one line with which train.py refuses the cache."""
    monkeypatch.setattr(sys, "argv", ["train.py", *DISTILL, f"latent_cache={folder}", "max_steps=1", *more])
    with pytest.raises(SystemExit) as end:
        train.main()
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and error.count("\n") == 0 and error.startswith("train.py: ")
    return error


@pytest.mark.slow
def test_a_cache_that_is_not_whole_is_refused(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = sorted(os.listdir(cache))
    assert len(names) == 10
    for name in names:
        error = refused(damaged(cache, tmp_path / f"damaged_{name}", name), monkeypatch, capsys)
        assert "damaged" in error and (name in error or "index" in name or ".json" in name), (name, error)
        shutil.copytree(cache, tmp_path / f"without_{name}")
        os.remove(tmp_path / f"without_{name}" / name)
        assert f"{name} is missing" in refused(tmp_path / f"without_{name}", monkeypatch, capsys)
        shutil.copytree(cache, tmp_path / f"cut_{name}")
        os.truncate(tmp_path / f"cut_{name}" / name, os.path.getsize(os.path.join(cache, name)) // 2)
        assert "damaged" in refused(tmp_path / f"cut_{name}", monkeypatch, capsys)
    shutil.copytree(cache, tmp_path / "partial")
    index = json.load(open(tmp_path / "partial" / "index.json"))
    index.pop("crc32")
    cache_files.write_index(tmp_path / "partial", {**index, "complete": False})
    assert "not finished" in refused(tmp_path / "partial", monkeypatch, capsys)
    assert "size=64 frames=12, but the latent cache" in refused(cache, monkeypatch, capsys, "size=64")
    assert "do not fit variant=taew2_2" in refused(cache, monkeypatch, capsys, "variant=taew2_2")
    assert "index.json is missing" in refused(tmp_path / "nowhere", monkeypatch, capsys)
    assert not os.path.exists(tmp_path / "runs" / "taehv_distill" / "model.pth")


def test_building_refuses_what_does_not_belong(cache, clips, teacher, tmp_path, monkeypatch, capsys):
    def line(folder, *arguments):
        assert build(folder, monkeypatch, *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0 and "Traceback" not in error
        return error

    asked = ["--data", clips, *SMALL]
    assert "of another kind (teacher's fingerprint" in line(cache, "--teacher", revealing(tmp_path, 3), *asked)
    assert "of another kind (size 32 there, 64 asked for)" in line(cache, "--teacher", f"taehv:{teacher}", *asked,
                                                                   "--size", "64")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert "is not empty, and no cache" in line(tmp_path / "other", "--teacher", f"taehv:{teacher}", *asked)
    new = tmp_path / "new"
    assert "does not exist" in line(new, "--teacher", "taehv:nowhere.pth", *asked)
    assert "is wanted" in line(new, "--teacher", "vae:x", *asked)
    error = line(new, "--teacher", "diffusers:AutoencoderKLWam:x", *asked)
    assert ("did you mean AutoencoderKLWan?" if importlib.util.find_spec("diffusers") else "pip install") in error
    assert "has no function 'made'" in line(new, "--teacher", revealing(tmp_path, 3).replace(":make", ":made"), *asked)
    error = line(new, "--teacher", f"taehv:{teacher}", *asked, "--size", "36")
    assert "12 frames of 36x36 cannot be encoded (height and width must be multiples of 8" in error
    assert "does not exist" in line(new, "--teacher", f"taehv:{teacher}", "--data", "nowhere", *SMALL)
    bad = tmp_path / "bad.py"
    bad.write_text("class A:\n    def encode(self, video): return video[0]\ndef make(): return A()\n")
    assert "latents N T C h w are wanted" in line(new, "--teacher", f"python:{bad}:make", *asked)
    assert not new.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_teachers(tmp_path, teacher):
    class Halving(torch.nn.Module):
        @torch.jit.export
        def encode(self, video: torch.Tensor):
            return video[:, ::4, :, ::8, ::8]

        @torch.jit.export
        def decode(self, latents: torch.Tensor):
            return latents.repeat_interleave(4, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)

        def forward(self, video: torch.Tensor):
            return self.decode(self.encode(video))

    torch.jit.script(Halving()).save(tmp_path / "halving.pt")
    video = torch.rand(2, 8, 3, 16, 16)
    scripted = load_teacher(f"torchscript:{tmp_path / 'halving.pt'}")
    assert torch.equal(scripted.encode(video), video[:, ::4, :, ::8, ::8])
    assert scripted.decode(scripted.encode(video)).shape == video.shape
    with pytest.raises(TeacherError, match="no TorchScript file"):
        load_teacher(f"torchscript:{teacher}")


@pytest.mark.parametrize("name", ["AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLWan"])
def test_diffusers_teachers(name, clips, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    small = {
        "AutoencoderKLCogVideoX": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
                                       scaling_factor=0.7),
        "AutoencoderKLHunyuanVideo": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        "AutoencoderKLWan": dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    }[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**small).eval()
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    spec = f"diffusers:{name}:{tmp_path / 'pipeline'}"
    asked = ["--teacher", spec, "--data", clips, *SMALL, "--clips", "2", "--frames", "9"]
    assert build(tmp_path / "c", monkeypatch, *asked) == 0
    kept = cache_files.LatentCache(tmp_path / "c")
    batch = kept.read([0, 1])
    assert kept.latent_shape == (3, 16, 4, 4)
    video = batch["video"].float() / 255
    with torch.no_grad():  # what the pipelines do before they hand latents to the diffusion model
        raw = model.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
        if name == "AutoencoderKLWan":
            mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1)
                         for v in (model.config.latents_mean, model.config.latents_std))
            expected = (raw - mean) / std
        else:
            expected = raw * model.config.scaling_factor
        decoded = (model.decode(raw).sample.transpose(1, 2) / 2 + 0.5).clamp(0, 1)
    scale = expected.abs().max()
    assert (batch["latents"].float() - expected.transpose(1, 2)).abs().max() < 2e-3 * scale
    again = load_teacher(spec).decode(expected.transpose(1, 2))
    assert again.shape[1] == 9 and (again - decoded).abs().max() < 1e-4


@pytest.mark.parametrize("latents, settings", [
    ((3, 16, 4, 4), "variant=taehv"), ((4, 16, 4, 4), "variant=taehv"), ((3, 48, 2, 2), "variant=taew2_2"),
    ((2, 128, 1, 1), "variant=taeltx_2"),
    ((12, 32, 4, 4), "patch_size=1 latent_channels=32 net.encoder_time_downscale=1,1,1"),
    ((6, 16, 4, 4), "patch_size=1 latent_channels=16 net.encoder_time_downscale=2,1,1"),
    ((3, 16, 5, 5), ""), ((3, 16, 4, 8), ""), ((5, 16, 4, 4), "")])
def test_the_settings_that_a_cache_proposes_make_a_model_for_it(latents, settings):
    plan = dict(frames=12, size=32, latents=latents, teacher=dict(pools_pairs=None, name=""))
    proposed = latent_cache.student_settings(plan)
    assert proposed.startswith(settings) and bool(proposed) == bool(settings)
    if proposed:
        cfg = config.load_config(["taehv_distill", "latent_cache=x", *proposed.split(), "size=32", "frames=12"])
        with torch.device("meta"), torch.no_grad():
            model = models.build_model(cfg.model, models.model_config(cfg))
            shape = model.encode(torch.empty(1, 12, 3, 32, 32)).shape
        assert model.aligned(12, latents[0])[0] == shape[1] and shape[2:] == latents[1:]


@pytest.mark.parametrize("frames", [1, 2, 12])
def test_a_teacher_of_single_frames_is_proposed_a_student_without_pooling_at_any_length(frames):
    plan = dict(frames=frames, size=32, latents=(frames, 32, 4, 4), teacher=dict(pools_pairs=None, name=""))
    assert "time_downscale=1,1,1 net.decoder_time_upscale=1,1,1" in latent_cache.student_settings(plan)


def proposed_run(folder, monkeypatch, capsys, *arguments):
    """Build a cache, and begin what it proposes: (settings, model, clips)."""
    assert build(folder, monkeypatch, *arguments) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("done: python train.py ")
    cfg = config.load_config(shlex.split(line)[3:])
    buckets = [data.Bucket(*b) for b in check_config.parse_buckets(cfg)]
    model, _ = models.make_model(cfg, buckets)
    clips = from_latent_cache(cfg, model, 0, 1, None).train
    clips.check(buckets[0])
    return cfg, model, clips


def test_what_a_finished_cache_proposes_can_be_run(clips, tmp_path, monkeypatch, capsys):
    torch.save(TAEHV(latent_channels=8, encoder_time_downscale=(1, 2, 1), decoder_time_upscale=(1, 2, 1)).state_dict(),
               tmp_path / "own.pth")
    asked = ["--data", clips, *SMALL, "--clips", "2"]
    _, model, kept = proposed_run(tmp_path / "a cache", monkeypatch, capsys, "--teacher",
                                  f"taehv:{tmp_path / 'own.pth'}", *asked)
    batch = kept.cache.read([0])
    video, latents = batch["video"].float() / 255, batch["latents"].float()
    with torch.no_grad():
        assert model.encode(video).shape == latents.shape == (1, 6, 8, 4, 4)
        assert model.eval().decode(latents).shape[1] == model.aligned(12, 6)[1] == 11
    (tmp_path / "pairs.py").write_text(PAIRS)
    cfg, model, _ = proposed_run(tmp_path / "pairs", monkeypatch, capsys, "--teacher",
                                 f"python:{tmp_path / 'pairs.py'}:make", *asked, "--frames", "16")
    assert (cfg.variant, cfg.frames, model.variant) == ("taecvx", 16, "taecvx")
    odd = tmp_path / "odd.py"
    odd.write_text(REVEALING.replace("LATENTS", "3").replace("avg_pool2d(video, 8)", "avg_pool2d(video, 6)"))
    assert build(tmp_path / "odd", monkeypatch, "--teacher", f"python:{odd}:make", *asked) == 0
    assert capsys.readouterr().out.count("no student here speaks latents of this shape") == 2


IMAGE_VAE = dict(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                 up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)


@pytest.mark.parametrize("name, conditioned", [("AutoencoderKLLTXVideo", False), ("AutoencoderKLLTXVideo", True),
                                               ("AutoencoderKLLTX2Video", False)])
def test_ltx_latents_are_normalised_as_its_pipelines_do_it(name, conditioned, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    settings = dict(scaling_factor=0.7, timestep_conditioning=conditioned)
    vae = getattr(diffusers, name)(**SMALL_VAES[name], **settings).eval()
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    vae.save_pretrained(tmp_path)
    teacher = load_teacher(f"diffusers:{name}:{tmp_path}")
    pipeline = diffusers.LTX2Pipeline if "LTX2" in name else diffusers.LTXPipeline
    video, statistics = torch.rand(2, 9, 3, 64, 64), (vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    with torch.no_grad():
        raw = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode()
        expected = pipeline._normalize_latents(raw, *statistics)
        again = pipeline._denormalize_latents(expected, *statistics)
        decoded = vae.decode(again, torch.zeros(2) if conditioned else None).sample
    latents = teacher.encode(video)
    assert (latents - raw.transpose(1, 2)).abs().max() > 0.5  # it is not nothing
    assert torch.allclose(latents, expected.transpose(1, 2), atol=1e-5)
    assert torch.allclose(teacher.decode(latents), (decoded.transpose(1, 2) / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_image_autoencoders_take_frame_by_frame(tmp_path):
    """FLUX's shift; FLUX.2's batch statistics of latents folded 2x2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    flux = diffusers.AutoencoderKL(**IMAGE_VAE, shift_factor=0.1, scaling_factor=0.3).eval()
    flux2 = diffusers.AutoencoderKLFlux2(**IMAGE_VAE).eval()
    flux2.bn.running_mean.normal_()
    flux2.bn.running_var.uniform_(0.5, 2)
    video = torch.rand(2, 3, 3, 16, 16)
    for vae, folder in ((flux, tmp_path / "flux"), (flux2, tmp_path / "flux2")):
        vae.save_pretrained(folder)
        teacher = load_teacher(f"diffusers:{type(vae).__name__}:{folder}")
        with torch.no_grad():
            raw = vae.encode(video.flatten(0, 1) * 2 - 1).latent_dist.mode()
            decoded = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).unflatten(0, (2, 3))
        if vae is flux:
            expected = (raw - 0.1) * 0.3
        else:
            mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
            packed = diffusers.Flux2Pipeline._patchify_latents(raw)
            expected = (packed - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
        latents = teacher.encode(video)
        assert torch.allclose(latents, expected.unflatten(0, (2, 3)), atol=1e-5)
        assert torch.allclose(teacher.decode(latents), decoded, atol=1e-5)


def test_hunyuan_video_15_takes_several_clips(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    diffusers.AutoencoderKLHunyuanVideo15(**SMALL_VAES["AutoencoderKLHunyuanVideo15"]).save_pretrained(tmp_path)
    teacher = load_teacher(f"diffusers:AutoencoderKLHunyuanVideo15:{tmp_path}")
    video = torch.rand(2, 5, 3, 32, 32)
    latents = teacher.encode(video)
    assert latents.shape == (2, 2, 8, 2, 2) and torch.allclose(latents[1:], teacher.encode(video[1:]), atol=1e-5)
    assert teacher.decode(latents).shape == video.shape


def test_cosmos_statistics_are_by_latent_frame():
    latents = torch.rand(1, 2, 3, 1, 1)
    values = torch.arange(12.).tolist()  # 3 channels x 4 latents
    assert per_channel(values, latents).flatten().tolist() == [0, 4, 8, 1, 5, 9]
    assert per_channel([1., 2., 3.], latents).shape == (1, 1, 3, 1, 1)


def test_folders_that_do_not_hold_the_class_asked_for(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import load_file, save_file

    def spoil(folder, change):
        shutil.copytree(tmp_path / "good", tmp_path / folder)
        path = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(TeacherError) as caught:
            load_teacher(f"diffusers:AutoencoderKL:{tmp_path / folder}")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    diffusers.AutoencoderKL(**IMAGE_VAE).save_pretrained(tmp_path / "good")
    load_teacher(f"diffusers:AutoencoderKL:{tmp_path / 'good'}")
    assert "quant_conv.bias is missing" in spoil("missing", lambda weights: weights.pop("quant_conv.bias"))
    assert "extra.weight is unexpected" in spoil(
        "more", lambda weights: weights.update({"extra.weight": torch.ones(1)}))
    assert "encoder.conv_in.weight is mismatched" in spoil(
        "shape", lambda weights: weights.update({"encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}))
    with pytest.raises(TeacherError, match="holds an AutoencoderKL: ask for diffusers:AutoencoderKL:"):
        load_teacher(f"diffusers:AutoencoderKLFlux2:{tmp_path / 'good'}")
    with pytest.raises(TeacherError, match="how the latents of AutoencoderKLTemporalDecoder are scaled is not known"):
        load_teacher(f"diffusers:AutoencoderKLTemporalDecoder:{tmp_path / 'good'}")


# ---- alignment ---------------------------------------------------------------------------------------------------


def test_counts_that_belong_together():
    model = TAEHV()
    assert model.aligned(12, 3) == (3, 9) and model.aligned(12, 4) == (3, 12)
    assert model.aligned(13, 4) == (4, 13) and model.aligned(1, 1) == (1, 1)
    for frames, latents in ((12, 2), (12, 5), (13, 5), (9, 2)):
        with pytest.raises(ValueError, match="do not belong together"):
            model.aligned(frames, latents)
    model = TAEHV("taecvx")
    for frames, latents in ((1, 1), (8, 2), (9, 3), (16, 4), (17, 5)):
        assert model.aligned(frames, latents) == (latents, frames)
    for frames, latents in ((4, 1), (5, 2), (12, 3), (13, 4)):
        with pytest.raises(ValueError, match=f"8k or 8k \\+ 1 frames, say .*, not {frames}$"):
            model.aligned(frames, latents)
    with pytest.raises(ValueError, match="do not belong together"):
        model.aligned(8, 3)
    assert TAEHV("taeltx_2").aligned(9, 2) == (2, 9)


def groups(model, frames, latents):
    """For each latent the input frames that what is decoded from it stands for."""
    assert model.aligned(frames, latents) == (latents, frames)
    sizes = [model.t_upscale] * latents
    if len(model.frame_index(frames, latents)) % model.t_upscale:
        sizes[0] -= model.frames_to_trim
    index = iter(model.frame_index(frames, latents))
    return [[next(index) for _ in range(size)] for size in sizes]


def test_latents_pooled_in_pairs_stand_for_the_frames_that_they_hold(tmp_path):
    (tmp_path / "pairs.py").write_text(PAIRS)
    pairs, model = load_teacher(f"python:{tmp_path / 'pairs.py'}:make"), TAEHV("taecvx")
    for frames in (1, 8, 9, 16, 17):
        pairs.check_frames(frames)
        moved = torch.eye(frames)[:, :, None, None, None].expand(-1, -1, 3, 8, 8)  # in clip t frame t differs from 0
        held = pairs.encode(moved)[:, :, 0, 0, 0].T > 0  # latents x frames
        assert [row.nonzero().flatten().tolist() for row in held] == groups(model, frames, len(held))
        assert pairs.decode(pairs.encode(moved)).shape[1] == frames
    for frames, filled in ((1, 1), (2, 8), (8, 8), (9, 9), (10, 16), (12, 16), (17, 17)):
        assert pairs.filled(frames, 4) == filled
        if frames != filled:
            with pytest.raises(TeacherError, match="8k or 8k"):
                pairs.check_frames(frames)


def test_counts_that_cogvideox_does_not_take_are_refused_before_any_work(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.py").write_text(PAIRS)
    (tmp_path / "silent.py").write_text(PAIRS.replace("pools_pairs = True", "pass"))
    asked = ["--data", clips, *SMALL, "--clips", "2"]

    def made(name, *more, code=0):
        assert build(tmp_path / name, monkeypatch, "--teacher", f"python:{name[:-2]}.py:make", *asked, *more) == code
        return tmp_path / name

    assert not made("pairs12", code=2).exists()
    assert "8k or 8k + 1 frames, say 9 or 16, not 12" in capsys.readouterr().err
    error = refused("", monkeypatch, capsys, "latent_cache=", "decoder_input=own", "encoder_weight=0", "variant=taecvx",
                    f"data={clips}")
    assert error.startswith("train.py: frames=12 with variant=taecvx: CogVideoX's VAE takes 8k or 8k + 1 frames")
    even, odd, silent = made("pairs16", "--frames", "16"), made("pairs17", "--frames", "17"), made("silent12")
    capsys.readouterr()
    plain, cogvideox = TAEHV(), TAEHV("taecvx")
    for folder, model in ((even, cogvideox), (odd, cogvideox), (odd, plain), (silent, plain)):
        cache_files.LatentCache(folder).check_alignment(model)
    assert "stand for other frames than those of variant taehv: set variant=taecvx" in refused(
        even, monkeypatch, capsys, "frames=16")
    with pytest.raises(video_files.DataError, match="say 9 or 16, not 12: build another"):
        cache_files.LatentCache(silent).check_alignment(cogvideox)
    index = json.load(open(silent / "index.json"))  # as caches were made before they told
    index["teacher"] = {**index["teacher"], "name": "diffusers AutoencoderKLCogVideoX"}
    del index["crc32"], index["teacher"]["pools_pairs"]
    cache_files.write_index(silent, index)
    assert "say 9 or 16, not 12: build another" in refused(silent, monkeypatch, capsys)


def test_a_teacher_that_pools_pairs_gets_frames_that_it_takes(tmp_path):
    (tmp_path / "pairs.py").write_text(PAIRS)
    source = data_files.Source(write_clip(str(tmp_path / "a.mp4"), frames=12, height=32, width=32), "a.mp4")
    pairs = load_teacher(f"python:{tmp_path / 'pairs.py'}:make")
    whole = compare.TeacherPass(pairs, source, 12, 4, 8)
    assert (whole.encoded, whole.count, len(whole.latents)) == (16, 12, 4)
    assert whole.notes == ["teacher: the last of 12 frames was repeated (4 x): it takes 8k or 8k + 1"]
    parts = compare.TeacherPass(pairs, source, 12, 4, 8, chunk=9)
    assert (parts.encoded, parts.count, len(parts.latents)) == (9 + 8, 12, 3)
    parts = compare.TeacherPass(pairs, source, 12, 4, 8, chunk=4)
    assert (parts.encoded, parts.count) == (3 * 8, 12) and parts.notes[0].startswith("teacher: the last of 4 frames")
    assert len(parts.notes) == 2
    source = data_files.Source(write_clip(str(tmp_path / "b.mp4"), frames=41, height=32, width=32), "b.mp4")
    for frames, latents in ((40, 8), (41, 9)):  # in pieces of 32 and of 33
        parts = compare.TeacherPass(pairs, source, frames, 4, 8, chunk=None)
        assert (parts.encoded, parts.count, len(parts.latents)) == (frames, frames, latents)


@pytest.mark.parametrize("frames", [16, 17])
def test_fresh_weights_of_cogvideox_keep_the_colours_of_the_frames_that_they_stand_for(frames):
    settings = ["taehv", "variant=taecvx", f"frames={frames}", "size=32", "data=demo", "init=colours"]
    cfg = config.load_config(settings)
    model, _ = models.make_model(cfg, [data.Bucket(*b) for b in check_config.parse_buckets(cfg)])
    video = torch.rand(1, frames, 3, 1, 1).expand(-1, -1, -1, 32, 32)  # each frame of one colour
    with torch.no_grad():
        output = model.eval()(video)[0]
    error = (output - video).abs().mean((2, 3, 4))[0]
    assert error.max() < 0.12, error


SMALL_VAES = {
    "AutoencoderKLCogVideoX": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
    "AutoencoderKLHunyuanVideo": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
    "AutoencoderKLWan": dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "AutoencoderKLLTXVideo": dict(latent_channels=8, block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
                                  decoder_block_out_channels=(8,) * 4, decoder_layers_per_block=(1,) * 5),
    "AutoencoderKLLTX2Video": dict(latent_channels=8, block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
                                   decoder_block_out_channels=(8, 16, 32), decoder_layers_per_block=(1,) * 4),
    "AutoencoderKLHunyuanVideo15": dict(block_out_channels=(32,) * 5, layers_per_block=1, latent_channels=8),
}


@pytest.mark.parametrize("name, variant, counts", [
    ("AutoencoderKLCogVideoX", "taecvx", (8, 9, 12)), ("AutoencoderKLHunyuanVideo", "taehv", (9,)),
    ("AutoencoderKLWan", "taew2_1", (9,)), ("AutoencoderKLLTXVideo", "taeltx_2", (9, 17)),
    ("AutoencoderKLLTX2Video", "taeltx_2", (9, 17))])
def test_a_latent_ends_with_the_last_frame_that_it_stands_for(name, variant, counts):
    """In diffusers' own networks, without their norms, which look at all frames: they are causal, so the last frame
    that moves a latent is where it ends, and the first frame that a latent moves is where its frames begin."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae, model = getattr(diffusers, name)(**SMALL_VAES[name]).eval(), TAEHV(variant)
    for module in list(vae.modules()):
        for child, norm in list(module.named_children()):
            if isinstance(norm, torch.nn.GroupNorm):
                setattr(module, child, torch.nn.Identity())
    size = 64 if "LTX2" in name else 32 if "LTX" in name else 16
    for frames in counts:
        video = torch.rand(1, 3, frames, size, size)
        moved = video + 0.5 * torch.eye(frames)[:, None, :, None, None]  # frames x 3 x frames: one moved in each
        with torch.no_grad():
            latents = vae.encode(video).latent_dist.mode()
            touched = (vae.encode(moved).latent_dist.mode() - latents).abs().amax((1, 3, 4)) > 1e-6  # frames x latents
        ends = [row.nonzero().max().item() for row in touched.T]
        if frames == 12 and variant == "taecvx":  # latents of frames 0-3, 4-7 and 8-11, which come back as nine frames
            assert ends == [3, 7, 11] and vae.decode(latents).sample.shape[2] == 9
            with pytest.raises(ValueError, match="takes 8k or 8k"):
                model.aligned(frames, latents.shape[2])
            continue
        standing = groups(model, frames, latents.shape[2])
        assert ends == [group[-1] for group in standing]
        if "LTX" in name:  # whose decoders are not causal
            continue
        moved = latents + torch.eye(len(standing))[:, None, :, None, None]
        with torch.no_grad():
            touched = (vae.decode(moved).sample - vae.decode(latents).sample).abs().amax((1, 3, 4)) > 1e-6
        assert touched.shape == (len(standing), frames)
        assert [row.nonzero().min().item() for row in touched] == [group[0] for group in standing]


@pytest.mark.parametrize("latents", [3, 4])
def test_latents_that_reveal_their_frame_stand_beside_it(latents, tmp_path, monkeypatch):
    """From the files through the cache to the pair of frames that a loss compares."""
    write_clip(str(tmp_path / "videos" / "a.mp4"), frames=30)
    spec = revealing(tmp_path, latents)
    asked = ["--teacher", spec, "--data", tmp_path / "videos", *SMALL, "--max-frame-delta", "2"]
    assert build(tmp_path / "c", monkeypatch, *asked) == 0
    batch = cache_files.LatentCache(tmp_path / "c").read([0, 1])
    video, kept = batch["video"].float() / 255, batch["latents"].float()
    assert kept.shape[1] == latents
    cfg = config.load_config([*DISTILL, f"latent_cache={tmp_path}", "pixel_loss=l2", "train_encoder=false"])
    model = TAEHV().train()
    goal = objective.Objective(cfg, model, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    seen = {}

    def decode(given):  # latent k gives frames 4 k - 3 to 4 k, as the family's decoder does
        return load_teacher(spec).decode(given)

    def compare(kind, output, target):
        seen.update(output=output, target=target)
        return (output - target).square().mean()

    goal.decode = decode
    monkeypatch.setattr(objective, "pixel_loss", compare)
    goal(video, kept, 1.0)
    output, target = (seen[k].mean((0, 2, 3, 4)) for k in ("output", "target"))
    assert len(output) == len(target) == (9 if latents == 3 else 12)
    assert torch.equal(seen["target"], video[:, : len(target)])
    assert (output - target)[::4].abs().max() < 2e-3  # frames 0, 4 and 8 are the very ones
    assert (output - target)[1::4].abs().min() > 0.01  # and their neighbours are not


# ---- losses and training -----------------------------------------------------------------------------------------


@pytest.fixture
def backbones(tmp_path_factory, monkeypatch):
    """Random weights in the place of LPIPS's backbone, which cannot be downloaded everywhere."""
    from torchvision.models import alexnet

    home = tmp_path_factory.mktemp("torch_home")
    os.makedirs(home / "hub" / "checkpoints")
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), home / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    monkeypatch.setenv("TORCH_HOME", str(home))


def test_perceptual_loss(backbones):
    from losses import PerceptualLoss

    loss = PerceptualLoss("alex", frames=2).train()
    assert not any(m.training for m in loss.modules()) and not any(p.requires_grad for p in loss.parameters())
    target = torch.rand(2, 5, 3, 64, 64)
    output = (target + 0.2 * torch.randn_like(target)).clamp(0, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(output, target)
    value.backward()
    touched = output.grad.abs().amax((2, 3, 4)) > 0  # two frames of each clip
    assert value.dtype == torch.float32 and value > 0 and touched.sum(1).tolist() == [2, 2]
    assert output.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(target, target).abs() < 1e-6
    every = PerceptualLoss("alex", frames=0)
    by_frame = torch.stack([every(output[:, t : t + 1], target[:, t : t + 1]) for t in range(5)])
    assert torch.allclose(every(output, target), by_frame.mean(), rtol=1e-4)


def test_perceptual_loss_is_the_packages(backbones):
    from losses import PerceptualLoss

    loss, target = PerceptualLoss("alex", frames=0), torch.rand(2, 3, 3, 64, 64)
    output = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    inputs = []
    loss.network.net.register_forward_hook(lambda _, given, out: inputs.append((given[0], out[-1].requires_grad)))
    ours = loss(output, target)
    assert [graph for _, graph in inputs] == [False, True], "one pass each; the target's keeps no graph"
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in inputs)
    theirs = loss.network(*(v.flatten(0, 1) * 2 - 1 for v in (output, target))).mean()
    (gradient,), (expected,) = (torch.autograd.grad(value, output) for value in (ours, theirs))
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(output, target)
    in_half, = torch.autograd.grad(half, output)
    assert half.dtype == torch.float32 and torch.allclose(half, ours, rtol=0.02)
    assert torch.cosine_similarity(in_half.flatten(), expected.flatten(), 0) > 0.95


def test_features_of_nothing_have_a_gradient():
    from losses import unit

    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (unit(features) - 1).square().sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("settings", ["", "seraena_weight=0.1", "gan_adaptive=false"])
def test_lpips_is_walked_back_through_once_beside_a_gan(settings, backbones, monkeypatch):
    """The adaptive weight wants the terms' gradient at the last layer, and the step wants it everywhere."""
    from adversary import Adversary
    words = ["perceptual_weight=1", "perceptual_net=alex", "gan_weight=0.5", "gan_start=0", "gan_ramp=0",
             "train_encoder=false", *settings.split()]
    passes, found = [], []
    make = objective.make_perceptual

    def counted(*given):
        loss = make(*given)
        loss.network.net.slice1.register_full_backward_hook(lambda *_: passes.append(1))
        return loss

    monkeypatch.setattr(objective, "make_perceptual", counted)
    for weighs in (Adversary.weighs, lambda self: False):  # the second: all terms at the output itself
        monkeypatch.setattr(Adversary, "weighs", weighs)
        values, model, goal = values_of(*words)
        found.append((len(passes), values, torch.cat([p.grad.flatten() for p in model.decoder.parameters()])))
        passes.clear()
    (once, values, gradient), (twice, plain_values, plain) = found
    assert (once, twice) == (1, 1 if "gan_adaptive" in settings else 2)
    assert (gradient - plain).abs().max() < 1e-4 * plain.abs().max()
    assert all(torch.allclose(values[name], plain_values[name], rtol=1e-4) for name in goal.names)


def values_of(*settings, clips=1):
    """(the objective's scalars for random clips, the model, the objective)."""
    torch.manual_seed(0)
    cfg = config.load_config([*DISTILL, "latent_cache=somewhere", *settings])
    model = TAEHV().train()
    model.encoder.requires_grad_(cfg.train_encoder)
    model.decoder.requires_grad_(cfg.train_decoder)
    goal = objective.Objective(cfg, model, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    goal.begin(0)
    values = goal(torch.rand(clips, 12, 3, 32, 32), torch.randn(clips, 3, 16, 4, 4), 1.0)
    values["loss"].backward()
    return values, model, goal


def test_each_switch_removes_its_cost(backbones, monkeypatch):
    everything = ["perceptual_weight=1", "perceptual_net=alex", "seraena_weight=0.1"]
    values, _, goal = values_of(*everything)
    assert set(goal.names) == set(values) and {"encoder_loss", "perceptual_loss", "seraena_loss"} < set(values)
    total = values["reconstruction_loss"] + values["encoder_loss"] + values["perceptual_loss"]
    assert torch.allclose(values["loss"], total + 0.1 * values["seraena_loss"])

    def never(*_, **__):
        raise AssertionError("this was to be switched off")

    values, model, goal = values_of()
    assert list(goal.pixel_terms) == ["reconstruction_loss"] and goal.seraena is None
    assert not {"perceptual_loss", "seraena_loss"} & set(values)
    assert all(p.grad is not None for p in model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(TAEHV, "encode", never)
        values, model, _ = values_of("train_encoder=false")
        assert "encoder_loss" not in values and all(p.grad is None for p in model.encoder.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(TAEHV, "decode", never)
        values, model, _ = values_of("train_decoder=false")
        assert set(values) >= {"encoder_loss", "loss"} and "squared_error" not in values
        assert all(p.grad is None for p in model.decoder.parameters())
    for settings in (["encoder_weight=0"], ["pixel_weight=0"], ["train_encoder=false", "pixel_weight=0"]):
        with pytest.raises(config.ConfigError, match="no term of the loss trains"):
            values_of(*settings)


def test_own_share_lets_the_decoder_see_own_latents_that_the_encoder_does_not_learn_from(monkeypatch):
    seen, decode = [], TAEHV.decode
    monkeypatch.setattr(TAEHV, "decode", lambda self, latents, *rest: (seen.append(latents), decode(self, latents))[1])
    found = {}
    for share in (0, 0.5, 1):
        _, model, _ = values_of(f"own_share={share}", clips=8)
        found[share] = seen.pop(), [p.grad for p in model.encoder.parameters()]
    teachers, owns, mixed = (found[share][0] for share in (0, 1, 0.5))
    is_own = [bool((clip == own).all()) for clip, own in zip(mixed, owns)]
    assert True in is_own and False in is_own and not (teachers == owns).any()
    for clip, own, its, drawn in zip(mixed, owns, teachers, is_own):
        assert torch.equal(clip, own if drawn else its)
    assert not owns.requires_grad
    for share in (0.5, 1):
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[share][1])), "the encoder learns latents alone"


@pytest.mark.parametrize(("settings", "share"), [([], 0.25), (["train_encoder=false"], 0), (["decoder_input=own"], 0),
                                                 (["train_encoder=false", "own_share=0.5"], 0.5)])
def test_the_presets_own_share_is_for_two_halves_that_learn(settings, share):
    assert config.load_config(["taehv_distill", "latent_cache=x", *settings]).own_share == share


@pytest.mark.parametrize(("key", "presets"), [("encoder_lr_factor", 3), ("latents_lr_factor", 8)])
def test_a_learning_rate_of_an_encoder_that_has_none_is_refused(key, presets):
    for settings in (["taehv", "data=x", "train_encoder=false", f"{key}=2"], ["vqgan", "data=x", f"{key}=2"]):
        with pytest.raises(config.ConfigError, match=f"{key}=2.0 is for a taehv whose encoder is trained"):
            config.load_config(settings)
    rates = [getattr(config.load_config(["taehv_distill", "latent_cache=x", *more]), key)
             for more in ([], ["train_encoder=false"], ["decoder_input=own"], ["decoder_input=own", f"{key}=2"])]
    assert rates == [presets, 1, 1, 2]


@pytest.mark.parametrize(("settings", "rates"), [
    (["init_from=x.pth"], (3, 1)), (["init=colours"], (3, 1)), (["init=clips"], (3, 8)),
    (["init_from=x.pth", "latents_lr_factor=2"], (3, 2)), (["variant=taehv1_5_super"], (3, 1)),
    (["variant=taew2_2"], (3, 8))])
def test_the_last_layers_learning_rate_is_for_weights_that_are_fitted(settings, rates):
    cfg = config.load_config(["taehv_distill", "latent_cache=x", *settings])
    assert (cfg.encoder_lr_factor, cfg.latents_lr_factor) == rates


@pytest.mark.parametrize("halves", [[], ["train_decoder=false"], ["train_encoder=false"]])
def test_each_part_learns_at_its_own_rate(halves):
    cfg = config.load_config(["taehv_distill", "latent_cache=x", "lr=0.5", *halves])
    model = TAEHV()
    model.encoder.requires_grad_(cfg.train_encoder)
    model.decoder.requires_grad_(cfg.train_decoder)
    adamw = optimizer.make_optimizer(model, cfg, torch.device("cpu"))
    rates = {p: group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert list(rates) == [p for p in model.parameters() if p.requires_grad], "in the model's order, each once"
    wanted = {**dict.fromkeys(model.encoder.parameters(), 1.5), **dict.fromkeys(model.encoder[-1].parameters(), 12.0),
              **dict.fromkeys(model.decoder.parameters(), 0.5)}
    assert all(rate == wanted[p] for p, rate in rates.items())


def test_a_runs_own_share_is_that_of_its_config_json(tmp_path):
    """It was chosen beside a frozen encoder once, and is not the preset's."""
    (tmp_path / "config.json").write_text(json.dumps(
        dict(latent_cache="x", decoder_input="teacher", train_encoder=False, own_share=0.5)))
    assert config.load_config([str(tmp_path / "config.json"), "lr=1e-4"]).own_share == 0.5


@pytest.mark.parametrize("settings", [["own_share=1.5"], ["own_share=-0.1"], ["decoder_input=own", "own_share=0.5"]])
def test_an_own_share_that_means_nothing_is_refused(settings):
    with pytest.raises(config.ConfigError, match=r"own_share=.*(: at (most|least) [01] is wanted|with decoder_input=own)"):
        config.load_config(["taehv_distill", "latent_cache=x", *settings])


def test_terms_that_need_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(config.ConfigError, match="Place alexnet.*or set perceptual_weight=0"):
        values_of("perceptual_weight=1", "perceptual_net=alex")
    with pytest.raises(config.ConfigError, match="set latent_cache=FOLDER"):
        values_of("latent_cache=")
    with pytest.raises(config.ConfigError, match="buckets=32x12:1:1 with latent_cache"):
        config.load_config([*shapeless(DISTILL), "latent_cache=somewhere", "buckets=32x12:1:1"])


@pytest.mark.slow
def test_training_needs_neither_teacher_nor_diffusers(clips, tmp_path, backbones):
    """And the split is by file, terms are logged, a resumed run is the uninterrupted one to the bit, on two ranks."""
    path = tmp_path / "teacher.pth"
    torch.save(TAEHV(encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32)).state_dict(), path)
    run(CACHE, "--teacher", f"taehv:{path}", "--data", clips, "--out", tmp_path / "c", *SMALL, cwd=tmp_path)
    os.remove(path)
    (tmp_path / "diffusers.py").write_text("raise ImportError('diffusers is not to be imported')\n")
    common = [TRAIN, *DISTILL, *NARROW, "init=colours", f"latent_cache={tmp_path / 'c'}", "perceptual_weight=0.1",
              "perceptual_net=alex", "seraena_weight=0.1"]
    output = run(*common, "max_steps=4", "name=whole", "val_every=4", "save_every=2", ranks=2, cwd=tmp_path)
    assert "psnr from the teacher's" in output and "held out: " in output
    held_out = next(line for line in output.splitlines() if line.startswith("held out: "))[10:].split(", ")
    train_clips, val_clips, names = cache_files.LatentCache(tmp_path / "c").split(0.3, 0, 64)
    files = [{part.cache.files[i] for i in part.indices} for part in (train_clips, val_clips)]
    assert not files[0] & files[1] and files[1] == set(held_out) == set(names)
    half = tmp_path / "runs" / "whole" / "step_00000002.pt"
    run(*common, "max_steps=4", "name=parts", f"resume={half}", ranks=2, cwd=tmp_path)
    a, b = (checkpoint.read(str(tmp_path / "runs" / name / "step_00000004.pt")) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    flat_a, flat_b = (torch.utils._pytree.tree_leaves(state["objective"]) for state in (a, b))
    assert len(flat_a) == len(flat_b) > 100
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(flat_a, flat_b))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "whole"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/encoder_loss", "train/seraena_loss", "train/perceptual_loss", "train/reconstruction_loss",
            "train/latent_rms", "train/teacher_rms", "val/latent_mse", "val/teacher_psnr", "val/psnr"} <= tags
    other = tmp_path / "other"
    run(CACHE, "--teacher", revealing(tmp_path, 3), "--data", clips, "--out", other, *SMALL, cwd=tmp_path)
    arguments = [f"latent_cache={other}" if a.startswith("latent_cache=") else a for a in common]
    output = run(*arguments, "max_steps=9", "name=parts", cwd=tmp_path, expect=2)
    assert "learnt from another teacher" in output


@pytest.mark.slow
@pytest.mark.parametrize("rates", ["encoder_lr_factor=1", "lr=1e-4"])
def test_one_rank_with_accumulation_equals_two_from_a_cache(cache, tmp_path, rates):
    """Gradients of the size of AdamW's eps are rounded otherwise: up to 0.003 of the encoder's rate, here 3e-4."""
    common = [TRAIN, *DISTILL, *NARROW, "init=colours", f"latent_cache={cache}", "max_steps=3", "own_share=0", rates,
              "latents_lr_factor=1"]
    run(*common, "name=two", ranks=2, cwd=tmp_path)
    run(*common, "name=one", "accumulation=2", cwd=tmp_path)
    a, b = (checkpoint.read(str(tmp_path / "runs" / name / "step_00000003.pt"))["model"] for name in ("two", "one"))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


@pytest.mark.slow
def test_distilling_brings_the_latents_nearer(cache, teacher, tmp_path, monkeypatch):
    """A student learns one teacher's latents and frames, and infer.py sets the two side by side."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *DISTILL, *NARROW, f"latent_cache={cache}", "max_steps=25",
                                      "lr=1e-3", "batch_size=2", "ema_decay=0.9", "name=s", "val_clips=2",
                                      "val_every=24"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 0
    lines = [line for line in open("runs/s/train.log") if "latents: mse" in line]
    first, last = (float(line.split("latents: mse ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert len(lines) == 2
    start = TAEHV()
    torch.manual_seed(0)
    kept = cache_files.LatentCache(cache)
    batch = kept.read(range(len(kept)))
    with torch.no_grad():
        untrained = (start.encode(batch["video"].float() / 255) - batch["latents"].float()).square().mean().item()
    assert last < 0.8 * untrained, (untrained, first, last)

    write_clip(str(tmp_path / "clip.mp4"), frames=10, height=48, width=64)
    monkeypatch.setattr(sys, "argv", ["infer.py", "runs/s", "clip.mp4", "--teacher", f"taehv:{teacher}", "--lpips",
                                      "none", "--precision", "fp32"])
    infer.main()
    page = open("inference_results/summary_report.html", encoding="utf-8").read()
    row = json.load(open("inference_results/metrics.json"))["rows"][0]
    assert "ours vs teacher" in page and row["frames"] == 10 and row["latent_error"] > 0
    assert {"psnr", "ssim", "mse"} <= {k for k, v in row["teacher"]["metrics"].items() if v is not None}
    assert row["teacher"]["encode_seconds"] > 0 and row["teacher"]["peak_memory_mb"] > 0
    reader = video_files.VideoReader("inference_results/comparison_videos/clip_comparison.webm")
    assert reader.width >= 3 * 64 or reader.height >= 2 * 48
    monkeypatch.setattr(sys, "argv", ["infer.py", teacher, "clip.mp4", "--teacher", f"taehv:{teacher}", "--lpips",
                                      "none", "--precision", "fp32", "--out", "same"])
    infer.main()
    row = json.load(open("same/metrics.json"))["rows"][0]  # a model beside itself: no difference at all
    assert row["latent_error"] < 1e-10 and abs(row["metrics"]["psnr"] - row["teacher"]["metrics"]["psnr"]) < 0.01


@pytest.mark.slow
def test_best_pt_of_a_distillation_has_the_teachers_latents(cache, here, monkeypatch):
    """Own encoding and decoding suit each other before the latents are right."""
    early = dict(psnr=21.0, teacher_psnr=12.0, latent_mse=0.5)
    late = dict(psnr=19.0, teacher_psnr=20.0, latent_mse=0.01)
    results, measured = [early, late], train.evaluate

    def evaluate(*arguments, **keywords):
        result, shown = measured(*arguments, **keywords)
        return {**result, **results.pop(0)}, shown

    monkeypatch.setattr(train, "evaluate", evaluate)
    settings = [*DISTILL, *NARROW, "init=colours", "data=", f"latent_cache={cache}", "val_every=1", "name=best"]
    folder = here(*settings, "max_steps=2")
    assert results == [] and checkpoint.read(str(folder / "best.pt"))["step"] == 2
    state = checkpoint.read(str(folder / "best.pt"))
    assert state["judged_by"]["measure"] == "psnr from the teacher's latents x latent error"
    state["judged_by"]["measure"] = "psnr"  # one of another measure is judged anew: here it is not as good any more
    torch.save(state, folder / "best.pt")
    results += [early, late]
    here(*settings, "max_steps=3")
    assert results == [] and checkpoint.read(str(folder / "best.pt"))["step"] == 3
