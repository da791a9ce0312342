"""TAEHV's weights by the names of diffusers' AutoencoderTinyVideo, and back.

Both have the same tensors: diffusers names the layers (`decoder.blocks.0.time_grow.weight`), and taehv.py numbers them
(`decoder.7.conv.weight`). As in huggingface/diffusers, scripts/convert_taehv_to_diffusers.py. This file works alone.
"""
import re

# Within a memory block, then in pools and growths, which have one convolution.
INNER = {"conv.0": "conv1", "conv.2": "conv2", "conv.4": "conv3"}


def layers():
    """{"encoder.2": "encoder.blocks.0.time_pool", ...}"""
    names = {"encoder.0": "encoder.conv_in", "encoder.17": "encoder.conv_out",
             "decoder.1": "decoder.conv_in", "decoder.22": "decoder.conv_out"}
    for i in range(3):
        first = 2 + 5 * i  # a pool, a convolution, three memory blocks
        names[f"encoder.{first}"] = f"encoder.blocks.{i}.time_pool"
        names[f"encoder.{first + 1}"] = f"encoder.blocks.{i}.conv_down"
        names.update({f"encoder.{first + 2 + k}": f"encoder.blocks.{i}.mem_blocks.{k}" for k in range(3)})
        first = 3 + 6 * i  # three memory blocks, the enlarging, a growth, a convolution
        names.update({f"decoder.{first + k}": f"decoder.blocks.{i}.mem_blocks.{k}" for k in range(3)})
        names[f"decoder.{first + 4}"] = f"decoder.blocks.{i}.time_grow"
        names[f"decoder.{first + 5}"] = f"decoder.blocks.{i}.conv_out"
    return names


def to_diffusers(state_dict):
    """A plain TAEHV's state_dict by diffusers' names. ValueError for a name that it has none for."""
    names, renamed = layers(), {}
    for key, tensor in state_dict.items():
        part, number, *between, last = key.split(".")
        layer, inner = f"{part}.{number}", ".".join(between)
        if layer not in names or inner not in ("", "conv", *INNER):
            raise ValueError(f"diffusers has no layer for {key}")
        renamed[".".join(filter(None, [names[layer], INNER.get(inner, ""), last]))] = tensor
    return renamed


def is_diffusers(state_dict):
    """Whether these are the names of an AutoencoderTinyVideo."""
    return "decoder.blocks.0.time_grow.weight" in state_dict


def from_diffusers(state_dict):
    """The weights of an AutoencoderTinyVideo by TAEHV's names; what is none of its names stays."""
    places, inner = {name: place for place, name in layers().items()}, {new: old for old, new in INNER.items()}
    renamed = {}
    for key, tensor in state_dict.items():
        found = re.fullmatch(r"(.*?)(?:\.(conv[123]))?\.(weight|bias)", key)
        place = places.get(found[1]) if found else None
        if place is None:
            renamed[key] = tensor
            continue
        one = "conv" if found[1].endswith(("time_pool", "time_grow")) else inner.get(found[2], "")
        renamed[".".join(filter(None, [place, one, found[3]]))] = tensor
    return renamed
