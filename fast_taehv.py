"""TAEHV for inference on a CPU: the same results from the same weights, in less time and memory.

    quick = fast(load_taehv("taew2_1.pth"))          # a derived copy, the model itself is untouched
    video = quick.decode(quick.encode(video))        # all of the model's methods, streams included

This file works with torch and model_taehv.py beside it; fast_cuda.py is the one for GPUs. Results are those of the
model up to rounding (about 1e-6 of the largest value in float32). The copy is for inference in eval mode, on the device
and in the dtype that the model had when the copy was made; later changes of the weights do not reach it.

What helps, measured on one 64-channel block at 240x416 or one 240x416 -> 480x832 growth, float32, one AVX-512 core:
- Frames flow through the layers one at a time, depth first: nothing is concatenated, and few maps exist at a time.
- A memory block's first convolution, over a frame and the one before, is computed as the sum of two convolutions. A
  frame's part in the next frame's sum is computed at once, and kept. oneDNN adds, and applies the ReLU, while it writes
  its result (360 ms instead of 480).
- Full-size maps exist only as bands of rows: in the encoder's first layers and the decoder's last.
- Temporal growth (1x1), nearest upsampling and the 3x3 convolution after them are linear. Merged, they are, for each
  output frame, one transposed convolution with a 4x4 kernel. (As four 2x2 convolutions, one for each position in a 2x2
  cell, 1250 ms became 750; those take 1.05 to 1.24 times as long as the transposed one.) Temporal pooling is merged
  with the strided convolution.
"""
import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from model_taehv import MEMORY_BLOCKS, TAEHV, MemBlock, TPool

BAND = 1 << 22  # numbers in a band of a full-size map: bounds memory, and costs no time (1 << 17 costs 5 %)


def has_onednn(dtype):
    """Whether this PyTorch and CPU have the fused convolutions."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Conv:
    """A convolution, optionally plus a tensor, optionally then a ReLU: one call of oneDNN if this PyTorch has it.

    `into`: a tensor of the result's shape to add; it may be overwritten. If it is not channels-last, it is copied:
    PyTorch passes only channels-last tensors to oneDNN, and its own fallback has no bfloat16.
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
        into = into.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            into, x, self.weight, self.bias, *self.geometry, "add", 1.0, "relu" if relu else None, [], "")


# ---- steps: generators of frames (N C H W, channels-last) from frames; memory: a dict, as in model_taehv -----------
#
# A step drops its own reference to a frame when it yields it (`yield done.pop()`). Else each step would keep one map
# alive that nobody needs.


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
            done = [self.conv(x, relu=self.relu)]
            del x
            yield done.pop()


class Memory:
    """A memory block. It overwrites its input frames. For the next frame it keeps this frame's part of the first
    convolution's sum, in the dtype memory["kept"]. Large frames (three bands or more) are computed band by band, with
    three rows more at each inner edge: then the frame and the kept map are the only full maps."""

    def __init__(self, block):
        first, second, third = block.conv[0], block.conv[2], block.conv[4]
        width = first.weight.shape[1] // 2
        self.now, self.before = Conv(first.weight[:, :width], first.bias), Conv(first.weight[:, width:])
        self.second, self.third = Conv(second.weight, second.bias), Conv(third.weight, third.bias)

    def __call__(self, frames, memory):
        for x in frames:
            if self not in memory:
                memory[self] = torch.zeros_like(x, dtype=memory["kept"])
            cuts = bands(x.shape[2], x.shape[1] * x.shape[3])
            done = [self.whole(x, memory) if len(cuts) < 3 else self.in_bands(x, memory[self], cuts)]
            del x
            yield done.pop()

    def whole(self, x, memory):
        past, memory[self] = memory[self].to(x.dtype), self.before(x).to(memory["kept"])
        return self.third(self.second(self.now(x, past, relu=True), relu=True), x, relu=True)

    def in_bands(self, batch, kept, cuts):
        """Overwrites the frames with the result, and `kept` with what the next frames need."""
        above = torch.empty_like(batch[:1, :, :6], memory_format=torch.channels_last).split(3, 2)
        for x, past in zip(batch.split(1), kept.split(1)):
            for start, end in cuts:
                first, last = start > 0, end < x.shape[2]  # the edges that lie within the frame
                slab, old = (torch.cat([rows] * first + [m[:, :, start:end + 3 * last].to(x.dtype)], 2)
                             for rows, m in zip(above, (x, past)))  # (with an empty first piece, not channels-last)
                for rows, m in zip(above, (slab, old)):  # save the rows that this band overwrites and the next needs
                    rows.copy_(m[:, :, 3 * first + end - start - 3:][:, :, :3])

                def valid(rows):  # at each inner edge, a convolution makes one more row wrong: drop it
                    return rows[:, :, first:rows.shape[2] - last]
                y = valid(self.second(valid(self.now(slab, old, relu=True)), relu=True))
                slab = valid(valid(slab))
                past[:, :, start:end] = valid(self.before(slab))
                x[:, :, start:end] = valid(self.third(y, slab, relu=True))
                del slab, old, y  # free them before the next band, which then reuses the same memory
        return batch


class WholeMemory:
    """A memory block run as in the model: of a super or wide decoder, or with LeakyReLU, which oneDNN does not fuse."""

    def __init__(self, block):
        self.block = block

    def __call__(self, frames, memory):
        for x in frames:
            past = memory.get(self)
            memory[self] = x
            yield self.block(x, torch.zeros_like(x) if past is None else past)


class PoolConv:
    """Temporal pooling merged with the strided convolution after it: a sum over frames, added up as they come."""

    def __init__(self, pool, layer):
        self.convs = [Conv(w, stride=2) for w in pool_kernels(pool, layer)]

    def __call__(self, frames, memory):
        total, position = [None], 0  # position of the next frame in its group
        for x in frames:
            total.append(self.convs[position](x, total.pop()))
            position = (position + 1) % len(self.convs)
            del x
            if position == 0:
                yield total.pop()
                total.append(None)


class FirstPoolConv:
    """The encoder's first layer, temporal pooling and the strided convolution after it, in bands of rows."""

    def __init__(self, first, pool, layer):
        self.first, self.convs = Conv(first.weight, first.bias), PoolConv(pool, layer).convs

    def __call__(self, frames, memory):
        for group in zip(*[iter(frames)] * len(self.convs)):
            height, width = group[0].shape[-2:]
            half, out = -(-height // 2), None
            for start, end in bands(half, 4 * 64 * width):
                top, slab = max(0, 2 * start - 2), None  # starts higher, since the band's first row comes out wrong
                for conv, x in zip(self.convs, group):
                    slab = conv(self.first(x[:, :, top:2 * end + 1], relu=True), slab)
                out = paste(out, slab[:, :, start - top // 2:end - top // 2], start, half)
            yield out


def bands(height, row_size):
    """[(first row, end row)] of bands of about equal height, at least 4 rows, with about BAND numbers each."""
    count = -(-height // max(8, BAND // row_size))
    return [(height * k // count, height * (k + 1) // count) for k in range(count)]


def paste(out, rows, start, height):
    """Copy rows, N C h W, into the map `out` of `height` rows, from row `start` on. out=None: makes it. Returns it."""
    if out is None:
        if rows.shape[2] == height:
            return rows
        out = torch.empty(len(rows), rows.shape[1], height, rows.shape[3], dtype=rows.dtype, device=rows.device,
                          memory_format=torch.channels_last)
    out[:, :, start:start + rows.shape[2]] = rows
    return out


class GrowConv:
    """Nearest upsampling, temporal growth and the convolution after them, merged; optionally a ReLU and the last layer.
    """

    def __init__(self, scale, grow, layer, last=None):
        self.scale, self.width = scale, len(layer.weight)
        self.last = last and Conv(last.weight, last.bias)
        self.kernels = [(Conv if scale == 1 else GrownConv)(w) for w in grow_kernels(grow, layer)]

    def __call__(self, frames, memory):
        for x in frames:
            for number, kernel in enumerate(self.kernels, 1):
                done = [kernel(x) if self.last is None else self.in_bands(x, kernel)]
                if number == len(self.kernels):
                    del x
                yield done.pop()

    def in_bands(self, x, kernel):
        out, scale, height = None, self.scale, x.shape[2]
        for start, end in bands(height, scale * x.shape[3] * scale * self.width):
            top = max(0, start - (3 - scale))  # with upsampling, a band needs one row around it instead of two
            slab = self.last(kernel(x[:, :, top:end + 3 - scale], relu=True))
            out = paste(out, slab[:, :, scale * (start - top):scale * (end - top)], scale * start, scale * height)
        return out


class GrownConv:
    """Nearest upsampling (x2) and a 3x3 convolution after it, as one transposed convolution."""

    def __init__(self, weight, bias=None):
        self.kernel = up_kernel(weight).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        self.bias = bias

    def __call__(self, x, relu=False):
        y = F.conv_transpose2d(x, self.kernel, self.bias, stride=2, padding=1)
        return y.relu_() if relu else y


def up_kernel(weight):
    """Kernels (..., 3, 3) of a convolution after nearest x2 upsampling -> kernels (..., 4, 4) of a transposed
    convolution of stride 2 and padding 1: 16 multiplications instead of 36. The caller swaps output and input channels,
    as a transposed convolution needs."""
    kernel = F.pad(weight.float().flip(-2, -1), (1, 1, 1, 1))
    kernel = kernel[..., :-1, :] + kernel[..., 1:, :]
    return (kernel[..., :-1] + kernel[..., 1:]).to(weight.dtype)


def pool_kernels(pool, layer):
    """Temporal pooling merged with the convolution after it: a kernel for each of the frames that it joins."""
    return merged(layer, pool.conv.weight).chunk(pool.stride, 1)


def grow_kernels(grow, layer):
    """Temporal growth merged with the convolution after it: a kernel for each of the frames that it makes."""
    return [merged(layer, weight) for weight in grow.conv.weight.chunk(grow.stride)]


def merged(layer, weight):
    """The kernel of a 1x1 convolution without bias followed by `layer`. Computed on the CPU: a GPU may use TF32."""
    kernel = torch.einsum("ocyx,ci->oiyx", layer.weight.float().cpu(), weight[:, :, 0, 0].float().cpu())
    return kernel.to(layer.weight)


STEPS = SimpleNamespace(Plain=Plain, ConvRelu=ConvRelu, Memory=Memory, WholeMemory=WholeMemory, PoolConv=PoolConv,
                        FirstPoolConv=FirstPoolConv, GrowConv=GrowConv)


def build_steps(blocks, kinds):
    """The steps for the layers of an encoder or decoder, in the order in which model_taehv.py builds them. kinds: the
    classes of the steps, such as STEPS."""
    steps, blocks = [], list(blocks)

    def followed_by(*layers):
        return len(blocks) >= len(layers) and all(isinstance(b, kind) for b, kind in zip(blocks, layers))

    while blocks:
        layer = blocks.pop(0)
        if isinstance(layer, nn.Conv2d) and followed_by(nn.ReLU, TPool, nn.Conv2d):
            _, pool, strided = (blocks.pop(0) for _ in range(3))
            steps.append(kinds.FirstPoolConv(layer, pool, strided))
        elif isinstance(layer, nn.Conv2d):
            relu = followed_by(nn.ReLU) and bool(blocks.pop(0))
            steps.append(kinds.ConvRelu(layer, relu))
        elif isinstance(layer, TPool):
            steps.append(kinds.PoolConv(layer, blocks.pop(0)))
        elif isinstance(layer, nn.Upsample):
            grow, behind = blocks.pop(0), blocks.pop(0)
            last = followed_by(nn.ReLU, nn.Conv2d)
            steps.append(kinds.GrowConv(int(layer.scale_factor), grow, behind, blocks[1] if last else None))
            blocks = [] if last else blocks
        elif isinstance(layer, MemBlock) and isinstance(layer.act, nn.ReLU):
            steps.append(kinds.Memory(layer))
        else:
            steps.append(kinds.WholeMemory(layer) if isinstance(layer, MEMORY_BLOCKS) else kinds.Plain(layer))
    return steps


class FastTAEHV(TAEHV):
    """The copy that `fast` returns.

    `kept`: the dtype in which memory blocks keep the previous frame; None for the model's own. These maps are most of
    the memory that large frames take. torch.float16 halves it, at an error of about 1e-4 of the largest value.
    """

    kept = None

    @torch.no_grad()
    def _frames(self, blocks, x, memory):
        own = next(self.parameters()).dtype
        if x.dtype != own or torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"fast(model) computes in the model's {own}, got {x.dtype}"
                             + " under torch.autocast" * torch.is_autocast_enabled(x.device.type)
                             + ": convert one to the other, as in fast(model.bfloat16()), and leave autocast out")
        frames = (frame.contiguous(memory_format=torch.channels_last) for frame in x.unbind(1))
        memory.setdefault("kept", self.kept or x.dtype)
        for step in self.steps["encoder" if blocks is self.encoder else "decoder"]:
            frames = step(frames, memory)
        for frame in frames:
            yield frame.unsqueeze(1)
            del frame

    def _run(self, blocks, x, memory=None, progress=None):
        if not x.shape[1]:
            return super()._run(blocks, x, memory, progress)
        frames = self._frames(blocks, x, {} if memory is None else memory)
        return torch.cat(list(frames if progress is None else progress(frames)), 1)


@torch.no_grad()
def fast(model):
    """A derived, inference-only copy of a TAEHV in eval mode, or of a tokenizer of its latents (model_vq_latents.py).
    ValueError in training mode, and for a model in float64. NaN in the input may come out as numbers: oneDNN's ReLU
    turns NaN into 0."""
    if model.training:
        raise ValueError("fast() is for inference: call model.eval() before")
    if next(model.parameters()).dtype == torch.float64:
        raise ValueError("fast() computes in float32, bfloat16 or float16, not in float64")
    quick = copy.copy(model)  # shares the weights
    if hasattr(model, "taehv"):
        quick._modules = {**model._modules, "taehv": fast(model.taehv)}
        return quick
    quick.__class__ = FastTAEHV
    quick.steps = {"encoder": build_steps(model.encoder, STEPS), "decoder": build_steps(model.decoder, STEPS)}
    return quick
