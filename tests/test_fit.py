"""Fresh weights of a TAEHV that are fitted to clips."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from conftest import COMMON, NARROW, ROOT, run
from fit_taehv import can_fit, fit, start_from_clips
from init_taehv import colours
from model_taehv import TAEHV

NARROW_NET = dict(encoder_widths=(32, 32, 32, 32), decoder_widths=(64, 48, 32, 32))


def smooth_clips(count, frames, size, seed, scale=5):
    """Coloured clouds of `scale` pixels that change: N T 3 H W."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2 + frames // 4, size // scale, size // scale, generator=generator)
    return F.interpolate(coarse, size=(frames, size, size), mode="trilinear").transpose(1, 2).contiguous()


def psnr_of(model, clips):
    with torch.no_grad():
        output, _ = model.eval()(clips)
    return -10 * (output - model.targets(clips)).square().mean().log10().item()


@pytest.mark.parametrize(("arguments", "frames", "size"), [
    (dict(), 12, 32), (dict(variant="taew2_2"), 12, 64), (dict(variant="lighttaehy1_5"), 12, 64),
    (dict(variant="taecvx"), 8, 32), (dict(variant="taecvx"), 9, 32), (dict(latent_channels=40), 8, 32),
    (dict(), 1, 32), (dict(), 6, 64), (dict(encoder_time_downscale=(1, 1, 1), decoder_time_upscale=(1, 1, 1)), 4, 32),
    (dict(decoder_time_upscale=(False, False, False)), 8, 32)])
def test_fitted_weights_reconstruct_clips_that_they_have_not_seen(arguments, frames, size):
    torch.manual_seed(0)
    fresh = TAEHV(**arguments, **NARROW_NET)
    fitted, coloured = copy.deepcopy(fresh), colours(copy.deepcopy(fresh), frames)
    drawn = torch.get_rng_state()
    assert can_fit(fitted) and fit(fitted, smooth_clips(24, frames, size, seed=1)) is fitted
    assert torch.equal(torch.get_rng_state(), drawn), "what a run draws later is the same with any start"
    unseen = smooth_clips(6, frames, size, seed=2)
    assert psnr_of(fitted, unseen) > psnr_of(coloured, unseen) + 0.5


@pytest.mark.parametrize(("variant", "frames", "size", "scale"), [("taeh3", 17, 64, 16), ("taeltx_2", 8, 128, 32)])
def test_large_cells_are_fitted_too(variant, frames, size, scale):
    torch.manual_seed(0)
    fresh, unseen = TAEHV(variant, **NARROW_NET), smooth_clips(6, frames, size, seed=2, scale=scale)
    before = psnr_of(fresh, unseen)
    assert psnr_of(fit(fresh, smooth_clips(24, frames, size, 1, scale=scale)), unseen) > before + 3


def test_each_output_frame_stands_for_its_own_input_frame():
    torch.manual_seed(0)
    model = fit(TAEHV(**NARROW_NET), smooth_clips(24, 12, 32, seed=1)).eval()
    video = smooth_clips(4, 12, 32, seed=3)
    with torch.no_grad():
        output, _ = model(video)
    distances = [(output - video[:, k:k + 9]).square().mean() for k in range(4)]
    assert min(distances) == distances[0], "the first nine frames, not later ones"


def test_a_teachers_latents_are_met_and_decoded_from_the_first_step_on():
    """The teacher keeps the mean colours of the four quarters of each cell, mixed at random."""
    mix = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0] * 3

    def teacher(video):
        quarters = F.pixel_unshuffle(F.avg_pool2d(video.flatten(0, 1) - 0.4, 4), 2)
        return torch.einsum("lb,nbhw->nlhw", mix, quarters).unflatten(0, video.shape[:2])

    torch.manual_seed(0)
    per_frame = dict(latent_channels=12, encoder_time_downscale=(1, 1, 1), decoder_time_upscale=(1, 1, 1))
    model, clips, unseen = TAEHV(**per_frame, **NARROW_NET), smooth_clips(40, 2, 32, 1), smooth_clips(6, 2, 32, 2)
    coloured = colours(copy.deepcopy(model)).eval()
    fit(model, clips, teacher(clips)).eval()
    with torch.no_grad():
        wanted = teacher(unseen)
        error = (model.encode(unseen) - wanted).square().mean() / wanted.var()
        psnrs = [-10 * (m.decode(wanted) - unseen).square().mean().log10() for m in (model, coloured)]
    assert error < 0.1 and psnrs[0] > psnrs[1] + 6, (error, psnrs)


def test_models_that_cannot_be_fitted_start_from_colours():
    torch.manual_seed(0)
    model = TAEHV("taehv1_5_super")
    before = copy.deepcopy(model.state_dict())
    batch = {"video": torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8), "notes": []}
    assert start_from_clips(model, iter([batch]), 4) == ""
    coloured = TAEHV("taehv1_5_super")
    coloured.load_state_dict(before)
    colours(coloured, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), coloured.state_dict().values()))


@pytest.mark.parametrize("colours", ["black", "one each"])
def test_flat_clips_are_not_fitted_to(colours):
    torch.manual_seed(0)
    model = TAEHV(encoder_widths=(32,) * 4, decoder_widths=(64, 32, 32, 32))
    shades = torch.randint(0, 256, (48, 1, 3, 1, 1)) if colours == "one each" else torch.zeros(48, 1, 3, 1, 1)
    batch = {"video": shades.expand(-1, 4, -1, 32, 32).to(torch.uint8)}
    assert "flat" in start_from_clips(model, iter([batch]), 4)
    with torch.no_grad():
        restored = model.decode(model.encode(batch["video"].float() / 255))
    assert max(p.abs().max() for p in model.parameters()) < 100
    assert (restored - batch["video"][:, :restored.shape[1]].float() / 255).abs().mean() < 0.1


@pytest.mark.slow
def test_two_ranks_start_from_the_same_fit_as_one_and_a_resumed_run_is_not_fitted_again(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's for two ranks: other counts of threads round otherwise
    settings = ["taehv", "size=32", "frames=4", "batch_size=2", "max_steps=1", f"data={clips}", *NARROW, *COMMON,
                "init=clips", "lr=0", "save_every=1"]
    train = os.path.join(ROOT, "train.py")
    output = run(train, *settings, "name=one", cwd=tmp_path)
    run(train, *settings, "name=two", "batch_size=1", ranks=2, cwd=tmp_path)
    one, two = (checkpoint.read(str(tmp_path / "runs" / name / "step_00000001.pt"))["model"] for name in ("one", "two"))
    assert "from scratch, fitted to 48 clips" in output
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert "fitted" not in run(train, *settings, "name=one", "max_steps=2", cwd=tmp_path)
