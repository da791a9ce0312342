"""Tokenizers from the command line: training with codebooks and a discriminator, token files."""

import contextlib
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import check_config
import checkpoint
import config
import data
import data_files
import infer
import models
import video_files
from conftest import BATCH_NORM, FRAMES, NEEDS, ROOT, log_of, mistake, run
from objective import Objective
from optimizer import average_weights

TRAIN, INFER = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "infer.py")
COMMON = ["size=32", "frames=2", "batch_size=1", "workers=0", "val_fraction=0", "warmup_steps=2", "schedule=constant",
          "precision=fp32", "device=cpu", "log_every=1", "save_every=100", "val_every=100", "perceptual_weight=0"]
SMALL_NETS = {
    "vqgan": ["net.ch=32", "net.ch_mult=1,1", "net.num_res_blocks=1", "net.attn_resolutions=()", "net.z_channels=16",
              "net.embed_dim=16", "net.n_embed=64"],
    "vqvae2": ["net.hidden_channels=16", "net.res_channels=8", "net.nb_res_layers=1", "net.nb_levels=2",
               "net.embed_dim=8", "net.nb_entries=64", "net.scaling_rates=4,2"],
    "vqvae_video": ["net.group_count=2", "net.n_hid=8", "net.n_init=16", "net.vocab_size=64", "net.sequence_length=2"],
    "dcae_small": ["net.width_list=16,16,16,32,32,32", "net.latent_channels=16", "workers=0"],
}


@pytest.fixture(scope="module")
def tokenizer(clips, tmp_path_factory):
    """The folder of a VQGAN's run: EMA codebook, discriminator from step 2 on, two ranks."""
    folder = tmp_path_factory.mktemp("tokenizer")
    output = run(TRAIN, "vqgan_ema", *COMMON, *SMALL_NETS["vqgan"], f"data={clips}", "val_fraction=0.3", "max_steps=6",
                 "val_every=3", "save_every=3", "gan_start=2", "gan_ramp=2", "name=two", "gan_norm=group", ranks=2,
                 cwd=folder)
    return folder, output


def test_every_preset_builds_its_model():
    for name in config.PRESETS:
        cfg = config.load_config([name, *NEEDS.get(name, [])])
        with torch.device("meta"):
            model = models.build_model(cfg.model, models.model_config(cfg))
        for size, frames, *_ in check_config.parse_buckets(cfg):
            assert size % model.space_factor == 0 and model.frame_index(frames)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["vqvae2", "vqvae2_optvq", "vqgan_optvq", "vqvae_video", "dcae_small"])
def test_every_family_trains_and_loads(preset, clips, tmp_path):
    nets = SMALL_NETS.get(preset) or SMALL_NETS[preset.split("_")[0]]
    more = ["net.num_head=2"] if "optvq" in preset else []
    run(TRAIN, preset, *COMMON, *nets, *more, f"data={clips}", "max_steps=3", "name=a", cwd=tmp_path)
    model, words = models.load_model(tmp_path / "runs" / "a")
    plain, _ = models.load_model(tmp_path / "runs" / "a" / "model.pth")
    video = torch.rand(1, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(video)[0], plain(video)[0]) and "step 3" in words
    if hasattr(model, "tokenize"):
        with torch.no_grad():
            assert torch.equal(model.detokenize(model.tokenize(video)), model.decode(model.encode(video)))


def test_the_average_follows_codebooks_and_statistics_as_it_does_weights(here, clips):
    """With ema_decay=0 it is the model, after what the step taught the codebook; between, it is between."""
    for settings in ([*FRAMES[:-1], "net.kmeans_init=true"], BATCH_NORM):
        folder = here(*settings, "gan_weight=0", "max_steps=3", "save_every=3", "ema_decay=0", "lr=1e-2",
                      f"name=now{settings[0]}")
        state = checkpoint.read(str(folder / "step_00000003.pt"))
        assert all(torch.equal(state["model"][key], state["ema"][key]) for key in state["model"])
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    model.running_mean.fill_(1), model.num_batches_tracked.fill_(7)
    average_weights(average, model, 0.75)
    assert average.running_mean.tolist() == [0.25, 0.25] and average.num_batches_tracked == 7


@pytest.mark.parametrize("kind", ["vq", "ema", "optvq"])
def test_a_step_that_is_not_finite_teaches_no_codebook(kind, clips):
    cfg = config.load_config(["vqgan", f"data={clips}", f"net.quantizer={kind}", *SMALL_NETS["vqgan"],
                              "net.kmeans_init=true", "perceptual_weight=0", "gan_weight=0"])
    model = models.build_model("vqgan", cfg.net).train()
    objective = Objective(cfg, model, torch.device("cpu"), contextlib.nullcontext())
    objective.begin(0)
    objective(torch.rand(2, 2, 3, 32, 32), None, 1.0)
    before = {key: value.clone() for key, value in model.quantize.state_dict().items()}
    objective.step(torch.tensor(1.0))
    assert all(torch.equal(value, before[key]) for key, value in model.quantize.state_dict().items())
    objective.begin(1)
    objective(torch.rand(2, 2, 3, 32, 32), None, 1.0)
    objective.step(torch.tensor(0.0))
    assert not torch.equal(model.quantize.state_dict()["embedding.weight"], before["embedding.weight"])


def test_a_run_that_began_from_k_means_goes_on_without_asking_for_it(here):
    here(*FRAMES, "net.kmeans_init=true", "max_steps=2", "name=k")
    assert "resumed from" in log_of(here(*FRAMES, "net.kmeans_init=false", "max_steps=3", "name=k"))


@pytest.mark.slow
def test_two_ranks_learn_the_codebook_of_one_with_accumulation(clips, tmp_path):
    common = [TRAIN, "vqgan_ema", *COMMON, *SMALL_NETS["vqgan"], f"data={clips}", "max_steps=4", "gan_weight=0",
              "net.kmeans_init=false", "net.restart_below=0",
              "beta1=0.9", "beta2=0.95"]  # with taming's 0.5 and 0.9, Adam turns rounding into steps of 1e-4
    run(*common, "name=two", ranks=2, cwd=tmp_path)
    run(*common, "name=one", "accumulation=2", cwd=tmp_path)
    a, b = (checkpoint.read(str(tmp_path / "runs" / name / "step_00000004.pt"))["model"] for name in ("two", "one"))
    names = [k for k in a if k.startswith("quantize.embedding.")]
    assert len(names) == 3 and max((a[k] - b[k]).abs().max().item() for k in names) < 1e-5
    saved = checkpoint.read(str(tmp_path / "runs" / "one" / "step_00000004.pt"))
    fresh = models.build_model("vqgan", saved["model_config"])
    assert all(not torch.equal(fresh.state_dict()[k], a[k]) for k in names)  # it learned


@pytest.mark.slow
def test_a_resumed_run_with_codebook_and_discriminator_is_exact(tokenizer, clips):
    folder, output = tokenizer
    assert re.search(r"codes used \d+\.\d %", output) and "codebook use" in output and "bits per pixel" in output
    common = [TRAIN, "vqgan_ema", *COMMON, *SMALL_NETS["vqgan"], f"data={clips}", "val_fraction=0.3", "gan_start=2",
              "gan_ramp=2", "gan_norm=group", "val_every=3", "name=parts"]
    half = folder / "runs" / "two" / "step_00000003.pt"
    run(*common, "max_steps=6", f"resume={half}", ranks=2, cwd=folder)
    a, b = (checkpoint.read(str(folder / "runs" / name / "step_00000006.pt")) for name in ("two", "parts"))
    for part in ("model", "ema", "objective"):
        flat_a, flat_b = (torch.utils._pytree.tree_leaves(state[part]) for state in (a, b))
        assert len(flat_a) == len(flat_b) > 10
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(flat_a, flat_b)), part


@pytest.mark.slow
@pytest.mark.auto_precision
def test_a_video_is_compressed_and_restored(tokenizer, clips, tmp_path, capsys, monkeypatch):
    folder, _ = tokenizer
    video = os.path.join(clips, "sub0", "clip0.mp4")
    run(INFER, folder / "runs" / "two", video, "--save-tokens", "--lpips", "none", "--out", "a", cwd=tmp_path)
    tokens = tmp_path / "a" / "tokens" / "clip0.tokens"
    run(INFER, folder / "runs" / "two", tokens, "--out", "b", cwd=tmp_path)
    direct, restored = (np.stack(list(video_files.VideoReader(str(tmp_path / out / "comparison_videos" /
                                                           "clip0_reconstructed.webm")))) for out in "ab")
    assert np.array_equal(direct, restored) and len(direct) == 24
    page = open(tmp_path / "a" / "summary_report.html", encoding="utf-8").read()
    assert "kbit/s" in page and "bits per pixel" in page
    assert os.path.getsize(tokens) < 24 * 36 * 48 * 6 / 8 + 1000  # frames x positions x bits, and the header

    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.tokens").write_bytes(tokens.read_bytes()[:-9])
    (tmp_path / "foreign.tokens").write_bytes(b"dear reader" * 50)
    arguments = [str(folder / "runs" / "two")]
    for name in ("short.tokens", "foreign.tokens"):
        assert name in mistake(capsys, monkeypatch, infer, *arguments, name)
    state = checkpoint.read(str(folder / "runs" / "two" / "step_00000006.pt"))
    state["ema"] = {k: v + 0.01 if v.is_floating_point() else v for k, v in state["ema"].items()}
    torch.save(state, tmp_path / "other.pt")
    error = mistake(capsys, monkeypatch, infer, "other.pt", str(tokens))
    assert "tokens are of another model" in error
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    assert "--fid: pip install pytorch-fid" in mistake(capsys, monkeypatch, infer, *arguments, video, "--fid", "4")
    assert "is a tokenizer; try --save-tokens" in mistake(capsys, monkeypatch, infer, *arguments, video,
                                                          "--save-latents")


@pytest.mark.slow
@pytest.mark.auto_precision
def test_images_train_as_videos_do(clips, tmp_path, capsys, monkeypatch):
    """A folder with videos and images: use_images takes the images, as clips of one frame."""
    shutil.copytree(clips, tmp_path / "mixed")
    for i, source in enumerate(data_files.find_sources(clips)):
        frame = next(iter(video_files.VideoReader(source.path)))
        data.cv2.imwrite(str(tmp_path / "mixed" / f"{i}.png"), frame[..., ::-1])
    common = [TRAIN, "vqgan", *COMMON, *SMALL_NETS["vqgan"], "data=mixed", "use_images=true", "max_steps=2"]
    common.remove("frames=2")
    output = run(*common, "val_fraction=0.5", "val_clips=2", "val_every=2", "name=a", cwd=tmp_path)
    assert re.search(r"training: \d files, \d separate clips of 1 frames", output) and "over 2 frames" in output
    held_out = re.search("held out: (.*)", output)[1].split(", ")
    assert 2 <= len(held_out) < 6 and all(name.endswith(".png") for name in held_out)
    import train

    monkeypatch.chdir(tmp_path)
    for settings, words in (
        (["data=mixed", "use_images=true", "frames=4"], "leave out frames"),
        ([f"data={clips}", "use_images=true"], "no image"),
        ([f"data={clips}", "val_metrics=ssimm"], "'ssimm' is neither lpips nor fid"),
    ):
        assert words in mistake(capsys, monkeypatch, train, "vqgan", "perceptual_weight=0", *settings)


@pytest.mark.any_precision
def test_mistakes_in_networks(clips, tmp_path, capsys, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)
    for settings, words in (
        (["net.chh=32"], "unexpected keyword argument 'chh'"),
        (["net.ch=large size"], "net.ch=large size: a number"),
        (["size=40"], "takes multiples of 16"),
        (["train_encoder=false"], "only taehv can be trained by halves"),
        (["latent_cache=x", "data="], "only taehv and vq_latents learn from a teacher"),
        (["gan_loss=wgan"], "gan_loss=wgan"),
    ):
        error = mistake(capsys, monkeypatch, train, "vqgan", f"data={clips}", "perceptual_weight=0", *settings)
        assert words in error, error
