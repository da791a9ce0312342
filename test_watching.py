"""What a run shows of itself, and how its commands are given: curves, warnings, best.pt, settings from files."""

import contextlib

import pytest
import torch

import metrics
import objective
import train
from model_taehv import TAEHV

CPU = torch.device("cpu")


class Speckled(torch.nn.Module):
    """A model whose reconstruction is its input and a little noise."""

    def forward(self, video):
        return video + 1e-3 * torch.randn(video.shape), {"latents": video}

    def targets(self, video):
        return video


def validate(model, samples):
    return objective.evaluate(model, samples, CPU, contextlib.nullcontext(), None)[0]


def test_a_flat_clip_has_no_sharpness():
    """A ratio of details where there is none: 1e8 and more, for noise that nobody sees."""
    flat = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    dithered = flat + (torch.rand(4, 3, 32, 32) > 0.9)  # a level up here and there
    textured = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for clip in (flat, dithered):
        result = validate(Speckled(), [{"video": clip}])
        assert result["sharpness"] is None and "sharpness - over 4 frames" in train.describe_validation(result)
    result = validate(Speckled(), [{"video": textured}, {"video": flat}])
    assert result["sharpness"] == pytest.approx(1, abs=0.01)
    assert f"sharpness {result['sharpness']:.3f} over 8 frames" in train.describe_validation(result)
