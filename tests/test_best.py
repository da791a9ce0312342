"""best.pt and what it was judged by; the checkpoint that outlives a run that diverges; weights that are not finite."""

import os
import re
import shutil
import signal
import sys

import pytest
import torch

import best
import checkpoint
import config
import infer
import objective
import saving
import train
import watch
from conftest import FRAMES, different, log_of, mistake, run, state_of, write_clip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux has them")
RUN = [*FRAMES, "val_every=1", "lr=1e-3", "name=a"]


def best_of(folder):
    return checkpoint.read(str(folder / "best.pt"))


def validations(folder):
    """[(step, PSNR)] in the order of the log."""
    return [(int(step), float(psnr)) for step, psnr in re.findall(r"step (\d+): validation psnr ([\d.]+) dB",
                                                                  log_of(folder))]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two folders of clips to validate with: one of a single grey, which is easy, and one of textures."""
    folder = tmp_path_factory.mktemp("held_out")
    write_clip(str(folder / "textures" / "a.mp4"), seed=50)
    import cv2
    import numpy as np

    for name, grey in (("a", 120), ("b", 130)):
        os.makedirs(folder / "grey", exist_ok=True)
        cv2.imwrite(str(folder / "grey" / f"{name}.png"), np.full((64, 64, 3), grey, np.uint8))
    return folder


# ---- what best.pt was judged by ----------------------------------------------------------------------------------


CHANGES = {
    "other clips": (["val_data={0}/textures"], "on other clips", "psnr"),
    "another size": (["val_data={0}/grey", "val_size=32"], "on other clips", "psnr"),
    "fewer clips": (["val_data={0}/grey", "val_clips=1"], "on other clips", "psnr"),
    "another measure": (["val_data={0}/grey", "best_by=ssim"], "by another measure", "ssim"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_best_pt_is_judged_anew_by_another_measure_or_on_other_clips(change, here, held_out):
    """Its score on two grey pictures is one that no other clips give."""
    settings, words, measure = CHANGES[change]
    settings = [setting.format(held_out) for setting in settings]
    folder = here(*RUN, f"val_data={held_out}/grey", "max_steps=2")
    before = best_of(folder)
    here(*RUN, *settings, "max_steps=4")
    line, = re.findall(r"best.pt of step (\d) is judged anew (.*): (-?[\d.]+) dB \((.*)\)", log_of(folder))
    assert line[:2] == (str(before["step"]), words) and line[3] == measure
    after = best_of(folder)
    assert after["judged_by"] != before["judged_by"] and after["judged_by"]["measure"] == measure
    if measure == "psnr":  # what is best now is so by today's scores alone
        found = dict([(before["step"], float(line[2])), *validations(folder)[2:]])
        assert after["step"] == max(found, key=found.get) and abs(after["score"] - max(found.values())) < 0.006
    here(*RUN, *settings, "max_steps=5")
    assert log_of(folder).count("is judged anew") == 1, "that is in best.pt itself now"


def test_best_pt_keeps_its_score_where_the_same_clips_lie_elsewhere_or_validation_was_off(here, held_out, tmp_path):
    folder = here(*RUN, f"val_data={held_out}/grey", "max_steps=2")
    before = best_of(folder)
    here(*RUN, "max_steps=3")  # val_fraction=0
    assert "no validation" in log_of(folder) and different(before, best_of(folder)) == []
    shutil.copytree(held_out / "grey", tmp_path / "moved")
    here(*RUN, f"val_data={tmp_path}/moved", "lr=0", "max_steps=4")
    assert "is judged anew" not in log_of(folder) and len(validations(folder)) == 3
    assert best_of(folder)["judged_by"] == before["judged_by"]


def test_a_fingerprint_is_of_the_clips_however_ranks_share_them(monkeypatch):
    clips = [{"video": torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
              "latents": torch.randn(1, 4, 2, 2).bfloat16()} for _ in range(5)]
    whole, ranks = best.fingerprint(clips, None), []
    monkeypatch.setattr(best, "gather", lambda _, own: (ranks.append(own), ranks)[1])
    best.fingerprint(clips[1::2], None)
    assert best.fingerprint(clips[::2], None) == whole and len(ranks) == 2
    monkeypatch.undo()
    for name in ("video", "latents"):
        changed = [{key: value.clone() for key, value in clip.items()} for clip in clips]
        changed[3][name][0, 1, 1, 1] += 1
        assert best.fingerprint(changed, None) != whole


@pytest.mark.slow
def test_two_ranks_judge_best_pt_together(here, held_out, tmp_path):
    folder = here(*RUN, f"val_data={held_out}/grey", "max_steps=1")
    state = best_of(folder)
    state["ema"]["decoder.conv_out.bias"] += 0.2  # no rank has these weights from anywhere else
    torch.save(state, folder / "best.pt")
    shutil.copytree(folder, tmp_path / "runs" / "a")
    others = [*RUN, f"data={held_out}/textures", f"val_data={held_out}/textures", "val_clips_per_video=3", "lr=0",
              "max_steps=2"]
    run(os.path.join(os.path.dirname(train.__file__), "train.py"), *others, ranks=2, cwd=tmp_path)
    here(*others, "accumulation=2")  # as many clips for the codebook
    one, two = (best_of(path) for path in (folder, tmp_path / "runs" / "a"))
    assert one["judged_by"] == two["judged_by"] and abs(one["score"] - two["score"]) < 1e-4
    logs = [log_of(path) for path in (folder, tmp_path / "runs" / "a")]
    anew = [re.findall("best.pt of step 1 is judged anew.*", log) for log in logs]
    assert anew[0] == anew[1] and len(anew[0]) == 1


# ---- runs that are killed ----------------------------------------------------------------------------------------


@pytest.fixture
def scores(monkeypatch):
    """scores({step: dB}): what validations find, wherever a run is; a step that is absent is measured."""
    now, found, measured = [0], {}, train.evaluate

    def begin(self, step, begin=objective.Objective.begin):
        now[0] = step + 1
        begin(self, step)

    def evaluate(*arguments, **keywords):
        result, shown = measured(*arguments, **keywords)
        return {**result, "psnr": found.get(now[0], result["psnr"])}, shown

    monkeypatch.setattr(objective.Objective, "begin", begin)
    monkeypatch.setattr(train, "evaluate", evaluate)
    return found.update


def test_a_best_pt_that_stays_best_is_judged_anew_once(here, held_out, scores):
    scores({1: 11.0, 2: 12.0})
    folder = here(*RUN, f"val_data={held_out}/grey", "max_steps=2")
    scores({2: 15.0, 3: 14.0, 4: 14.5})
    for last in (3, 4):
        here(*RUN, f"val_data={held_out}/textures", f"max_steps={last}")
        assert best_of(folder)["step"] == 2 and best_of(folder)["score"] == 15.0
    assert log_of(folder).count("best.pt of step 2 is judged anew on other clips: 15.00 dB (psnr)") == 1


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.slow
def test_a_run_killed_between_best_pt_and_its_checkpoint_ends_with_the_same_best_pt(here, at, scores):
    settings = [*FRAMES, "val_every=1", "val_fraction=0.3", "save_every=3", "max_steps=8"]
    scores({1: 11.0, 2: 12.0, 3: 13.0, 4: 12.5, 5: 19.0, 6: 14.0, 7: 13.5, 8: 18.0})
    whole = here(*settings, "name=whole")
    at({6: kill})
    with pytest.raises(Killed):
        here(*settings, "name=parts")
    folder = whole.parent / "parts"
    assert best_of(folder)["step"] == 5 and checkpoint.checkpoints(str(folder))[0].endswith("step_00000003.pt")
    here(*settings, "name=parts")
    assert "at step 3" in log_of(folder) and "is judged anew" not in log_of(folder)
    for step in (3, 6, 8):
        assert set(different(state_of(whole, step), state_of(folder, step))) <= {"state.config.name"}
    facts = [{key: value for key, value in best_of(path).items() if key != "val"} for path in (whole, folder)]
    assert different(*facts) == [] and facts[0]["step"] == 5


def test_a_better_best_pt_of_steps_that_were_lost_stays(here, at, scores):
    settings = [*FRAMES, "val_every=1", "val_fraction=0.3", "save_every=3", "name=lost"]
    scores({1: 11.0, 2: 12.0, 3: 13.0, 4: 12.5, 5: 19.0})
    at({6: kill})
    with pytest.raises(Killed):
        here(*settings, "max_steps=8")
    scores({4: 12.5, 5: 14.0, 6: 15.0})  # with another learning rate, say
    folder = here(*settings, "max_steps=6")
    assert best_of(folder)["step"] == 5 and best_of(folder)["score"] == 19.0


@pytest.mark.parametrize("cause", ["damaged", "of another model", "not finite", "of an earlier run"])
def test_a_best_pt_that_cannot_be_used_is_put_aside(cause, here, held_out):
    settings = [*RUN, f"val_data={held_out}/grey"]
    folder = here(*settings, "max_steps=1")
    state = best_of(folder)
    if cause == "damaged":
        (folder / "best.pt").write_bytes(b"damaged")
    elif cause == "of another model":
        torch.save({**state, "ema": {name: torch.zeros(3) for name in state["ema"]}}, folder / "best.pt")
    elif cause == "not finite":
        state["ema"]["quantize.embedding.weight"][2] = float("nan")
        torch.save(state, folder / "best.pt")
    else:
        os.remove(folder / "step_00000001.pt")
    (folder / "best.old1.pt").write_bytes(b"an earlier one")
    content = (folder / "best.pt").read_bytes()
    here(*settings, "max_steps=2")
    line, = re.findall("warning: .*best.pt is put aside as best.old2.pt: .*", log_of(folder))
    words = {"damaged": "no file of weights", "not finite": r"not finite \(quantize.embedding.weight\)"}
    assert re.search(words.get(cause, cause), line)
    assert (folder / "best.old2.pt").read_bytes() == content
    assert (folder / "best.old1.pt").read_bytes() == b"an earlier one"
    assert best_of(folder)["step"] == validations(folder)[-1][0], "the next validation is the best so far"


# ---- runs that diverge -------------------------------------------------------------------------------------------


@pytest.fixture
def diverging(monkeypatch):
    """From step 14 on the weights grow tenfold in each step, from step 20 on the loss is not finite."""
    now, measured = [0], objective.pixel_loss

    def begin(self, step, begin=objective.Objective.begin):
        now[0] = step + 1
        if 14 <= step + 1 < 20:
            with torch.no_grad():
                self.last_layer().mul_(10)
        begin(self, step)

    def pixel_loss(*arguments):
        return measured(*arguments) * (float("nan") if now[0] >= 20 else 1)

    monkeypatch.setattr(objective.Objective, "begin", begin)
    monkeypatch.setattr(objective, "pixel_loss", pixel_loss)


def steps_of(folder):
    return [int(re.search(r"step_(\d+)", path)[1]) for path in checkpoint.checkpoints(str(folder))]


@pytest.mark.slow
def test_a_run_that_diverges_keeps_the_checkpoint_from_before(here, diverging, tmp_path):
    settings = [*FRAMES, "save_every=2", "keep_last=2", "max_bad_steps=5", "name=diverging"]
    folder = here(*settings, "max_steps=17")
    assert steps_of(folder) == [17, 16, 12], "17 is no multiple of 2: the last step of this part"
    with pytest.raises(config.ConfigError) as caught:
        here(*settings, "max_steps=40")
    sound = folder / "step_00000012.pt"
    assert str(caught.value) == (
        "the loss or a gradient was not finite 5 steps in a row at step 24; the run is saved. The weights are those of "
        f"step 19, from before, when the loss had risen already. resume={sound} name=OTHER goes on from before that. "
        "Try a lower lr, precision=fp32, or other data.")
    assert steps_of(folder) == [24, 22, 12]
    states = [state_of(folder, step)["model"] for step in (22, 24)]
    assert different(*states) == [] and checkpoint.not_finite(states[0]) == ""
    grown = [state_of(folder, step)["model"]["decoder.conv_out.weight"].norm() for step in (12, 24)]
    assert grown[1] > 1e5 * grown[0]
    with pytest.raises(config.ConfigError, match="6 steps in a row at step 25; the run is saved.*of step 19,"):
        here(*settings, "max_steps=40")
    assert steps_of(folder) == [25, 24, 12], "nor by the same command again"
    here(*settings, "name=other", f"resume={sound}", "max_steps=13")
    assert "done: 13 steps" in log_of(tmp_path / "other")


def test_a_full_disk_spares_the_checkpoint_from_before(tmp_path):
    weights = {"w": torch.ones(3)}
    for step in range(1, 5):
        state = dict(step=step, model_config={}, model=weights, ema=weights)
        assert checkpoint.save_run(str(tmp_path), state, keep_last=9, sound=1) == ""
    for left in ([4, 3, 1], [4, 1], [1]):  # the newest last: with it gone, there is one to go on from
        assert checkpoint.drop_oldest(str(tmp_path), 5, sound=1) and steps_of(tmp_path) == left
    assert not checkpoint.drop_oldest(str(tmp_path), 5, sound=1) and steps_of(tmp_path) == [1]


def test_weights_that_were_good_are_said_to_be_so(here, monkeypatch):
    measured, count = objective.pixel_loss, []

    def pixel_loss(*arguments):
        count.append(1)
        return measured(*arguments) * (float("nan") if len(count) > 13 else 1)

    monkeypatch.setattr(objective, "pixel_loss", pixel_loss)
    with pytest.raises(config.ConfigError, match="3 steps in a row at step 16; the run is saved. The weights are those "
                                                 "of step 13, from before. Try a lower lr"):
        here(*FRAMES, "max_bad_steps=3", "max_steps=20")


def judged(losses, every=10):
    """[steps of the sound checkpoints] of a run with these losses (NaN: a skipped step), saved `every` so many."""
    trend, sound = watch.Trend(torch.device("cpu"), window=300), []
    for step, loss in enumerate(losses):
        loss = torch.tensor(float(loss))
        trend.add(step, loss, torch.tensor(1.0), 1.0 - loss.isfinite().float())
        if (step + 1) % every == 0:
            trend.sound = trend.judge(step + 1)
            sound.append(trend.sound[0])
    return sound


def test_a_checkpoint_is_sound_until_the_loss_goes_wrong():
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.5 * torch.randn(600, generator=generator).clamp(-1.9, 3)  # as of single clips
    falls = 0.05 + 0.5 * (-torch.arange(600) / 100).exp()
    all_steps = list(range(10, 601, 10))
    assert judged(falls * noise) == all_steps and judged(0.05 * noise) == all_steps
    leaps = torch.where(torch.arange(600) < 405, falls, 0.5)
    assert set(judged(leaps * noise)[41:]) <= {400, 410}, "and at that height it stays"
    creeps = falls * torch.where(torch.arange(600) < 300, 1.0, 1.005 ** (torch.arange(600) - 300))
    assert 300 <= judged(creeps * noise)[-1] < 500
    returns = torch.where((torch.arange(600) >= 405) & (torch.arange(600) < 435), 0.5, falls)
    assert judged(returns * noise)[-1] == 600
    skipped = falls.clone()
    skipped[::3] = float("nan")
    assert judged(skipped) == [step if step % 3 != 1 else max(0, step - 10) or None for step in all_steps]


# ---- weights that are not finite ---------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_saved(here, tmp_path, monkeypatch):
    def begin(self, step, begin=objective.Objective.begin):
        if step + 1 == 4:
            with torch.no_grad():
                self.last_layer()[0, 0] = float("inf")
        begin(self, step)

    monkeypatch.setattr(objective.Objective, "begin", begin)
    settings = [*FRAMES, "save_every=1", "val_fraction=0.3", "val_every=4", "max_bad_steps=3", "name=inf"]
    with pytest.raises(saving.NotSaved) as caught:
        here(*settings, "max_steps=9")
    folder, name = tmp_path / "inf", "decoder.conv_out.weight"
    assert str(caught.value) == (
        "the loss or a gradient was not finite 3 steps in a row at step 6; not saved: its weights are not finite "
        f"({name}); on disk: step 3 ({folder}). The weights are those of step 3, from before, and not finite. "
        f"resume={folder}/step_00000003.pt name=OTHER goes on from before that. Try a lower lr, precision=fp32, or "
        "other data.")
    assert steps_of(folder) == [3, 2, 1] and not (folder / "best.pt").exists()
    assert "step 4 could not be saved: its weights are not finite (decoder.conv_out.weight)" in log_of(folder)
    assert different(checkpoint.read(str(folder / "model.pth")), state_of(folder, 3)["ema"]) == []
    weights = {"ema": {"w": torch.tensor([1.0, float("-inf")])}, "step": 1}
    assert checkpoint.save_best(str(tmp_path), weights) == "its weights are not finite (w)"
    assert os.listdir(tmp_path) == ["inf"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips):
    """A run of two checkpoints, in its folder."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    folder = tmp_path_factory.mktemp("trained")
    train.train(config.load_config([*FRAMES, f"data={clips}", f"out_dir={folder}", "name=a", "max_steps=2",
                                    "save_every=1"]))
    signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])
    return folder / "a"


def spoil(path, key):
    """Makes one weight of a file NaN; returns what that weight is called."""
    state = checkpoint.read(str(path))
    weights = state[key] if key else state
    name = next(name for name in weights if name.endswith("conv_in.weight"))
    weights[name][0, 0, 0, 0] = float("nan")
    torch.save(state, path)
    return name


@pytest.mark.any_precision
def test_weights_that_are_not_finite_are_refused(trained, clips, teacher, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "a")
    name = spoil(folder / "step_00000002.pt", "ema")
    spoil(folder / "model.pth", "")
    published = checkpoint.read(teacher)
    published["decoder.1.bias"][3] = float("inf")
    torch.save(published, tmp_path / "published.pth")
    for path in (folder / "step_00000002.pt", folder / "model.pth", tmp_path / "published.pth"):
        word = name if "published" not in str(path) else "decoder.1.bias"
        line = f"checkpoint: '{path}': its weights are not finite ({word})"
        assert mistake(capsys, monkeypatch, infer, path, clips) == f"infer.py: {line}"
        assert mistake(capsys, monkeypatch, train, *FRAMES, f"data={clips}", f"init_from={path}", "device=cpu",
                       f"out_dir={tmp_path}/new") == f"train.py: {line}"
    assert mistake(capsys, monkeypatch, train, *FRAMES, f"data={clips}", f"resume={folder}/step_00000002.pt",
                   f"out_dir={tmp_path}/new").endswith(f"its weights are not finite ({name})")


@pytest.mark.parametrize("key", ["model", "ema"])
def test_a_run_goes_on_from_the_checkpoint_before_one_that_is_not_finite(key, trained, here, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "a")
    name = spoil(folder / "step_00000002.pt", key)
    here(*FRAMES, "name=a", "max_steps=2", "save_every=1")
    assert f"step_00000002.pt': its weights are not finite ({name}); the one before it is used" in log_of(folder)
    assert "step_00000001.pt at step 1" in log_of(folder)
    assert set(different(state_of(folder, 2), state_of(trained, 2))) <= {"state.config.out_dir"}
