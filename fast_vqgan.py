"""VQGAN for inference on a CPU: the same results from the same weights, in less time and memory.

    quick = fast(load_vqgan("last.ckpt")[0])         # a derived copy, the model itself is untouched
    video = quick.detokenize(quick.tokenize(video))  # all of the model's methods, streams included

This file works with torch, model_vqgan.py and fast_taehv.py beside it. Results are those of the model up to rounding,
so codes are the same except for near ties. The copy is for inference in eval mode, on the device and in the dtype that
the model had when the copy was made; later changes of the weights do not reach it.

Nine tenths of the time are convolutions, as fast as matrix products. What else helps (figures: docs/speed.md):
- Nearest upsampling and the convolution after it are a transposed convolution: 16 multiplications instead of 36.
- The activation overwrites a norm's result, and a block's result its input; oneDNN adds the shortcut.
- Attention has two 1x1 convolutions instead of four, and no copies into another layout.
"""
import copy

import torch
import torch.nn.functional as F

from fast_taehv import Conv, GrownConv
from model_vqgan import VQGAN


def conv_of(layer):
    return Conv(layer.weight, layer.bias, layer.stride[0], layer.padding[0])


def normed(x, norm):
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps), inplace=True)


class Block:
    """A residual block; overwrites its input. oneDNN adds the shortcut while it writes the last result."""

    def __init__(self, block):
        self.norm1, self.conv1, self.norm2, self.conv2 = (
            block.norm1, conv_of(block.conv1), block.norm2, conv_of(block.conv2))
        self.shortcut = conv_of(block.nin_shortcut) if hasattr(block, "nin_shortcut") else None

    def __call__(self, x):
        h = normed(self.conv1(normed(x, self.norm1)), self.norm2)
        return self.conv2(h, x if self.shortcut is None else self.shortcut(x))


class Attention:
    """Self-attention; overwrites its input. Its four 1x1 convolutions are merged into two: query with key, value with
    output.

    The key's bias adds the same number to all of a query's logits, which does not change the softmax, so it is dropped.
    The value's bias is added to every output, so it goes into the output's bias.
    """

    def __init__(self, block):
        layers, dtype = (block.q, block.k, block.v, block.proj_out), block.q.weight.dtype
        (q, q_bias), (k, _), (v, v_bias), (out, out_bias) = (
            (layer.weight[:, :, 0, 0].float(), layer.bias.float()) for layer in layers)
        self.norm = block.norm
        self.query = (k.t() @ q).to(dtype), (k.t() @ q_bias).to(dtype)
        self.value = (out @ v).to(dtype), (out @ v_bias + out_bias).to(dtype)

    def __call__(self, x):
        norm = self.norm
        h = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps).permute(0, 2, 3, 1).flatten(1, 2)
        q, v = F.linear(h, *self.query), F.linear(h, *self.value)
        h = F.scaled_dot_product_attention(q[:, None], h[:, None], v[:, None])[:, 0]  # keys: h itself
        return x.add_(h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2))


class Last:
    def __init__(self, half):
        self.norm, self.conv = half.norm_out, conv_of(half.conv_out)

    def __call__(self, x):
        return self.conv(normed(x, self.norm))


def level_steps(level):
    steps = []
    for j, block in enumerate(level.block):
        steps += [Block(block), *([Attention(level.attn[j])] if level.attn else [])]
    steps += [level.downsample] if hasattr(level, "downsample") else []
    if hasattr(level, "upsample"):
        steps.append(GrownConv(level.upsample.conv.weight, level.upsample.conv.bias))
    return steps


def middle_steps(mid):
    return [Block(mid.block_1), Attention(mid.attn_1), Block(mid.block_2)]


class FastVQGAN(VQGAN):
    """The copy that `fast` returns."""

    @torch.no_grad()
    def _encoded(self, frames):
        for step in self.steps["encoder"]:
            frames = step(frames)
        return frames

    @torch.no_grad()
    def _decoded(self, z):
        for step in self.steps["decoder"]:
            z = step(z)
        return z


@torch.no_grad()
def fast(model):
    """A derived, inference-only copy of a VQGAN in eval mode. ValueError in training mode."""
    if model.training:
        raise ValueError("fast() is for inference: call model.eval() before")
    encoder, decoder = model.encoder, model.decoder
    down = [step for level in encoder.down for step in level_steps(level)]
    up = [step for level in reversed(decoder.up) for step in level_steps(level)]
    quick = copy.copy(model)  # shares the weights
    quick.__class__ = FastVQGAN
    quick.steps = {"encoder": [conv_of(encoder.conv_in), *down, *middle_steps(encoder.mid), Last(encoder)],
                   "decoder": [conv_of(decoder.conv_in), *middle_steps(decoder.mid), *up, Last(decoder)]}
    return quick
