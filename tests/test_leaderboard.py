"""leaderboard.py: what its figures mean, what it measures again, and what it makes of mistakes."""
import collections
import copy
import json
import math
import os
import re
import sys
import xml.etree.ElementTree

import cv2
import numpy as np
import pytest
import scipy.interpolate
import torch

import entries
import leaderboard
import leaderboard_page
import metrics
import protocols
import rate
from codec import InputError
from conftest import mistake, write_clip
from model_taehv import load_taehv
from model_vqgan import VQGAN

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "--size 64x64 --frames 12 --lpips none --no-fid --device cpu --precision fp32".split()

# Keeps what it is given, and adds so many 255ths to a frame by its place among the four that a latent stands for.
MARKED = """
import torch
class Marked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(7))
    def encode(self, video):
        self.video = video
        n, t, _, h, w = video.shape
        return torch.zeros(n, 1 + (t - 1) // 4, 5, h // 8, w // 8)
    def decode(self, latents):
        errors = [0] + [5, 10, 10, 20] * (self.video.shape[1] // 4)
        return self.video + torch.tensor(errors).view(1, -1, 1, 1, 1) / 255
def make():
    return Marked()
"""


def main(*arguments, code=0):
    """Runs the command; returns leaderboard.json."""
    sys.argv = ["leaderboard.py", *map(str, arguments)]
    if code:
        with pytest.raises(SystemExit) as caught:
            leaderboard.main()
        assert caught.value.code == code
    else:
        leaderboard.main()
    out = sys.argv[sys.argv.index("--out") + 1]
    with open(f"{out}/leaderboard.json", encoding="utf-8") as file:
        return json.load(file, parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def board(clips, teacher, tmp_path_factory):
    """(the command's arguments, leaderboard.json, the page) of four models and one that cannot be read."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "marked.py").write_text(MARKED)
    (folder / "broken.pth").write_bytes(b"no weights")
    models = [f"python:{folder}/marked.py:make", teacher, "bicubic", "pca16", str(folder / "broken.pth")]
    arguments = [*models, "--data", clips, "--clips", "3", "--out", str(folder / "out"), *SMALL]
    argv = sys.argv
    found = main(*arguments, code=1)
    sys.argv = argv
    return arguments, found, (folder / "out" / "leaderboard.html").read_text(encoding="utf-8")


def test_figures_are_of_the_frames_that_all_models_return(board, clips, teacher, tmp_path):
    """TAEHV returns 9 of 12 frames: the others' last three count no more. By hand: what a known error gives."""
    _, found, _ = board
    marked, taehv, bicubic, pca, broken = found["rows"]
    assert found["info"]["judged"] == list(range(9)) and len(found["info"]["returned"][marked["name"]]) == 12
    errors = np.array([0, 5, 10, 10, 20, 5, 10, 10, 20]) / 255
    assert math.isclose(marked["metrics"]["mse"], np.square(errors).mean(), rel_tol=1e-3)
    assert math.isclose(marked["metrics"]["flicker"], np.abs(np.diff(errors)).mean(), rel_tol=1e-3)
    # The first frame of a causal model has a latent for itself, and is the last that this one stands for.
    for place, error in (("first", 5), ("inner", 10), ("last", math.sqrt((0 + 20 ** 2 + 20 ** 2) / 3))):
        assert math.isclose(marked[f"place_{place}"], 20 * math.log10(255 / error), abs_tol=0.01)
    assert marked["parameters"] == 7 and marked["numbers_per_pixel"] == 4 * 5 / 64 / 12  # 12 frames are filled up to 13
    assert bicubic["numbers_per_pixel"] == 3 / 64 and bicubic["place_first"] is None
    assert math.isclose(pca["numbers_per_pixel"], 16 / (3 * 256) * 3) and pca["metrics"]["psnr"] > 20
    model, clips = load_taehv(teacher).eval(), protocols.Clips(clips, str(tmp_path), 64, 64, 12, clips=3)
    with torch.no_grad():  # the plain network, where the command has a fast one
        videos = [clips.video(i) for i in range(3)]
        outputs = [model(video)[0].clamp(0, 1).mul(255).round().div(255) for video in videos]
    expected = [metrics.psnr(output, video[:, :9]).mean().item() for output, video in zip(outputs, videos)]
    assert np.allclose([clip["psnr"] for clip in taehv["clips"]], expected, atol=0.01)
    assert math.isclose(taehv["metrics"]["psnr"], np.mean(expected), abs_tol=0.01)
    assert taehv["numbers_per_pixel"] == 16 * 3 / 64 / 12 and taehv["place_last"] and taehv["decode_fps"] > 0
    assert all(len(row["clips"]) == 3 and row["peak_memory_mb"] != 0 for row in found["rows"][:4])
    assert "broken.pth" in broken["failed"]


def test_the_page_is_one_file_and_says_all(board):
    _, found, page = board
    assert re.search(r"frames 0-8 of each clip, numbered from 0: those that all models return; \S+ returns few", page)
    assert "not measured: checkpoint: " in page and "LPIPS was not asked for" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5 and all(source.startswith("data:video/webm;base64,") for source in sources)
    assert "http" not in re.sub(r'data-value="[^"]*"', "", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        dots = xml.etree.ElementTree.fromstring(svg).findall("circle")
        assert len(dots) == 4
    lines = leaderboard_page.table(found["rows"], leaderboard.short)
    assert len(lines) == 6 and lines[1].startswith("make ") and "failed: " in lines[-1]
    widths = [len(line) for line in lines[:-1]]
    assert len(set(widths)) == 1 and "PSNR dB" in lines[0] and "-" in lines[1]


def test_what_was_measured_is_not_measured_again(board, monkeypatch, tmp_path, capsys):
    """Other weights, another order and --again do count; a model less does, where other frames are judged then."""
    arguments, found, _ = board
    measured, whole = [], leaderboard.measure

    def noted(entry, *rest):
        measured.append(entry.name)
        return whole(entry, *rest)

    monkeypatch.setattr(leaderboard, "measure", noted)
    again = main(*arguments, code=1)
    assert not measured and again["rows"][:4] == found["rows"][:4]
    assert "measured before, with the same weights, clips and settings: 4 of 4" in capsys.readouterr().out
    fewer = [argument for argument in arguments if not argument.endswith(".pth")]
    without = main(*fewer)
    assert len(measured) == 3 and len(without["info"]["judged"]) == 12 and len(without["earlier"]) == 4
    (tmp_path / "marked.py").write_text(MARKED.replace("torch.zeros(7)", "torch.ones(7)"))
    other = [f"python:{tmp_path}/marked.py:make", *fewer[1:]]
    main(*other)
    assert measured[3:] == other[:1]
    main(*other[2:], "--again")
    assert measured[4:] == ["pca16"]


def test_ctrl_c_keeps_what_was_measured(board, monkeypatch, tmp_path, capsys):
    arguments, _, _ = board
    arguments = ["bicubic", "pca16", *arguments[5:]]
    arguments[arguments.index("--out") + 1] = tmp_path / "out"
    whole = leaderboard.measure

    def interrupted(entry, *rest):
        if entry.name == "pca16":
            raise KeyboardInterrupt
        return whole(entry, *rest)

    monkeypatch.setattr(leaderboard, "measure", interrupted)
    assert [row["name"] for row in main(*arguments, code=130)["rows"]] == ["bicubic"]
    assert "what was measured is kept" in capsys.readouterr().err and (tmp_path / "out" / "leaderboard.html").exists()
    monkeypatch.setattr(leaderboard, "measure", lambda entry, *rest: whole(entry, *rest) | {"words": "second"})
    assert [row["words"] == "second" for row in main(*arguments)["rows"]] == [False, True]


def test_mistakes_are_one_line(clips, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "file").write_text("")
    out = ["--out", tmp_path / "out", *SMALL]
    for arguments, line in (
            (["bicubic", "--data", tmp_path / "empty", *out], "no video or image"),
            (["bicubic", "--data", clips, "--out", tmp_path / "file" / "out"], "file"),
            (["bicubic", "--data", clips, *out, "--protocol", "mcl-jcv"], "wants 30 videos, and 6 of "),
            (["bicubic", "--data", clips, *out, "--size", "64"], "--size 64: height x width"),
            (["bicubic", "--data", clips, *out, "--i3d", tmp_path / "text.pt"], "no TorchScript file"),
            (["bicubic", "--data", clips, *out, "--clips", "2", "--levels", "1,2"], "--levels: none of the models"),
            (["bicubic", "--data", clips, *out, "--clips", "2", "--show", "2"], "there are clips 0 to 1"),
            (["h264", "--data", clips, *out, "--clips", "2"], "h264: a rate is wanted"),
            (["pca16", "--data", clips, *out, "--clips", "1"], "--fit FOLDER"),
            ([tmp_path / "text.pt", "pca999", "--data", clips, *out, "--clips", "2"], "none of the 2 can be measured; the ")):
        assert line in mistake(capsys, monkeypatch, leaderboard, *arguments), arguments
    with monkeypatch.context() as patched:
        patched.setattr(protocols.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
        line = mistake(capsys, monkeypatch, leaderboard, "bicubic", "--data", clips, *out, "--clips", "2")
    assert "out: clip 1 finds no room there (No space left on device); clips take 0.1 MB each" in line
    monkeypatch.setitem(sys.modules, "av", None)
    line = mistake(capsys, monkeypatch, leaderboard, "h264@crf30", "--data", clips, *out, "--clips", "2")
    assert line == "leaderboard.py: h264@crf30 needs a package: pip install av"


def test_a_damaged_table_of_before_is_measured_anew(board, tmp_path, capsys):
    arguments, _, _ = board
    (tmp_path / "leaderboard.json").write_text('{"rows": [1], "earlier": []}')
    found = main("bicubic", *arguments[5:7], "--clips", "1", "--out", tmp_path, *SMALL)
    assert "leaderboard.json cannot be read" in capsys.readouterr().out and found["rows"][0]["metrics"]["psnr"] > 10


# ---- clips ---------------------------------------------------------------------------------------------------------


def test_a_protocol_takes_videos_whole_and_folders_of_images(tmp_path, monkeypatch):
    write_clip(str(tmp_path / "data" / "video.mp4"), frames=30, height=48, width=96, fps=60)
    (tmp_path / "data" / "walk").mkdir()
    for t in range(7):  # of 40x60, each of its own grey; the centre is brighter
        image = np.full((40, 60, 3), 10 * t, np.uint8)
        image[:, 10:50] += 100
        cv2.imwrite(str(tmp_path / "data" / "walk" / f"{t:05d}.png"), image)
    monkeypatch.setitem(protocols.PROTOCOLS, "davis", protocols.Protocol(32, 32, 5, True, 30, 2))
    shape = protocols.PROTOCOLS["davis"]._asdict()
    del shape["videos"]
    found = protocols.Clips(str(tmp_path / "data"), tmp_path, **shape, protocol="davis")
    assert found.names == ["video #1", "video #2", "video #3", "walk #1", "walk #2"], "30 frames at 60 a second: 15"
    assert found.fps[0] == 30 and found.video(0).shape == (1, 5, 3, 32, 32)
    assert found.pixels[3, :, 0, 0, 0].tolist() == [100, 110, 120, 130, 140], "the centre, whole"
    assert found.pixels[4, :, 16, 16, 1].tolist() == [150, 160, 160, 160, 160], "filled up with the last"
    part = protocols.Clips(str(tmp_path / "data"), tmp_path, **shape, protocol="davis", clips=1)
    assert len(part) == 1 and part.fingerprint != found.fingerprint


def test_more_clips_than_videos_are_spread_over_all_of_them(clips, tmp_path):
    found = protocols.Clips(clips, str(tmp_path), 16, 16, 4, clips=8)
    assert len(found) == 8 and set(collections.Counter(found.sources).values()) == {1, 2}
    assert len(set(found.sources)) == len(protocols.Clips(clips, str(tmp_path), 16, 16, 4, clips=6)) == 6


def test_principal_components_are_of_other_clips_and_exact_where_they_can_be():
    torch.manual_seed(0)
    bases = torch.randn(2, 5, 768)

    class TwoSources:  # clips 0 and 2 are made of five blocks, clip 1 of five others
        sources, fingerprint = ["a", "b", "a"], "made"

        def __len__(self):
            return 3

        def video(self, i, device="cpu"):
            rows = torch.randn(4 * 4 * 2, 5) @ bases[i % 2] / 100 + 0.5
            return rows.view(2, 4, 4, 4, 3, 8, 8).permute(0, 3, 4, 1, 5, 2, 6).reshape(1, 8, 3, 32, 32).clamp(0, 1)

    made = TwoSources()
    context = entries.Context(torch.device("cpu"), torch.float32, made)
    two_fold = entries.load("pca8", context)
    ahead = entries.load("pca8", context._replace(fit=made))
    clip = made.video(1)
    error = {name: (entry.run(clip, 25, 1).frames - clip).square().mean().item()
             for name, entry in (("other half", two_fold), ("all", entries.load("pca10", context._replace(fit=made))))}
    assert error["all"] < 1e-10 < 1e-4 < error["other half"], "components of clip a say nothing of clip b"
    assert ahead.run(clip[:, :7, :, :30], 25, 1).frames.shape == (1, 7, 3, 30, 32)
    assert two_fold.fingerprint != ahead.fingerprint


def test_a_name_that_stands_for_nothing_is_refused_before_anything_is_measured(clips, tmp_path, capsys, monkeypatch):
    common = ("--data", clips, "--out", tmp_path / "out", *SMALL)
    for name, words in (("bicubik", "did you mean 'bicubic'?"), ("runs/nope", "'runs/nope' is no run, no weights, no tea")):
        assert words in mistake(capsys, monkeypatch, leaderboard, "pca8", name, *common)
    assert not os.path.exists(tmp_path / "out" / "leaderboard.json")


def test_rfvd_is_the_frechet_distance_of_what_the_network_says(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x, rescale: bool = True, return_features: bool = False):
            assert return_features and not rescale and x.shape[1] == 3 and x.shape[3] == 224
            return x.mean((1, 2, 3, 4))[:, None]

    torch.jit.script(Mean()).save(str(tmp_path / "i3d.pt"))
    fvd = metrics.load_i3d(str(tmp_path / "i3d.pt"))()
    ours, theirs = [0.1, 0.4, 0.7], [0.2, 0.3, 0.7]
    for a, b in zip(ours, theirs):
        fvd.add(torch.full((1, 9, 3, 16, 24), a), torch.full((1, 9, 3, 16, 24), b))
    features = [2 * np.array(values) - 1 for values in (ours, theirs)]
    expected = (features[0].mean() - features[1].mean()) ** 2 + (features[0].std(ddof=1) - features[1].std(ddof=1)) ** 2
    assert math.isclose(fvd.reduce(), expected, rel_tol=1e-4)


# ---- rate ------------------------------------------------------------------------------------------------------------


def test_bd_rate_by_hand():
    points = [(1, 30), (2, 33), (4, 36), (8, 38)]
    double = [(2 * rate, psnr) for rate, psnr in points]
    assert math.isclose(rate.bd_rate(points, double), 100) and math.isclose(rate.bd_rate(double, points), -50)
    # Two straight lines, log rate over PSNR: (p - 30) / 10 and (p - 30) / 5 are 0.5 apart on average.
    assert math.isclose(rate.bd_rate([(1, 30), (10, 40)], [(1, 30), (100, 40)]), 100 * (10 ** 0.5 - 1))
    # In common they have 35 to 40 dB, where these are 0.75 apart.
    assert math.isclose(rate.bd_rate([(1, 30), (10, 40)], [(10, 35), (1000, 45)]), 100 * (10 ** 0.75 - 1))
    other = [(1.5, 31), (1.9, 32.5), (5, 36.5), (6, 37)]
    curves = [scipy.interpolate.PchipInterpolator(*np.array([(psnr, math.log10(r)) for r, psnr in some]).T)
              for some in (points, other)]
    expected = 100 * (10 ** ((curves[1].integrate(31, 37) - curves[0].integrate(31, 37)) / 6) - 1)
    assert math.isclose(rate.bd_rate(points[::-1], other), expected, rel_tol=1e-9)
    for none in ([(1, 30)], [(1, 40), (2, 41)], [(1, 30), (2, 29)], [(1, 30), (1, 31)], [(0, 30), (1, 31)]):
        assert rate.bd_rate(points, none) is None


def test_a_tokenizer_has_bits_and_a_curve_of_its_levels(clips, tmp_path, monkeypatch):
    """Two codes of 16 for each 8x8 pixels of a frame: 8 bits for 64 pixels."""
    torch.manual_seed(0)
    model = VQGAN(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8,
                  embed_dim=8, n_embed=16, quantizer="rvq", depth=2).eval()
    monkeypatch.setattr(entries.models, "load_model", lambda name: (copy.deepcopy(model), "tiny"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").touch()
    found = main("tok", "bicubic", "--data", clips, "--clips", "2", "--out", tmp_path, *SMALL, "--size", "60x64")
    row = found["rows"][0]
    assert row["bits_per_pixel"] == 8 * 64 / (60 * 64) and row["numbers_per_pixel"] is None, "60 rows are filled to 64"
    assert 0 < row["entropy_bits_per_pixel"] <= row["bits_per_pixel"] and 0 < row["codebook_use"] <= 1
    assert row["place_first"] is None and row["clips"][0]["bits_per_pixel"] == row["bits_per_pixel"]
    levels = main("tok", "bicubic", "--data", clips, "--clips", "2", "--out", tmp_path, *SMALL, "--levels", "1,2,9")
    coarse, fine, other = levels["rows"]
    assert [coarse["name"], fine["name"], other["name"]] == ["tok levels 1", "tok levels 2", "bicubic"]
    assert [one["bits_per_pixel"] for one in (coarse, fine)] == [4 / 64, 8 / 64]
    assert coarse["metrics"] != fine["metrics"]
    assert [*rate.curves(levels["rows"])] == ["tok"] and "<h2>Rate and distortion" in (
        tmp_path / "leaderboard.html").read_text(encoding="utf-8")


def test_codecs_give_bits_and_curves(clips, tmp_path):
    pytest.importorskip("av")
    names = ["h264@crf20", "h264@crf40", "av1@crf20", "av1@crf50", "h265@300"]
    found = main(*names, "--data", clips, "--clips", "2", "--out", tmp_path, *SMALL)
    rows = {row["name"]: row for row in found["rows"]}
    for codec in ("h264", "av1"):
        fine, coarse = (rows[name] for name in names if name.startswith(f"{codec}@"))
        assert fine["bits_per_pixel"] > 1.5 * coarse["bits_per_pixel"]
        assert fine["metrics"]["psnr"] > coarse["metrics"]["psnr"] + 3 and fine["metrics"]["psnr"] > 30
        assert [clip["name"] for clip in fine["clips"]] == ["sub0/clip0", "sub1/clip5"]
    assert found["rates"]["against"] == "h264" and [*found["rates"]["curves"]] == ["av1"]
    assert len(found["rates"]["curves"]["av1"]["clips"]) == 2
    page = (tmp_path / "leaderboard.html").read_text(encoding="utf-8")
    assert page.count("<polyline") == 2 + 2 + 2 + 2 * 2, "two curves by speed, by size, on average and for each clip"
    codec = rate.VideoCodec("h265@crf1", *rate.parse_codec("h265@crf1"))
    torch.manual_seed(0)
    few = 0.3 + 0.4 * torch.rand(1, 3, 4, 6)  # 4:2:0 does not hold saturated colours
    video = torch.nn.functional.interpolate(few, size=(63, 95), mode="bicubic").clamp(0, 1)
    result = codec.run(video[None].expand(-1, 3, -1, -1, -1), 29.97, 0)
    error = result.frames - video
    assert error.shape == (1, 3, 3, 63, 95) and -10 * error.square().mean().log10() > 42
    assert error.mean((0, 1, 3, 4)).abs().max() < 0.3 / 255, "colours are converted without a shift"
    with pytest.raises(InputError, match="crf0 to crf51"):
        rate.VideoCodec("h264@crf60", *rate.parse_codec("h264@crf60"))
