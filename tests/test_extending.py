"""docs/extending.md: each of its diffs applies to the repository as it is, and what they add runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, write_clip

with open(os.path.join(ROOT, "docs", "extending.md"), encoding="utf-8") as page:
    DIFFS = re.findall(r"^## A (\w+)$.*?^```diff\n(.*?)^```$", page.read(), re.M | re.S)

SCRIPT = """
import sys
from check_config import ConfigError
from config import load_config
import infer, train

common = ("data=clips.txt size=32 frames=4 batch_size=2 workers=0 val_fraction=0 schedule=constant precision=fp32 "
          "device=cpu log_every=1").split()
small = "net.ch=32 net.ch_mult=(1,1) net.num_res_blocks=1 net.attn_resolutions=() net.resolution=32 net.z_channels=8"
codes = [*small.split(), *"net.quantizer=sign net.embed_dim=8 net.n_embed=256 perceptual_weight=0".split()]
try:
    load_config(["vqgan", "edge_weight=-0.5"])
except ConfigError as error:
    assert str(error) == "edge_weight=-0.5: at least 0 is wanted"
else:
    raise AssertionError("a weight below 0 was taken")
train.train(load_config(["vqgan", "name=codes", "pixel_weight=0", "edge_weight=0.5", "gan_weight=0", "max_steps=2",
                         *codes, *common]))
train.train(load_config(["patches", "max_steps=2", "val_data=clips.txt", "val_clips=2", *common]))
sys.argv = "infer.py runs/patches clips/a.mp4 --lpips none --max-frames 4 --device cpu --precision fp32".split()
infer.main()
"""


def apply(diff, folder, *options):
    """git refuses a diff whose lines are not there exactly."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(["git", "apply", *options], cwd=folder, env=environment, input=diff, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copy(tmp_path):
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    return tmp_path


def test_each_diff_applies_alone_and_touches_as_few_files_as_the_page_says(copy):
    touched = {}
    for name, diff in DIFFS:
        apply(diff, copy, "--check")
        touched[name] = re.findall(r"^\+\+\+ b/(\S+)", diff, re.M)
    assert touched == {"model": ["config.py", "model_patches.py", "models.py"],
                       "loss": ["config.py", "losses.py", "objective.py"],
                       "metric": ["metrics.py"], "quantizer": ["quantize.py", "quantize_binary.py"],
                       "dataset": ["data_files.py"]}


def test_what_the_diffs_add_runs(copy):
    for _, diff in DIFFS:
        apply(diff, copy)
    write_clip(str(copy / "clips" / "a.mp4"))
    (copy / "clips.txt").write_text("clips/a.mp4\n")
    (copy / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "script.py"], cwd=copy, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    log = (copy / "runs" / "codes" / "train.log").read_text()
    assert '"quantizer": "sign"' in log and "training: 1 files" in log
    terms = re.search(r"step 2: .*edge (\S+), vq (\S+), codes used (\S+) %", log)
    assert terms and all(float(value) > 0 for value in terms.groups())
    assert re.search(r"step 2: validation .* mae 0\.\d+", (copy / "runs" / "patches" / "train.log").read_text())
    row, = json.loads((copy / "inference_results" / "metrics.json").read_text())["rows"]
    assert 0 < row["metrics"]["mae"] < 1 and f"{row['metrics']['mae']:.5f}" in done.stdout
    assert re.search(r"PSNR dB +MAE +SSIM", done.stdout)
    assert "<th>MAE<" in (copy / "inference_results" / "summary_report.html").read_text()
