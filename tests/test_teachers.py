"""Teachers whose output is not what it was at first: what latent_cache.py, infer.py and train.py make of it."""
import json
import os
import re
import sys

import numpy as np
import pytest

import cache_files
import data_files
import latent_cache
import train
from compare import TeacherPass
from conftest import SMALL_CACHE, mistake, write_clip
from teachers import TeacherError, load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

# Averages of 8 x 8 pixels and 4 frames, three channels; from its sixth clip on they are what FAULT, a file beside it,
# says. 12 frames of 32 x 32 give 3 x 3 x 4 x 4.
FAULTY = """
import os
import torch
import torch.nn.functional as F
class Faulty:
    seen, buffer = 0, torch.zeros(2, 3, 3, 4, 4)
    def encode(self, video):
        self.seen += len(video)
        latents = F.avg_pool3d(video.transpose(1, 2), (4, 8, 8)).transpose(1, 2)
        fault = os.path.join(os.path.dirname(__file__), "FAULT")
        if self.seen > 5 and os.path.exists(fault):
            return eval(open(fault).read(), {"torch": torch, "z": latents, "self": self})
        return latents
    def decode(self, latents):
        video = F.interpolate(latents.transpose(1, 2), scale_factor=(4, 8, 8)).transpose(1, 2)
        fault = os.path.join(os.path.dirname(__file__), "DECODES")
        return eval(open(fault).read(), {"torch": torch, "v": video, "z": latents}) if os.path.exists(fault) else video
def make():
    return Faulty()
"""


@pytest.fixture
def faulty(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    return f"python:{tmp_path / 'faulty.py'}:make"


FAULTS = {  # what encode gives from the second shard on: what is said of it
    "z[:, :2]": "gave float32 (2, 2, 3, 4, 4); floating-point latents (2, 3, 3, 4, 4) are wanted (clip 1 of",
    "torch.cat([z, z], 1)": "gave float32 (2, 6, 3, 4, 4); ",
    "z[:, :, :2]": "gave float32 (2, 3, 2, 4, 4); ",
    "z.transpose(0, 1)": "gave float32 (3, 2, 3, 4, 4); ",
    "z.reshape(2, 3, 3, 2, 8)": "gave float32 (2, 3, 3, 2, 8); ",
    "z[:, :0]": "gave float32 (2, 0, 3, 4, 4); ",
    "z.round().long()": "gave int64 (2, 3, 3, 4, 4); ",
    "z + 1j": "gave complex64 (2, 3, 3, 4, 4); ",
    "z.numpy()": "gave ndarray; ",
    "(z, z)": "gave tuple; ",
    "z * torch.tensor([1, float('nan')]).view(2, 1, 1, 1, 1)": "gave numbers that are not finite (clip 2 of",
    "z + torch.tensor([0, 9e4]).view(2, 1, 1, 1, 1)": "not finite as float16: try --latent-dtype bfloat16 (clip 2 of",
    "self.missing": "encode raised AttributeError: 'Faulty' object has no attribute 'missing' (clip 1 of",
}
FINE = ["z.clone().requires_grad_()", "self.buffer.copy_(z)", "z.double()"]


@pytest.fixture(scope="module")
def sound(clips, tmp_path_factory):
    """The cache of that teacher without a fault: the content of its files."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "faulty.py").write_text(FAULTY)
    options = latent_cache.parse(asked(f"python:{folder / 'faulty.py'}:make", clips, folder / "cache"))
    latent_cache.build(options)
    return content(folder / "cache")


def asked(spec, clips, out):
    return ["--teacher", spec, "--data", clips, "--out", str(out), *SMALL_CACHE, "--device", "cpu"]


def content(cache):
    return {path.name: path.read_bytes() for path in cache.iterdir() if path.name.startswith("shard_")}


@pytest.mark.parametrize("fault", [*FAULTS, *FINE])
def test_each_batch_of_a_teacher_is_compared_with_the_plan(fault, faulty, sound, clips, tmp_path, monkeypatch, capsys):
    (tmp_path / "FAULT").write_text(fault)
    monkeypatch.setattr(sys, "argv", ["latent_cache.py", *asked(faulty, clips, tmp_path / "cache")])
    with pytest.raises(SystemExit) as end:
        latent_cache.main()
    printed = capsys.readouterr().err.strip().splitlines()
    if fault in FAULTS:
        assert end.value.code == 2 and f"latent_cache.py: teacher {faulty}: " in printed[-1]
        assert FAULTS[fault] in printed[-1] and ".mp4 from frame " in printed[-1] and "(clip " in printed[-1]
        traceback = [line for line in printed[:-1] if "Traceback" in line or "faulty.py" in line]
        assert bool(traceback) == ("raised" in FAULTS[fault])  # of the teacher's own error
        assert {name for name in content(tmp_path / "cache") if "tmp" not in name} == {
            name for name in sound if "_00000." in name}
        os.remove(tmp_path / "FAULT")
        with pytest.raises(SystemExit) as end:
            latent_cache.main()
        assert "4 of them from before" in capsys.readouterr().out
    assert end.value.code == 0 and content(tmp_path / "cache") == sound


DECODES = {  # what decode gives: what is said of it
    "v[:, :, :2]": "gave float32 (1, 12, 2, 32, 32); a floating-point video N T 3 H W is wanted",
    "(v * 255).byte()": "gave uint8 (1, 12, 3, 32, 32); ",
    "v.repeat(2, 1, 1, 1, 1)": "gave float32 (2, 12, 3, 32, 32); ",
    "v * float('nan')": "gave numbers that are not finite",
    "torch.complex(v, v)": "gave complex64 ",
    "z.numpy()": "gave ndarray; "}


def test_what_a_teacher_decodes_is_looked_at_too(faulty, tmp_path):
    source = data_files.Source(write_clip(str(tmp_path / "a.mp4"), frames=12, height=32, width=32), "a.mp4")
    for fault, said in DECODES.items():
        (tmp_path / "DECODES").write_text(fault)
        with pytest.raises(TeacherError, match="^teacher python:.*: decode, given latents of shape .1, 3, 3, 4, 4., "
                           + re.escape(said)):
            TeacherPass(load_teacher(faulty), source, 12, 4, 8)


def test_latents_are_kept_from_a_teacher_that_writes_to_them_again(faulty, tmp_path):
    source = data_files.Source(write_clip(str(tmp_path / "a.mp4"), frames=24, height=32, width=32), "a.mp4")
    expected = TeacherPass(load_teacher(faulty), source, 24, 4, 8, chunk=12)
    (tmp_path / "FAULT").write_text("self.buffer[:1].copy_(z)")
    (tmp_path / "DECODES").write_text("(v, z.zero_())[0]")
    teacher = load_teacher(faulty)
    teacher.source.seen = 5
    found = TeacherPass(teacher, source, 24, 4, 8, chunk=12)
    assert np.array_equal(found.latents, expected.latents) and found.count == 24


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_training_refuses_a_cache_whose_latents_are_not_finite(dtype, faulty, clips, tmp_path, monkeypatch, capsys):
    """One that another program made: its checksums are right."""
    folder = tmp_path / "cache"
    latent_cache.build(latent_cache.parse([*asked(faulty, clips, folder), "--latent-dtype", dtype]))
    common = [f"latent_cache={folder}", "patch_size=1", "latent_channels=3", "size=32", "frames=12", "max_steps=1",
              "device=cpu", "precision=fp32", "name=run", f"out_dir={tmp_path}", "warmup_steps=0", "workers=0"]
    array = np.load(folder / "shard_00001.latents.npy", mmap_mode="r+")
    array[1, 2, 0, 3, 3] = 0x7fc0 if dtype == "bfloat16" else np.inf
    array.flush()
    about = json.loads((folder / "shard_00001.json").read_text())
    about["crc32"]["latents.npy"] = cache_files.file_crc(folder / "shard_00001.latents.npy")
    (folder / "shard_00001.json").write_text(json.dumps(about))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["crc32"] = {**about["crc32"], "json": cache_files.file_crc(folder / "shard_00001.json")}
    index.pop("crc32")
    cache_files.write_index(folder, index)
    capsys.readouterr()
    said = mistake(capsys, monkeypatch, train, "taehv_distill", *common)
    assert said.endswith("shard_00001.latents.npy holds latents that are not finite: build it again")
