"""TAEHV with gradients: the same numbers from the same weights, in less time and memory than autograd's plain path.

    model = speed_up(TAEHV())         # from here on its layers run through this file when gradients are wanted

This file works with torch and model_taehv.py beside it, on any device, under autocast, with gradient checkpointing.

What helps, and by how much: 64x64x12, batch 4, float32, seconds of one AVX-512 core for a step and memory for a clip.
The published routine (bench.py) takes 3.95 s and 188 MB, this one 2.71 s and 103 MB.
- Tensors are time-major (frame 0 of all clips, frame 1 of all clips, ...), so the previous frames are a view. Cutting
  them out clip by clip costs a map of zeros and a change of layout for each clip and block in the backward pass.
- A memory block's first convolution, over a frame and the one before, is computed as the sum of two convolutions. Only
  the block's input and the results of its three ReLUs are stored (2.85 s and 139 MB with a concatenation and autograd).
- Nearest upsampling and the 3x3 convolution after it are one transposed convolution with a 4x4 kernel and stride 2: 16
  multiplications instead of 36, in all three passes (2.88 s and 119 MB without; 13 % slower than those, with many
  copies, as one 2x2 convolution to four times the channels and a pixel shuffle).
- Temporal pooling (1x1) is merged with the strided convolution after it. Layers before the first pool run separately on
  the first frames of the pool's groups, the second frames, ... That saves memory (122 MB without), not time (2.64 s).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model_taehv import MEMORY_BLOCKS, MemBlock, TGrow, TPool


def speed_up(model):
    """Let a TAEHV, or the one inside a tokenizer of its latents, train through this file. Returns the model."""
    getattr(model, "taehv", model).run_with_gradients = run_blocks
    return model


def run_blocks(blocks, video, checkpointing=False):
    """Encoder or decoder blocks over whole clips: N T C H W -> N T' C' H' W'."""
    n, blocks = len(video), list(blocks)
    x = video.transpose(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    while blocks:
        layer = blocks.pop(0)
        if isinstance(layer, MEMORY_BLOCKS):
            x = checkpoint(remember, layer, x, n, use_reentrant=False) if checkpointing else remember(layer, x, n)
        elif isinstance(layer, TPool):
            x = pool_conv([], layer, blocks.pop(0), x, n)
        elif len(blocks) > 1 and isinstance(blocks[1], TPool):
            x = pool_conv([layer, blocks.pop(0)], blocks.pop(0), blocks.pop(0), x, n)
        elif isinstance(layer, nn.Upsample):
            x = grow(blocks.pop(0), x, n)
            x = up_conv(blocks.pop(0), x) if layer.scale_factor == 2 else blocks.pop(0)(x)
        else:
            x = grow(layer, x, n) if isinstance(layer, TGrow) else layer(x)
    return x.unflatten(0, (-1, n)).transpose(0, 1)


def remember(block, x, n):
    """A memory block over all frames. x: (T * N, C, H, W), time-major, of `n` clips."""
    if not isinstance(block, MemBlock) or not isinstance(block.act, nn.ReLU):  # MemoryPass knows ReLU alone
        return block(x, torch.cat([torch.zeros_like(x[:n]), x[:-n]]))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    convs = block.conv[0], block.conv[2], block.conv[4]
    return MemoryPass.apply(x.to(dtype), n, *(p.to(dtype) for c in convs for p in (c.weight, c.bias)))


class MemoryPass(torch.autograd.Function):
    """A MemBlock of equal widths with ReLU; all tensors have one dtype."""

    @staticmethod
    def forward(ctx, x, n, w1, b1, w2, b2, w3, b3):
        now, before = (w.contiguous(memory_format=torch.channels_last) for w in w1.chunk(2, 1))
        h1 = F.conv2d(x, now, b1, padding=1)
        if len(x) > n:
            h1[n:].add_(F.conv2d(x[:-n], before, padding=1))
        h1.relu_()
        h2 = F.conv2d(h1, w2, b2, padding=1).relu_()
        out = F.conv2d(h2, w3, b3, padding=1).add_(x)
        # torch 2.11 gives a compiled function no gradient at all if its result was made in place.
        out = out.relu() if torch.compiler.is_compiling() else out.relu_()
        ctx.n = n
        ctx.save_for_backward(x, h1, h2, out, now, before, w2, w3)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, h1, h2, out, now, before, w2, w3 = ctx.saved_tensors
        n, (x_too, _, *weights_too) = ctx.n, ctx.needs_input_grad
        out = g = torch.ops.aten.threshold_backward(g, out, 0)
        g, gw3, gb3 = conv_backward(g, h2, w3, True, *weights_too[4:])
        g, gw2, gb2 = conv_backward(relu_backward_(g, h2), h1, w2, True, *weights_too[2:4])
        g = relu_backward_(g, h1)
        gx, gw1, gb1 = conv_backward(g, x, now, x_too, *weights_too[:2])
        gp = gbefore = None
        if len(x) > n:
            gp, gbefore, _ = conv_backward(g[n:], x[:-n], before, x_too, weights_too[0], False)
        if x_too:
            gx.add_(out)
            if gp is not None:
                gx[:-n].add_(gp)
        if weights_too[0]:
            gw1 = torch.cat([gw1, torch.zeros_like(before) if gbefore is None else gbefore], 1)
        return gx, None, gw1, gb1, gw2, gb2, gw3, gb3


def relu_backward_(g, result):
    return torch.ops.aten.threshold_backward.grad_input(g, result, 0, grad_input=g)


def conv_backward(g, x, weight, *wanted):
    """Gradients of a 3x3 convolution's (input, weight, bias); None for what is not wanted."""
    return torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)


def pool_conv(before, pool, conv, x, n):
    """`before`, layers that see single frames; then a temporal pool (1x1) and a strided convolution, merged. x: (T * N,
    C, H, W) of `n` clips -> (T / stride * N, C', H / 2, W / 2)."""
    with torch.autocast(x.device.type, enabled=False):
        merged = torch.einsum("ocyx,ci->oiyx", conv.weight, pool.conv.weight[:, :, 0, 0])
    total, positions = None, x.permute(0, 2, 3, 1).unflatten(0, (-1, pool.stride, n)).unbind(1)
    for frames, weight in zip(positions, merged.chunk(pool.stride, 1)):  # first frames of all groups, second, ...
        y = frames.flatten(0, 1).permute(0, 3, 1, 2)
        for layer in before:
            y = layer(y)
        y = F.conv2d(y, weight.contiguous(memory_format=torch.channels_last), stride=2, padding=1)
        total = y if total is None else total + y
    return total


def grow(layer, x, n):
    """Temporal growth: (T * N, C, H, W) -> (T * stride * N, C, H, W)."""
    x = layer.conv(x)
    if layer.stride == 1:
        return x
    x = x.permute(0, 2, 3, 1).unflatten(-1, (layer.stride, -1)).unflatten(0, (-1, n))  # T N H W s C
    return x.permute(0, 4, 1, 2, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def up_conv(conv, x):
    """Nearest upsampling (x2) and a 3x3 convolution without bias, as one transposed convolution."""
    kernel = F.pad(conv.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    kernel = kernel[..., :-1, :] + kernel[..., 1:, :]
    kernel = kernel[..., :-1] + kernel[..., 1:]
    return F.conv_transpose2d(x, kernel.contiguous(memory_format=torch.channels_last), stride=2, padding=1)
