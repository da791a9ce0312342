"""Files that are made to exhaust memory, to take for ever, or to open other files: refused in one line, before that."""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import struct
import sys
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import torch

import cache_files
import checkpoint
import codec
import config
import data
import data_files
import infer
import inputs
import latent_cache
import latent_file
import launch
import models
import pictures
import teachers
import token_file
import train
import video_files
import video_writer
from conftest import COMMON, FRAMES, log_of, mistake, write_clip
from model_taehv import TAEHV

pytestmark = pytest.mark.usefixtures("one_thread")


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(side=30000):
    """The beginning of a PNG whose header alone is large: 2.6 MB of zeros more would decode to 2.7 GB."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(9999)))


def no_decoder(monkeypatch):
    """Whoever decodes an image, or a frame of a video, fails."""
    def decode(*_):
        raise AssertionError("decoded")

    class Capture:
        def __init__(self, *arguments, real=cv2.VideoCapture):
            self.get, self.isOpened = (capture := real(*arguments)).get, capture.isOpened
            self.read = self.grab = self.retrieve = decode

    for name in ("imread", "imdecode", "imreadmulti"):
        monkeypatch.setattr(cv2, name, decode)
    monkeypatch.setattr(cv2, "VideoCapture", Capture)


# ---- images and videos that are too large ----------------------------------------------------------------------------


def test_the_limit_is_the_same_everywhere():
    assert config.Config().max_pixels == video_files.MAX_PIXELS == infer.parse(["a", "b"]).max_pixels
    assert latent_cache.parse("--teacher a --data b --out c --clips 1".split()).max_pixels == video_files.MAX_PIXELS


def test_huge_images_are_refused_undecoded(tmp_path, monkeypatch):
    """By their headers, of every kind that is read. Others (TIFF, EXR, AVIF), whose sizes it does not know, never."""
    jpeg = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    at = jpeg.index(b"\xff\xc0") + 5
    app = b"\xff\xe1" + struct.pack(">H", 40) + b"\xff\xc0\0\x11\x08\0\1\0\1".ljust(38)  # as of a thumbnail
    webp = b"RIFF\1\1\0\0WEBP"
    huge = {
        "png": huge_png(),
        "jpg": jpeg[:2] + app + b"noise\xff\xff" + jpeg[3:at] + struct.pack(">HH", 30000, 30000) + jpeg[at + 4:],
        "jpeg": b"BM" + bytes(12) + struct.pack("<Iii", 40, 30000, -30000) + bytes(28),
        "webp": webp + b"VP8X" + bytes(8) + b"\x2f\x75\0" * 2,
        "WEBP": webp + b"VP8L" + bytes(4) + b"\x2f" + struct.pack("<I", 16000 - 1 | 16000 - 1 << 14) + bytes(9),
        "Png": webp + b"VP8 " + bytes(7) + b"\x9d\x01\x2a" + struct.pack("<HH", 16000, 16000 | 1 << 14) + bytes(9),
    }
    for suffix, content in huge.items():
        (tmp_path / f"a.{suffix}").write_bytes(content)
    (tmp_path / "tiff.png").write_bytes(b"II*\0" + bytes(99))
    (tmp_path / "sparse.png").write_bytes(huge_png(side=16))
    os.truncate(tmp_path / "sparse.png", 10 ** 11)
    (tmp_path / "long.jpg").write_bytes(b"\xff\xd8" + bytes(10 ** 6))
    (tmp_path / "cut.jpg").write_bytes(jpeg[:at])
    no_decoder(monkeypatch)
    sources, refused = data_files.probe(data_files.find_sources(str(tmp_path)))
    reasons = {os.path.basename(path): reason for path, reason in refused}
    assert not sources and len(reasons) == len(huge) + 4
    for name in ("a.png", "a.jpg", "a.jpeg", "a.webp"):
        assert reasons[name].startswith("30000x30000 pixels, and max_pixels is 100000000: "), (name, reasons[name])
    assert reasons["a.WEBP"].startswith("16000x16000 ") and reasons["a.Png"].startswith("16000x16000 ")
    assert reasons["tiff.png"] == "not a PNG, JPEG, WebP or BMP image" and "too many" in reasons["sparse.png"]
    assert reasons["long.jpg"] == reasons["cut.jpg"] == "not an image"


def test_honest_images_have_the_size_in_their_headers(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (21, 34, 4), np.uint8)
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
    kinds = [(".png", []), (".jpg", []), (".jpg", progressive), (".webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
             (".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]), (".bmp", [])]
    path = str(tmp_path / "a.png")  # what a file is, its content says
    for channels in (3, 4):
        for suffix, how in kinds:
            cv2.imencode(suffix, image[:, :, :channels], how)[1].tofile(path)
            assert video_files.image_size(path) == (34, 21) and video_files.read_image(path).shape == (21, 34, 3), (suffix, channels)


def test_huge_videos_are_refused_undecoded(tmp_path, monkeypatch):
    path = write_clip(str(tmp_path / "a.mp4"), frames=2)
    assert data_files.probe([data_files.Source(path, "a")], 96 * 72)[1] == []
    no_decoder(monkeypatch)
    reason = "96x72 pixels, and max_pixels is 6911: raise it, or scale the file down"
    assert data_files.probe([data_files.Source(path, "a")], 96 * 72 - 1) == ([], [(path, reason)])
    for read in (video_files.VideoReader, lambda *limit: video_files.read_frames(path, 0.5, 2, 1, *limit[1:]), video_files.count_frames):
        with pytest.raises(video_files.DataError, match=reason):
            read(path, 96 * 72 - 1)


def test_every_command_passes_huge_files_over(here, tmp_path, monkeypatch, capsys):
    """In a folder they are named, and the others are read; alone they are one line."""
    (folder := tmp_path / "data").mkdir()
    cv2.imwrite(str(folder / "good.png"), np.zeros((32, 32, 3), np.uint8))
    (folder / "huge.png").write_bytes(huge_png())
    settings = [*FRAMES, f"data={folder}", "frames=1", "max_steps=1"]
    log = log_of(here(*settings))
    assert "training: 1 files" in log and "huge.png: 30000x30000 pixels, and max_pixels is 100000000" in log
    with pytest.raises(video_files.DataError, match="32x32 pixels, and max_pixels is 1023"):
        here(*settings, "max_pixels=1023", "name=small")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for arguments, words in (([folder / "huge.png"], "huge.png: 30000x30000 pixels, and max_pixels is 100000000"),
                             ([folder, "--max-pixels", 1023], "none of the 2 files can be read"),
                             ([folder, "--max-pixels", 0], "--max-pixels 0: at least 1 is wanted")):
        assert words in mistake(capsys, monkeypatch, infer, "x.pth", *arguments, "--precision", "fp32")


def test_long_thin_pictures_work_as_far_as_a_video_can_hold_them(tmp_path, monkeypatch, capsys):
    """A comparison of 8191x4 was scaled down to no height at all; 20000x4 was "is the folder writable?"."""
    monkeypatch.chdir(tmp_path)
    torch.save(TAEHV(encoder_widths=(8,) * 4, decoder_widths=(16, 8, 8, 8)).state_dict(), "taehv.pth")
    sizes = [(8191, 4), (4, 8191), (16383, 4), (2, 7)]
    for width, height in sizes:
        cv2.imwrite(f"{width}x{height}.png", np.zeros((height, width, 3), np.uint8))
    sources, _ = data_files.probe(data_files.find_sources("."))
    clips = data.TrainClips(sources)
    assert {clips[data.Key(0, i, 16, 1)]["origin"]["file"] for i in range(4)} == {f"{w}x{h}.png" for w, h in sizes}
    options = "--precision fp32 --lpips none --device cpu --out".split()
    monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", ".", *options, "all"])
    infer.main()
    with open("all/metrics.json") as file:
        failed = {os.path.basename(row["source"]): row.get("failed") for row in json.load(file)["rows"]}
    assert failed["8191x4.png"] is None is failed["4x8191.png"] and "16383x4 pixels: " in failed["16383x4.png"]
    capsys.readouterr()
    assert "2x7 pixels are too few" in mistake(capsys, monkeypatch, infer, "taehv.pth", "2x7.png", *options, "few")
    for shape in ((video_writer.MAX_SIDE, 1, 3), (1, video_writer.MAX_SIDE, 3)):
        picture = pictures.side_by_side([np.zeros(shape, np.uint8)] * 3, ["a", "b", "c"], max_width=1920)
        assert picture.shape[0] <= video_writer.MAX_SIDE and picture.shape[1] <= 1920 + 2 * 4


# ---- files of latents and tokens -------------------------------------------------------------------------------------


@pytest.fixture
def taehv(tmp_path):
    model = TAEHV(encoder_widths=(8,) * 4, decoder_widths=(16, 8, 8, 8))
    torch.save(model.state_dict(), tmp_path / "taehv.pth")
    return model


def write_latents(path, model, number=3, header=(), packed=zipfile.ZIP_STORED, **about):
    """An honest one: 9 frames of 16x24, which take three latents."""
    about = dict(dict(model_config=model.config, fps=25.0, height=16, width=24, frames=9, tiles=""), **about)
    header = dict(dict(descr="<f4", fortran_order=False, shape=(number, 16, 2, 3)), **dict(header))
    with zipfile.ZipFile(path, "w", packed) as archive:
        with archive.open("latents.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(number * 16 * 2 * 3 * 4))
        with archive.open("about.npy", "w") as file:
            np.lib.format.write_array(file, np.array(json.dumps(about)))
    return str(path)


def test_latents_with_forged_numbers_are_refused_at_once(taehv, tmp_path):
    path = tmp_path / "a.latents.npz"
    assert codec.open_codes(write_latents(path, taehv), taehv, "", "").frames == 9
    for forged, words in (
        (dict(frames=10 ** 9), "says it has 1000000000 frames"), (dict(frames=-1), "-1 frames"),
        (dict(frames=10), "10 frames, and holds 3 latents, which are too few"), (dict(frames=0), "0 frames"),
        (dict(number=0), r"latents \(0, 16, 2, 3\)"), (dict(header=dict(shape=(10 ** 15, 16, 2, 3))), "bytes for"),
        (dict(height=10 ** 6, width=10 ** 6), "are not this model's: "), (dict(header=dict(descr="<c8")), "bytes for"),
        (dict(header=dict(descr="|O")), "layout"), (dict(header=dict(fortran_order=True)), "layout"),
        (dict(number=9000, packed=zipfile.ZIP_DEFLATED), "these are no latents"),
        (dict(variant="x" * 2 ** 21), "these are no latents"), (dict(header=dict(shape=(1, 16, 2, 3))), "bytes for"),
    ):
        with pytest.raises((latent_file.LatentFileError, codec.InputError), match=words):
            codec.open_codes(write_latents(path, taehv, **forged), taehv, "", "")


def test_tokens_with_forged_numbers_are_refused_at_once(tmp_path):
    model = models.build_model("vqgan", dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(),
                                                 resolution=32, z_channels=8, embed_dim=8, n_embed=16))
    path = str(tmp_path / "a.tokens")

    def read(vocabulary=(16,), shape=(8, 12), number=8, **about):
        about = dict(dict(model="x", fps=25.0, height=16, width=24, frames=8), **about)
        with token_file.TokenWriter(path, about, vocabulary) as writer:
            for _ in range(number):
                writer.write([np.zeros((1, *shape), np.int64) for _ in vocabulary])
        return codec.open_codes(path, model, "x", "")

    assert read().total == 8
    for forged, words in (
        (dict(frames=10 ** 9), "says it has 1000000000 frames"), (dict(frames=-1), "-1 frames"),
        (dict(frames=math.inf), "no tokens of a video"), (dict(frames=9), "9 frames, and holds 8 latents"),
        (dict(frames=7), "7 frames take 7 latents, and it holds 8"), (dict(number=0), "code maps"),
        (dict(height=10 ** 6, width=10 ** 6), "1000000x1000000"), (dict(height=0, width=0), "0x0"),
        (dict(vocabulary=(1024,)), "code maps"), (dict(vocabulary=(16, 16)), "code maps"),
        (dict(shape=(500, 600)), "code maps"),
    ):
        with pytest.raises(codec.InputError, match=words):
            read(**forged)


def test_infer_says_what_is_odd_about_a_rate(taehv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_latents("a.latents.npz", taehv, fps=1e300)
    options = "--precision fp32 --lpips none --device cpu".split()
    monkeypatch.setattr(sys, "argv", ["infer.py", "taehv.pth", "a.latents.npz", *options])
    infer.main()
    assert "a: videos are written at 25 frames/s, the source says 1e+300" in capsys.readouterr().out.replace("\n", "")
    write_latents("a.latents.npz", taehv, frames=13)
    error = mistake(capsys, monkeypatch, infer, "taehv.pth", "a.latents.npz", *options, "--out", "b")
    assert "13 frames, and holds 3 latents" in error and not os.path.exists("b")


# ---- videos that are lists of others ---------------------------------------------------------------------------------

PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile 'good.avi'\n",
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT1S"><Period>'
            '<AdaptationSet><Representation id="1" mimeType="video/mp4" bandwidth="1"><BaseURL>good.mp4</BaseURL>'
            "</Representation></AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
           "a=rtpmap:96 H264/90000\n",
}


def test_playlists_open_no_other_file(tmp_path):
    write_clip(str(tmp_path / "good.avi"), frames=3)
    write_clip(str(tmp_path / "good.mp4"), frames=3)
    for name, content in PLAYLISTS.items():
        (tmp_path / f"{name}.mp4").write_text(content)
    sources, refused = data_files.probe(data_files.find_sources(str(tmp_path)))
    assert [source.key for source in sources] == ["good.avi", "good.mp4"]
    assert [reason for _, reason in refused] == ["not a video"] * len(PLAYLISTS)


def test_a_name_is_no_pattern_and_no_address(tmp_path, monkeypatch):
    """`%d` and digits make image series of names, `concat:` and `http:` addresses; ours are the names of files."""
    good, other = (write_clip(str(tmp_path / "v" / f"{n}.avi"), frames=n) for n in (3, 5))
    monkeypatch.chdir(tmp_path)
    names = ["a%02d.avi", "a01.avi", "concat:a01.avi|a02.avi", "file:a01.avi", "pipe:0.avi", "-.avi", "a?b.avi"]
    os.makedirs("http:/127.0.0.1:1")
    for name in [*names, "http:/127.0.0.1:1/x.avi"]:
        shutil.copy(good, name)
    shutil.copy(other, "a02.avi")
    (tmp_path / "a.csv").write_text("path\n" + "\n".join([*names, "http://127.0.0.1:1/x.avi"]))
    for given in (".", "a.csv"):
        sources, refused = data_files.probe(data_files.find_sources(given))
        frames = {source.key: len(list(video_files.VideoReader(source.path))) for source in sources}
        assert not refused and {frames[name] for name in names} == {3} and len(frames) >= 8, frames


# ---- weights ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def little():
    """Ten seconds, and half a gigabyte more than there is now."""
    def too_long(*_):
        raise AssertionError("it takes too long")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    signal.signal(signal.SIGALRM, too_long)
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 ** 29, before[1]))
        signal.alarm(10)
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(path, load=models.load_model):
    with little(), pytest.raises(checkpoint.CheckpointError) as caught:
        load(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


class Stored:
    """Stands for a storage of so many float32 numbers, in a pickle."""

    def __init__(self, numbers, key="0"):
        self.about = "storage", torch.FloatStorage, key, "cpu", numbers


class Tensor:
    def __init__(self, shape, strides, stored):
        self.arguments = stored, 0, shape, strides, False, {}

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def pickled(content):
    file = io.BytesIO()
    pickler = pickle._Pickler(file, 2)
    pickler.persistent_id = lambda part: part.about if isinstance(part, Stored) else None
    pickler.dump(content)
    return file.getvalue()


def write_weights(path, content, packed=zipfile.ZIP_STORED, data=bytes(64), **parts):
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, part in {"data.pkl": content, "byteorder": b"little", "version": b"3\n", "data/0": data}.items():
            archive.writestr(f"archive/{name}", part)
    return path


def write_old_weights(path, content):
    with open(path, "wb") as file:
        for part in (0x1950a86a20f9469cfc6c, 1001, {}):
            pickle.dump(part, file, 2)
        file.write(content + pickle.dumps(["0"], 2) + struct.pack("<q", 16) + bytes(64))
    return path


NAME, PAIR = b"\x80\x02}X\1\0\0\0a", b"s."  # around a value: the pickle of {"a": value}


@pytest.mark.parametrize("content, words", [
    (pickled({"a": Tensor((10 ** 9,), (1,), Stored(10 ** 9))}), "part 0 is said to have 4000000000 bytes"),
    (pickled({"a": Tensor((100,), (1,), Stored(100))}), "part 0 is said to have 400 bytes, and has 64|in a file of"),
    (pickled({"a": Tensor((10 ** 9,), (1,), Stored(16))}), "a tensor of 1000000000 in a file of"),
    (pickled({"a": Tensor((10 ** 9,), (0,), Stored(16))}), "a tensor of 1000000000 in a file of"),
    (pickled({i: Tensor((10 ** 6,), (0,), Stored(16)) for i in range(9)}), "a tensor of 1000000 in a file of"),
    (pickled({"a": Tensor((-1,), (1,), Stored(16))}), "a size that is no number"),
    (NAME + b"cbuiltins\nbytearray\n\x8a\x05" + (10 ** 10).to_bytes(5, "little") + b"\x85R" + PAIR,
     "it has bytearray called"),
    (NAME + b"ctorch\nTensor\n\x8a\x05" + (10 ** 10).to_bytes(5, "little") + b"\x85R" + PAIR, "it has Tensor called"),
    (NAME + b"ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R" + PAIR, "it has UntypedStorage called"),
    (b"\x80\x02})" + b"\x85" * 150_000 + b"K\1" + PAIR, "keys that are no names"),  # its hash ends Python
    (NAME + b"cbuiltins\nset\n])" + b"\x85" * 150_000 + b"a\x85R" + PAIR, "keys that are no names"),
    (pickled({k * (2 ** 61 - 1): None for k in range(1, 1002)}), "keys that are no names"),  # all have one hash
    (NAME + b"c_codecs\nencode\nX\1\0\0\0aX\x08\0\0\0punycode\x86R" + PAIR, "bytes in punycode"),
    (NAME + b"]" * 2 ** 22 + PAIR, "data.pkl has more than 4 MiB"),
    (b"\x80\x02]" + b"]" * 30_000 + b"a" * 30_000 + b".", "holds a list"),
    (b"\x80\x02" + b"}X\1\0\0\0a" * 30_000 + b"N" + b"s" * 30_000 + b".", "no TAEHV weights"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_weights_that_ask_for_more_than_they_hold_are_refused_at_once(tmp_path, content, words):
    """Both formats, and .ckpt; some of these ended Python, or took all memory, or hours."""
    assert re.search(words, refusal(write_weights(tmp_path / "a.pth", content)))
    if len(content) < 20_000:
        for path in (write_old_weights(tmp_path / "old.pth", content), write_weights(tmp_path / "a.ckpt", content)):
            assert re.search(words, refusal(path))


def test_archives_that_unpack_to_gigabytes_are_refused_at_once(tmp_path):
    content = pickled({"a": Tensor((2 ** 25,), (1,), Stored(2 ** 25))})
    path = write_weights(tmp_path / "a.pth", content, zipfile.ZIP_DEFLATED, bytes(2 ** 27))
    assert os.path.getsize(path) < 2 ** 18 and "would unpack to 134217" in refusal(path)
    os.rename(path, tmp_path / "a.ckpt")
    assert "would unpack to 134217" in refusal(tmp_path / "a.ckpt")
    with pytest.raises(teachers.TeacherError, match="would unpack to 134217"), little():
        teachers.load_teacher(f"torchscript:{tmp_path / 'a.ckpt'}")
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("a/data.pkl", pickled({}))
    assert "parts of the same name" in refusal(path)


def test_safetensors_that_ask_for_more_than_they_hold_are_refused_at_once(tmp_path):
    pytest.importorskip("safetensors")
    one = dict(dtype="F32", shape=[1], data_offsets=[0, 4])
    names = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight",
             "encoder.conv_out.weight", "quantize.embedding.weight")
    empty = {name: dict(dtype="F32", shape=[2 ** 20, 3, 0, 0][:4 if "in" in name else 2], data_offsets=[0, 0])
             for name in names}
    for header, length in (({}, 2 ** 60), ({}, 2 ** 30), ({"a": dict(one, shape=[10 ** 9] * 3)}, 0), (empty, 0),
                           ({"a": dict(one, shape=[10 ** 9], data_offsets=[0, 4 * 10 ** 9])}, 0),
                           ({"a": one, "b": one}, 0)):
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length or len(text)) + text + bytes(4))
        refusal(tmp_path / "a.safetensors")


SMALL = dict(ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), resolution=32, z_channels=8, embed_dim=8,
             n_embed=16)


@pytest.mark.parametrize("name, settings", [
    ("vqgan", dict(SMALL, ch=32 * 200)), ("vqgan", dict(SMALL, ch=32 * 20_000)),
    ("vqgan", dict(SMALL, num_res_blocks=10 ** 6)), ("vqgan", dict(SMALL, n_embed=10 ** 9)),
    ("vqgan", dict(SMALL, n_embed=3 * 10 ** 7, quantizer="ema")),
    ("vqgan", dict(SMALL, quantizer="fsq", embed_dim=3, levels=(1000, 100, 1000))),
    ("vqgan", dict(SMALL, quantizer="rvq", depth=10 ** 6)),
    ("vqvae2", dict(nb_levels=10 ** 5, scaling_rates=[2] * 10 ** 5)), ("vqvae2", dict(nb_res_layers=10 ** 6)),
    ("vqvae_video", dict(vocab_size=10 ** 8)), ("taehv", dict(encoder_widths=(20_000,) * 4)),
    ("taehv", dict(patch_size=100)), ("vq_latents", dict(blocks=10 ** 6)),
    ("dcae", dict(width_list=(128,) * 6, encoder_depth_list=(10 ** 6,) * 6, decoder_depth_list=(1,) * 6)),
])
def test_a_checkpoint_that_asks_for_a_model_larger_than_itself_is_refused_at_once(tmp_path, name, settings):
    torch.save(dict(model_name=name, model_config=settings, ema={"a": torch.zeros(1)}, step=1), tmp_path / "a.pt")
    words = "than the file can hold weights for|can't allocate memory|net.* at most|net.levels"
    assert re.search(words, refusal(tmp_path / "a.pt"))


def test_weights_whose_shapes_ask_for_a_larger_model_are_refused_at_once(tmp_path):
    thin = {"encoder.conv_in.weight": (3200, 3), "encoder.down.0.block.0.conv1.weight": (3200,),
            "quant_conv.weight": (4,), "encoder.conv_out.weight": (4,), "quantize.embedding.weight": (16, 4)}
    for suffix in ("ckpt", "pth"):
        torch.save({"state_dict": {k: torch.zeros(shape) for k, shape in thin.items()}}, tmp_path / f"a.{suffix}")
        assert "than the file can hold weights for" in refusal(tmp_path / f"a.{suffix}")
    last = "encoder.project_out.main.op_list.0.conv.weight"
    for names in ([f"codebooks.0.{i}" for i in range(9)] + [f"encoders.{i}.x" for i in range(9000)],
                  [last] + [f"encoder.stages.{i}.x.x" for i in range(9000)]):
        torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "a.pth")  # which took minutes
        assert re.search("9000 (levels|stages)", refusal(tmp_path / "a.pth"))


def test_a_run_does_not_go_on_from_impossible_numbers(here, tmp_path):
    state = torch.load(here(*FRAMES, "max_steps=1", "name=a") / "step_00000001.pt", weights_only=True)
    for forged in (dict(samples=2 ** 62), dict(seconds=-1e300), dict(seconds=math.nan)):
        torch.save({**state, **forged}, tmp_path / "forged.pt")
        with pytest.raises(config.ConfigError, match="counts impossible steps, samples or seconds"):
            here(*FRAMES, "max_steps=2", "name=b", f"resume={tmp_path / 'forged.pt'}")


def test_every_command_refuses_forged_weights_in_one_line(tmp_path, monkeypatch, capsys):
    """Whichever way they come: each of these took all memory."""
    monkeypatch.chdir(tmp_path)
    write_clip(str(tmp_path / "v" / "a.avi"), frames=2)
    write_weights("a.pth", pickled({"a": Tensor((10 ** 9,), (0,), Stored(16))}))
    os.mkdir("run")
    shutil.copy("a.pth", "run/step_00000001.pt")
    cached = "--data v --out cache --clips 1 --workers 0 --precision fp32 --device cpu --teacher".split()
    words = "a tensor of 1000000000 in a file of"
    for module, arguments in (
            (infer, ["a.pth", "v", "--precision", "fp32"]), (infer, ["run", "v", "--precision", "fp32"]),
            (infer, ["taehv:a.pth", "v", "--precision", "fp32"]), (latent_cache, [*cached, "taehv:a.pth"]),
            (train, ["taehv", *COMMON, "data=v", "name=b", "init_from=a.pth"]),
            (train, [*FRAMES, "data=v", "name=c", "resume=a.pth"])):
        error = mistake(capsys, monkeypatch, module, *arguments)
        assert words in error or arguments[0] == "run" and "holds no best.pt" in error, error


def test_settings_beside_weights_are_believed_no_more_than_the_weights(taehv, tmp_path):
    path, settings = tmp_path / "model.pth", dict(model="taehv", variant="", patch_size=0, latent_channels=0, net={})
    torch.save(taehv.state_dict(), path)
    honest = dict(settings, net=dict(encoder_widths=[8] * 4, decoder_widths=[16, 8, 8, 8]))
    for about in (honest, [], None, 7, {}, {"model": {}}, {"model": "of another program"}):
        (tmp_path / "config.json").write_text(json.dumps(about))
        assert models.load_model(path)[0].decoder_widths == (16, 8, 8, 8)
    os.symlink("/dev/zero", tmp_path / "zero")
    for text, words in ((json.dumps(dict(settings, net=dict(encoder_widths=[3000] * 4))), "can hold weights for"),
                        (json.dumps(dict(settings, net=[1])), "its net is no object"),
                        ('{"model": "taehv"}', "has no 'variant'"), ("{", "cannot be read as JSON"),
                        ("[" * 10 ** 5, "maximum recursion"), (" " * (2 ** 20 + 1), "more than 1 MiB"),
                        (json.dumps(dict(settings, variant=str(path))), "another file of weights"),
                        (json.dumps(dict(settings, net=dict(checkpoint_path="taew2_1"))), "another file of weights")):
        (tmp_path / "config.json").write_text(text)
        assert words in refusal(path)


def test_a_checkpoint_opens_no_other_file(taehv, tmp_path):
    """TAEHV(path) reads that file."""
    other = str(tmp_path / "taehv.pth")
    for settings in (dict(variant=other), dict(checkpoint_path=other), dict(checkpoint_path="taew2_1")):
        for name, net in (("taehv", settings), ("vq_latents", dict(taehv=settings))):
            torch.save(dict(model_name=name, model_config=net, ema=taehv.state_dict(), step=1), tmp_path / "a.pt")
            assert "another file of weights, which is not read" in refusal(tmp_path / "a.pt")


# ---- files that are none, and lists of files -------------------------------------------------------------------------


def odd_files(folder, name):
    """The path, as a FIFO that nobody writes to, as an endless device, and as a socket."""
    path = folder / name
    for kind in ("fifo", "device", "socket"):
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            os.symlink("/dev/zero", path)
        else:
            os.mknod(path, stat.S_IFSOCK | 0o600)
        yield path


READERS = {
    "a.pth": models.load_model, "a.ckpt": models.load_model, "a.safetensors": models.load_model,
    "step_00000001.pt": lambda path: models.load_model(os.path.dirname(path)), "resume.pt": checkpoint.read,
    "t.pt": lambda path: teachers.load_teacher(f"torchscript:{path}"),
    "t.py": lambda path: teachers.load_teacher(f"python:{path}:f"),
    "a.json": data_files.find_sources, "a.csv": data_files.find_sources, "config.json": lambda path: config.load_config([path]),
    "tasks.json": launch.read_tasks, "a.latents.npz": lambda path: inputs.find_inputs([path]),
    "a.tokens": lambda path: inputs.find_inputs([path]), "a.mp4": lambda path: inputs.find_inputs([path]),
    "index.json": lambda path: latent_cache.prepare_folder(os.path.dirname(path), {}),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name):
    """A FIFO was waited for without end, /dev/zero filled the memory."""
    for path in odd_files(tmp_path, name):
        with little(), pytest.raises((*inputs.MISTAKES, config.ConfigError)) as caught:
            READERS[name](str(path))
        assert "\n" not in str(caught.value)
    for path in odd_files(tmp_path, "step_00000001.rank0"):
        with little():
            state, problem = checkpoint.read_rank(str(tmp_path / "step_00000001.pt"), 0)
        assert state is None and "step_00000001.rank0" in problem


@pytest.fixture
def forged(cache, tmp_path):
    """A copy of a cache, and a function that changes its index and sets the checksum right."""
    shutil.copytree(cache, tmp_path / "cache")

    def change(path, value):
        index = json.loads((tmp_path / "cache" / "index.json").read_text())
        index.pop("crc32")
        *path, last = path
        functools.reduce(lambda part, key: part[key], path, index)[last] = value
        cache_files.write_index(str(tmp_path / "cache"), index)

    change.folder = tmp_path / "cache"
    return change


def cache_refusal(folder):
    with little(), pytest.raises(video_files.DataError) as caught:
        if problem := cache_files.LatentCache(str(folder)).problem():
            raise video_files.DataError(problem)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


def test_parts_of_a_cache_that_are_no_files_are_refused_at_once(forged):
    for name in ("index.json", "shard_00000.json", "shard_00000.clips.npy", "shard_00001.latents.npy"):
        content = (forged.folder / name).read_bytes()
        for path in odd_files(forged.folder, name):
            assert "damaged, or no cache" in cache_refusal(forged.folder)
            with little():
                assert name.startswith("index") or not cache_files.shard_is_done(str(forged.folder), int(name[10]), 4)
        path.unlink()
        path.write_bytes(content)
    assert cache_files.LatentCache(str(forged.folder)).problem() == ""


@pytest.mark.parametrize("path, value, words", [
    (["shards", 0, "clips"], 10 ** 12, "clips of shape"), (["shards", 0, "clips"], -4, "clips of shape"),
    (["size"], 10 ** 9, "clips of shape"), (["frames"], 10 ** 30, "clips of shape"),
    (["latents"], [10 ** 6, 10 ** 6, 1, 1], "latents of shape"), (["latents"], [0, 16, 4, 4], "latents of shape"),
    (["shards", 0, "crc32"], {"x/../../../../etc/passwd": 0}, "has no part 'x/../../../../etc/passwd'"),
    (["shards"], [dict(clips=4, crc32={})] * 10 ** 4, "shard_00003.clips.npy is missing"),
    (["shards"], [dict(clips=10 ** 7, crc32={})], "clips of shape"), (["latent_dtype"], "object", "KeyError"),
])
def test_an_index_is_believed_no_more_than_its_shards(forged, path, value, words):
    forged(path, value)
    if words.startswith("shard_"):
        forged(["shards"], json.loads((forged.folder / "index.json").read_text())["shards"][:3] + value)
        words = "clips of shape|is missing"
    assert re.search(re.escape(words) if "|" not in words else words, cache_refusal(forged.folder))


def test_shards_with_forged_headers_are_refused_at_once(forged):
    name, arrays = forged.folder / "shard_00000.clips.npy", io.BytesIO()
    np.savez_compressed(arrays, a=np.zeros(2 ** 22, np.uint8))

    def header(**about):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, dict(dict(descr="|u1", fortran_order=False, shape=(1,)), **about))
        return file.getvalue() + bytes(64)

    for content in (header(shape=(10 ** 12,)), header(shape=(10 ** 30,)), header(descr="|O"), arrays.getvalue(),
                    header(descr=[("x" * 9, "|u1")] * 1), pickle.dumps([]), b"\x93NUMPY\2\0\xff\xff\xff\xff",
                    header(shape=(4, 12, 32, 32, 3), descr="|V100000")):
        name.write_bytes(content)
        assert "damaged, or no cache" in cache_refusal(forged.folder)
        assert not cache_files.shard_is_done(str(forged.folder), 0, 4)


def test_lists_that_are_too_long_or_deep_are_refused_at_once(tmp_path, forged):
    for name, most in (("a.json", data_files.MAX_LIST), ("config.json", 1 << 20), ("tasks.json", 1 << 20)):
        for deep in (True, False):
            (tmp_path / name).write_text("[" * 10 ** 5 if deep else "")
            if not deep:
                os.truncate(tmp_path / name, most + 1)
            with little(), pytest.raises((video_files.DataError, config.ConfigError)) as caught:
                READERS[name](str(tmp_path / name))
            assert ("maximum recursion" if deep else f"more than {most >> 20} MiB") in str(caught.value)
    for name, most in (("shard_00000.json", 2 ** 20 + os.path.getsize(forged.folder / "shard_00000.clips.npy")),
                       ("index.json", cache_files.MAX_INDEX)):
        (forged.folder / name).write_text("[" * 10 ** 5)
        assert "maximum recursion" in cache_refusal(forged.folder)
        os.truncate(forged.folder / name, most + 1)
        assert "more than" in cache_refusal(forged.folder)

