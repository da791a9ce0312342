"""VQGAN: a convolutional image tokenizer in the layout of taming-transformers, applied to every frame of a video.

    model, words = load_vqgan("last.ckpt")           # taming, OptVQ or own weights; recognises the architecture
    codes = model.tokenize(video)                    # N T 3 H W in [0, 1]  ->  [int64 N T H/16 W/16]
    video = model.detokenize(codes)                  # ... and back, clamped to [0, 1]

This file works with torch, and the quantize*.py files beside it. State_dict names, shapes and results are those of
github.com/CompVis/taming-transformers (VQModel and EMAVQ; Esser et al. 2021) and github.com/zbr17/OptVQ. What differs:
frames are folded into the batch, attention is one fused call, and videos are in [0, 1] (the networks see [-1, 1]).

Conventions: video is N T C H W, RGB, in [0, 1]; latents are the quantized vectors, N T C h w.
"""
import pickle
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize import TokenizerStream, check_arguments, make_quantizer

FOREIGN = ("loss.", "discriminator.", "colorize", "quantize.started", "quantize.usage_count")  # for training only
INERT = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "typing")  # packages, see `read_weights`


# ---- the network -------------------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose result has x's dtype under autocast too. On a GPU, autocast would compute in float32
    and keep maps twice as large for the backward pass. Statistics are summed in float32 either way."""

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if x.device.type != "cpu":  # a CPU takes weights in float32 beside x in bf16
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def norm(channels):
    return GroupNorm(32, channels, eps=1e-6)


def enlarge(x):
    """Nearest upsampling by 2, in x's dtype under autocast too, which on a GPU would convert it to float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and SiLU, beside a shortcut: N n_in H W -> N n_out H W."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = norm(n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over the positions of a frame, one head. (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # B 1 HW C
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(h.reshape(x.shape))


class Resample(nn.Module):
    """A convolution that halves or doubles the size. Halving pads only the right and the bottom, as published."""

    def __init__(self, channels, down):
        super().__init__()
        self.down, self.conv = down, nn.Conv2d(channels, channels, 3, **({"stride": 2} if down else {"padding": 1}))

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else enlarge(x))


class Level(nn.Module):
    """The blocks of one resolution; the encoder and the decoder add a change of size after them."""

    def __init__(self, n_in, n_out, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(n_out if j else n_in, n_out) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(n_out) for _ in range(blocks if attention else 0))

    def forward(self, x, run):
        for j, block in enumerate(self.block):
            x = run(block, x)
            if self.attn:
                x = run(self.attn[j], x)
        return x


class Middle(nn.Module):
    """The middle of encoder and decoder: a block, attention, a block; N C H W, unchanged."""

    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x, run):
        return run(self.block_2, run(self.attn_1, run(self.block_1, x)))


class Encoder(nn.Module):
    """Frames (B, 3, H, W) in [-1, 1] -> (B, z_channels, H/s, W/s)."""

    def __init__(self, widths, num_res_blocks, attention, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(zip(widths, widths[1:])):
            level = Level(n_in, n_out, num_res_blocks, attention[i])
            if i < len(attention) - 1:
                level.downsample = Resample(n_out, down=True)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x, run):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x, run)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x, run))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> frames (B, 3, s*h, s*w), about [-1, 1]."""

    def __init__(self, widths, num_res_blocks, attention, z_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels, n_in = [], widths[-1]
        for i in reversed(range(len(attention))):
            level = Level(n_in, widths[i + 1], num_res_blocks + 1, attention[i])
            n_in = widths[i + 1]
            if i > 0:
                level.upsample = Resample(n_in, down=False)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(n_in), nn.Conv2d(n_in, 3, 3, padding=1)

    def forward(self, z, run):
        x = self.mid(self.conv_in(z), run)
        for level in reversed(self.up):
            x = level(x, run)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # outside `run`: the adaptive GAN weight needs its gradient


class VQGAN(nn.Module):
    """One per-frame tokenizer.

    ch, ch_mult, num_res_blocks: widths and depth of the levels, each half the size of the one before. attn_resolutions:
    the sizes of the levels that have attention, for frames of `resolution` pixels (other frame sizes work as well).
    z_channels, embed_dim: channels before and after the 1x1 convolution that leads to the quantizer. n_embed: number
    of codes, which the models of model_vqvae.py call nb_entries and vocab_size. beta: weight of the commitment loss.
    quantizer: a key of quantize.QUANTIZERS. quantizer_options go to its class: "rvq" needs depth=..., "product"
    groups=..., "fsq" takes levels=... instead of n_embed and beta, "lfq" and "bsq" take a power of 2 as n_embed, and
    "optvq" gets eval_nearest=True by default (as published, a frame's codes would depend on the other frames of the
    batch). ValueError for arguments that do not fit.
    """

    def __init__(self, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256,
                 z_channels=256, embed_dim=256, n_embed=1024, quantizer="vq", beta=0.25, **quantizer_options):
        super().__init__()
        check_arguments(VQGAN, locals())
        self.space_factor, self.time_factor = 2 ** (len(ch_mult) - 1), 1
        self.latent_channels, self.image_channels = embed_dim, 3
        if ch % 32 or min(ch_mult, default=0) < 1:
            raise ValueError("ch must be a multiple of 32 (GroupNorm has 32 groups) and ch_mult positive, got "
                             f"ch={ch}, ch_mult={tuple(ch_mult)}")
        if resolution % self.space_factor:
            raise ValueError(f"resolution {resolution} is no multiple of {self.space_factor}, which {len(ch_mult)} "
                             "levels (ch_mult) divide by")
        sizes = [resolution >> i for i in range(len(ch_mult))]
        if not set(attn_resolutions) <= set(sizes):
            raise ValueError(f"attn_resolutions {tuple(attn_resolutions)}: the levels of resolution {resolution} have "
                             f"sizes {sizes}; choose some of these, or () for none")
        attention, widths = [size in attn_resolutions for size in sizes], [ch, *(ch * m for m in ch_mult)]
        self.encoder = Encoder(widths, num_res_blocks, attention, z_channels)
        self.decoder = Decoder(widths, num_res_blocks, attention, z_channels)
        if quantizer == "optvq" or quantizer_options.get("kind") == "sinkhorn":
            quantizer_options.setdefault("eval_nearest", True)
        self.quantize = make_quantizer(quantizer, embed_dim, n_embed, beta, quantizer_options)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z_channels, embed_dim, 1), nn.Conv2d(embed_dim, z_channels, 1)
        # For each tensor in the list that `tokenize` gives: how many codes there are, and the width of one in pixels.
        self.codebook_sizes = [self.quantize.num_codes] * self.quantize.codes_per_position
        self.code_strides = [self.space_factor] * self.quantize.codes_per_position
        self.gradient_checkpointing = False
        self.numbers_per_pixel = 6 * max(widths[:3])  # activations alive at a time, roughly; streams use it
        self.config = dict(ch=ch, ch_mult=list(ch_mult), num_res_blocks=num_res_blocks,
                           attn_resolutions=list(attn_resolutions), resolution=resolution, z_channels=z_channels,
                           embed_dim=embed_dim, n_embed=n_embed, quantizer=quantizer, beta=beta, **quantizer_options)

    @property
    def last_layer(self):
        """Weight of the decoder's last convolution, for the adaptive GAN weight."""
        return self.decoder.conv_out.weight

    # ---- frame counts and alignment: every frame is a latent and comes back ---------------------------------------

    def latent_frames(self, frames):
        return frames

    def frame_index(self, frames, latents=None):
        """For each output frame of a clip of `frames` frames, the input frame (from 0) that it stands for."""
        return list(range(latents or frames))

    def targets(self, video, latents=None):
        """The frames that `forward(video)` reconstructs: all of them."""
        return video[:, :latents]

    # ---- whole clips ----------------------------------------------------------------------------------------------

    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T embed_dim H/s W/s. ValueError if s does not divide H and W."""
        return self._quantized(video)[0]

    def decode(self, latents):
        """Latents N T embed_dim h w -> video N T 3 s*h s*w, clamped to [0, 1] except in training mode."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise ValueError(f"expected latents as N T {self.latent_channels} H W, got shape {tuple(latents.shape)}")
        frames = self._decoded(self.post_quant_conv(latents.flatten(0, 1).to(self.last_layer.dtype)))
        video = (frames.unflatten(0, latents.shape[:2]) + 1) / 2
        return video if self.training else video.clamp(0, 1)

    def forward(self, video):
        """Returns (reconstruction N T 3 H W, {"latents", "vq_loss", "perplexity", "usage", "codes"})."""
        latents, info = self._quantized(video)
        return self.decode(latents), {"latents": latents, **info}

    @torch.no_grad()
    def tokenize(self, video):
        """Video -> [int64 N T h w], a tensor for each head or residual depth of the quantizer. Needs eval mode."""
        return self._quantized(video)[1]["codes"]

    @torch.no_grad()
    def detokenize(self, codes):
        """Codes from `tokenize` -> video, bit for bit that of `decode(encode(video))`."""
        return self.decode(self.quantize.codes_to_vectors(codes).transpose(1, 2))

    def stream(self, memory_limit=None, total_latents=None):
        """A TokenizerStream: the same results, piece by piece. memory_limit: bytes for activations (see there);
        total_latents: not needed here."""
        return TokenizerStream(self, memory_limit)

    def _quantized(self, video):
        latents, info = self.quantize(self._features(video).transpose(1, 2))  # N C T H W
        return latents.transpose(1, 2), info

    def _features(self, video):
        if video.ndim != 5 or video.shape[2] != 3 or not video.shape[1]:
            raise ValueError(f"expected video as N T 3 H W with at least one frame, got shape {tuple(video.shape)}")
        if any(size % self.space_factor for size in video.shape[-2:]):
            raise ValueError(f"height and width must be multiples of {self.space_factor}, got "
                             f"{video.shape[-2]}x{video.shape[-1]}: crop, or pad with torch.nn.functional.pad")
        frames = (video.flatten(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self._encoded(frames)).unflatten(0, video.shape[:2])

    def _encoded(self, frames):
        return self.encoder(frames, self._run)

    def _decoded(self, z):
        return self.decoder(z, self._run)

    def _run(self, block, x):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


# ---- weights -----------------------------------------------------------------------------------------------------


def read_weights(path):
    """The contents of a .ckpt, .pth or .safetensors file, on the CPU; runs no code from the file.

    Lightning checkpoints hold objects of the training program beside the weights. Empty objects replace those from the
    packages in INERT. ValueError for any other object, and for damaged files.
    """
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file  # pip install safetensors
        return load_file(str(path))
    inert = {}
    while True:
        try:
            if not inert:
                return torch.load(path, map_location="cpu", weights_only=True)
            with torch.serialization.safe_globals(list(inert.values())):  # torch 2.5 or newer
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
            name = found[1] if found else "something"
            if name.split(".")[0] not in INERT or name in inert or not hasattr(torch.serialization, "safe_globals"):
                raise ValueError(f"{path} is no file of weights, or holds more than that ({name}), which is not run. "
                                 "If you trust it: torch.save({'state_dict': torch.load(FILE, weights_only=False)"
                                 "['state_dict']}, 'weights.pth')") from None
            module, _, last = name.rpartition(".")
            inert[name] = type(last, (Inert,), {"__module__": module})
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is damaged or no file of weights ({str(error).splitlines()[0]})") from None


class Inert:
    """Replaces an object of a training program; takes any arguments, and keeps none."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)


def adapt_state_dict(state):
    """(this model's entries, a description of those left out) from a state_dict, or a checkpoint dict that holds one.

    Undoes the wrappings of Lightning ("state_dict"), OptVQ ("model", and "model." in its Hugging Face files), DDP and
    torch.compile, and leaves out the entries of losses and discriminators. ValueError if it is no dict.
    """
    if not isinstance(state, dict):
        raise ValueError(f"no VQGAN weights, but a {type(state).__name__}")
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    kept, left = {}, {}
    for name, value in state.items():
        name = re.sub(r"^((module|_orig_mod|model)\.)+", "", str(name))
        if name.startswith(FOREIGN):
            left.setdefault(name.split(".")[0], []).append(name)
        else:
            kept[name] = value
    return kept, ", ".join(f"{len(names)} entries of {part!r} ignored" for part, names in left.items())


def recognise(weights):
    """The VQGAN arguments that fit a state_dict (`adapt_state_dict` first), from its names and shapes.

    Weights do not tell the resolution: 256 is assumed, and attn_resolutions set to match. ValueError if these are no
    VQGAN weights, or if the quantizer is not supported.
    """
    def shape(key):
        if not isinstance(weights.get(key), torch.Tensor):
            raise ValueError(f"no VQGAN weights: {key} is missing")
        return weights[key].shape

    def count(pattern):
        return len({match[1] for key in weights if (match := re.match(pattern, key))})

    ch, channels = shape("encoder.conv_in.weight")[:2]
    if channels != 3:
        raise ValueError(f"these weights are for images of {channels} channels, not RGB")
    levels = count(r"encoder\.down\.(\d+)\.")
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in weights]
    resolution = max(256, 2 ** (levels - 1))
    embed_dim = shape("quant_conv.weight")[0]
    found = dict(ch=ch, ch_mult=[width // ch for width in widths],
                 num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)\."), resolution=resolution,
                 attn_resolutions=[resolution >> i for i in attended], z_channels=shape("encoder.conv_out.weight")[0],
                 embed_dim=embed_dim)
    if "quantize.embed.weight" in weights:
        raise ValueError("these weights are of a Gumbel quantizer, which is not supported")
    depth = count(r"quantize\.layers\.(\d+)\.")
    book = "quantize.layers.0." if depth else "quantize."
    if book + "embedding.weight" not in weights:
        return dict(found, quantizer="fsq")
    n_embed, code_dim = shape(book + "embedding.weight")
    projected = book + "proj.weight" in weights
    kind = "optvq" if projected or code_dim != embed_dim else "vq"
    kind = "ema" if book + "embedding.cluster_size" in weights else kind
    if book + "embedding_proj.weight" in weights:
        return dict(found, n_embed=n_embed, quantizer="simvq")
    if depth and code_dim != embed_dim:
        return dict(found, n_embed=n_embed, quantizer="product", groups=depth,
                    kind="ema" if book + "embedding.cluster_size" in weights else "vq")
    if depth:
        return dict(found, n_embed=n_embed, quantizer="rvq", depth=depth, kind="sinkhorn" if kind == "optvq" else kind)
    options = dict(num_head=embed_dim // code_dim, use_proj=projected) if kind == "optvq" else {}
    return dict(found, n_embed=n_embed, quantizer=kind, **options)


def load_vqgan(source, **overrides):
    """(VQGAN in eval mode, a description that also says what was ignored) from a taming .ckpt, OptVQ or own weights.

    source: a path (see `read_weights`), or the dict that such a file holds. overrides: arguments of VQGAN, for what
    weights do not tell: `levels` of FSQ, `quantizer` of LFQ and BSQ, `cosine`, `depth` and `shared` of a residual
    quantizer with one codebook, `legacy`, `beta`. ValueError if the weights do not fit.
    """
    weights, left = adapt_state_dict(source if isinstance(source, dict) else read_weights(source))
    arguments = {**recognise(weights), **overrides}
    if arguments["quantizer"] == "fsq" and "levels" not in arguments:
        raise ValueError("these weights have no codebook: give the levels of FSQ, say levels=(8, 5, 5, 5), or "
                         "quantizer='lfq' or 'bsq', and n_embed")
    model = VQGAN(**arguments)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit a VQGAN with quantizer {arguments['quantizer']!r}: "
                         + " ".join(str(error).splitlines()[1].split())[:200]) from None
    words = f"VQGAN f{model.space_factor}, quantizer {arguments['quantizer']}, {model.quantize.num_codes} codes"
    return model.eval(), words + (f"; {left}" if left else "")
