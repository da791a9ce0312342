"""The fast path: the same results as the plain model, for all variants, sizes, bands and types."""

import copy
import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F

import codec
import fast_taehv
import infer
from conftest import ROOT, run, write_clip
from fast_taehv import fast
from model_taehv import TAEHV, VARIANTS
from model_vq_latents import VQLatents


def make(variant="taehv", dtype=torch.float32, **changes):
    """A model in eval mode, all of whose weights matter."""
    torch.manual_seed(0)
    model = TAEHV(variant, **changes).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=(1.6 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1)
    return model.to(dtype)


def clip(frames=9, height=48, width=32, dtype=torch.float32):
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


NARROW = {"encoder_widths": (32,) * 4, "decoder_widths": (64, 32, 32, 32)}  # for what width has no part in
PREVIEWS = [{}, {"decoder_time_upscale": (False, False)}, {"decoder_space_upscale": (True, True, False)}]
SMALLER = {"taeltx2_3_wide": {"decoder_widths": (128, 64, 32, 16)}}
ALIKE = "taew2_1", "taeos1_3", "taeltx2_3", "lighttaew2_1", "lighttaew2_2"  # the layers of another that is run
CASES = [(v, SMALLER.get(v, {})) for v in VARIANTS if v not in ALIKE] + [
    (v, p) for v in ("taehv", "taew2_2_super") for p in PREVIEWS[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("band", [1, 1 << 22])  # at least 8 rows: three bands of 48, or one
@pytest.mark.parametrize(("variant", "changes"), CASES)
@torch.no_grad()
def test_results_are_the_plain_models(variant, changes, band, monkeypatch):
    monkeypatch.setattr(fast_taehv, "BAND", band)
    narrow = NARROW if band == 1 and "wide" not in variant else {}
    model = make(variant, **{**changes, **narrow})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quick, video = fast(model), clip({"taeh3": 20, "taecvx": 13}.get(variant, 9))
    if model.space_factor == 32:
        video = F.interpolate(video.flatten(0, 1), scale_factor=2).unflatten(0, (2, -1))[..., :96, :64]
    latents = model.encode(video)
    assert error(quick.encode(video), latents) < 1e-5
    assert error(quick._decode(latents), model._decode(latents)) < 1e-5
    assert list(quick.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# With AMX oneDNN does not write what a strided convolution in bfloat16 makes of maps two pixels wide (torch 2.14).
@pytest.mark.parametrize(("batch", "height", "width", "dtype"), [
    (1, 72, 40, torch.float32), (2, 56, 8, torch.float32), (1, 72, 40, torch.bfloat16), (2, 56, 16, torch.bfloat16)])
@torch.no_grad()
def test_bands_keep_the_layout_that_sums_need(batch, height, width, dtype, monkeypatch, sums_are_channels_last):
    """In bfloat16 too, and while streaming; results are as near to the exact ones as the plain model's."""
    monkeypatch.setattr(fast_taehv, "BAND", 1)
    exact, video = make(**NARROW), clip(9, height, width)[:batch]
    model = copy.deepcopy(exact).to(dtype)
    quick, allowed = fast(model), 1e-5 if dtype == torch.float32 else 1.5
    latents = exact.encode(video)
    stream = quick.stream()
    ours = torch.cat([stream.encode(piece) for piece in video.to(dtype).split(3, 1)] + [stream.flush()], 1)
    unit = 1 if dtype == torch.float32 else error(model.encode(video.to(dtype)), latents)
    assert error(ours, latents) < allowed * unit
    frames = exact._decode(latents)
    unit = 1 if dtype == torch.float32 else error(model._decode(latents.to(dtype)), frames)
    assert error(quick._decode(latents.to(dtype)), frames) < allowed * unit
    assert sums_are_channels_last, "nothing was summed"


@torch.no_grad()
def test_a_sum_in_another_layout_is_right_too():
    layer = torch.nn.Conv2d(8, 8, 3, padding=1)
    x, into = torch.randn(2, 8, 6, 5), torch.randn(2, 8, 5, 6).transpose(2, 3)
    expected = F.relu(layer(x) + into)
    assert error(fast_taehv.Conv(layer.weight, layer.bias)(x, into.clone(), relu=True), expected) < 1e-5


@pytest.mark.parametrize("band", [1, 1 << 22])
@torch.no_grad()
@pytest.mark.slow
def test_past_frames_in_half_precision_cost_little(band, monkeypatch):
    monkeypatch.setattr(fast_taehv, "BAND", band)
    model, video = make(), clip()
    quick, latents = fast(model), model.encode(video)
    quick.kept = torch.float16
    assert 1e-6 < error(quick.encode(video), latents) < 1e-3
    assert 1e-6 < error(quick._decode(latents), model._decode(latents)) < 1e-3
    stream = quick.stream()
    stream.encode(video)
    assert sum(torch.is_tensor(kept) for kept in stream._encoder_memory.values()) == 9
    assert {kept.dtype for kept in stream._encoder_memory.values() if torch.is_tensor(kept)} == {torch.float16}
    stream.flush_encoder()
    assert not stream._encoder_memory, "a clip's end lets go of it"


@pytest.mark.parametrize(("kept", "most"), [(None, 8.5), (torch.float16, 6.0)])
@torch.no_grad()
@pytest.mark.slow
def test_large_frames_need_few_maps(kept, most, tmp_path, monkeypatch):
    """In half-size maps of 64 channels: 5.25 (2.63 in half precision) are kept, 1 and 0.5 in work, 0.2 a frame."""
    height, width = 160, 256
    monkeypatch.setattr(fast_taehv, "BAND", height * width)  # sixteenths of such a map
    quick = fast(make())
    quick.kept = kept
    stream, latents = quick.stream(), torch.randn(1, 2, 16, height // 8, width // 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for latent in latents.split(1, 1):
            for frame in stream.frames(latent):
                del frame
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    live = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    maps = (max(live) - live[0]) / (height * width / 4 * 64 * 4)
    assert most - 3 < maps < most


@pytest.mark.parametrize("cut", [1, 5, 13])
@torch.no_grad()
def test_streams_do_not_depend_on_the_cutting(cut):
    quick, video = fast(make(**NARROW if cut < 13 else {})), clip()
    stream = quick.stream()
    frames = [stream.decode(stream.encode(piece)) for piece in video.split(cut, 1)] + [stream.flush()]
    assert torch.equal(torch.cat(frames, 1), quick.decode(quick.encode(video)))


@torch.no_grad()
@pytest.mark.slow
def test_odd_sizes_and_the_published_calls(monkeypatch, sums_are_channels_last):
    monkeypatch.setattr(fast_taehv, "BAND", 1)
    model, video = TAEHV().eval(), clip(8, 75, 51)  # initial weights: what is decoded is seldom clamped
    quick = fast(model)
    latents = model.encode_video(video, show_progress_bar=False)
    for parallel in (True, False):
        assert error(quick.encode_video(video, parallel, show_progress_bar=False), latents) < 1e-5
        ours, theirs = (m.decode_video(latents, parallel, show_progress_bar=False) for m in (quick, model))
        assert (ours - theirs).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.slow
def test_bf16_is_within_its_own_error():
    reference, video = make(), clip()
    exact = reference.encode(video)
    model = copy.deepcopy(reference).bfloat16()
    plain, quick = (m.encode(video.bfloat16()) for m in (model, fast(model)))
    assert error(quick, exact) < 1.5 * error(plain, exact)
    exact = reference._decode(exact)
    plain, quick = (m._decode(reference.encode(video).bfloat16()) for m in (model, fast(model)))
    assert error(quick, exact) < 1.5 * error(plain, exact)


@torch.no_grad()
def test_without_onednn_it_works_as_well(monkeypatch):
    model, video = make(), clip()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    quick = fast(model)
    assert not quick.steps["encoder"][-1].conv.fused
    assert error(quick.encode(video), model.encode(video)) < 1e-5
    assert error(quick._decode(model.encode(video)), model._decode(model.encode(video))) < 1e-5


@torch.no_grad()
def test_a_tokenizer_of_latents_uses_it():
    model, video = VQLatents(n_embed=16, width=8), clip()
    model.calibrate(model.taehv.encode(video))
    model.eval()
    quick = fast(model)
    assert isinstance(quick.taehv, fast_taehv.FastTAEHV) and not isinstance(model.taehv, fast_taehv.FastTAEHV)
    codes = model.tokenize(video)
    assert (quick.tokenize(video)[0] == codes[0]).float().mean() > 0.9  # but for near ties
    assert error(quick.detokenize(codes), model.detokenize(codes)) < 1e-5


@pytest.mark.slow
def test_infer_spares_memory_on_large_frames_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip("./a.mp4")
    torch.save(make().state_dict(), "taehv.pth")
    rows = []
    for limit in (codec.LARGE, 0):
        monkeypatch.setattr(codec, "LARGE", limit)
        monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", "a.mp4", "--device", "cpu", "--lpips", "none",
                                          "--precision", "fp32"])
        infer.main()
        rows.append(json.loads(open("inference_results/metrics.json").read())["rows"][0])
        assert ("in float16" in capsys.readouterr().out) == ("in float16" in str(rows[-1]["notes"])) == (limit == 0)
    assert rows[0]["frames"] == rows[1]["frames"] > 0
    assert rows[0]["metrics"]["psnr"] == pytest.approx(rows[1]["metrics"]["psnr"], abs=0.01)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="call model.eval"):
        fast(TAEHV())


@pytest.mark.slow
@pytest.mark.any_precision
def test_bench_prints_a_table_and_writes_json(tmp_path):
    output = run(os.path.join(ROOT, "tests", "bench_in_forks.py"), "codec", "quantizer", "loader", "--quick",
                 "--families", "taehv", "--precision", "fp32", "--json", "rows.json", cwd=tmp_path, timeout=500)
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["what"].split()[0], row["how"]): row for row in found["rows"]}
    assert {how for _, how in rows} >= {"plain fp32", "fast fp32", "ours, EMA", "all distances, one-hot", "ours"}
    assert all(row["value"] > 0 and row["what"] in output for row in found["rows"])
    assert rows["taehv", "plain fp32"]["ratio"] == 1 and found["peak"]["fp32"] > 1e9
    assert rows["quantizer,", "all distances, one-hot"]["memory"] > rows["quantizer,", "ours, VQ"]["memory"]


@pytest.mark.slow
@pytest.mark.any_precision
def test_bench_compares_recipes_by_training(clips, tmp_path):
    write_clip(str(tmp_path / "val" / "a.mp4"))
    output = run(os.path.join(ROOT, "bench.py"), "quality", "--data", clips, "--val-data", "val", "--minutes", "0.01",
                 "--quick", "--seeds", "1", "--device", "cpu", "--json", "rows.json", cwd=tmp_path, timeout=500)
    notebook, ours = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert notebook["how"] == "the notebook's network and recipe" and notebook["how"] in output
    assert notebook["ratio"] == 1
    assert ours["value"] > notebook["value"] and ours["ratio"] > 0, "ours starts with the colours"
    assert [psnr for _, psnr in ours["curve"]][-1] == ours["value"] and len(notebook["curve"]) >= 1


def test_what_fast_cannot_compute_is_refused_in_words():
    model = TAEHV(encoder_widths=(8, 8, 8, 8), decoder_widths=(8, 8, 8, 8)).eval()
    quick, video = fast(model), torch.rand(1, 5, 3, 16, 16)
    for wrong in (video.half(), video.double()):
        with pytest.raises(ValueError, match="computes in the model's torch.float32, got torch.float(16|64): convert"):
            quick.encode(wrong)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="under torch.autocast"):
        quick.encode(video)
    for one in (model, quick, model.stream(), quick.stream()):
        with pytest.raises(ValueError, match="got torch.uint8: divide"):
            one.encode(video.mul(255).byte())
    for one in (model, quick):
        with pytest.raises(ValueError, match="expected video as N T 3 H W, got shape .0, 5, 3, 16, 16"):
            one.encode(video[:0])
        assert one.decode(torch.rand(1, 0, 16, 2, 2)).shape[1] == 0
    with pytest.raises(ValueError, match="not in float64"):
        fast(model.double())
