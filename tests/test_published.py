"""Weights and code that others published for TAEHV: relatives, the published calls, weights by name, torch.hub."""

import ast
import copy
import http.server
import importlib.util
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import hubconf
import infer
import model_taehv
import models
import teachers
import train
from conftest import ROOT, mistake
from fast_taehv import fast
from golden.fill import fill_, make_input
from init_taehv import colours
from model_taehv import PUBLISHED, RELATIVES, TAEHV, StreamingTAEHV, load_taehv, recognise

# ---- relatives: one clip, retyped from the published files, straight from the weights -----------------------------


def conv(w, name, x, **options):
    weight = w[name + ".weight"]
    return F.conv2d(x, weight, w.get(name + ".bias"), padding=weight.shape[-1] // 2, **options)


def memory_block(w, name, x, act):
    h = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
    places = [0, 2, 4, 6] if f"{name}.conv.6.weight" in w else [0, 2, 4]
    for i in places:
        weight = w[f"{name}.conv.{i}.weight"]
        h = conv(w, f"{name}.conv.{i}", h, groups=h.shape[1] // weight.shape[1])
        h = h if i == places[-1] else act(h)
    return act(h + x)


def encoder(w, x, act):
    """T C H W -> latents."""
    x = act(conv(w, "encoder.0", x))
    for i in (2, 7, 12):
        stride = w[f"encoder.{i}.conv.weight"].shape[1] // x.shape[1]
        x = conv(w, f"encoder.{i}.conv", x.reshape(-1, stride * x.shape[1], *x.shape[2:]))
        x = conv(w, f"encoder.{i + 1}", x, stride=2)
        for j in range(i + 2, i + 5):
            x = memory_block(w, f"encoder.{j}", x, act)
    return conv(w, "encoder.17", x)


def decoder(w, x, act):
    """Latents T C H W -> pixels, all frames."""
    x = act(conv(w, "decoder.1", torch.tanh(x / 3) * 3))
    for i in (3, 9, 15):
        for j in range(i, i + 3):
            x = memory_block(w, f"decoder.{j}", x, act)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = conv(w, f"decoder.{i + 4}.conv", x).reshape(-1, *x.shape[1:])
        x = conv(w, f"decoder.{i + 5}", x)
    return conv(w, "decoder.22", act(x))


def filled(variant):
    return {k: v.clone() for k, v in fill_(TAEHV(variant).state_dict()).items()}


SHAPED_LIKE = {"lighttaehy1_5": "taehv1_5", "lighttae_hy1_5": "taehv1_5", "lighttaew2_1": "taew2_1",
               "lighttaew2_2": "taew2_2"}


@pytest.mark.parametrize("name", SHAPED_LIKE)
@torch.no_grad()
def test_weights_of_lightx2v_give_what_its_code_gives(name, tmp_path):
    weights = filled(SHAPED_LIKE[name])
    torch.save(weights, tmp_path / f"{name}.pth")
    model, words = models.load_model(tmp_path / f"{name}.pth")
    leaky = "hy" in name
    act = (lambda x: F.leaky_relu(x, 0.2)) if leaky else F.relu
    if leaky:
        mean, deviation = 0, 1 / 1.03682
    else:
        mean, deviation = (torch.tensor(RELATIVES[name][k]).view(-1, 1, 1) for k in ("mean", "deviation"))
    patch, size = model.patch_size, model.space_factor
    video = make_input("rand", (1, 8, 3, size, 2 * size), 1)
    latents = make_input("randn", (1, 2, model.latent_channels, 1, 2), 2)
    pixels = F.pixel_unshuffle(video[0] * 2 - 1 if leaky else video[0], patch)
    encoded = (encoder(weights, pixels, act) - mean) / deviation
    decoded = F.pixel_shuffle(decoder(weights, latents[0] * deviation + mean, act), patch)[3:]
    decoded = (decoded.clamp(-1, 1) + 1) / 2 if leaky else decoded.clamp(0, 1)
    assert ((decoded > 0) & (decoded < 1)).float().mean() > 0.2, "what is clamped compares nothing"
    stream, quick = model.stream(), fast(model)
    for ours in (model.encode(video), quick.encode(video), torch.cat([*map(stream.encode, video.split(3, 1))], 1)):
        assert (ours[0] - encoded).abs().max() < 1e-4 * encoded.abs().max()
    for ours in (model.decode(latents), quick.decode(latents), model.stream().decode(latents),
                 model.decode_video(latents, parallel=False, show_progress_bar=False)):
        assert (ours[0] - decoded).abs().max() < 1e-4
    variant = name.replace("lighttae_", "lighttae")
    assert model.variant == variant and f"variant {variant} (by name" in words and SHAPED_LIKE[name] in words
    assert list(model.state_dict()) == list(weights), "mean and deviation are no part of the weights"
    assert TAEHV(**model.config).config == model.config and TAEHV(**model.config).activation == model.activation


def test_what_the_name_does_not_tell_the_caller_does(tmp_path):
    torch.save(filled("taew2_1"), tmp_path / "model.pth")
    assert load_taehv(str(tmp_path / "model.pth"), variant="lighttaew2_1").latents_scale is not None
    assert load_taehv(str(tmp_path / "model.pth"), variant="taew2_1").latents_scale is None
    model, words = models.load_model(tmp_path / "model.pth")
    assert model.variant == "taehv" and "lighttaew2_1" in words.split("(by name or default:")[1]


def test_means_and_deviations_are_those_of_the_big_vaes():
    if not (diffusers := importlib.util.find_spec("diffusers")):
        pytest.skip("diffusers is not installed")
    folder = os.path.join(diffusers.submodule_search_locations[0], "models", "autoencoders")
    with open(os.path.join(folder, "autoencoder_kl_wan.py"), encoding="utf-8") as file:  # read: importing takes seconds
        source = file.read()
    for ours, theirs in (("mean", "latents_mean"), ("deviation", "latents_std")):
        values = re.search(theirs + r": [\w\[\]]+ = (\[.*?\])", source, re.DOTALL)[1]
        assert RELATIVES["lighttaew2_1"][ours] == ast.literal_eval(values)


@torch.no_grad()
def test_the_wide_decoder_is_the_published_one(tmp_path):
    fresh = TAEHV("taeltx2_3_wide")
    assert [fresh.decoder[i].conv[2].weight.shape for i in (3, 9, 15)] == [(1024, 64, 3, 3), (512, 64, 3, 3),
                                                                          (256, 64, 3, 3)]
    small = TAEHV("taeltx2_3_wide", decoder_widths=(128, 128, 64, 16)).eval()  # the rule at a fraction of the size
    weights = fill_(small.state_dict())
    video, latents = make_input("rand", (1, 8, 3, 32, 32), 1), make_input("randn", (1, 2, 128, 1, 1), 2)
    encoded = encoder(weights, F.pixel_unshuffle(video[0], 4), F.relu)
    decoded = F.pixel_shuffle(decoder(weights, latents[0], F.relu), 4)[7:].clamp(0, 1)
    for model in (small, fast(small)):
        assert (model.encode(video)[0] - encoded).abs().max() < 1e-4 * encoded.abs().max()
        assert (model.decode(latents)[0] - decoded).abs().max() < 1e-4


def test_widths_are_read_off_the_weights(tmp_path):
    models = [TAEHV(encoder_widths=(8, 16, 24, 32), decoder_widths=(48, 40, 24, 24)),
              TAEHV("taew2_2_super", decoder_widths=(32, 24, 16, 8)),
              TAEHV("taeltx2_3_wide", decoder_widths=(128, 64, 32, 16), encoder_widths=(16,) * 4)]
    for model in models:
        torch.save(model.state_dict(), tmp_path / "model.pth")
        loaded = load_taehv(str(tmp_path / "model.pth"))
        assert loaded.encoder_widths == model.encoder_widths and loaded.decoder_widths == model.decoder_widths
        assert TAEHV(**loaded.config).config == loaded.config
        assert "decoder_widths" in loaded.config
        assert loaded.decode(torch.randn(1, 2, loaded.latent_channels, 2, 2)).shape[1] == 1 + loaded.time_factor
    assert "decoder_widths" not in TAEHV("taew2_2_super").config, "checkpoints from before widths still fit"
    assert recognise(TAEHV("taehv1_5").state_dict(), "lighttaehy1_5.pth")["variant"] == "lighttaehy1_5"


@pytest.mark.parametrize("changes", [
    dict(activation="leaky_relu"), dict(output_range=(-1, 1)),
    dict(activation="leaky_relu", output_range=[-1, 1], decoder_widths=[48, 40, 24, 24])])
def test_fresh_weights_start_from_colours_all_the_same(changes):
    torch.manual_seed(0)
    model, video, drawn = TAEHV(**changes).eval(), torch.rand(1, 12, 3, 4, 4), torch.get_rng_state()
    colours(model)
    assert torch.equal(torch.get_rng_state(), drawn), "what a run draws later is the same with any start"
    video = F.interpolate(video[0], scale_factor=8, mode="nearest")[None]
    with torch.no_grad():
        error = (model(video)[0] - model.targets(video)).square().mean()
    assert error < 0.02, "each cell's mean colour comes back: random weights give 0.08 and more"


@pytest.mark.parametrize(("changes", "message"), [
    (dict(activation="gelu"), "unknown activation 'gelu'"),
    (dict(output_range=(0, 255)), r"output_range \(0, 255\)"),
    (dict(decoder_widths=(64, 64)), "decoder_widths takes four"),
    (dict(encoder_widths=64), "encoder_widths takes four"),
    (dict(variant="taeltx2_3_wide", decoder_widths=(200, 64, 64, 64)), "multiples of 64"),
    (dict(variant="lighttaew2_1", latent_channels=8), "16 latent channels, not 8"),
])
def test_shapes_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        TAEHV(**changes)


# ---- the published calls -----------------------------------------------------------------------------------------

SMALL = dict(encoder_widths=(8,) * 4, decoder_widths=(32, 24, 24, 24))


def save_small(path, variant="taehv", **changes):
    torch.manual_seed(1)
    torch.save(TAEHV(variant, **SMALL, **changes).state_dict(), path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@torch.no_grad()
def test_every_call_of_the_published_readme_and_main(folder):
    save_small("taehv.pth")
    save_small("taew2_2.pth", "taew2_2")
    frames = torch.randint(0, 256, (1, 9, 3, 24, 40), dtype=torch.uint8)
    model = TAEHV(checkpoint_path="taehv.pth").to(torch.device("cpu"), torch.float16)  # taehv.py's main()
    video = frames.to("cpu", torch.float16).div_(255.0)
    results = []
    for options in (dict(), dict(parallel=False)):
        latents = model.encode_video(video, **options)
        decoded = model.decode_video(latents, **options)
        assert decoded.dtype == torch.float16 and decoded.shape == (1, 9, 3, 24, 40)
        assert decoded.clamp_(0, 1).mul_(255).round_().byte().cpu()[0].shape == (9, 3, 24, 40)
        results.append(latents)
    assert latents.shape == (1, 3, 16, 3, 5) and torch.allclose(*map(torch.Tensor.float, results), atol=1e-2)
    model = TAEHV("taew2_2.pth").to("cpu", torch.float32).eval().requires_grad_(False)  # the notebooks
    diffusers_layout = model.decode_video(torch.randn(1, 2, 48, 2, 2), parallel=False).transpose(1, 2).mul_(2).sub_(1)
    assert diffusers_layout.shape == (1, 3, 5, 32, 32) and (model.patch_size, model.latent_channels) == (2, 48)
    assert {"t_downscale": 4, "t_upscale": 4, "frames_to_trim": 3, "image_channels": 3}.items() <= vars(model).items()


@pytest.mark.parametrize("arguments", [
    dict(), dict(checkpoint_path=None), dict(decoder_time_upscale=(False, False), decoder_space_upscale=(True,) * 3)])
def test_without_a_path_weights_are_fresh(arguments, folder):
    save_small("taehv.pth")
    assert TAEHV(**arguments).encoder_widths == (64,) * 4, "the file is not read"


@torch.no_grad()
def test_previews_and_arguments_beside_a_path(folder):
    save_small("weights.pth", patch_size=2, latent_channels=8)
    arguments = dict(patch_size=2, latent_channels=8, encoder_time_downscale=(True, True, False),
                     decoder_time_upscale=(False, False), decoder_space_upscale=(False, False, False),
                     arch_variant=None)
    model = TAEHV("weights.pth", **arguments)
    whole = load_taehv("weights.pth")
    assert not model.training and model.decode_video(torch.randn(1, 3, 8, 2, 2)).shape == (1, 3, 3, 4, 4)
    assert torch.equal(model.decoder[19].conv.weight, whole.decoder[19].conv.weight[24:]), "the last frame's weights"
    video = torch.rand(1, 4, 3, 16, 16)
    assert torch.equal(model.encode(video), whole.encode(video))
    assert TAEHV(**model.config).config == model.config
    with pytest.raises(ValueError, match="weights.pth does not fit TAEHV variant taehv: encoder.0.weight is"):
        TAEHV("weights.pth", patch_size=1)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: TAEHV("taew21"), r"unknown TAEHV variant or file 'taew21' \(did you mean 'taew2_1'\?\)"),
    (lambda: TAEHV("nowhere/taew2_1.pth"), "unknown TAEHV variant or file 'nowhere/taew2_1.pth'"),
    (lambda: TAEHV(checkpoint_path="nowhere.pth"), "'nowhere.pth' does not exist"),
    (lambda: load_taehv("taew2_9"), r"'taew2_9' does not exist \(did you mean 'taew2_2'\?\)"),
    (lambda: load_taehv("a/taew2_1.pth"), "'a/taew2_1.pth' does not exist; taew2_1 alone is found or downloaded"),
    (lambda: load_taehv("lighttaehy1_5.safetensors"), "huggingface.co/lightx2v/Autoencoders"),
])
def test_what_is_neither_a_variant_nor_a_file(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["taehv", "taecvx", "taeltx_2", "taeh3"])
@torch.no_grad()
def test_streaming_as_the_published_docstring_has_it(name):
    torch.manual_seed(1)
    model = TAEHV(name, **{**SMALL, "decoder_widths": (48, 48, 48, 48)}).eval()
    size, factor = model.space_factor, model.time_factor
    video = torch.rand(2, 21, 3, size, size)
    latents = model.encode_video(video, show_progress_bar=False)
    whole = model.decode_video(latents, show_progress_bar=False)
    streaming = StreamingTAEHV(model)
    shown, seen = [], []  # video to video: each call gives one latent or None, one frame or None
    for frame in video.split(1, 1):
        latent = streaming.encode(frame)
        decoded = streaming.decode(latent)
        shown += [] if decoded is None else [decoded]
        seen.append(latent is not None)
    if name != "taeh3":
        assert seen == [(t + 1) % factor == 0 for t in range(21)], "a latent comes with the last frame of its group"
    rest = streaming.flush()
    assert isinstance(rest, list) and all(frame.shape == (2, 1, 3, size, size) for frame in [*shown, *rest])
    frames = torch.cat([*shown, *rest], 1)
    assert frames.shape == whole.shape and torch.allclose(frames, whole, atol=1e-5)
    assert streaming.encode() is None and streaming.decode() is None

    streaming.reset()
    assert streaming.flush_encoder() == streaming.flush_decoder() == streaming.flush() == []
    again = [streaming.encode(video)]  # all frames at once; the others are asked for
    again += [*iter(streaming.encode, None), *streaming.flush_encoder()]
    assert torch.allclose(torch.cat(again, 1), latents, atol=1e-5)
    shown = []  # decoding alone (a world model)
    for latent in latents.split(1, 1):
        frame = streaming.decode(latent)
        while frame is not None:
            shown.append(frame)
            frame = streaming.decode()
    shown += streaming.flush_decoder()
    assert torch.allclose(torch.cat(shown, 1), whole, atol=1e-5)
    assert streaming.n_frames_encoded >= 21 and streaming.n_frames_decoded == model.t_upscale * latents.shape[1]


def test_a_stream_in_use_can_be_copied():
    """A world model that tries several futures."""
    streaming = StreamingTAEHV(TAEHV(**SMALL).eval())
    latents = torch.randn(1, 3, 16, 2, 2)
    assert streaming.decode(latents[:, :1]) is not None  # frames 3: the first three are trimmed
    assert streaming.decode(latents[:, 1:2]) is not None  # of four; three wait
    copied = copy.deepcopy(streaming)
    again = pickle.loads(pickle.dumps(streaming))
    rest = [torch.cat([*iter(one.decode, None), one.decode(latents[:, 2:]), *one.flush_decoder()], 1)
            for one in (streaming, copied, again)]
    assert rest[0].shape[1] == 7 and torch.equal(rest[0], rest[1]) and torch.equal(rest[0], rest[2])


@pytest.mark.parametrize("name, size", [("taehv", (10, 21)), ("taew2_2", (18, 16)), ("taehv1_5", (18, 34)),
                                        ("taeltx_2", (36, 32)), ("taeh3", (18, 16))])
@torch.no_grad()
def test_any_size_that_the_patches_divide_is_encoded_one_frame_at_a_time(name, size):
    torch.manual_seed(1)
    model = TAEHV(name, **SMALL).eval()
    video = torch.rand(2, 9, 3, *size)
    whole, pieces = (model.encode_video(video, parallel=way, show_progress_bar=False) for way in (True, False))
    assert whole.shape == pieces.shape and torch.allclose(whole, pieces, atol=1e-5) and whole.is_contiguous()
    for way in (True, False):
        with pytest.raises(ValueError, match="0 frames"):
            model.encode_video(video[:, :0], parallel=way, show_progress_bar=False)


def test_arguments_come_in_the_published_order(tmp_path):
    model = TAEHV(None, (True, True, True), (True, True, True), (True, True, False), 4, 128, **SMALL)
    assert (model.time_factor, model.patch_size, model.latent_channels, model.space_upscale) == (8, 4, 128, 16)
    path = str(tmp_path / "taew2_1.pth")
    torch.save(TAEHV(**SMALL).state_dict(), path)
    preview = TAEHV(path, (True, True, False), (False, False))
    assert (preview.variant, preview.t_upscale) == ("taew2_1", 1)


def test_streaming_refuses_what_has_no_time():
    streaming = StreamingTAEHV(TAEHV(**SMALL))
    with pytest.raises(ValueError, match="expected frames as N T 3 H W"):
        streaming.encode(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected latents as N T 16 H W"):
        streaming.decode(torch.rand(1, 1, 4, 2, 2))


# ---- weights by name ---------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(folder, monkeypatch):
    """A server with taew2_1.pth, an empty hub cache, an empty present folder. Has: url, requests, the file's bytes,
    how many of them are `sent`."""
    save_small("taew2_1.pth", "taew2_1")
    contents = (folder / "taew2_1.pth").read_bytes()
    monkeypatch.setitem(PUBLISHED, "taew2_1", model_taehv.blob_id("taew2_1.pth"))
    os.remove("taew2_1.pth")

    class Handler(http.server.BaseHTTPRequestHandler):
        requests, sent = [], len(contents)

        def do_GET(self):
            self.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(contents)))
            self.end_headers()
            self.wfile.write(contents[:Handler.sent])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        monkeypatch.setenv("TAEHV_URL", f"http://127.0.0.1:{server.server_port}/files/")
        monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        Handler.contents, Handler.path = contents, folder / "home" / "hub" / "checkpoints" / "taew2_1.pth"
        yield Handler
        server.shutdown()
        thread.join()


def test_the_id_of_contents_is_gits(tmp_path):
    (tmp_path / "empty").touch()
    assert model_taehv.blob_id(tmp_path / "empty") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert set(PUBLISHED) == set(model_taehv.VARIANTS) - set(RELATIVES)
    assert all(re.fullmatch("[0-9a-f]{40}", wanted) for wanted in PUBLISHED.values())


def test_a_name_downloads_once(mirror, capfd, clips):
    model = load_taehv("taew2_1")
    assert (model.variant, model.training, mirror.requests) == ("taew2_1", False, ["/files/taew2_1.pth"])
    assert "100%" in capfd.readouterr().err, "a progress bar"
    assert mirror.path.read_bytes() == mirror.contents and os.listdir(mirror.path.parent) == ["taew2_1.pth"]
    teacher = teachers.load_teacher("taehv:taew2_1")
    again, words = models.load_model("taew2_1")
    assert "variant taew2_1" in words and TAEHV(checkpoint_path="taew2_1").variant == "taew2_1"
    started, origin = models.make_model(train.load_config(["taehv_finetune", "init_from=taew2_1", "variant=taew2_1",
                                                          *(f"net.{k}={v}" for k, v in SMALL.items())]), [])[:2]
    for other in (teacher.source, again, started):
        assert torch.equal(other.encoder[0].weight, model.encoder[0].weight)
    assert origin == "from taew2_1" and len(mirror.requests) == 1, "the rest is found in the cache"


def test_infer_takes_a_name(mirror, clips, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", "taew2_1", os.path.join(clips, "sub0", "clip0.mp4"), "--max-frames",
                                      "5", "--lpips", "none", "--precision", "fp32", "--quiet"])
    infer.main()
    assert "taew2_1: weights of variant taew2_1" in capsys.readouterr().out
    assert (folder / "inference_results" / "metrics.json").is_file()


def test_a_file_in_the_present_folder_comes_first(mirror):
    save_small("taew2_1.pth", "taew2_1")
    load_taehv("taew2_1")
    assert not mirror.requests


@pytest.mark.parametrize("sent", [0, 1000])
def test_half_a_download_is_never_the_file(sent, mirror):
    whole, mirror.sent = mirror.sent, sent
    with pytest.raises((ValueError, OSError), match=f"by hand and put it there as {mirror.path}"):
        load_taehv("taew2_1")
    assert not os.listdir(mirror.path.parent)
    mirror.sent = whole
    load_taehv("taew2_1")


def test_other_contents_are_refused_and_removed(mirror, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "taew2_1", "0" * 40)
    with pytest.raises(ValueError, match=r"files/taew2_1.pth is not the published taew2_1, and was removed: get http"):
        load_taehv("taew2_1")
    assert not os.listdir(mirror.path.parent)
    mirror.path.write_bytes(b"older")
    with pytest.raises(ValueError, match="taew2_1.pth is damaged, or not the published taew2_1: remove it"):
        load_taehv("taew2_1")
    assert mirror.path.read_bytes() == b"older", "what lies there is the user's"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "nonsense", "file:///nowhere"])
@pytest.mark.any_precision
def test_without_a_network_one_line_says_where_to_put_it(url, mirror, monkeypatch, capsys, clips):
    monkeypatch.setenv("TAEHV_URL", url)
    line = mistake(capsys, monkeypatch, infer, "taew2_1", clips)
    assert f"{url}/taew2_1.pth cannot be downloaded" in line and f"put it there as {mirror.path}" in line
    assert "get https://raw.githubusercontent.com/madebyollin/taehv/" in line


@pytest.mark.any_precision
def test_a_misspelt_name_is_one_line(folder, monkeypatch, capsys, clips):
    assert "did you mean 'taew2_1'?" in mistake(capsys, monkeypatch, infer, "taew2.1", clips)


def test_the_model_file_alone_finds_weights_by_name(mirror, folder):
    os.makedirs("alone")
    shutil.copy(model_taehv.__file__, "alone")
    mirror.path.parent.mkdir(parents=True)
    mirror.path.write_bytes(mirror.contents)
    code = (f"import model_taehv as m; m.PUBLISHED['taew2_1'] = '{PUBLISHED['taew2_1']}'; "
            "m.StreamingTAEHV(m.load_taehv('taew2_1')); print(m.TAEHV(m.find_weights('taew2_1')).variant)")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd="alone", env=environment, check=True, capture_output=True)
    assert done.stdout.split() == [b"taew2_1"] and not mirror.requests


# ---- torch.hub ---------------------------------------------------------------------------------------------------


def test_hub_entry_points(mirror):
    entries = {name for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")}
    assert entries == set(PUBLISHED) and "pretrained=False" in hubconf.taew2_1.__doc__
    model = torch.hub.load(ROOT, "taew2_1", source="local")
    assert (model.variant, model.encoder_widths, mirror.requests) == ("taew2_1", (8,) * 4, ["/files/taew2_1.pth"])
    preview = torch.hub.load(ROOT, "taew2_1", source="local", decoder_time_upscale=(False, False))
    assert preview.t_upscale == 1 and len(mirror.requests) == 1
    assert torch.hub.load(ROOT, "taeh3", source="local", pretrained=False, **SMALL).is_h3


@pytest.mark.slow
def test_a_model_of_the_hub_trains_and_is_quick_when_its_folder_is_out_of_sight(folder):
    code = ("import sys, torch; "
            "load = lambda **how: torch.hub.load(sys.argv[1], 'taehv', source='local', pretrained=False, **how); "
            "m, quick = load(), load(fast=True); assert sys.argv[1] not in sys.path; "
            "video = torch.rand(1, 4, 3, 8, 8); "
            "m(video)[0].sum().backward(); assert m.run_with_gradients.__module__ == 'step_taehv'; "
            "assert type(quick).__name__ == 'FastTAEHV' and quick(video)[0].isfinite().all()")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, ROOT], env=environment, check=True)
