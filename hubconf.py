"""TAEHV by torch.hub:

    model = torch.hub.load(FOLDER, "taew2_1", source="local")                     # published weights, downloaded once
    model = torch.hub.load(FOLDER, "taehv", source="local", pretrained=False)     # fresh weights

FOLDER is this one. There is an entry point for each name in PUBLISHED of model_taehv.py.
"""
from fast_taehv import fast as _fast
from init_taehv import colours as _colours
from model_taehv import PUBLISHED as _PUBLISHED
from model_taehv import TAEHV as _TAEHV
from model_taehv import load_taehv as _load_taehv
from step_taehv import speed_up as _speed_up

dependencies = ["torch"]


def _entry(name):
    def build(pretrained=True, fast=False, **arguments):
        model = _load_taehv(name, name, **arguments) if pretrained else _colours(_TAEHV(name, **arguments))
        return _fast(model.eval()) if fast else _speed_up(model)
    build.__name__ = name
    build.__doc__ = (f"The TAEHV {name}, in eval mode with its published weights, or fresh ones with pretrained=False; "
                     "fast=True gives a quicker copy for inference on a CPU. Other arguments: see TAEHV in "
                     "model_taehv.py.")
    return build


for _name in _PUBLISHED:
    globals()[_name] = _entry(_name)
