"""TAEHV for inference on a CPU: the same results from the same weights, in less time and memory.

    quick = fast(load_taehv("taew2_1.pth"))          # or model.fast(); a derived copy, the model itself is untouched
    video = quick.decode(quick.encode(video))        # all of the model's methods, streams included

This file works with torch and model_taehv.py beside it. Results are those of the model up to rounding (about 1e-6 of
the largest value in float32). The copy is for inference in eval mode, on the device and in the type that the model had
when it was made; later changes of the weights do not reach it.

What was measured to pay, one 64-channel block at 240x416 or one 240x416 -> 480x832 growth, float32, one AVX-512 core:
- Frames flow through the layers one at a time, depth first: nothing is concatenated, and few maps exist at a time.
- A memory block's first convolution, over a frame and the one before, is the sum of two; the second one's half is made
  when its frame is at hand, and kept. oneDNN adds, and applies the ReLU, while it writes its result (360 ms, not 480).
- At full size there are only bands of rows: of the encoder's first layers and of the decoder's last.
- Temporal growth (1x1), nearest upsampling and the 3x3 convolution behind them are linear: merged, they are for each
  output frame four 2x2 convolutions at low resolution, one for each place in a 2x2 cell (750 ms, not 1250; as one
  convolution with four times the channels 1210). Temporal pooling merges with the strided convolution behind it.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from model_taehv import TAEHV, MemBlock, SuperMemBlock, TPool

BAND = 1 << 22  # numbers of a full-size map that exist at a time: bounds memory, costs no time (1 << 17 costs 5 %)


def has_onednn(dtype):
    """Whether this PyTorch and CPU have the fused convolutions."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Conv:
    """A convolution, perhaps with something added and a ReLU, in one call of oneDNN where that can be had.

    `into`: a tensor of the result's shape that is added; it is overwritten.
    """

    def __init__(self, weight, bias=None, stride=1, padding=1):
        self.bias, self.stride, self.padding = bias, stride, padding
        weight = self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.fused = weight.device.type == "cpu" and has_onednn(weight.dtype)
        if self.fused:
            self.geometry = [padding] * 2, [stride] * 2, [1, 1], 1
            size = [1, weight.shape[1], 256, 256]  # the layout that suits usual frames; others work as well
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, size)

    def __call__(self, x, into=None, relu=False):
        if not self.fused:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
            y = y if into is None else y.add_(into)
            return y.relu_() if relu else y
        if into is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, "relu" if relu else "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            into, x, self.weight, self.bias, *self.geometry, "add", 1.0, "relu" if relu else None, [], "")


# ---- steps: generators of frames (N C H W, channels-last) from frames; memory: a dict, as in model_taehv -----------


class Plain:
    """Layers that look at single frames."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, frames, memory):
        for x in frames:
            yield from self.layer(x).unflatten(0, (len(x), -1)).unbind(1)  # several if it grows time


class ConvRelu:
    def __init__(self, layer, relu):
        self.conv, self.relu = Conv(layer.weight, layer.bias, padding=layer.padding[0]), relu

    def __call__(self, frames, memory):
        for x in frames:
            yield self.conv(x, relu=self.relu)


class Memory:
    """A memory block."""

    def __init__(self, block):
        first, second, third = block.conv[0], block.conv[2], block.conv[4]
        width = first.weight.shape[1] // 2
        self.now, self.before = Conv(first.weight[:, :width], first.bias), Conv(first.weight[:, width:])
        self.second, self.third = Conv(second.weight, second.bias), Conv(third.weight, third.bias)

    def __call__(self, frames, memory):
        for x in frames:
            past = memory.get(self)  # of the frame before, already convolved: nothing at a clip's start, for zeros
            h = self.now(x, past, relu=True)
            memory[self] = self.before(x)
            yield self.third(self.second(h, relu=True), x, relu=True)


class SuperMemory:
    def __init__(self, block):
        self.block = block

    def __call__(self, frames, memory):
        for x in frames:
            past = memory.get(self)
            memory[self] = x
            yield self.block(x, torch.zeros_like(x) if past is None else past)


class PoolConv:
    """Temporal pooling and the strided convolution behind it; before them, perhaps, the encoder's first layer."""

    def __init__(self, pool, layer, first=None):
        merged = torch.einsum("ocyx,ci->oiyx", layer.weight.float(), pool.conv.weight[:, :, 0, 0].float())
        self.convs = [Conv(w.to(layer.weight.dtype), stride=2) for w in merged.chunk(pool.stride, 1)]
        self.first = first and Conv(first.weight, first.bias)

    def __call__(self, frames, memory):
        for group in zip(*[iter(frames)] * len(self.convs)):
            yield self.pooled(group) if self.first is None else self.in_bands(group)

    def pooled(self, group):
        total = None
        for conv, x in zip(self.convs, group):
            total = conv(x, total)
        return total

    def in_bands(self, group):
        height, width = group[0].shape[-2:]
        half, done = -(-height // 2), []
        for start, end in bands(half, 2 * width * 2 * 64):
            top = max(0, 2 * start - 2)  # the first row of what follows is wrong there, where rows above are missing
            slab = self.pooled([self.first(x[:, :, top:2 * end + 1], relu=True) for x in group])
            done.append(slab[:, :, start - top // 2:end - top // 2])
        return done[0] if len(done) == 1 else torch.cat(done, 2)


def bands(height, row_size):
    """[(first row, row behind the last)] of bands whose rows of `row_size` numbers stay in a core's cache."""
    rows = max(8, BAND // row_size)
    return [(start, min(start + rows, height)) for start in range(0, height, rows)]


class GrowConv:
    """Nearest upsampling, temporal growth, the convolution behind them; then, perhaps, a ReLU and the last layer."""

    def __init__(self, scale, grow, layer, last=None):
        self.scale, self.width, dtype = scale, len(layer.weight), layer.weight.dtype
        self.last = last and Conv(last.weight, last.bias)
        self.kernels = []
        for w in grow.conv.weight[:, :, 0, 0].float().chunk(grow.stride):
            merged = torch.einsum("ocyx,ci->oiyx", layer.weight.float(), w)
            if scale == 1:
                self.kernels.append(Conv(merged.to(dtype)))
            else:
                self.kernels.append([(i, j, Conv(kernel.to(dtype))) for i, j, kernel in sub_pixel(merged)])

    def __call__(self, frames, memory):
        for x in frames:
            for kernel in self.kernels:
                yield self.grown(x, kernel) if self.last is None else self.in_bands(x, kernel)

    def grown(self, x, kernel):
        relu = self.last is not None
        if self.scale == 1:
            return kernel(x, relu=relu)
        n, _, height, width = x.shape
        out = torch.empty(n, self.width, 2 * height, 2 * width, dtype=x.dtype, device=x.device,
                          memory_format=torch.channels_last)
        for i, j, conv in kernel:
            out[:, :, i::2, j::2] = conv(x, relu=relu)[:, :, i:i + height, j:j + width]
        return out

    def in_bands(self, x, kernel):
        done, scale = [], self.scale
        for start, end in bands(x.shape[2], scale * x.shape[3] * scale * self.width):
            top = max(0, start - (3 - scale))  # nearest upsampling needs one row less around
            slab = self.last(self.grown(x[:, :, top:end + 3 - scale], kernel))
            done.append(slab[:, :, scale * (start - top):scale * (end - top)])
        return done[0] if len(done) == 1 else torch.cat(done, 2)


def sub_pixel(weight):
    """A 3x3 kernel behind a nearest x2 upsampling, as [(row, column, 2x2 kernel)] for the places in a 2x2 cell."""
    def halves(w, place, axis):  # the upper pixel sees (row above; own row twice), the lower (own twice; row below)
        a, b, c = w.unbind(axis)
        return torch.stack([a, b + c] if place == 0 else [a + b, c], axis)
    return [(i, j, halves(halves(weight, i, 2), j, 3)) for i in (0, 1) for j in (0, 1)]


def build_steps(blocks):
    """Steps for the layers of an encoder or decoder, in the orders that model_taehv builds."""
    steps, blocks = [], list(blocks)

    def followed_by(*kinds):
        return len(blocks) >= len(kinds) and all(isinstance(b, k) for b, k in zip(blocks, kinds))

    while blocks:
        layer = blocks.pop(0)
        if isinstance(layer, nn.Conv2d) and followed_by(nn.ReLU, TPool, nn.Conv2d):
            _, pool, strided = (blocks.pop(0) for _ in range(3))
            steps.append(PoolConv(pool, strided, layer))
        elif isinstance(layer, nn.Conv2d):
            relu = followed_by(nn.ReLU) and bool(blocks.pop(0))
            steps.append(ConvRelu(layer, relu))
        elif isinstance(layer, TPool):
            steps.append(PoolConv(layer, blocks.pop(0)))
        elif isinstance(layer, nn.Upsample):
            grow, behind = blocks.pop(0), blocks.pop(0)
            last = followed_by(nn.ReLU, nn.Conv2d)
            steps.append(GrowConv(int(layer.scale_factor), grow, behind, blocks[1] if last else None))
            blocks = [] if last else blocks
        elif isinstance(layer, MemBlock):
            steps.append(Memory(layer))
        else:
            steps.append(SuperMemory(layer) if isinstance(layer, SuperMemBlock) else Plain(layer))
    return steps


class FastTAEHV(TAEHV):
    """What `fast` gives."""

    @torch.no_grad()
    def _run(self, blocks, x, memory=None, progress=None):
        frames = (frame.contiguous(memory_format=torch.channels_last) for frame in x.unbind(1))
        memory = {} if memory is None else memory
        for step in self.steps["encoder" if blocks is self.encoder else "decoder"]:
            frames = step(frames, memory)
        return torch.stack(list(frames if progress is None else progress(frames)), 1)


@torch.no_grad()
def fast(model):
    """A derived, inference-only copy of a TAEHV in eval mode. ValueError in training mode."""
    if model.training:
        raise ValueError("fast() is for inference: call model.eval() before")
    quick = copy.copy(model)  # shares the weights
    quick.__class__ = FastTAEHV
    quick.steps = {"encoder": build_steps(model.encoder), "decoder": build_steps(model.decoder)}
    return quick
