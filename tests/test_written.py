"""Files written by earlier versions: they load, and give the same bits. tests/written/ holds a run of a narrow TAEHV,
one of a small VQ-VAE-2, a cache, latents and tokens, each made by the commands of November 2026."""
import hashlib
import os
import shutil

import numpy as np
import torch

import models
from checkpoint import read
from conftest import COMMON, ROOT, SCRATCH
from cache_files import LatentCache
from latent_file import LatentReader
from token_file import TokenReader

WRITTEN = os.path.join(ROOT, "tests", "written")


def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def written(*names):
    return os.path.join(WRITTEN, *names)


def test_weights_of_a_run_are_the_same():
    """As best.pt, as a checkpoint, and as model.pth beside config.json."""
    for names in (("taehv",), ("taehv", "step_00000002.pt"), ("taehv", "model.pth")):
        assert models.fingerprint(models.load_model(written(*names))[0]) == "a1ff6bd4099511f5"
    model, words = models.load_model(written("vqvae2"))
    assert models.fingerprint(model) == "6fa6470f24c03ded" and words == "vqvae2, step 2"


def test_latents_tokens_and_caches_are_the_same():
    model, _ = models.load_model(written("taehv"))
    latents = list(LatentReader(written("clip.latents.npz"), model))
    assert digest(piece.numpy() for piece in latents) == "36e9974bf337595e"
    pieces = list(TokenReader(written("clip.tokens")))
    assert digest(codes for piece in pieces for codes in piece) == "cf788851fa8c5b1a"
    cache = LatentCache(written("cache"))
    found = cache.read(np.arange(len(cache)))
    assert cache.problem() == "" and digest((found["video"].numpy(), found["latents"].float().numpy())) == \
        "572293e16c9d19fe"


def test_a_run_goes_on(here, tmp_path):
    """With a learning rate of 0 its next checkpoint has the same weights, and the state that the first one had."""
    shutil.copytree(written("taehv"), tmp_path / "taehv")
    before = read(written("taehv", "step_00000002.pt"))
    widths = [f"net.{name}={','.join(map(str, before['model_config'][name]))}"
              for name in ("encoder_widths", "decoder_widths")]
    here(*SCRATCH, *COMMON, *widths, "pixel_loss=l1", "size=16", "frames=4", "batch_size=2", "max_steps=3", "lr=0",
         "weight_decay=0", "name=taehv")
    after = read(str(tmp_path / "taehv" / "step_00000003.pt"))
    assert (after["step"], after["samples"]) == (3, before["samples"] + 2) and after.keys() == before.keys()
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
    means = [[state["step"].item() for state in one["optimizer"]["state"].values()] for one in (before, after)]
    assert set(means[0]) == {2.0} and set(means[1]) == {3.0}
    assert after["trend"]["kept"][2].sum() == 3, "the trend knows the two steps before"
