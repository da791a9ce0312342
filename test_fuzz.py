"""Files and words of strangers, scrambled: one clear line each, no hang, no other error."""

import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal

import pytest
import torch

import checkpoint
import config
import data
import latent_cache
import latent_file
import train
from conftest import FRAMES, state_of
from model_taehv import TAEHV

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
        seen.append(answers(lambda: config.parse_buckets(read()), config.ConfigError))  # noqa: B023
    assert min(seen.count("read"), seen.count("refused")) > 300
    for key, value in itertools.product(("lr", "pixel_weight", "timeout_minutes", "gan_lecam"), ("inf", "-inf", "nan")):
        with pytest.raises(config.ConfigError, match=f"{key}={value}: a finite number is wanted"):
            config.load_config([f"{key}={value}"])
    for text in ("timeout_minutes=1e300", f"buckets={9 ** 999}x4:1:1", f"buckets=16x4:{9 ** 999}:1"):
        with pytest.raises(config.ConfigError):
            config.parse_buckets(config.load_config([text]))
    for name in ("../x", "/tmp/x", "..", "a/b", "a\\b", "-\0"):
        read = functools.partial(config.load_config, [f"name={name}"])
        assert answers(read, config.ConfigError) == "refused", name


@pytest.mark.parametrize("settings, words", [
    ("workers=999999999", "workers=999999999: at most .* is wanted on a machine of"),
    ("max_steps=100000000000000000", "max_steps=100000000000000000: at most 100000000000 is wanted"),
    ("lr=1e300", "lr=1e.300: at most 10{30} is wanted"),
    ("buckets=16x70000:1:1", "buckets: '16x70000:1:1': frames at most 65536 is wanted"),
    ("size=16384 frames=65536 workers=64", "size=16384 frames=65536 .*the batches alone take .* GB, and this machine"),
    ("model=vqgan net.num_res_blocks=1000000000", "net.num_res_blocks=1000000000: at most 128 is wanted"),
    (f"model=dcae net.width_list={'65536,' * 6}",
     "training it takes .* GB for its weights alone, and this machine has"),
    ("model=vqgan net.quantizer=fsq net.levels=(1000,1000,1000)", "1000000000 codes; at most 1048576 are wanted")])
def test_what_is_beyond_any_machine_is_refused_at_once(settings, words):
    assert re.search(words, train.problem_of(["taehv", *settings.split()]))


def test_scrambled_annotations_are_refused_in_one_line(tmp_path):
    rng, seen, path = random.Random(2), [], tmp_path / "a.json"
    tree = {"list": [{"path": "a.mp4", "caption": "b"}, {"path": "c/d.mp4"}], "more": 1}
    for i in range(600):
        path.write_bytes(json.dumps(with_something_odd(tree, rng)).encode() if i % 2 else
                         scrambled(json.dumps(tree).encode(), rng))
        seen.append(answers(lambda: data.probe(data.find_sources(str(path))), data.DataError))
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
        seen.append(answers((lambda: here(*resume)) if kind == "run" else lambda: checkpoint.load_model(path),
                            config.ConfigError, checkpoint.CheckpointError))
    assert min(seen.count("read"), seen.count("refused")) > 3, seen


def test_scrambled_caches_are_refused_in_one_line(cache, tmp_path):
    rng, seen = random.Random(5), []
    small = {name: (tmp_path / "cache" / name) for name in sorted(os.listdir(cache))}
    shutil.copytree(cache, tmp_path / "cache")
    index = json.loads(small["index.json"].read_text())

    def read():
        found = latent_cache.LatentCache(str(tmp_path / "cache"))
        train_clips, _, _ = found.split(0.3, 0, 4)
        if found.problem():
            raise data.DataError(found.problem())
        train_clips.sample(3)

    for i in range(300):
        name = rng.choice(["index.json", "index.json", *small])
        before = small[name].read_bytes()
        if name == "index.json" and i % 3:
            odd = with_something_odd(index, rng)
            if isinstance(odd, dict):
                odd.pop("crc32", None)
                odd["crc32"] = latent_cache.index_crc(odd)
            small[name].write_text(json.dumps(odd))
        else:
            small[name].write_bytes(scrambled(before, rng))
        seen.append(answers(read, data.DataError))
        small[name].write_bytes(before)
    assert seen.count("refused") > 150 and answers(read, data.DataError) == "read"
