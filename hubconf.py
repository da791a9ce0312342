"""TAEHV by torch.hub:

    model = torch.hub.load(FOLDER, "taew2_1", source="local")                     # published weights, downloaded once
    model = torch.hub.load(FOLDER, "taehv", source="local", pretrained=False)     # fresh weights

FOLDER is this one. There is an entry point for each name in PUBLISHED of model_taehv.py.
"""
import fast_taehv as _fast_taehv  # noqa: F401  torch.hub shows a model this folder only while it is built
import step_taehv as _step_taehv  # noqa: F401
from model_taehv import PUBLISHED as _PUBLISHED
from model_taehv import TAEHV as _TAEHV
from model_taehv import load_taehv as _load_taehv

dependencies = ["torch"]


def _entry(name):
    def build(pretrained=True, **arguments):
        return _load_taehv(name, name, **arguments) if pretrained else _TAEHV(name, **arguments)
    build.__name__ = name
    build.__doc__ = (f"The TAEHV {name}, in eval mode with its published weights, or fresh ones with pretrained=False. "
                     "Other arguments: see TAEHV in model_taehv.py.")
    return build


for _name in _PUBLISHED:
    globals()[_name] = _entry(_name)
