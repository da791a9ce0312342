"""The commands themselves, on one and two CPU ranks, with small clips: train, resume, stop, fail, reconstruct."""

import json
import os
import re
import shlex
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest
import torch

import checkpoint
import config
import data
import infer
import latent_cache
import models
import train
from conftest import NARROW, ROOT, command, mistake, run, write_clip
from model_taehv import TAEHV

TRAIN, INFER = os.path.join(ROOT, "train.py"), os.path.join(ROOT, "infer.py")
FP32 = ("--precision", "fp32")
PLAIN = [
    "taehv",
    "size=16",
    "frames=4",
    "batch_size=1",
    "workers=0",
    "val_fraction=0",
    "warmup_steps=2",
    "schedule=constant",
    "precision=fp32",
    "device=cpu",
    "log_every=1",
    "save_every=100",
    "val_every=100",
    "color_jitter=0.1",
]
SMALL = [*PLAIN, *NARROW]


def weights(folder, step):
    state = checkpoint.read(os.path.join(folder, f"step_{step:08d}.pt"))
    return {**{f"model.{k}": v for k, v in state["model"].items()}, **{f"ema.{k}": v for k, v in state["ema"].items()}}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    """A run folder after 4 steps of two ranks, with validation; and the folder it lies in."""
    folder = tmp_path_factory.mktemp("trained")
    output = run(
        TRAIN,
        *PLAIN,
        f"data={clips}",
        "val_fraction=0.3",
        "max_steps=4",
        "val_every=2",
        "save_every=2",
        "name=two",
        "val_clips=3",
        ranks=2,
        cwd=folder,
    )
    return folder, str(folder / "runs" / "two"), output


def test_two_ranks_equal_one_with_accumulation(clips, tmp_path):
    common = [*SMALL, f"data={clips}", "max_steps=5"]
    run(TRAIN, *common, "name=two", ranks=2, cwd=tmp_path)
    run(TRAIN, *common, "name=one", "accumulation=2", cwd=tmp_path)
    run(TRAIN, *common, "name=other", "accumulation=2", "seed=1", cwd=tmp_path)
    two, one, other = (weights(tmp_path / "runs" / name, 5) for name in ("two", "one", "other"))
    assert largest_difference(two, one) < 1e-6
    assert largest_difference(two, other) > 1e-3, "so the comparison can fail"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(clips, tmp_path):
    common = [*SMALL, f"data={clips}", "buckets=16x4:0.6:1, 32x1:0.4:2"]
    run(TRAIN, *common, "name=whole", "max_steps=20", cwd=tmp_path)
    run(TRAIN, *common, "name=parts", "max_steps=10", cwd=tmp_path)
    output = run(TRAIN, *common, "name=parts", "max_steps=20", "workers=1", cwd=tmp_path)
    assert "at step 10" in output
    whole, parts = (weights(tmp_path / "runs" / name, 20) for name in ("whole", "parts"))
    assert largest_difference(whole, parts) == 0
    logs = [
        re.findall(r"step (1[1-9]|20): (loss \S+)", (tmp_path / "runs" / name / "train.log").read_text())
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 10


def test_training_leaves_what_it_promises(trained):
    folder, run_folder, output = trained
    names = set(os.listdir(run_folder))
    assert {"step_00000002.pt", "step_00000004.pt", "best.pt", "model.pth", "config.json", "train.log"} <= names
    log = open(os.path.join(run_folder, "train.log")).read()
    for words in (
        "encoder.2 TPool",
        "all  ",
        "11,315,539",
        '"max_steps": 4',
        "training: ",
        "held out: ",
        "validation psnr",
    ):
        assert words in log, words
    frames = int(re.search(r"step 4: validation .* over (\d+) frames", log)[1])
    assert frames == 3 * 1, "3 clips of 4 frames give one frame each: every clip once, on whichever rank"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run_folder)
    events.Reload()
    wanted = {
        f"train/{n}"
        for n in ("loss", "reconstruction_loss", "learning_rate", "resident_memory_gb", "clips_per_second")
    }
    assert wanted | {"val/mse", "val/psnr", "val/ssim"} <= set(events.Tags()["scalars"])
    assert "val/clip_0" in events.Tags()["images"]
    plain = checkpoint.read(os.path.join(run_folder, "model.pth"))
    assert largest_difference(plain, checkpoint.read(os.path.join(run_folder, "step_00000004.pt"))["ema"]) == 0
    assert not [k for k in plain if "module." in k or "_orig_mod." in k]


def test_validation_is_the_same_on_one_rank(trained, clips):
    folder, run_folder, _ = trained
    sources, _ = data.probe(data.find_sources(clips))
    _, val = data.split_sources(sources, 0.3)
    val_clips = data.ValClips(val, 16, 4, 2, 3).share(0, 1, print)
    assert len(val_clips) == 3
    model = TAEHV()
    model.load_state_dict(checkpoint.read(os.path.join(run_folder, "step_00000004.pt"))["ema"])
    import contextlib

    result, _ = train.evaluate(model.eval(), val_clips, torch.device("cpu"), contextlib.nullcontext(), None)
    logged = re.search(
        r"step 4: validation psnr (\S+) dB, ssim (\S+), mse (\S+)", open(os.path.join(run_folder, "train.log")).read()
    )
    assert abs(result["psnr"] - float(logged[1])) < 0.006 and abs(result["ssim"] - float(logged[2])) < 6e-5


FAULT = """
import sys, torch
sys.path.insert(0, {root!r})
import torch.distributed as dist
import objective
import train
original, calls = objective.pixel_loss, [0]
def faulty(*arguments):
    calls[0] += 1
    loss = original(*arguments)
    if dist.get_rank() == 1 and calls[0] in {calls}:
        {fault}
    return loss
objective.pixel_loss = faulty
train.main()
"""


def test_nan_on_one_rank_is_skipped_by_both(clips, tmp_path):
    (tmp_path / "nan.py").write_text(FAULT.format(root=ROOT, calls=[3, 4], fault="loss = loss * float('nan')"))
    run("nan.py", *SMALL, f"data={clips}", "max_steps=6", "name=nan", ranks=2, cwd=tmp_path)
    log = (tmp_path / "runs" / "nan" / "train.log").read_text()
    assert "2 steps skipped" in log and "step 6: loss" in log
    state = checkpoint.read(str(tmp_path / "runs" / "nan" / "step_00000006.pt"))
    assert all(v.isfinite().all() for v in state["model"].values())
    assert {int(v["step"]) for v in state["optimizer"]["state"].values()} == {4}, "6 steps, 2 of them skipped"
    assert not re.search("step [56]: loss nan", log)


def test_too_many_bad_steps_stop_the_run_with_a_checkpoint(clips, tmp_path):
    (tmp_path / "nan.py").write_text(FAULT.format(root=ROOT, calls="range(3, 99)", fault="loss = loss + float('inf')"))
    output = run(
        "nan.py",
        *SMALL,
        f"data={clips}",
        "max_steps=30",
        "max_bad_steps=4",
        "name=nan",
        ranks=2,
        cwd=tmp_path,
        expect=1,
    )
    assert "not finite 4 steps in a row at step 6; the run is saved" in output
    assert (tmp_path / "runs" / "nan" / "step_00000006.pt").exists()


def test_out_of_memory_on_one_rank_splits_the_batch_on_both(clips, tmp_path):
    fault = "raise torch.cuda.OutOfMemoryError('injected')"
    (tmp_path / "oom.py").write_text(FAULT.format(root=ROOT, calls=[3], fault=fault))
    run("oom.py", *SMALL, f"data={clips}", "max_steps=4", "batch_size=2", "name=oom", ranks=2, cwd=tmp_path)
    run(TRAIN, *SMALL, f"data={clips}", "max_steps=4", "batch_size=2", "name=fine", ranks=2, cwd=tmp_path)
    assert (
        "step 3: out of memory; micro-batches are split in 2" in (tmp_path / "runs" / "oom" / "train.log").read_text()
    )
    oom, fine = (weights(tmp_path / "runs" / name, 4) for name in ("oom", "fine"))
    assert largest_difference(oom, fine) < 5e-5, "the step is done again in parts, so nothing is lost; a step is 3e-4"


def test_sigterm_saves_and_the_same_command_goes_on(clips, tmp_path):
    arguments = [TRAIN, *SMALL, f"data={clips}", "name=stopped"]
    process = subprocess.Popen(
        command(*arguments, "max_steps=100000"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, limit = tmp_path / "runs" / "stopped" / "train.log", time.monotonic() + 120
    while not (log.exists() and "step 3: loss" in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "stopped by a signal" in output, output
    step = int(re.search(r"stopped by a signal after step (\d+)", output)[1])
    output = run(*arguments, f"max_steps={step + 1}", cwd=tmp_path)
    assert f"at step {step}" in output and f"done: {step + 1} steps" in output
    assert "nothing to do" in run(*arguments, f"max_steps={step + 1}", cwd=tmp_path)


def test_a_signal_to_the_whole_group_saves_too(clips, tmp_path):
    """As a terminal's Ctrl-C and schedulers send it: to the data workers as well, while the run waits for them."""
    arguments = [TRAIN, *SMALL, f"data={clips}", "name=group", "workers=1", "accumulation=8", "max_steps=100000"]
    process = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log, limit = tmp_path / "runs" / "group" / "train.log", time.monotonic() + 120
    while not (log.exists() and "step 2: loss" in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "stopped by a signal" in output, output


def test_branching_off_an_older_step_loses_nothing(trained, clips, tmp_path):
    folder, run_folder, _ = trained
    common = [*PLAIN, f"data={clips}", "val_fraction=0.3", "max_steps=3", f"resume={run_folder}/step_00000002.pt"]
    output = run(TRAIN, *common, "name=two", f"out_dir={folder}/runs", cwd=tmp_path, expect=2)
    assert "holds newer checkpoints than step 2" in output
    output = run(TRAIN, *common, "name=branch", "weight_decay=0.5", "beta2=0.9", cwd=tmp_path)
    assert "at step 2" in output
    group = checkpoint.read(str(tmp_path / "runs" / "branch" / "step_00000003.pt"))["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0.9, 0.9), "today's settings hold"
    output = run(TRAIN, *common[:-2], common[-1], "max_steps=4", "name=branch", cwd=tmp_path)
    assert "at step 3" in output, "the same command goes on in its own folder"


def test_one_clip_can_be_learnt(tmp_path):
    write_clip(str(tmp_path / "v" / "a.mp4"), frames=5, height=32, width=32)
    run(
        TRAIN,
        *SMALL,
        "data=v",
        "name=one",
        "size=32",
        "frames=5",
        "random_crop=false",
        "flip=false",
        "color_jitter=0",
        "max_frame_delta=1",
        "max_steps=40",
        "lr=1e-3",
        "ema_decay=0.9",
        cwd=tmp_path,
    )
    psnrs = [
        float(x)
        for x in re.findall(r"step \d+: loss \S+ psnr (\S+) dB", (tmp_path / "runs" / "one" / "train.log").read_text())
    ]
    assert len(psnrs) == 40 and np.mean(psnrs[-5:]) > np.mean(psnrs[:5]) + 4


def test_starting_from_weights_and_training_one_half(trained, clips, tmp_path):
    folder, run_folder, _ = trained
    common = [*PLAIN, f"data={clips}", f"init_from={run_folder}/model.pth", "train_encoder=false", "max_steps=2"]
    run(TRAIN, *common, "name=half", cwd=tmp_path)
    before = checkpoint.read(os.path.join(run_folder, "model.pth"))
    after = checkpoint.read(str(tmp_path / "runs" / "half" / "step_00000002.pt"))["model"]
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith("decoder.") for k in moved)


# ---- mistakes: one line, exit code 2, no traceback ---------------------------------------------------------------


@pytest.mark.any_precision
def test_mistakes_get_one_line_and_code_2(trained, clips, tmp_path, capsys, monkeypatch):
    folder, run_folder, _ = trained
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("x")
    torch.save({"a": Bomb()}, "bomb.pt")
    torch.save(TAEHV("taew2_2").state_dict(), "taew2_2.pth")
    cases = [
        (["taehv"], "no data given"),
        (["taehv", "data=nowhere"], "'nowhere' does not exist"),
        (["taehv", "data=none"], "no video or image"),
        (["taehv", "data=bad"], "none of the 1 files of 'bad' can be read"),
        (["taehvv"], "did you mean 'taehv'"),
        (["frame=3"], "did you mean 'frames'"),
        (["size=big"], "whole number"),
        (["taehv", "size=100", f"data={clips}"], "takes multiples of 8"),
        (["variant=taehw"], "unknown TAEHV variant"),
        (["taehv", f"data={clips}", "init_from=bomb.pt"], "code"),
        (["taehv", f"data={clips}", "init_from=taew2_2.pth", "variant=taehv"], "does not fit"),
        (["taehv", f"data={clips}", "resume=missing.pt"], "missing.pt"),
        (
            ["taehv", f"data={clips}", f"out_dir={folder}/runs", "name=two", "variant=taew2_2", "size=32"],
            "is a checkpoint of",
        ),
        (["taehv", f"data={clips}", f"out_dir={folder}/runs", "name=two", "resume=none"], "resume=none, but"),
        (["taehv", f"data={clips}", "device=cuda:77"], "device"),
    ]
    for arguments, words in cases:
        assert words in mistake(capsys, monkeypatch, train, *arguments), arguments
    for arguments, words in [
        (["nothing", clips], "'nothing' does not exist"),
        ([run_folder, "missing.mp4"], "does not exist"),
        ([run_folder, "bad/a.mp4"], "not a video"),
        ([run_folder, "none"], "no video"),
        (["bomb.pt", clips], "code"),
        ([run_folder, "x.latents.npz"], "does not exist"),
    ]:
        assert words in mistake(capsys, monkeypatch, infer, *arguments), arguments
    (tmp_path / "x.latents.npz").write_text("x")
    assert "no file of latents" in mistake(capsys, monkeypatch, infer, run_folder, "x.latents.npz")


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.any_precision
def test_a_mistake_in_a_real_process(tmp_path):
    output = run(TRAIN, "taehv", "data=nowhere", cwd=tmp_path, expect=2)
    assert output == "train.py: data: 'nowhere' does not exist\n"
    assert "key=value" in run(TRAIN, "--help", cwd=tmp_path) and "INPUT" in run(INFER, "--help", cwd=tmp_path)
    assert os.listdir(tmp_path) == ["runs"] or os.listdir(tmp_path) == []


# ---- reconstruction ----------------------------------------------------------------------------------------------


def read_all(path):
    return list(data.VideoReader(str(path)))


def test_reconstruct_report_and_latents(trained, tmp_path):
    folder, run_folder, _ = trained
    write_clip(str(tmp_path / "in" / "odd.mp4"), frames=14, height=50, width=70, fps=12)
    write_clip(str(tmp_path / "in" / "more" / "odd.mp4"), frames=1, height=48, width=48)
    cv2.imwrite(str(tmp_path / "in" / "<b>&picture.png"), np.full((33, 40, 3), 99, np.uint8))
    (tmp_path / "in" / "broken.mp4").write_text("x")
    output = run(INFER, run_folder, "in", "--out", "out", "--save-latents", "--lpips", "none", *FP32, cwd=tmp_path)
    assert "broken" in output and "padded from 50x70 to 56x72" in output and "report: out" in output
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 4 and rows["odd"]["frames"] == 14 and rows["odd"]["latent_shape"] == [5, 16, 7, 9]
    assert rows["odd"]["fps"] == 12 and "failed" in rows["broken.mp4"]
    assert "<b>" not in (tmp_path / "out" / "summary_report.html").read_text().replace("<body>", "")
    originals, outputs = (read_all(tmp_path / "out" / rows["odd"]["videos"][k]) for k in ("original", "reconstructed"))
    assert len(originals) == len(outputs) == 14
    # what is reported is what the model gives on the whole clip, frame by frame
    model, _ = models.load_model(run_folder)
    frames = torch.from_numpy(np.stack(read_all(tmp_path / "in" / "odd.mp4"))).permute(0, 3, 1, 2)[None].float() / 255
    padded = torch.nn.functional.pad(frames[0], (0, 2, 0, 6), mode="replicate")[None]
    padded = torch.cat([padded, padded[:, -1:].repeat(1, 3, 1, 1, 1)], 1)
    with torch.no_grad():
        whole = model(padded)[0][:, :14, :, :50, :70]
    whole = (whole * 255).round() / 255
    psnr = -10 * (whole - frames).square().mean((2, 3, 4)).log10().mean().item()
    assert abs(psnr - rows["odd"]["metrics"]["psnr"]) < 1e-2
    stored = np.load(tmp_path / "out" / "latents" / "odd.latents.npz")
    assert stored["latents"].shape == (5, 16, 7, 9)
    with torch.no_grad():
        assert np.allclose(stored["latents"], model.encode(padded)[0].numpy(), atol=1e-4)
    run(INFER, run_folder, "out/latents/odd.latents.npz", "--out", "again", *FP32, cwd=tmp_path)
    again = read_all(tmp_path / "again" / "comparison_videos" / "odd_reconstructed.webm")
    assert all(np.array_equal(a, b) for a, b in zip(again, outputs)) and len(again) == 14
    for name in ("odd_latents", "odd_2_latents"):
        assert cv2.imread(str(tmp_path / "out" / "latent_visualizations" / f"{name}.png")) is not None


@pytest.mark.auto_precision
def test_latents_of_another_model_or_cut_short_are_refused(trained, tmp_path, capsys, monkeypatch):
    folder, run_folder, _ = trained
    monkeypatch.chdir(tmp_path)
    write_clip(str(tmp_path / "a.mp4"), frames=4, height=32, width=32)
    run(INFER, run_folder, "a.mp4", "--save-latents", "--lpips", "none", cwd=tmp_path)
    latents = tmp_path / "inference_results" / "latents" / "a.latents.npz"
    torch.save(TAEHV("taehv1_5").state_dict(), "taehv1_5.pth")
    assert "not this model's" in mistake(capsys, monkeypatch, infer, "taehv1_5.pth", latents)
    whole = latents.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:]):
        (tmp_path / "b.latents.npz").write_bytes(damaged)
        assert "damaged" in mistake(capsys, monkeypatch, infer, run_folder, "b.latents.npz")


def test_one_bad_input_does_not_cost_the_others(trained, tmp_path):
    folder, run_folder, _ = trained
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), np.zeros((16, 16400, 3), np.uint8))  # too wide for VP8
    write_clip(str(tmp_path / "in" / "b.mp4"), frames=3, height=32, width=32)
    output = run(INFER, run_folder, "in", "--lpips", "none", *FP32, cwd=tmp_path)
    rows = json.loads((tmp_path / "inference_results" / "metrics.json").read_text())["rows"]
    assert "failed" in rows[0] and rows[1]["frames"] == 3 and "a  " in output


# ---- the README --------------------------------------------------------------------------------------------------


LEAVING = """
import os
import torch
import torch.distributed as dist
import ranks
rank, world, control = ranks.start_ranks(torch.device("cpu"), 5)
weight = torch.nn.Parameter(torch.zeros(3))
weight.grad = torch.ones(3)
torch.optim.AdamW([weight], fused=True).step()
ranks.gather(control, {"rank": rank})
del control
dist.destroy_process_group()
threads = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
assert not any("gloo" in t for t in threads), threads
print("left nothing behind")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_ranks_end_without_threads_that_could_abort_them(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    assert run(tmp_path / "leaving.py", ranks=2, cwd=tmp_path).count("left nothing behind") == 2


def pages():
    """{name: text} of the README and what stands in docs/."""
    names = ["README.md", *(os.path.join("docs", name) for name in sorted(os.listdir(os.path.join(ROOT, "docs"))))]
    texts = {}
    for name in filter(lambda name: name.endswith(".md"), names):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            texts[name] = file.read()
    return texts


def commands_in(text, script):
    """The arguments of each `script` in the code of a page, as lists of words; continued lines are joined."""
    code = "\n".join(block or words for block, words in re.findall(r"```bash\n(.*?)```|`([^`\n]+)`", text, re.S))
    for line in re.findall(rf"\b{re.escape(script)} ([^\n|&]*)", code.replace("\\\n", " ")):
        yield shlex.split(line.split("#")[0])


def test_the_pages_tell_what_there_is():
    """Each command of the README and of docs/ has settings and options that exist; presets and files too."""
    found = set()
    for page, text in pages().items():
        for words in commands_in(text, "train.py"):
            if "--help" not in words:  # a run's config.json, in a preset's place, is not here
                config.load_config([w for w in words if w != "..." and not w.endswith("/config.json")])
                found.add("train")
        for module in (infer, latent_cache):
            for words in commands_in(text, f"{module.__name__}.py"):
                if words and words != ["..."]:
                    module.parse(words)
                    found.add(module.__name__)
        for name in re.findall(r"`(\w+\.(?:py|txt))`", text):
            assert os.path.exists(os.path.join(ROOT, name)), f"{name} is in {page} only"
    assert found == {"train", "infer", "latent_cache"}
    readme = pages()["README.md"]
    assert config.PRESETS.keys() <= set(re.findall(r"`(\w+)`", readme))
    with open(os.path.join(ROOT, ".ci", "run"), encoding="utf-8") as file:
        assert "README.md" in file.read() and "python -m pytest" in readme, "CI takes its test command from the README"


def test_no_link_of_the_pages_leads_nowhere():
    texts, links = pages(), 0
    for page, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            assert os.path.exists(os.path.join(ROOT, path)), f"{page} links to {target}"
            if anchor:
                headings = [re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-")
                            for h in re.findall(r"^#+ (.*)$", texts[path], re.M)]
                assert anchor in headings, f"{page} links to {target}"
            links += 1
    assert links > 20
    reached = re.findall(r"\]\((docs/\w+\.md)\)", texts["README.md"])
    assert set(reached) >= {page for page in texts if page.startswith("docs")}, "the README leads to every page"


def test_files_that_work_alone_import_no_others():
    """Those of which the README's table says so, but for imports within functions."""
    names = {name.removesuffix(".py") for name in os.listdir(ROOT) if name.endswith(".py")}
    rows = [line.split(" | ") for line in pages()["README.md"].splitlines() if line.endswith(" | yes |")]
    alone = [name for row in rows for name in re.findall(r"`(\w+)\.py`", row[1])]
    assert len(alone) > 15
    for name in alone:
        with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as file:
            wanted = re.findall(r"^(?:import|from) (\w+)", file.read(), re.M)
        assert not names & set(wanted), f"{name}.py imports {names & set(wanted)}"


def test_each_row_of_what_happens_when_names_tests_that_there_are():
    with open(os.path.join(ROOT, "docs", "faults.md"), encoding="utf-8") as file:
        rows = [line for line in file if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert len(rows) >= 30
    for row in rows:
        named = re.findall(r"`((?:tests/)?test_\w+\.py)::(test_\w+)`", row.split(" | ")[2])
        assert named, row
        for name, test in named:
            with open(os.path.join(ROOT, name), encoding="utf-8") as file:
                assert f"\ndef {test}(" in file.read(), f"{name}::{test}"


def test_a_run_of_minutes_ends_by_itself_and_is_scored_at_another_size(clips, tmp_path):
    common = [*SMALL, f"data={clips}", f"val_data={clips}", "val_clips=2", "val_size=32", "name=timed"]
    output = run(TRAIN, *common, "max_minutes=0.02", cwd=tmp_path)
    (last,) = re.findall(r"done: (\d+) steps in 0.\d minutes", output)
    assert f"step {last}: validation psnr" in output and int(last) < 10000
    state = checkpoint.read(str(tmp_path / "runs" / "timed" / f"step_{int(last):08d}.pt"))
    assert 1.2 <= state["seconds"] < 30
    assert "nothing to do" in run(TRAIN, *common, "max_minutes=0.02", cwd=tmp_path)
    output = run(TRAIN, *common, f"max_minutes={state['seconds'] / 60 + 0.001}", cwd=tmp_path)
    assert f"at step {last}" in output and "done: " in output
