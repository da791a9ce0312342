"""A streaming video tokenizer from a frozen TAEHV: its latents are quantized, and a small network repairs the error.

    codes = model.tokenize(video)                    # N T 3 H W in [0, 1]  ->  [int64 N T/4 H/8 W/8, ...]
    video = model.detokenize(codes)                  # ... and back, clamped to [0, 1]

Only the quantizer and the rectifier after it are trained, on latents (which a latent cache can hold), at a small part
of the cost of training a VQGAN. The idea is ReVQ's (Zhang et al. 2025, "Quantize-then-Rectify"). What differs: the
autoencoder is a causal video autoencoder, and the rectifier is a few convolutions over a latent and the one before it,
so that live video can be tokenized; and the quantizer may be any of quantize.py.

This file works with torch, and model_taehv.py and the quantize*.py files beside it.
Conventions: video is N T C H W, RGB, in [0, 1]; latents are N T C h w, the TAEHV's own.
"""
import torch
import torch.nn.functional as F
from torch import nn

from model_taehv import TAEHV
from quantize import check_arguments, make_quantizer, stays_float32


class Rectifier(nn.Module):
    """Predicts a correction of quantized latents: a residual network of 3x3 convolutions, whose output starts at zero.

    x: quantized latents B C h w. past: for each, the one before it in time, same shape. Returns what to add to x.
    """

    def __init__(self, channels, width, blocks):
        super().__init__()
        self.conv_in = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                                  nn.Conv2d(width, width, 3, padding=1)) for _ in range(blocks))
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x, past):
        h = self.conv_in(torch.cat([x, past], 1))
        for block in self.blocks:
            h = h + block(h)
        return self.conv_out(F.relu(h))


class VQLatents(nn.Module):
    """taehv: a dict of TAEHV's arguments. The TAEHV is frozen; load its weights into `model.taehv`.

    quantizer, n_embed (the number of codes), beta, **quantizer_options: as in VQGAN. width, blocks: channels and number
    of blocks of the rectifier. Call `calibrate` before any use: it sets the scale to zero mean and unit deviation in
    which latents are quantized. ValueError for arguments that do not fit.
    """

    def __init__(self, taehv=None, quantizer="ema", n_embed=4096, beta=0.25, width=64, blocks=2, **quantizer_options):
        super().__init__()
        check_arguments(VQLatents, locals())
        self.taehv = TAEHV(**(taehv or {})).requires_grad_(False)
        if self.taehv.frames_to_trim != self.taehv.time_factor - 1:
            raise ValueError("a preview decoder gives back too few frames for a tokenizer")
        self.time_factor, self.space_factor = self.taehv.time_factor, self.taehv.space_factor
        channels = self.latent_channels = self.taehv.latent_channels
        if quantizer == "optvq" or quantizer_options.get("kind") == "sinkhorn":
            quantizer_options.setdefault("eval_nearest", True)  # else a code depends on the rest of the batch
        self.quantize = make_quantizer(quantizer, channels, n_embed, beta, quantizer_options)
        self.rectifier = Rectifier(channels, width, blocks)
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.zeros(()))  # 0: not calibrated
        self.codebook_sizes = [self.quantize.num_codes] * self.quantize.codes_per_position
        self.code_strides = [self.space_factor] * self.quantize.codes_per_position
        self.config = dict(taehv=self.taehv.config, quantizer=quantizer, n_embed=n_embed, beta=beta, width=width,
                           blocks=blocks, **quantizer_options)
        # Frame counts and alignment are the TAEHV's.
        self.latent_frames, self.frame_index = self.taehv.latent_frames, self.taehv.frame_index
        self.aligned, self.targets = self.taehv.aligned, self.taehv.targets

    def _apply(self, fn, recurse=True):
        kept = {name: stays_float32(fn)(self._buffers[name]) for name in ("shift", "scale")}
        super()._apply(fn, recurse)
        self._buffers.update(kept)  # float32 like the codebook, since all of them decide which code is nearest
        return self

    @torch.no_grad()
    def calibrate(self, latents):
        """Set each channel's mean, and one deviation for all channels (so that distances keep their proportions), to
        those of latents N T C h w."""
        centred = latents.float().movedim(2, -1)
        self.shift.copy_(centred.mean((0, 1, 2, 3)))
        self.scale.copy_((centred - self.shift).square().mean().sqrt().clamp(min=1e-6))

    # ---- whole clips ----------------------------------------------------------------------------------------------

    def requantize(self, latents):
        """Latents N T C h w -> (latents quantized and rectified, {"vq_loss", "perplexity", "usage", "codes"})."""
        vectors, info = self.quantized(latents)
        return self.rectify(vectors), info

    def quantized(self, latents):
        """Latents N T C h w -> (quantized vectors N T C h w, info of the quantizer); each position by itself."""
        z = (latents.movedim(2, -1) - self.shift) / self.scale  # float32, whatever the TAEHV's dtype
        vectors, info = self.quantize(z.movedim(-1, 1))  # N C T h w
        return vectors.transpose(1, 2).to(self.rectifier.conv_in.weight.dtype), info

    def rectify(self, vectors, past=None):
        """Quantized vectors N T C h w, and the one before them (N 1 C h w; None at a clip's start) -> latents."""
        past = torch.zeros_like(vectors[:, :1]) if past is None else past
        past = torch.cat([past, vectors[:, :-1]], 1)
        better = vectors + self.rectifier(vectors.flatten(0, 1), past.flatten(0, 1)).unflatten(0, vectors.shape[:2])
        return (better.movedim(2, -1) * self.scale + self.shift).movedim(-1, 2).to(better.dtype)

    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T' C h w, quantized and rectified."""
        return self.requantize(self.taehv.encode(video))[0]

    def decode(self, latents):
        """Latents N T C h w -> video, as TAEHV.decode."""
        return self.taehv.decode(latents)

    def forward(self, video):
        """Returns (reconstruction, {"latents", "vq_loss", "perplexity", "usage", "codes"}); see `targets`."""
        latents, info = self.requantize(self.taehv.encode(video))
        return self.decode(latents), {"latents": latents, **info}

    @torch.no_grad()
    def tokenize(self, video):
        """Video -> [int64 N T' h w], a tensor for each head or residual depth of the quantizer. Needs eval mode."""
        return self.quantized(self.taehv.encode(video))[1]["codes"]

    @torch.no_grad()
    def detokenize(self, codes):
        """Codes from `tokenize` -> video, equal to `decode(encode(video))`."""
        return self.decode(self.rectify(self.vectors(codes)))

    def vectors(self, codes):
        """[int64 N T h w] -> quantized vectors N T C h w."""
        return self.quantize.codes_to_vectors(codes).transpose(1, 2).to(self.rectifier.conv_in.weight.dtype)

    def stream(self, memory_limit=None, total_latents=None):
        """A VQLatentsStream; both arguments are TAEHV.stream's."""
        return VQLatentsStream(self, memory_limit, total_latents)


class VQLatentsStream:
    """Encodes and decodes clips piece by piece, however the pieces are cut. For a model in eval mode.

        stream = model.stream()
        for frames in pieces:                                  # N t 3 H W, any t
            show(stream.detokenize(stream.tokenize(frames)))   # or stream.decode(stream.encode(frames))
        show(stream.flush())

    This is a TAEHVStream with the quantizer in its middle. The quantizer works latent by latent, so the results do not
    depend on how the pieces are cut.
    """

    def __init__(self, model, memory_limit=None, total_latents=None):
        self.model, self._arguments = model, (memory_limit, total_latents)
        self._frames = model.taehv.stream(memory_limit, total_latents)
        self._past = {"encode": None, "detokenize": None}  # the newest quantized vectors in each direction
        self._gives_codes = self._takes_codes = self._decoding = False

    def encode(self, frames):
        """Take N t 3 H W frames, return the latents N t' C h w that are complete."""
        self._gives_codes = False
        return self._coded(self._frames.encode(frames))

    def tokenize(self, frames):
        """Take N t 3 H W frames, return the codes [int64 N t' h w] that are complete."""
        self._gives_codes = True
        return self._coded(self._frames.encode(frames))

    def decode(self, latents):
        """Take N t C h w latents, return the frames N t' 3 H W that are complete, in [0, 1]."""
        self._takes_codes, self._decoding = False, True
        return self._frames.decode(latents)

    @torch.no_grad()
    def detokenize(self, codes):
        """Take codes [int64 N t h w], return the frames N t' 3 H W that are complete, in [0, 1]."""
        self._takes_codes = self._decoding = True
        n, count, h, w = codes[0].shape
        latents = [self._rectified("detokenize", self.model.vectors([c[:, k:k + 1] for c in codes]))
                   for k in range(count)]
        empty = self.model.rectifier.conv_in.weight.new_empty(n, 0, self.model.latent_channels, h, w)
        return self._frames.decode(torch.cat([empty, *latents], 1))

    @torch.no_grad()
    def _coded(self, latents):
        """A TAEHV's latents N T C h w -> codes if this stream gives codes, else quantized and rectified latents."""
        model, codes, done = self.model, [], []
        for latent in latents.split(1, 1) if latents.shape[1] else ():
            vectors, info = model.quantized(latent)
            codes.append(info["codes"])
            if not self._gives_codes:
                done.append(self._rectified("encode", vectors))
        if not self._gives_codes:
            return torch.cat([latents[:, :0], *done], 1)
        nothing = [latents[:, :0, 0].long()] * len(model.codebook_sizes)
        return [torch.cat(parts, 1) for parts in zip(nothing, *codes)]

    def _rectified(self, direction, vectors):
        latent = self.model.rectify(vectors, self._past[direction])
        self._past[direction] = vectors
        return latent

    def flush_encoder(self):
        """End of the clip: the remaining latents or codes; None if no frames were given."""
        rest = self._frames.flush_encoder()
        return None if rest is None else self._coded(rest)

    def flush_decoder(self):
        """End of the clip: the remaining frames; None if no latents or codes were given."""
        return self._frames.flush_decoder()

    def flush(self):
        """End of the clip: the remaining frames if this stream was decoding, else the remaining latents or codes. The
        stream is as new afterwards. ValueError if nothing was streamed."""
        rest = self.flush_encoder()
        if rest is None and not self._decoding:
            raise ValueError("flush() of a stream that was given nothing")
        if self._decoding:
            frames = [] if rest is None else [(self.detokenize if self._takes_codes else self.decode)(rest)]
            rest = torch.cat([*frames, self.flush_decoder()], 1)
        self.__init__(self.model, *self._arguments)
        return rest
