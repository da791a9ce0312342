"""Vector quantizers: VQ, EMA, SimVQ, Sinkhorn (OptVQ), residual, product, FSQ, LFQ, BSQ. The quantize*.py files need
torch alone: to use them elsewhere, copy all of them.

    quantizer = EMAQuantizer(1024, 256, kmeans_init=True, restart_below=1.0)
    quantized, info = quantizer(z)                         # z: N C H W or N C T H W; the same shape comes back
    quantized = quantizer.codes_to_vectors(info["codes"])  # bit for bit the same (in eval mode: no update in between)

quantize_base.py has what all have in common, quantize_table.py VQ, EMA and SimVQ, quantize_optvq.py OptVQ,
quantize_residual.py the quantizers made of several, quantize_binary.py those without a codebook.

`info` always has the same keys:
    vq_loss     scalar, float32, to be added to the training loss (zero for FSQ; may be negative for LFQ and BSQ)
    codes       list of `codes_per_position` int64 tensors N H W or N T H W, each in [0, num_codes)
    perplexity  scalar: exp of the entropy of the codes in this batch, mean over the list
    usage       scalar: fraction of the codebook that this batch used, mean over the codebooks
Distances and statistics are true float32, inside autocast too, and where the process allows products in TF32 (or in
bfloat16 on a CPU): see true_float32. `quantized` has the dtype of z. Codebooks stay float32 if a model is cast to
bfloat16 or float16. A tensor of positions x codes never exists as a whole: such work is done in blocks of `chunk`
numbers (64 MB by default).

Several ranks. By default a training forward sums its statistics (codebook averages, perplexity, usage) over all ranks
before it returns. With deferred=True, or after `defer`, a forward only collects them, without any communication, and
the loop decides:

    for q in quantizers(model): q.begin()        # forget what was collected; also to redo or to skip a step
    ... forward and backward of all micro-batches ...
    for q in quantizers(model): q.update()       # on all ranks: sum, learn; returns the step's perplexity and usage

so a rank that fails inside its forward leaves no other rank waiting in a reduction. (SinkhornQuantizer, LFQ and BSQ
still reduce inside forward; before each of these reductions they call the function given to `defer`.) Several
micro-batches then count as one batch. Eval mode never communicates or learns, so ranks may evaluate different numbers
of batches.
"""
import torch

from quantize_base import (
    CHUNK, Quantizer, check_arguments, ema_update, kmeans, nearest, quantizers, rotated, stays_float32,
    straight_through, true_float32)
from quantize_binary import BSQ, FSQ, LFQ
from quantize_optvq import SinkhornQuantizer
from quantize_residual import ProductQuantizer, ResidualQuantizer
from quantize_table import EMAQuantizer, SimVQ, VectorQuantizer

# Models and others take all names from here, wherever they are defined.
__all__ = ["CHUNK", "Quantizer", "check_arguments", "ema_update", "kmeans", "nearest", "quantizers", "rotated",
           "stays_float32", "straight_through", "true_float32"]
QUANTIZERS = {"vq": VectorQuantizer, "ema": EMAQuantizer, "optvq": SinkhornQuantizer, "rvq": ResidualQuantizer,
              "fsq": FSQ, "simvq": SimVQ, "lfq": LFQ, "bsq": BSQ, "product": ProductQuantizer}


def make_quantizer(kind, dim, n_embed, beta, options):
    """A quantizer by its short name. ValueError for an unknown name, or options that do not fit."""
    if kind not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {kind!r}; there are {', '.join(QUANTIZERS)}")
    book = {} if kind == "fsq" else {"n_embed": n_embed, "beta": beta}
    try:
        return QUANTIZERS[kind](dim=dim, **book, **options)
    except TypeError as error:  # an option that it does not have, or that is missing
        raise ValueError(f"quantizer {kind!r}: {error}") from None


def levels_of(model):
    """How many levels a residual tokenizer's codes have (the first few alone decode to a coarser video), else 0."""
    quantizer = getattr(model, "quantize", None)
    return quantizer.codes_per_position if getattr(quantizer, "nested", False) else 0


def use_levels(model, levels):
    """From now on, outside of training, a tokenizer with a residual quantizer gives only the codes of its first
    `levels` depths: fewer bits, and a coarser picture. It still decodes codes of any number of depths. ValueError for a
    model that has no such levels, or fewer."""
    most = levels_of(model)
    if not most:
        raise ValueError("its codes have no levels: only a residual quantizer's do (net.quantizer=rvq)")
    if not 1 <= levels <= most:
        raise ValueError(f"1 to {most} are possible: its quantizer has so many levels")
    model.quantize.levels = levels
    model.codebook_sizes, model.code_strides = [model.quantize.num_codes] * levels, [model.space_factor] * levels


class TokenizerStream:
    """Encodes and decodes clips piece by piece, however the pieces are cut. For a model in eval mode.

        stream = model.stream()
        for frames in pieces:                                  # N t 3 H W, any t
            show(stream.decode(stream.encode(frames)))         # or stream.detokenize(stream.tokenize(frames))
        show(stream.flush())

    The stream works on fixed groups of frames, counted from the clip's start, so the results do not depend on how the
    pieces are cut. A call returns what is complete so far, possibly 0 frames; last=True says that its input ends the
    clip. A group is one latent, or as many as keep the activations under about `memory_limit` bytes (larger groups keep
    a GPU busy).
    """

    def __init__(self, model, memory_limit=None):
        self.model, self.memory_limit = model, memory_limit
        self._held = {}  # {name of a method: its input that does not fill a group yet}

    @torch.no_grad()
    def encode(self, frames, last=False):
        """Take N t 3 H W frames, return the latents N t' C h w that are complete."""
        model, k, (n, _, _, height, width) = self.model, self.model.space_factor, frames.shape
        nothing = frames.new_empty(n, 0, model.latent_channels, height // k, width // k)
        groups = self._groups("encode", [frames], model.time_factor * self._latents(height, width), last)
        return torch.cat([nothing, *(model.encode(*group) for group in groups)], 1)

    @torch.no_grad()
    def tokenize(self, frames, last=False):
        """Take N t 3 H W frames, return the codes [int64 N t' h w] that are complete."""
        model, (n, _, _, height, width) = self.model, frames.shape
        nothing = [frames.new_empty(n, 0, height // k, width // k, dtype=torch.int64) for k in model.code_strides]
        groups = self._groups("tokenize", [frames], model.time_factor * self._latents(height, width), last)
        return [torch.cat(codes, 1) for codes in zip(nothing, *(model.tokenize(*group) for group in groups))]

    def decode(self, latents, last=False):
        """Take N t C h w latents, return the frames N t' 3 H W that are complete, in [0, 1]."""
        return self._frames("decode", [latents], self.model.space_factor, lambda group: self.model.decode(*group), last)

    def detokenize(self, codes, last=False):
        """Take codes [int64 N t h w], return the frames N t' 3 H W that are complete, in [0, 1]."""
        return self._frames("detokenize", codes, self.model.code_strides[0], self.model.detokenize, last)

    @torch.no_grad()
    def _frames(self, name, pieces, stride, call, last):
        height, width = (size * stride for size in pieces[0].shape[-2:])
        nothing = self.model.last_layer.new_empty(len(pieces[0]), 0, 3, height, width)
        return torch.cat([nothing, *map(call, self._groups(name, pieces, self._latents(height, width), last))], 1)

    def _latents(self, height, width):
        """How many latents make a group."""
        if self.memory_limit is None:
            return 1
        bytes_per_pixel = self.model.numbers_per_pixel * self.model.last_layer.element_size()
        return max(1, self.memory_limit // (self.model.time_factor * bytes_per_pixel * height * width))

    def _groups(self, name, pieces, size, last):
        """Cut what is held and the pieces (tensors N t ..., of equal t) into groups of `size`, and hold the rest."""
        held = self._held.pop(name, None)
        pieces = [torch.cat(pair, 1) for pair in zip(held, pieces)] if held else pieces
        end = pieces[0].shape[1] if last else pieces[0].shape[1] // size * size
        if not last:
            self._held[name] = [piece[:, end:] for piece in pieces]
        return [[piece[:, k:k + size] for piece in pieces] for k in range(0, end, size)]

    def flush_encoder(self):
        """End of the clip: the remaining latents or codes; None if no frames were given."""
        return self._flush("encode", "tokenize")

    def flush_decoder(self):
        """End of the clip: the remaining frames; None if no latents or codes were given."""
        return self._flush("decode", "detokenize")

    def _flush(self, *names):
        for name in names:
            if name in self._held:
                nothing = [piece[:, :0] for piece in self._held[name]]
                return getattr(self, name)(nothing if name == "detokenize" else nothing[0], last=True)
        return None

    def flush(self):
        """End of the clip: the remaining frames if this stream was decoding, else the remaining latents or codes. The
        stream is as new afterwards. ValueError if nothing was streamed."""
        if not self._held:
            raise ValueError("flush() of a stream that was given nothing")
        rest = self.flush_encoder()
        if not self._held:
            return rest
        if rest is None:
            return self.flush_decoder()
        return (self.decode if "decode" in self._held else self.detokenize)(rest, last=True)
