"""The fast copies of VQGAN and the Video DC-AE: the same results as the plain models'."""

import copy

import pytest
import torch
from torch import nn

import fast_dcae
import fast_vqgan
from model_dcae import DCAE
from model_vqgan import VQGAN
from models import fast
from tiling import Tiled

NET = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "resolution": 32, "z_channels": 8}
VQGANS = {"vq": {"n_embed": 512}, "optvq": {"n_embed": 256, "quantizer": "optvq", "num_head": 2},
          "fsq": {"quantizer": "fsq", "levels": (5, 4, 4)}}
WIDTHS = {"equal": (32,) * 6, "growing": (8, 16, 64, 32, 64, 64), "steep": (8, 32, 64, 32, 32, 32),
          "falling": (32, 16, 8, 32, 32, 64)}

pytestmark = pytest.mark.usefixtures("one_thread")


def random_weights(model):
    """Weights that all matter; those of norms are near 1."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=(1 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return model.eval()


def vqgan(kind="vq"):
    return random_weights(VQGAN(**NET, embed_dim=8, **VQGANS[kind]))


def dcae(widths="growing"):
    return random_weights(DCAE(WIDTHS[widths], (1, 2, 1, 1, 1, 1), (1, 1, 2, 1, 1, 1), latent_channels=32))


def clip(frames=8, height=32, width=64):
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def parts(model):
    """Encoder and decoder, without quantizer and clamping."""
    if isinstance(model, VQGAN):
        return model._features, lambda z: model._decoded(model.post_quant_conv(z.flatten(0, 1)))
    return model.encode, lambda z: model._decoded(z.transpose(1, 2))


@torch.no_grad()
def compare(model, video):
    """Largest relative errors of the fast copy's encoder and decoder, whose model must stay as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quick = fast(model)
    (encode, decode), (plain_encode, plain_decode) = parts(quick), parts(model)
    given = video.clone()
    latents = plain_encode(video)
    kept = latents.clone()
    found = max(error(encode(video), latents), error(decode(latents), plain_decode(latents)))
    assert torch.equal(video, given) and torch.equal(latents, kept), "inputs are left alone"
    assert list(quick.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return found


@pytest.mark.parametrize("kind", VQGANS)
def test_vqgan_is_the_plain_model(kind, sums_are_channels_last):
    assert compare(vqgan(kind), clip(2, 32, 48)) < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 5, 12])
def test_dcae_is_the_plain_model(frames):
    assert compare(dcae(), clip(frames)) < 1e-5


@pytest.mark.parametrize("widths", WIDTHS)
def test_dcae_with_all_kinds_of_shortcuts(widths, sums_are_channels_last):
    assert compare(dcae(widths), clip()) < 1e-5


@torch.no_grad()
def test_tokens_differ_only_at_ties():
    """A fast feature moves a code only where the two nearest codes are as far away, up to rounding."""
    model, quick = vqgan(), fast(vqgan())
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(torch.randn(512, 8) * model._features(clip(1, 32, 32)).std())
    quick.quantize = model.quantize
    video = clip(32, 64, 64)
    ours, theirs = quick.tokenize(video)[0].flatten(), model.tokenize(video)[0].flatten()
    assert theirs.unique().numel() > 100
    distances = torch.cdist(model._features(video).movedim(2, -1).reshape(-1, 8).double(),
                            model.quantize.embedding.weight.double())
    apart = (distances.gather(1, ours[:, None]) - distances.gather(1, theirs[:, None])).abs() / distances.mean()
    assert (ours != theirs).float().mean() < 0.002 and apart.max() < 1e-5


@pytest.mark.parametrize("make", [vqgan, dcae])
@torch.no_grad()
@pytest.mark.slow
def test_bf16_is_within_its_own_error(make, sums_are_channels_last):
    reference = make()
    encode, decode = parts(reference)
    video = clip(4, 64, 32)
    latents = encode(video)
    exact = decode(latents.bfloat16().float())
    model = copy.deepcopy(reference).bfloat16()
    (plain_encode, plain_decode), (encode, decode) = parts(model), parts(fast(model))
    assert error(encode(video.bfloat16()), latents) < 1.5 * error(plain_encode(video.bfloat16()), latents)
    assert error(decode(latents.bfloat16()), exact) < 1.5 * error(plain_decode(latents.bfloat16()), exact)


@pytest.mark.parametrize("make", [vqgan, dcae])
@torch.no_grad()
def test_without_onednn_it_works_as_well(make, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert compare(make(), clip(8, 32, 32)) < 1e-5


@pytest.mark.parametrize(("make", "frames"), [(vqgan, 5), (dcae, 41)])
@torch.no_grad()
def test_streams_do_not_depend_on_the_cutting(make, frames):
    quick, video, results = fast(make()), clip(frames, 32, 32)[:1], []
    for cut in (3, 40):
        stream = quick.stream()
        pieces = [stream.decode(stream.encode(piece)) for piece in video.split(cut, 1)] + [stream.flush()]
        results.append(torch.cat(pieces, 1))
    assert torch.equal(*results) and results[0].shape == video.shape


@torch.no_grad()
def test_codes_restore_what_latents_do():
    quick, video = fast(vqgan()), clip(3, 32, 32)
    assert torch.equal(quick.detokenize(quick.tokenize(video)), quick.decode(quick.encode(video)))


@torch.no_grad()
@pytest.mark.slow
def test_tiles(sums_are_channels_last):
    model, video = dcae("equal"), clip(12, 64, 70)[:1]
    plain, quick = (Tiled(m, spatial_tile_size=64, temporal_tile_size=8, tile_overlap_factor=0.5)
                    for m in (model, fast(model)))
    assert error(quick(video)[0], plain(video)[0]) < 1e-4 and quick(video)[0].shape == video.shape


@pytest.mark.parametrize("model", [VQGAN(**NET, embed_dim=8), DCAE(WIDTHS["equal"], (1,) * 6, (1,) * 6, 32)])
def test_training_mode_is_refused(model):
    with pytest.raises(ValueError, match="call model.eval"):
        fast(model)
    assert isinstance(fast(model.eval()), fast_vqgan.FastVQGAN if isinstance(model, VQGAN) else fast_dcae.FastDCAE)
