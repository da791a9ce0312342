"""Video DC-AE for inference on a CPU: the same results from the same weights, in less time and memory.

    quick = fast(load_dcae("F32T4C128_AE.safetensors"))  # a derived copy
    video = quick.decode(quick.encode(video))            # all of the model's methods, streams and tiles included

This file works with torch, model_dcae.py and fast_taehv.py beside it. Results are those of the model up to rounding
(about 2e-6 of the largest value in float32, like the model's own error). The copy is for inference in eval mode, on the
device and in the dtype that the model had when the copy was made; later changes of the weights do not reach it. Its
kernels take up to four times the memory of the weights they are made from. Images go through the model's own layers.

What helps (measured figures: docs/speed.md):
- In the stages of residual blocks, frames flow one at a time, depth first: few maps exist at once, all channels-last.
- A 3D convolution is a sum of 2D convolutions over neighbouring frames. Winograd's algorithm, in time alone, makes four
  frames with six 2D convolutions instead of twelve; its other sums are over whole frames. Only in float32.
- Nearest upsampling and the convolution after it are a transposed convolution: 16 multiplications instead of 36.
- The shortcuts beside changes of size are linear, so they are added to the kernels.
- The last layer, to three channels, is one 2D convolution that gives a frame's contributions to three output frames.
  The first layer, from three channels, is one 2D convolution over three frames.
"""
import copy

import torch
import torch.nn.functional as F

from fast_taehv import Conv, up_kernel
from model_dcae import DCAE, TIME_STAGES, AttentionBlock, Average, Duplicate, Residual

# ---- 3D convolutions over a stream of frames (1 C H W, channels-last), as 2D convolutions --------------------------


def windows(frames, size):
    """Yields lists of size + 2 consecutive frames, each `size` frames after the one before; None beyond the ends."""
    window = [None]
    for x in frames:
        window.append(x)
        if len(window) == size + 2:
            ready, window = [window], window[size:]
            yield ready.pop()  # hold no frame here that is not needed again
    yield window + [None] * (size + 2 - len(window))


class Taps:
    """A 3D convolution as three 2D kernels: for the previous frame, the frame itself and the next one."""

    def __init__(self, weight, bias, kernel):
        self.kernels = [kernel(w, bias if d == 1 else None) for d, w in enumerate(weight.unbind(2))]

    def __call__(self, frames):
        for before, x, behind in windows(frames, 1):
            y = self.kernels[1](x)
            y = y if before is None else self.kernels[0](before, y)
            yield y if behind is None else self.kernels[2](behind, y)


class Winograd:
    """Four frames with six 2D convolutions instead of twelve (Winograd 1980, F(4, 3)); clips have a multiple of four.

    Each of the six is a convolution of a weighted sum of frames. `even` and `odd` are sums that two result frames need.
    """

    def __init__(self, weight, bias, kernel):
        a, b, c = weight.double().unbind(2)
        products = [a / 4, (a + b + c) / -6, (a - b + c) / -6, (a + 2 * b + 4 * c) / 24, (a - 2 * b + 4 * c) / 24, c]
        self.kernels = [kernel(w.to(weight.dtype), bias if k == 1 else None) for k, w in enumerate(products)]

    def __call__(self, frames):
        for window in windows(frames, 4):
            done = self.four([torch.zeros_like(window[1]) if x is None else x for x in window])
            del window
            while done:
                yield done.pop(0)

    def four(self, x):
        k = self.kernels
        p, q = x[4].sub(x[2], alpha=4), x[3].sub(x[1], alpha=4)
        one, two = k[1](p + q), k[2](p.sub_(q))
        even, odd = one + two, one.sub_(two)
        p, q = x[4] - x[2], x[3] - x[1]
        one, two = k[3](torch.add(p, q, alpha=2)), k[4](p.sub_(q, alpha=2))
        even4, odd2 = one + two, one.sub_(two)
        p, q = x[4].sub(x[2], alpha=5).add_(x[0], alpha=4), x[5].sub(x[3], alpha=5).add_(x[1], alpha=4)
        return [k[0](p, even + even4), torch.add(odd, odd2, alpha=2), even.add_(even4, alpha=4),
                k[5](q, odd.add_(odd2, alpha=8))]


class First:
    """The first layer, with few input channels: a 2D convolution over the channels of three frames."""

    def __init__(self, layer):
        self.conv = Conv(layer.weight.transpose(1, 2).flatten(1, 2), layer.bias)

    def __call__(self, frames):
        for window in windows(frames, 1):
            shape = next(x for x in window if x is not None)
            window = [torch.zeros_like(shape) if x is None else x for x in window]
            yield self.conv(torch.cat(window, 1).contiguous(memory_format=torch.channels_last))


class Last:
    """The last layers: a norm, a ReLU, and a 2D convolution that gives a frame's contributions to three output frames.
    """

    def __init__(self, norm, layer):
        self.norm, self.bias = norm, layer.bias.view(-1, 1, 1)
        self.conv = Conv(layer.weight.transpose(1, 2).transpose(0, 1).flatten(0, 1))

    def __call__(self, frames):
        parts = (self.conv(normed(x, self.norm).relu_()).chunk(3, 1) for x in frames)
        for before, now, behind in windows(parts, 1):
            y = now[1] + self.bias
            y = y if before is None else y.add_(before[0])
            yield y if behind is None else y.add_(behind[2])


class Grow:
    """The 4x4 kernel of a transposed convolution, which enlarges (x2)."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias

    def __call__(self, x, into=None):
        y = F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        return y if into is None else into.add_(y)


def time_conv(weight, bias, stride=1):
    pays = stride == 1 or len(weight) >= 64  # with a stride, the sums are over frames four times the result's size
    exact = weight.dtype == torch.float32    # bf16 would lose too much precision
    return (Winograd if pays and exact else Taps)(weight, bias, lambda w, b: Conv(w, b, stride))


def down(residual):
    """The layer at a stage's end; its shortcut, averages of cells, is merged into the kernel."""
    layer = residual.main.conv
    weight, (n_out, n_in) = layer.weight.clone(), layer.weight.shape[:2]
    for k in range(4 * n_in):
        weight[k * n_out // (4 * n_in), k // 4, 1, 1 + k % 4 // 2, 1 + k % 2] += n_out / (4 * n_in)
    return time_conv(weight, layer.bias, 2)


def up(residual):
    """The layer at a stage's start; its shortcut, copies, is merged into the kernel."""
    layer = residual.main.conv.conv
    n_out, n_in = layer.weight.shape[:2]
    kernel = up_kernel(layer.weight)  # (n_out, n_in, 3, 4, 4)
    for k in range(4 * n_out):
        kernel[k // 4, k * n_in // (4 * n_out), 1, 1 + k % 4 // 2, 1 + k % 2] += 1
    kernel = kernel.transpose(0, 1)
    return (Winograd if kernel.dtype == torch.float32 else Taps)(kernel, layer.bias, Grow)


def normed(x, norm):
    """RMSNorm of a frame, in place."""
    scale = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = (scale.square_() / x.shape[1] + 1e-5).rsqrt_().to(x.dtype)
    return torch.addcmul(norm.bias.view(-1, 1, 1), x.mul_(scale), norm.weight.view(-1, 1, 1), out=x)


class Branch:
    """A residual branch over frames: steps and a norm, whose result is added to the branch's input."""

    def __init__(self, steps, norm):
        self.steps, self.norm = steps, norm

    def __call__(self, frames):
        waiting = []

        def kept():
            for x in frames:
                waiting.append(x)
                yield x

        branch = kept()
        for step in self.steps:
            branch = step(branch)
        for y in branch:
            yield normed(y, self.norm).add_(waiting.pop(0))


class Each:
    """A function of single frames."""

    def __init__(self, function):
        self.function = function

    def __call__(self, frames):
        return map(self.function, frames)


class Whole:
    """A layer that needs the whole clip."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, frames):
        clip = torch.cat(list(frames)).transpose(0, 1)[None]  # channels-last
        for x in self.layer(clip).unbind(2):
            yield x.contiguous(memory_format=torch.channels_last)


class Depthwise:
    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def __call__(self, x, into=None):
        y = F.conv2d(x, self.weight, self.bias, padding=1, groups=len(self.weight))
        return y if into is None else into.add_(y)


def silu_(x):
    return F.silu(x, inplace=True)


def gate(x):
    x, gates = x.chunk(2, 1)
    return F.silu(gates).mul_(x)


def block_steps(block):
    """Steps for a residual block, or for one with attention."""
    if not isinstance(block, AttentionBlock):
        first, second = block.main.conv1.conv, block.main.conv2
        return [Branch([time_conv(first.weight, first.bias), Each(silu_), time_conv(second.conv.weight, None)],
                       second.norm)]
    local = block.local_module.main
    wide, depth, point = local.inverted_conv.conv, local.depth_conv.conv, local.point_conv
    return [Whole(block.context_module),
            Branch([Each(Conv(wide.weight[:, :, 0], wide.bias, padding=0)), Each(silu_),
                    Taps(depth.weight, depth.bias, Depthwise), Each(gate),
                    Each(Conv(point.conv.weight[:, :, 0], padding=0))], point.norm)]


class FastDCAE(DCAE):
    """The copy that `fast` returns."""

    def _encoded(self, x):
        return super()._encoded(x) if x.shape[2] == 1 else run(self.steps["encoder"], x)

    def _decoded(self, z):
        return super()._decoded(z) if z.shape[2] == 1 else run(self.steps["decoder"], z)


@torch.no_grad()
def run(steps, x):
    """N C T H W -> the same layout."""
    done = []
    for clip in x:
        frames = (frame[None].contiguous(memory_format=torch.channels_last) for frame in clip.unbind(1))
        for step in steps:
            frames = step(frames)
        done.append(torch.cat(list(frames)))
    return torch.stack(done).transpose(1, 2)


@torch.no_grad()
def fast(model):
    """A derived, inference-only copy of a DCAE in eval mode. ValueError in training mode."""
    if model.training:
        raise ValueError("fast() is for inference: call model.eval() before")
    encoder, decoder = [First(model.encoder.project_in.conv)], [Whole(model.decoder.project_in)]
    for i, stage in enumerate(model.encoder.stages):
        for layer in stage.op_list:
            if isinstance(layer, Residual) and isinstance(layer.shortcut, Average):
                encoder.append(Whole(layer) if i in TIME_STAGES else down(layer))
            else:
                encoder += block_steps(layer)
    for i, stage in reversed([*enumerate(model.decoder.stages)]):
        for layer in stage.op_list:
            if isinstance(layer, Residual) and isinstance(layer.shortcut, Duplicate):
                decoder.append(Whole(layer) if i in TIME_STAGES else up(layer))
            else:
                decoder += block_steps(layer)
    norm, _, last = model.decoder.project_out.op_list
    quick = copy.copy(model)  # shares the weights
    quick.__class__ = FastDCAE
    quick.steps = {"encoder": [*encoder, Whole(model.encoder.project_out)],
                   "decoder": [*decoder, Last(norm, last.conv)]}
    return quick
