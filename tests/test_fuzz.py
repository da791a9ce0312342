"""Files and words of strangers, scrambled: one clear line each, no hang, no other error."""

import dataclasses
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys

import cv2
import numpy as np
import pytest
import torch

import cache_files
import check_config
import checkpoint
import config
import fuzz
import data_files
import infer
import latent_file
import models
import train
import video_files
from conftest import BATCH_NORM, COMMON, FRAMES, NARROW, SCRATCH, SERAENA, log_of, mistake, state_of, write_clip
from model_taehv import TAEHV
from screen import one_line

ODD = [None, True, -1, 0, 3, 2**70, 0.5, math.nan, math.inf, "", "x", "\0", "../x", "\ud800", "x" * 9999, [], {}, [[1]]]


def scrambled(content, rng):
    """Bytes or text with something flipped, left out, put in, doubled or cut off."""
    place, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    some = rng.choices(range(256) if isinstance(content, bytes) else "=.,:(-1e9\0é[", k=3)
    some = bytes(some) if isinstance(content, bytes) else "".join(some)
    return rng.choice([content[:place] + some + content[place + 3:], content[:place] + content[other:], content[:place],
                       content[:other] + content[place:], content[:place] + some + content[place:]])


def with_something_odd(tree, rng):
    """A copy of nested lists and dicts in which one node, at any depth, is another thing or is gone."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.1:
        return rng.choice(ODD)
    tree = tree.copy()
    key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if rng.random() < 0.15:
        del tree[key]
    else:
        tree[key] = with_something_odd(tree[key], rng)
    return tree


def answers(read, *errors):
    """"read", or "refused" by one of these errors, in one line; any other error fails, and so does no end."""
    def too_long(*_):
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        read()
        return "read"
    except errors as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 12_000, error
        return "refused"
    finally:
        signal.alarm(0)


def test_scrambled_settings_are_refused_in_one_line():
    rng, seen = random.Random(1), []
    settings = ["size=64", "lr=1e-4", "net.ch_mult=1,2,4", "buckets=16x4:0.6:1, 32x1:0.4:2", "name=mine", "flip=true",
                "val_metrics=lpips,fid", "resume=auto", "--max-steps=7"]
    for _ in range(4000):
        chosen = rng.choice(settings)
        arguments = ["taehv", *rng.sample(settings, 2), scrambled(chosen, rng)]
        read = functools.partial(config.load_config, arguments)
        seen.append(answers(lambda: check_config.parse_buckets(read()), config.ConfigError))  # noqa: B023
    assert min(seen.count("read"), seen.count("refused")) > 300
    for key, value in itertools.product(("lr", "pixel_weight", "timeout_minutes", "gan_lecam"), ("inf", "-inf", "nan")):
        with pytest.raises(config.ConfigError, match=f"{key}={value}: a finite number is wanted"):
            config.load_config([f"{key}={value}"])
    for text in ("timeout_minutes=1e300", f"buckets={9 ** 999}x4:1:1", f"buckets=16x4:{9 ** 999}:1"):
        with pytest.raises(config.ConfigError):
            check_config.parse_buckets(config.load_config([text]))
    for name in ("../x", "/tmp/x", "..", "a/b", "a\\b", "-\0"):
        read = functools.partial(config.load_config, [f"name={name}"])
        assert answers(read, config.ConfigError) == "refused", name


@pytest.mark.parametrize("settings, words", [
    ("workers=999999999", "workers=999999999: at most .* is wanted on a machine of"),
    ("max_steps=100000000000000000", "max_steps=100000000000000000: at most 100000000000 is wanted"),
    ("lr=1e300", "lr=1e.300: at most 1e.30 is wanted"),
    ("buckets=16x70000:1:1", "buckets: '16x70000:1:1': frames at most 65536 is wanted"),
    ("size=16384 frames=65536 workers=64", "size=16384 frames=65536 .*the batches alone take .* GB, and this machine"),
    ("model=vqgan net.num_res_blocks=1000000000", "net.num_res_blocks=1000000000: at most 128 is wanted"),
    (f"model=dcae net.width_list={'65536,' * 6}",
     "training it takes .* GB for its weights alone, and this machine has"),
    ("model=vqgan net.quantizer=fsq net.levels=(1000,1000,1000)", "1000000000 codes; at most 1048576 are wanted")])
def test_what_is_beyond_any_machine_is_refused_at_once(settings, words):
    assert re.search(words, models.problem_of(["taehv", *settings.split()]))


@pytest.mark.parametrize("settings, words", [
    ("gan_dims=7", "gan_dims=7: one of 2, 3 is wanted"), ("val_size=8", "val_size=8: at least 16 is wanted, or 0"),
    ("model=vqgan net.beta=1,2", r"beta=\(1, 2\): a number from 0 on is wanted"),
    ("model=vqgan net.chunk=32,32", r"chunk=\(32, 32\): a whole number from 1 on is wanted"),
    ("model=vqvae_video net.decay=1.5,2.5", r"decay=\(1.5, 2.5\): a number from 0 on is wanted"),
    ("model=vqvae2 net.kmeans_init=3", "kmeans_init=3: true or false is wanted"),
    ("model=vqgan net.ch_mult=2.5", r"ch_mult=2.5: whole numbers like 1,2,4 \(one alone: 16,\) are wanted"),
    ("net.patch_size=1.5", "patch_size=1.5: a whole number from 1 on is wanted"),
    ("net.encoder_time_downscale=2", r"encoder_time_downscale takes three booleans or strides of 1 and 2, got \(2,\)"),
    ("model=dcae net.width_list=3.5", "width_list: whole numbers are wanted, got 3.5")])
def test_values_of_another_kind_are_named(settings, words):
    assert re.search(words, models.problem_of(["taehv", *settings.split()]))


@pytest.mark.any_precision
def test_a_message_is_one_line_whatever_the_value_holds(monkeypatch, capsys):
    for module, arguments in ((train, ["name=a\nb"]), (infer, ["a", "b\n\x1b[2J"]), (infer, ["a", "b", "--fid", "\n"]),
                              (train, ["out_dir=" + "x" * 9999])):
        assert len(mistake(capsys, monkeypatch, module, *arguments)) < 5000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that grants memory that there is not")
def test_what_does_not_fit_the_memory_is_refused(bases, tmp_path):
    """On a machine that says it has 4 GB."""
    arguments = [*bases["vqgan"], "net.ch_mult=64,1,2,64,4"]
    for call, given, words in ((fuzz.train_with, arguments, "training it takes .* and this machine has 4:"),
                               (fuzz.allocate, [fuzz.MEMORY], "True")):
        outcome, text = fuzz.attempt("memory", call, *given, folder=tmp_path)
        assert outcome == "refused" and re.search(words, text), text


def test_scrambled_annotations_are_refused_in_one_line(tmp_path):
    rng, seen, path = random.Random(2), [], tmp_path / "a.json"
    tree = {"list": [{"path": "a.mp4", "caption": "b"}, {"path": "c/d.mp4"}], "more": 1}
    for i in range(600):
        path.write_bytes(json.dumps(with_something_odd(tree, rng)).encode() if i % 2 else
                         scrambled(json.dumps(tree).encode(), rng))
        seen.append(answers(lambda: data_files.probe(data_files.find_sources(str(path))), video_files.DataError))
    assert min(seen.count("read"), seen.count("refused")) > 50


def test_scrambled_latents_are_refused_in_one_line(tmp_path):
    rng, seen, path = random.Random(3), [], str(tmp_path / "a.latents.npz")
    model, video = TAEHV(), type("Video", (), dict(fps=25.0, height=16, width=24))
    def write(about=None):
        with latent_file.LatentWriter(path, model, video, 8, 2) as writer:
            writer.about = about or writer.about
            writer.write(torch.zeros(1, 1, 16, 2, 3))
            writer.write(torch.ones(1, 1, 16, 2, 3))
            return writer.about
    about = write()
    with open(path, "rb") as file:
        content = file.read()
    for i in range(300):
        if i % 2:
            write(with_something_odd(about, rng) or 7)
        else:
            with open(path, "wb") as file:
                file.write(scrambled(content, rng))
        seen.append(answers(lambda: list(latent_file.LatentReader(path, model)), latent_file.LatentFileError))
    assert min(seen.count("read"), seen.count("refused")) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weights", "run"])
def test_scrambled_checkpoints_are_refused_in_one_line(kind, here, tmp_path):
    rng, seen = random.Random(4), []
    folder = here(*FRAMES, "max_steps=1", "name=a")
    path = str(folder / "step_00000001.pt")
    state = {**state_of(folder, 1)}
    with open(path, "rb") as file:
        content = file.read()
    resume = [*FRAMES, "max_steps=2", "name=b", f"resume={path}"]
    for i in range(30):
        if i % 4 == 3:
            with open(path, "wb") as file:
                file.write(scrambled(content, rng))
        else:
            torch.save(with_something_odd(state, rng), path)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        seen.append(answers((lambda: here(*resume)) if kind == "run" else lambda: models.load_model(path),
                            config.ConfigError, checkpoint.CheckpointError))
    assert min(seen.count("read"), seen.count("refused")) > 3, seen


@pytest.mark.slow
def test_a_state_of_a_rank_that_is_none_costs_only_itself(here, tmp_path):
    begun = here(*SERAENA, "name=begun", "max_steps=1")
    state = checkpoint.read(str(begun / "step_00000001.rank0"))
    for number, odd in enumerate(({}, {"generator": 3}, {"replay": [{"shape": ((1, 2, 3), (1, 1, 1)), "rows": 1}]})):
        folder = shutil.copytree(begun, tmp_path / f"r{number}")
        torch.save({**state, **odd} if odd else odd, folder / "step_00000001.rank0")
        here(*SERAENA, f"name=r{number}", "max_steps=2")
        log = log_of(folder)
        assert "done: 2 steps" in log and ("it holds no state of a rank" in log) == bool(odd), log


def test_scrambled_caches_are_refused_in_one_line(cache, tmp_path):
    rng, seen = random.Random(5), []
    small = {name: (tmp_path / "cache" / name) for name in sorted(os.listdir(cache))}
    shutil.copytree(cache, tmp_path / "cache")
    index = json.loads(small["index.json"].read_text())

    def read():
        found = cache_files.LatentCache(str(tmp_path / "cache"))
        train_clips, _, _ = found.split(0.3, 0, 4)
        if found.problem():
            raise video_files.DataError(found.problem())
        train_clips.sample(3)

    for i in range(300):
        name = rng.choice(["index.json", "index.json", *small])
        before = small[name].read_bytes()
        if name == "index.json" and i % 3:
            odd = with_something_odd(index, rng)
            if isinstance(odd, dict):
                odd.pop("crc32", None)
                odd["crc32"] = cache_files.index_crc(odd)
            small[name].write_text(json.dumps(odd))
        else:
            small[name].write_bytes(scrambled(before, rng))
        seen.append(answers(read, video_files.DataError))
        small[name].write_bytes(before)
    assert seen.count("refused") > 150 and answers(read, video_files.DataError) == "read"


# ---- everything that can be set: each in a process of its own --------------------------------------------------------
# FUZZ_ROUNDS=20 python -m pytest -s tests/test_fuzz.py: as many rounds over all settings, options and readers, and the
# table.


ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 0))
BASES = {
    "taehv": [*SCRATCH, "size=16", "frames=4", "batch_size=1", *COMMON, *NARROW],
    "seraena": SERAENA,
    "vqgan": [*FRAMES, "size=32", "gan_weight=0.5"],
    "vqvae2": BATCH_NORM,
    "vqvae_video": ["vqvae_video", "size=16", "frames=4", "batch_size=1", *COMMON, *"net.group_count=2 net.n_hid=8 "
                    "net.n_init=16 net.vocab_size=16 net.sequence_length=2".split()],
    "dcae": ["dcae_small", "size=32", "frames=4", "batch_size=1", *COMMON, "net.width_list=32,32,32,32,32,32",
             "net.latent_channels=32"],
    "vq_latents": ["vq_latents", "latent_cache=CACHE", "init_from=TEACHER", "size=32", "frames=12", "batch_size=2",
                   *COMMON, "color_jitter=0", "net.n_embed=16"],
    "distill": ["taehv_distill", "latent_cache=CACHE", "size=32", "frames=12", "batch_size=1", *COMMON, "color_jitter=0",
                *NARROW],
}
AMOUNTS = "batch_size accumulation frames size buckets val_size val_clips val_clips_per_video workers net".split()


def attempts(cases, every):
    """Attempts each `every`-th of the cases ((kind, call, arguments, keywords) by a function of a random generator);
    with FUZZ_ROUNDS, all, in that many rounds."""
    failed = []
    for i in range(max(1, ROUNDS)):
        rng = random.Random(i)
        for kind, call, arguments, keywords in itertools.islice(cases(rng), None, None, 1 if ROUNDS else every):
            outcome, text = fuzz.attempt(kind, call, *arguments, **keywords)
            if ROUNDS:
                print(kind, outcome, arguments[-4:], text[:200], flush=True)
            if outcome not in ("refused", "run"):
                failed.append(f"{kind}: {outcome}: {arguments!r:.2000}\n{text[-3000:]}")
                print(failed[-1], flush=True)
    print(fuzz.table(), flush=True)
    assert not failed, "\n\n".join(failed)


@pytest.fixture
def places(clips, cache, teacher, tmp_path):
    """Paths that may be given as values."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{}")
    return [clips, cache, teacher, f"{tmp_path}/empty", f"{tmp_path}/text.json", f"{tmp_path}/missing",
            os.path.join(clips, "sub0", "clip0.mp4"), os.path.join(cache, "index.json"), f"{cache}\0"]


@pytest.fixture
def bases(clips, cache, teacher, tmp_path):
    """Small runs of two steps, of each model."""
    return {name: [word.replace("CACHE", cache).replace("TEACHER", teacher) for word in words]
            + ["max_steps=2", *([] if "latent_cache=CACHE" in words else [f"data={clips}"]), f"out_dir={tmp_path}/runs"]
            for name, words in BASES.items()}


def test_any_text_for_any_setting_is_read_or_refused():
    """Each setting with each odd value, and its bounds."""
    def read(words):
        try:
            check_config.parse_buckets(config.load_config(["taehv", words]))
        except config.ConfigError as error:
            raise config.ConfigError(one_line(str(error))) from None  # as train.py prints it

    seen, rng = [], random.Random(0)
    for field in dataclasses.fields(config.Config):
        key = "net.ch" if field.name == "net" else field.name
        for text in [*fuzz.NUMBERS, *fuzz.TEXTS, *fuzz.LISTS, *(fuzz.setting(field, rng, []) for _ in range(20))]:
            seen.append(answers(functools.partial(read, f"{key}={text}"), config.ConfigError))
    assert min(seen.count("read"), seen.count("refused")) > 1000


@pytest.mark.slow
@pytest.mark.any_precision
def test_any_setting_trains_or_is_refused(bases, places, tmp_path):
    """Each setting in a run of some model, alone or with another."""
    fields = dataclasses.fields(config.Config)

    def cases(rng):
        for field in fields:
            chosen = [field, *rng.sample(fields, rng.choice([0, 0, 1, 2]))]
            words = [f"{f.name}={fuzz.setting(f, rng, places)}" for f in chosen if f.name != "net"]
            name = rng.choice([*bases])
            arguments = [*bases[name], "val_fraction=0.3", "val_every=1", f"name=r{rng.random()}", *words]
            long = any(word.partition("=")[0] in AMOUNTS for word in words)
            yield f"settings, {name}", fuzz.train_with, arguments, dict(folder=tmp_path, long=long)

    attempts(cases, 8)


@pytest.mark.slow
@pytest.mark.any_precision
def test_any_argument_of_any_model_trains_or_is_refused(bases, tmp_path):
    def cases(rng):
        for name, model in (("taehv", "taehv"), ("vqgan", "vqgan"), ("vqvae2", "vqvae2"), ("dcae", "dcae"),
                            ("vqvae_video", "vqvae_video"), ("vq_latents", "vq_latents")):
            takes = fuzz.model_arguments(model)
            for key in takes:
                chosen = [key, *rng.sample([*takes], rng.choice([0, 0, 1]))]
                words = [f"net.{k}={fuzz.argument(takes[k], rng)}" for k in chosen]
                arguments = [*bases[name], f"name=r{rng.random()}", *words]
                yield f"model, {name}", fuzz.train_with, arguments, dict(folder=tmp_path, long=True)

    assert {config.load_config(words).model for words in bases.values()} == {*models.MODELS}
    attempts(cases, 8)


@pytest.fixture
def written(here, clips, tmp_path, monkeypatch):
    """Runs of a narrow TAEHV and of a VQGAN, and files of latents and tokens by them; their folder."""
    for settings in ([*BASES["taehv"], "name=taehv"], [*FRAMES, "name=vqgan"], [*SERAENA, "name=seraena"]):
        here(*settings, "max_steps=2", "save_every=1", f"out_dir={tmp_path}/runs")
    for name, flag in (("taehv", "--save-latents"), ("vqgan", "--save-tokens")):
        more = [flag, "--out", f"{tmp_path}/{name}", *"--lpips none --precision fp32 --max-frames 4".split()]
        words = ["infer.py", f"{tmp_path}/runs/{name}", f"{clips}/sub0/clip0.mp4", *more]
        monkeypatch.setattr("sys.argv", words)
        infer.main()
    return tmp_path


@pytest.fixture
def command_lines(written, clips):
    """{command: {argument: its words}} of small tasks."""
    overrides = dict(word.split("=", 1) for word in BASES["taehv"][1:] if not word.startswith("net."))
    tasks = {"tasks": [{"name": "a", "preset": "taehv", "gpus": 1, "overrides": {**overrides, "data": clips}}]}
    (written / "tasks.json").write_text(json.dumps(tasks))
    latent_cache = f"--data {clips} --out NEW --clips 2 --size 16 --frames 4 --workers 0 --precision fp32".split()
    codec = "--families taehv --sizes 16x16 --frames 4 --repeat 1 --precision fp32".split()
    return {"infer": {"checkpoint": ["runs/taehv"], "inputs": [f"{clips}/sub0/clip0.mp4"],
                      "": "--out o --lpips none --precision fp32 --max-frames 4".split()},
            "latent_cache": {"": ["--teacher", "taehv:runs/taehv/model.pth", *latent_cache]},
            "export": {"checkpoint": ["runs/taehv"], "to": ["--to", "taehv"], "": ["--out", "x.pth", "--force"]},
            "prune": {"checkpoint": ["runs/taehv"], "keep": ["--keep", "0.6"], "data": ["--data", f"{clips}/sub0"],
                      "": "--out p.pth --force --clips 2 --val-clips 1 --size 16 --frames 4 --multiple 8".split()},
            "leaderboard": {"entries": ["bicubic"], "data": ["--data", f"{clips}/sub0"],
                            "": "--out o --lpips none --no-fid --precision fp32 --size 32x32 --frames 4".split()},
            "launch": {"tasks": ["tasks.json"], "": ["--dry-run", "--slots", "1"]},
            "bench": {"sections": ["codec"], "": codec}}


@pytest.mark.slow
@pytest.mark.any_precision
def test_any_option_of_any_command_works_or_is_refused(command_lines, places, tmp_path):
    assert {*command_lines} == {*fuzz.commands()}

    def cases(rng):
        for name, line in command_lines.items():
            for action in (actions := fuzz.options_of(name)):
                words = dict(line)
                for a in [action, *rng.sample(actions, rng.choice([0, 0, 1]))]:
                    words[a.dest] = fuzz.option(a, rng, places)
                words = [word.replace("NEW", f"c{rng.random()}") for part in words.values() for word in part]
                yield f"options, {name}", fuzz.run_command, [name, *words], dict(folder=tmp_path)

    attempts(cases, 8)


def as_bytes(state):
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.fixture
def readers(written, command_lines, cache, clips, teacher):
    """[(what, path, its contents as a tree or None, how to write that, who reads it)]"""
    from safetensors.torch import save

    infer = ["infer", "--out", "o", "--lpips", "none", "--precision", "fp32", "--max-frames", "4"]
    runs, small = f"{written}/runs", [*BASES["taehv"], "max_steps=3", f"out_dir={written}/runs"]
    of_taehv, of_vqgan = [*infer, f"{runs}/taehv"], [*infer, f"{runs}/vqgan"]
    of_launch = ["launch", "tasks.json", "--dry-run", "--slots", "1"]
    for suffix in ("mp4", "mkv", "avi", "mov"):
        write_clip(f"{written}/v/a.{suffix}", frames=4)
    shutil.copy(written / "taehv/comparison_videos/clip0_original.webm", written / "v/a.webm")
    image = np.random.default_rng(0).integers(0, 255, (32, 40, 3), np.uint8)
    for name in ("png", "jpg", "webp", "bmp"):
        cv2.imencode(f".{name}", image)[1].tofile(f"{written}/{name}.png")
    listed = [f"{clips}/sub0/clip0.mp4", f"{clips}/sub1/clip1.mp4"]
    texts = {"a.json": json.dumps({"list": [{"path": path, "caption": "b"} for path in listed]}),
             "a.csv": "path,caption\n" + "".join(f"{path},b\n" for path in listed)}
    for name, text in texts.items():
        (written / name).write_text(text)
    weights = checkpoint.read(f"{runs}/taehv/model.pth")
    (written / "w.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))
    vqgan = checkpoint.read(f"{runs}/vqgan/model.pth")
    (written / "w.ckpt").write_bytes(as_bytes({"state_dict": vqgan, "epoch": 1}))
    shutil.copytree(f"{runs}/taehv", f"{runs}/a")
    shutil.copytree(cache, f"{written}/cache")
    script = torch.jit.script(Scripted())
    torch.jit.save(script, f"{written}/t.pt")
    step = checkpoint.read(f"{runs}/taehv/step_00000002.pt")
    config_tree = json.loads((written / "runs/taehv/config.json").read_text())
    cached = [*BASES["distill"][:1], f"latent_cache={written}/cache", *BASES["distill"][2:], "max_steps=1",
              f"out_dir={runs}", "name=cached"]
    build = ["latent_cache", *(word.replace("NEW", "c") for word in command_lines["latent_cache"][""])]

    metrics = [json.loads(line) for line in open(f"{runs}/a/metrics.jsonl")]

    def text(tree):
        return json.dumps(tree).encode()

    def lines(tree):
        return b"".join(text(part) + b"\n" for part in (tree if isinstance(tree, list) else [tree]))

    return [
        *((f"video, {suffix}", f"v/a.{suffix}", None, None, [*of_taehv, f"v/a.{suffix}"])
          for suffix in ("mp4", "mkv", "avi", "mov", "webm")),
        ("video, train.py", "v/a.mp4", None, None, [*small, "data=v/a.mp4", "name=v", "resume=auto"]),
        *((f"image, {name}", f"{name}.png", None, None, [*of_taehv, f"{name}.png"])
          for name in ("png", "jpg", "webp", "bmp")),
        ("annotation", "a.json", json.loads(texts["a.json"]), text, [*small, "data=a.json", "name=j"]),
        ("table", "a.csv", None, None, [*small, "data=a.csv", "name=t"]),
        ("latents", "taehv/latents/clip0.latents.npz", None, None, [*of_taehv, "taehv/latents/clip0.latents.npz"]),
        ("tokens", "vqgan/tokens/clip0.tokens", None, None, [*of_vqgan, "vqgan/tokens/clip0.tokens"]),
        ("checkpoint, infer.py", "runs/taehv/step_00000002.pt", step, as_bytes, [*of_taehv, listed[0]]),
        ("checkpoint, train.py", "runs/taehv/step_00000002.pt", step, as_bytes,
         [*small, f"data={clips}", "name=taehv"]),
        ("checkpoint, init_from", "runs/taehv/step_00000002.pt", step, as_bytes,
         ["taehv", *small[2:], f"data={clips}", "name=i", "init_from=runs/taehv/step_00000002.pt"]),
        ("one rank's state", "runs/seraena/step_00000002.rank0", checkpoint.read(f"{runs}/seraena/step_00000002.rank0"),
         as_bytes, [*SERAENA, "max_steps=3", f"out_dir={runs}", f"data={clips}", "name=seraena"]),
        ("weights, .pth", "runs/taehv/model.pth", weights, as_bytes, [*infer, "runs/taehv/model.pth", listed[0]]),
        ("weights, .safetensors", "w.safetensors", None, None, [*infer, "w.safetensors", listed[0]]),
        ("weights, .ckpt", "w.ckpt", {"state_dict": vqgan, "epoch": 1}, as_bytes, [*infer, "w.ckpt", listed[0]]),
        ("weights, tokenizer", "runs/vqgan/model.pth", vqgan, as_bytes, [*infer, "runs/vqgan/model.pth", listed[0]]),
        ("settings beside weights", "runs/taehv/config.json", config_tree, text,
         [*infer, "runs/taehv/model.pth", listed[0]]),
        ("settings of a run, train.py", "runs/taehv/config.json", config_tree, text,
         ["runs/taehv/config.json", "max_steps=3", f"out_dir={runs}"]),
        ("settings of a run, launch.py", "runs/a/config.json", config_tree, text, of_launch),
        ("metrics.jsonl, launch.py", "runs/a/metrics.jsonl", metrics, lines, of_launch),
        ("tasks", "tasks.json", json.loads((written / "tasks.json").read_text()), text, of_launch),
        ("cache, index", "cache/index.json", json.loads((written / "cache/index.json").read_text()), text, cached),
        ("cache, origins", "cache/shard_00000.json", json.loads((written / "cache/shard_00000.json").read_text()), text,
         cached),
        ("cache, latents", "cache/shard_00001.latents.npy", None, None, cached),
        ("cache, building on", "c/index.json", None, None, build),
        ("teacher, torchscript", "t.pt", None, None,
         ["latent_cache", "--teacher", "torchscript:t.pt", *build[3:], "--out", "s"]),
    ]


class Scripted(torch.nn.Module):
    """A teacher."""

    @torch.jit.export
    def encode(self, video: torch.Tensor):
        return video[:, :1, :, ::8, ::8]


@pytest.mark.slow
@pytest.mark.any_precision
def test_any_file_is_read_or_refused(readers, written):
    """Files of each kind, whose bytes are scrambled, or in whose contents something is odd, as their readers' commands
    take them."""
    outcome, text = fuzz.attempt("files, whole", fuzz.run_command, *readers[-2][-1], folder=written)
    assert outcome == "run", text  # there is a cache to go on with
    originals = {path: (written / path).read_bytes() for _, path, *_ in readers}

    def cases(rng):
        for what, path, tree, write, arguments in readers:
            odd = tree is not None and rng.random() < 0.7
            content = write(with_something_odd(tree, rng)) if odd else scrambled(originals[path], rng)
            call = fuzz.run_command if arguments[0] in fuzz.commands() else fuzz.train_with
            for name in ("s", "runs/seraena/step_00000003.pt", "runs/taehv/step_00000003.pt"):  # of attempts before
                remove = shutil.rmtree if name == "s" else os.remove
                if (written / name).exists():
                    remove(written / name)
            (written / path).write_bytes(content)
            yield f"files: {what}", call, arguments, dict(folder=written)
            (written / path).write_bytes(originals[path])

    attempts(cases, 8)
