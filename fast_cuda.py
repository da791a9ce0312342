"""TAEHV for inference on a GPU: the same results from the same weights, in fewer and larger kernels.

    quick = fast(load_taehv("taew2_1.pth").cuda().half())   # a derived copy, the model itself is untouched
    quick = fast(model, graph=True)                         # the same, replayed as CUDA graphs
    video = quick.decode(quick.encode(video))               # all of the model's methods, streams included

This file works with torch, model_taehv.py and fast_taehv.py beside it. Results are those of the model up to rounding.
The copy is for inference in eval mode, on the device and in the dtype that the model had when the copy was made; later
changes of the weights do not reach it. It runs on a CPU too, where fast_taehv.py is faster. Its arithmetic is tested on
a CPU. What only a GPU has (cuDNN's fused calls, CUDA graphs) has not run yet; tests/test_gpu.py tests it on a GPU.

How it differs from the model's layers:
- All frames of a group are one batch, channels-last and time-major (T N C H W: frame 0 of all clips, frame 1, ...), so
  the previous frames are a view.
- A memory block's first convolution, over a frame and the one before, is computed as the sum of two convolutions. cuDNN
  adds, and applies the ReLU, while it writes its result.
- Temporal growth (1x1), nearest upsampling and the 3x3 convolution after them are, for each output frame, one
  transposed convolution with a 4x4 kernel: 16 multiplications instead of 36. If time grows, a copy then puts the frames
  in order. Two alternatives wait for a measurement on a GPU: growing time first, at a quarter of the size, would copy
  less and multiply an eighth more; and with a 3x3 convolution to four times the channels and a shuffle, cuDNN could
  apply the ReLU, but for 36 multiplications.
- Temporal pooling is merged with the strided convolution. The first layer runs separately on the first frames of the
  pool's groups, the second frames, ..., so that no full-size map is copied.
- Zeros fill up the input channels of the first and the output channels of the last convolution to multiples of 8, which
  tensor cores need.
"""
import copy
import functools
import weakref
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fast_taehv import GrownConv, build_steps, grow_kernels, pool_kernels
from model_taehv import TAEHV, TGrow

INDEX = 1 << 31  # most numbers in a map: PyTorch splits larger maps for cuDNN, but not in the fused calls


@functools.cache
def has_fused(device, dtype):
    """Whether cuDNN's fused convolutions exist for a device and dtype, and give the right result on a small map."""
    if device.type != "cuda" or not hasattr(torch, "cudnn_convolution_add_relu"):
        return False
    x, weight = (torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
                 for size in ((2, 64, 16, 16), (64, 64, 3, 3)))
    weight /= 24  # results of about 1
    bias = x[0, :, 0, 0].contiguous()
    plain = F.conv2d(x, weight, bias, padding=1)
    try:
        fused = [fused_conv(x, weight, bias, add, 1, 1) for add in (None, x)]
    except RuntimeError:  # cuDNN has none for this GPU and type, or PyTorch was built without it
        return False
    return all((ours - theirs.relu()).abs().max() < 0.1 for ours, theirs in zip(fused, (plain, plain + x)))


def fused_conv(x, weight, bias, add, stride, padding):
    """relu(convolution + bias + add) in one call of cuDNN; add may be None."""
    geometry = [stride] * 2, [padding] * 2, [1, 1], 1
    if add is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, add, 1.0, bias, *geometry)


class Conv:
    """A convolution, optionally plus a tensor `add` of the result's shape, optionally then a ReLU: one cuDNN call if it
    has such a call."""

    def __init__(self, weight, bias=None, stride=1, padding=1):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.stride, self.padding = bias, stride, padding
        self.zeros = weight.new_zeros(len(weight)) if bias is None else bias  # the fused calls would make them
        self.fused = has_fused(weight.device, weight.dtype) and not any(n % 8 for n in weight.shape[:2])

    def __call__(self, x, add=None, relu=False):
        largest = len(x) * x.shape[2] * x.shape[3] * max(self.weight.shape[:2])
        if self.fused and relu and largest < INDEX:
            return fused_conv(x, self.weight, self.zeros, add, self.stride, self.padding)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        y = y if add is None else y.add_(add)
        return y.relu_() if relu else y


class Edge(Conv):
    """A convolution with any numbers of channels, which zeros fill up to multiples of 8."""

    def __init__(self, layer):
        self.channels, (self.more_in, more_out) = len(layer.weight), (-n % 8 for n in layer.weight.shape[1::-1])
        super().__init__(F.pad(layer.weight, (0, 0, 0, 0, 0, self.more_in, 0, more_out)),
                         layer.bias if layer.bias is None else F.pad(layer.bias, (0, more_out)),
                         padding=layer.padding[0])

    def __call__(self, x, relu=False):
        x = F.pad(x, (0, 0, 0, 0, 0, self.more_in)) if self.more_in else x
        return super().__call__(x, relu=relu)[:, :self.channels]


# ---- steps: frames (T * N, C, H, W) of N clips -> the same; kept: {step: what it needs of the previous frame} -------


def places(x, count, n):
    """The first of each `count` frames, the second of each, ...: (T * N, C, H, W), channels-last -> `count` such."""
    return [place.flatten(0, 1).permute(0, 3, 1, 2)
            for place in x.permute(0, 2, 3, 1).unflatten(0, (-1, count, n)).unbind(1)]


def interleave(frames, n):
    """The inverse of `places`: the lists of first, second, ... frames, put back in order."""
    if len(frames) == 1:
        return frames[0]
    frames = [frame.permute(0, 2, 3, 1).unflatten(0, (-1, n)) for frame in frames]
    return torch.stack(frames, 1).flatten(0, 2).permute(0, 3, 1, 2)


def before(x, step, n, kept):
    """x shifted by one frame: the frame kept from the last call comes first, or zeros at a clip's start. The tensor in
    `kept` stays the same one, since CUDA graphs know its address: `keep` overwrites it."""
    if step not in kept:
        kept[step] = torch.zeros_like(x[:n])
    return kept[step] if len(x) == n else torch.cat([kept[step], x[:-n]])


def keep(x, step, n, kept):
    kept[step].copy_(x[-n:])


class Plain:
    """Layers that look at single frames."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x, n, kept):
        if isinstance(self.layer, TGrow):
            return interleave(self.layer.conv(x).chunk(self.layer.stride, 1), n)
        return self.layer(x)


class ConvRelu:
    def __init__(self, layer, relu):
        self.conv, self.relu = Edge(layer), relu

    def __call__(self, x, n, kept):
        return self.conv(x, self.relu)


class Memory:
    """A memory block. It keeps not the previous frame, but that frame's part of the first convolution's sum."""

    def __init__(self, block):
        first, second, third = block.conv[0], block.conv[2], block.conv[4]
        width = first.weight.shape[1] // 2
        self.now, self.before = Conv(first.weight[:, :width], first.bias), Conv(first.weight[:, width:])
        self.second, self.third = Conv(second.weight, second.bias), Conv(third.weight, third.bias)

    def __call__(self, x, n, kept):
        half = self.before(x)
        y = self.now(x, before(half, self, n, kept), relu=True)
        keep(half, self, n, kept)
        del half
        return self.third(self.second(y, relu=True), x, relu=True)


class WholeMemory:
    """A memory block run as in the model: one of a super or wide decoder, or with LeakyReLU."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x, n, kept):
        y = self.block(x, before(x, self, n, kept))
        keep(x, self, n, kept)
        return y


class PoolConv:
    """Temporal pooling merged with the strided convolution after it; optionally the encoder's first layer before."""

    def __init__(self, pool, layer, first=None):
        self.convs, self.first = [Conv(w, stride=2) for w in pool_kernels(pool, layer)], first

    def __call__(self, x, n, kept):
        total = None
        for conv, frames in zip(self.convs, places(x, len(self.convs), n)):
            total = conv(frames if self.first is None else self.first(frames, relu=True), total)
        return total


class FirstPoolConv(PoolConv):
    def __init__(self, first, pool, layer):
        super().__init__(pool, layer, Edge(first))


class GrowConv:
    """Nearest upsampling, temporal growth and the convolution after them, merged; optionally a ReLU and the last layer.
    """

    def __init__(self, scale, grow, layer, last=None):
        self.kernels = [(Conv if scale == 1 else GrownConv)(w) for w in grow_kernels(grow, layer)]
        self.last = last and Edge(last)

    def __call__(self, x, n, kept):
        if self.last is None:
            return interleave([kernel(x) for kernel in self.kernels], n)
        return interleave([self.last(kernel(x, relu=True)) for kernel in self.kernels], n)


STEPS = SimpleNamespace(Plain=Plain, ConvRelu=ConvRelu, Memory=Memory, WholeMemory=WholeMemory, PoolConv=PoolConv,
                        FirstPoolConv=FirstPoolConv, GrowConv=GrowConv)


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


def record(call, device):
    """Record call() as a CUDA graph: (function that replays it, the tensor that then holds its result)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # lets libraries initialise themselves, which must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call()
    return graph.replay, result


class Graph:
    """A recorded call for groups of one shape; it reads and overwrites tensors in `kept`."""

    def __init__(self, call, x, kept):
        self.x = x.clone()
        originals = [tensor.clone() for tensor in kept.values()]
        self.replay, self.result = record(lambda: call(self.x), x.device)
        for tensor, original in zip(kept.values(), originals):  # undo the call that `record` makes as a warm-up
            tensor.copy_(original)

    def __call__(self, x):
        self.x.copy_(x)
        self.replay()
        return self.result.clone()  # the next call overwrites it


class Session:
    """The tensors kept during one run of clips, and the graphs that are bound to their addresses. After the run, the
    next run of clips of the same size reuses them. Runs at the same time have a Session each."""

    def __init__(self):
        self.kept, self.graphs = {}, {}  # graphs: {shape of a group: Graph, or None if it occurred once}
        self.user = lambda: None         # gives the Clips that use it, None after they are gone

    def run(self, call, x):
        """call(x). A shape is recorded when it occurs the second time, since the odd lengths of last groups rarely do.
        """
        if x.shape not in self.graphs:
            self.graphs[x.shape] = None
            return call(x)
        if self.graphs[x.shape] is None:
            self.graphs[x.shape] = Graph(call, x, self.kept)
        return self.graphs[x.shape](x)


class Clips:
    """A run of clips: lives in their stream's `memory`, and ends with it. Its first past frames are zeros.
    """

    def __init__(self, session):
        self.session, session.user = session, weakref.ref(self)
        for tensor in session.kept.values():
            tensor.zero_()


class CudaTAEHV(TAEHV):
    """The copy that `fast` returns. sessions: {("encoder" or "decoder", shape, ...): [Session]}."""

    @torch.no_grad()
    def _run(self, blocks, x, memory=None, progress=None):
        half, n, memory = "encoder" if blocks is self.encoder else "decoder", len(x), {} if memory is None else memory
        if not memory:
            memory["clips"] = Clips(self._session(half, n, *x.shape[2:], x.dtype, torch.is_inference_mode_enabled()))
        session, steps = memory["clips"].session, self.steps[half]

        def run(x):
            for step in steps if progress is None else progress(steps):
                x = step(x, n, session.kept)
            return x

        x = x.transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = session.run(run, x) if self.graph and progress is None else run(x)
        return x.unflatten(0, (-1, n)).transpose(0, 1)

    def _session(self, *key):
        if not self.graph:
            return Session()
        sessions = self.sessions.setdefault(key, [])
        idle = next((session for session in sessions if session.user() is None), None)
        if idle is None:
            sessions.append(idle := Session())
        return idle


@torch.no_grad()
def fast(model, graph=False):
    """A derived, inference-only copy of a TAEHV in eval mode, or of a tokenizer of its latents (model_vq_latents.py).

    graph: when a size and number of frames occurs the second time, record the work as a CUDA graph, and replay it from
    then on, so that the GPU never waits for Python. A graph keeps its working memory as long as the copy lives. Use it
    from one thread only. ValueError in training mode, or for graphs on another device.
    """
    if model.training:
        raise ValueError("fast() is for inference: call model.eval() before")
    quick = copy.copy(model)  # shares the weights
    if hasattr(model, "taehv"):
        quick._modules = {**model._modules, "taehv": fast(model.taehv, graph)}
        return quick
    device = model.encoder[0].weight.device
    if graph and device.type != "cuda":
        raise ValueError(f"graph=True is for a GPU, and the model is on {device}: leave it out, or move the model")
    quick.__class__ = CudaTAEHV
    quick.steps = {"encoder": build_steps(model.encoder, STEPS), "decoder": build_steps(model.decoder, STEPS)}
    quick.graph, quick.sessions = graph, {}
    return quick
