"""Weights as the bytes of a file, and the folder that they go to: what export.py and prune.py write.

    with folder_for("new/folder"):
        write_atomically("new/folder/a.safetensors", as_safetensors(model, model.state_dict()))
"""
import contextlib
import io
import json
import os

import torch

import models
from checkpoint import probe


class ExportError(Exception):
    """What cannot be exported so; the message names the reason."""


def name_of(model):
    """The key of models.MODELS that makes such a model."""
    return next(name for name, kind in models.MODELS.items() if type(model) is kind)


def as_safetensors(model, state):
    """With the settings in its metadata, by which models.py and model_taehv.py know it whatever its name."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ExportError("this needs a package: pip install safetensors") from None
    return save(state, {"format": "pt", "model_name": name_of(model), "model_config": json.dumps(model.config)})


def as_pth(state):
    """A state_dict as torch.save writes it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@contextlib.contextmanager
def folder_for(path):
    """Makes the folder and sees that it can be written to; what was made goes again if the block fails."""
    folder, made = os.path.abspath(path), []
    while not os.path.isdir(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(path, exist_ok=True)
        probe(path)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
