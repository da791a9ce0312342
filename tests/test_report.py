"""The report: files, escaping, and that a browser plays it (skipped where there is no Chromium)."""

import http.server
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile

import cv2
import numpy as np
import pytest

import pictures
import report
import video_writer

FRAME = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
EVIL = "<img src=x onerror=\"document.title='pwned'\">&'#50%? \u202e"


def write(path, frame=FRAME, count=5, fps=25):
    with video_writer.VideoWriter(str(path), fps, frame.shape[1], frame.shape[0]) as writer:
        for _ in range(count):
            writer.write(frame)
    return writer


def probe(path):
    capture, count = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), 0
    while capture.grab():
        count += 1
    return count, capture.get(cv2.CAP_PROP_FPS), int(capture.get(4)), int(capture.get(3))


def test_videos_of_any_rate_and_size(tmp_path, video_encoder):
    for fps in (0.5, 12.5, 24000 / 1001, 29.97, 120):
        assert not write(tmp_path / "a.webm", fps=fps).note
        assert probe(tmp_path / "a.webm")[1] == pytest.approx(fps, abs=0.01)
    for fps in (0, None, math.nan, 90000):
        writer = write(tmp_path / "a.webm", fps=fps)
        assert writer.fps == probe(tmp_path / "a.webm")[1] == 25 and str(fps) in writer.note
    write(tmp_path / "a.webm", np.full((75, 43, 3), (200, 40, 90), np.uint8), 1)
    assert probe(tmp_path / "a.webm") == (1, 25, 76, 44)
    back = cv2.VideoCapture(str(tmp_path / "a.webm")).read()[1][..., ::-1]
    assert np.abs(back.astype(int) - (200, 40, 90)).max() < 12


def test_frames_come_back_each_with_its_colours_and_at_its_time(tmp_path, video_encoder):
    """Colours all over the cube, in a picture that moves; OpenCV reads it back, by BT.601 and the limited range."""
    colours = np.stack(np.meshgrid(*[np.linspace(0, 255, n) for n in (8, 8, 6)], indexing="ij"), -1)
    picture = cv2.resize(colours.reshape(16, 24, 3).astype(np.uint8), (192, 128), interpolation=cv2.INTER_NEAREST)
    frames = [np.roll(picture, 16 * t, 1) for t in range(12)]
    with video_writer.VideoWriter(str(tmp_path / "a.webm"), 24000 / 1001, 192, 128) as writer:
        for frame in frames:
            writer.write(frame)
    capture = cv2.VideoCapture(str(tmp_path / "a.webm"), cv2.CAP_FFMPEG)
    for number, frame in enumerate(frames):
        back = capture.read()[1][..., ::-1].astype(int)
        assert np.abs(back - frame).mean((0, 1)).max() < 12 and np.abs((back - frame).mean((0, 1))).max() < 4
        assert capture.get(cv2.CAP_PROP_POS_MSEC) == pytest.approx(1000 * number * 1001 / 24000, abs=1)
    assert not capture.read()[0]


def test_what_writes_the_videos(tmp_path, video_encoder, monkeypatch):
    def written_by():
        with video_writer.VideoWriter(str(tmp_path / "a.webm"), 25, 128, 96) as writer:
            writer.write(FRAME)
        return type(writer._encoder).__name__
    assert written_by() == f"_Through{video_encoder}"
    monkeypatch.setattr(video_writer, "ENCODER", "libnone")
    assert written_by() == "_ThroughOpenCV", "a PyAV that was built without libvpx"


def test_no_half_video_and_no_silent_failure(tmp_path, video_encoder):
    write(tmp_path / "a.webm", count=3)
    with pytest.raises(KeyError), video_writer.VideoWriter(str(tmp_path / "a.webm"), 25, 128, 96) as writer:
        writer.write(FRAME)
        raise KeyError
    with (
        pytest.raises(ValueError, match="takes uint8"),
        video_writer.VideoWriter(str(tmp_path / "a.webm"), 25, 128, 96) as writer,
    ):
        writer.write(FRAME[:-1])
    with pytest.raises(OSError, match="no frame"):
        write(tmp_path / "a.webm", count=0)
    assert os.listdir(tmp_path) == ["a.webm"] and probe(tmp_path / "a.webm")[0] == 3
    (tmp_path / ".b.webm.part.webm").symlink_to(tmp_path / "nowhere" / "b.webm")
    with pytest.raises(OSError, match=r"cannot write .*b\.webm \(128x96, 25 frames/s\): is the folder writable"):
        write(tmp_path / "b.webm")


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.parametrize("room", ["100 bytes", "half", "all but a byte"])
def test_a_full_disk_is_noticed(room, tmp_path, video_encoder):
    """At the first bytes, among the frames, or at the last byte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write(tmp_path / "whole.webm", count=40)
    whole = os.path.getsize(tmp_path / "whole.webm")
    size = {"100 bytes": 100, "half": whole // 2, "all but a byte": whole - 1}[room]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        with pytest.raises(OSError, match=r"File too large|is the disk full\?"):
            write(tmp_path / "a.webm", count=40)
        with pytest.raises(KeyError), video_writer.VideoWriter(str(tmp_path / "a.webm"), 25, 128, 96) as writer:
            writer.write(FRAME)
            raise KeyError
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["whole.webm"]


def test_names_are_safe_and_unique():
    taken = set()
    names = [
        report.safe_name(p, taken) for p in ("a/x.mp4", "b/x.mp4", "X.avi", "..", "", EVIL, "a b%20?.mp4", "é" * 300)
    ]
    assert len({n.casefold() for n in names}) == len(names) == len(taken)
    assert all(n and not set(n) & set('/\\<>:"|?*%# ') and len(n.encode()) < 140 for n in names)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 4, 9), (20, 16, 8, 8), (2, 128, 3, 2)])
def test_latent_pictures(shape):
    latents = np.random.default_rng(0).normal(size=shape)
    picture = pictures.latent_picture(latents)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 1
    assert np.array_equal(picture, pictures.latent_picture(latents))
    pictures.latent_picture(np.zeros(shape))
    latents.flat[0] = np.nan
    assert not np.array_equal(picture, pictures.latent_picture(latents))


def make_report(folder):
    videos = {}
    for label, name in (("original", "a.webm"), (EVIL, "b #50%25?&'\"<script>é.webm")):
        write(folder / "videos" / name, count=9)
        videos[label] = f"videos/{name}"
    cv2.imwrite(str(folder / "latents.png"), pictures.latent_picture(np.random.default_rng(0).normal(size=(1, 3, 4, 4))))
    row = dict(
        name=EVIL,
        source=EVIL,
        frames=9,
        fps=25.0,
        height=96,
        width=128,
        latent_shape=[1, 3, 4, 4],
        notes=[EVIL],
        metrics=dict(psnr=math.inf, mse=0.0, ssim=1.0, lpips=None),
        encode_seconds=0.1,
        decode_seconds=0.2,
        encode_fps=50.0,
        decode_fps=40.0,
        peak_memory_mb=100.0,
        videos=videos,
        latent_picture="latents.png",
    )
    teacher = dict(metrics=dict(psnr=32.0, mse=6e-4, ssim=0.95, lpips=None), decode_seconds=2.0, latent_error=0.1)
    other = dict(row, name="plain", metrics=dict(psnr=30.0, mse=1e-3, ssim=0.9, lpips=None), teacher=teacher)
    return report.write_report(
        str(folder), [row, other, dict(name=EVIL, source=EVIL, failed=EVIL)], {"model": EVIL, EVIL: EVIL}
    )


def test_report_is_strict_json_and_escaped_html(tmp_path):
    page = open(make_report(tmp_path), encoding="utf-8").read()

    def never(token):
        raise AssertionError(token)

    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=never)
    assert content["summary"]["ours"]["psnr"] == {"mean": 30.0, "std": None, "count": 1}
    assert content["summary"]["ours"]["ssim"]["std"] == pytest.approx(0.1 / math.sqrt(2))
    assert content["summary"]["versus_teacher"]["psnr"] == -2.0 and content["summary"]["failed"] == 1
    assert "LPIPS</th>" not in page and "LPIPS<small>" not in page, "nobody has it"
    assert "PSNR<small>" in page and "∞" in page
    assert "<img src=x" not in page and "<script" not in page and "http:" not in page


SCRIPT = """<script>addEventListener("load", async () => {
  const videos = [];
  for (const video of document.querySelectorAll("video")) {
    video.loop = false;
    const end = new Promise(done => ["ended", "error"].forEach(name => video.addEventListener(name, done)));
    await video.play().catch(() => 0);
    await Promise.race([end, new Promise(done => setTimeout(done, 15000))]);
    videos.push({error: video.error && video.error.message, ended: video.ended, width: video.videoWidth,
                 at: video.currentTime});
  }
  const images = [...document.images].map(image => { image.loading = "eager"; return image });
  await Promise.all(images.map(image => image.decode().catch(() => 0)));
  fetch("http://127.0.0.1:PORT/", {method: "POST", mode: "no-cors", body: JSON.stringify({videos, title: document.title,
    handlers: document.querySelectorAll("[onerror],[onload]").length, images: images.map(i => i.naturalWidth)})});
});</script>"""


def play(page):
    """Open a copy of a report in headless Chromium, play every video to its end, return what the page saw."""

    class Inbox(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Inbox)
    server.timeout, server.result = 100, None
    with open(page, encoding="utf-8") as file:
        text = file.read().replace("</body>", SCRIPT.replace("PORT", str(server.server_port)) + "</body>")
    copy = os.path.join(os.path.dirname(os.path.abspath(page)), "played.html")
    with open(copy, "w", encoding="utf-8") as file:
        file.write(text)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [
                shutil.which("chromium"),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--remote-debugging-port=0",
                "--autoplay-policy=no-user-gesture-required",
                "file://" + copy,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            server.handle_request()
        finally:
            browser.terminate()
            browser.wait()
            server.server_close()
            os.remove(copy)
    return server.result


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_plays_the_videos(tmp_path):
    seen = play(make_report(tmp_path))
    assert len(seen["videos"]) == 4 and all(
        v["error"] is None and v["ended"] and v["width"] == 128 and v["at"] > 0 for v in seen["videos"]
    )
    assert seen["images"] == [seen["images"][0]] * 2 and seen["images"][0] > 0
    assert seen["handlers"] == 0 and seen["title"].startswith("Reconstructions")
