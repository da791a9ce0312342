"""VQ-VAE-2, a hierarchy of codes for each frame, and VqVae2, which folds a clip of frames into one map of codes.

    model = VQVAE2(nb_levels=2, scaling_rates=(4, 2))    # or VqVae2(sequence_length=16)
    codes = model.tokenize(video)                    # N T 3 H W in [0, 1]  ->  [int64 N T' h w], coarse to fine
    video = model.detokenize(codes)                  # ... and back, clamped to [0, 1]

This file works with torch, and the quantize*.py files beside it.
State_dict names, shapes and results of VQVAE2 are those of
github.com/vvvm23/vqvae-2 (after Razavi et al. 2019), names and shapes of VqVae2 those of models/vq_vae/vq_vae2 in
github.com/zhangxuan1918/VqVaeVideo. What differs: videos are in [0, 1] (the networks see [-1, 1]; the second one was
published for ImageNet's mean and deviation), and codebooks are those of quantize.py.

The two classes have almost one name, and are two different networks: VQVAE2 (model=vqvae2) has several codebooks for
each frame, VqVae2 (model=vqvae_video) has one codebook for a whole clip. Both keep the names under which they were
published, and so do their arguments: the number of codes in a codebook is nb_entries in VQVAE2, vocab_size in VqVae2,
and n_embed in VQGAN and quantize.py.

Conventions: video is N T C H W, RGB, in [0, 1]; latents are the quantized vectors, N T' C h w.
"""
import math
import pickle
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize import EMAQuantizer, SinkhornQuantizer, TokenizerStream, VectorQuantizer, check_arguments


def recomputed(block, x):
    """block(x), recomputed in the backward pass. That second pass does not update batch norms' running statistics."""
    norms, passes = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)], []

    def run(x):
        kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if passes]
        passes.append(x.shape)
        for norm, _, _ in kept:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            return block(x)
        finally:  # PyTorch ends the second pass early, by an exception
            for norm, momentum, count in kept:
                norm.momentum, norm.num_batches_tracked = momentum, count
    return checkpoint(run, x, use_reentrant=False)


class Tokenizer(nn.Module):
    """The methods that both models have, built on their one pass through the network (see `_pass`)."""

    def latent_frames(self, frames):
        return math.ceil(frames / self.time_factor)

    def frame_index(self, frames, latents=None):
        """For each output frame of a clip of `frames` frames, the input frame (from 0) that it stands for.

        Numbers past the clip's end stand for repetitions of its last frame, which fill up the last latent.
        """
        return list(range((latents or self.latent_frames(frames)) * self.time_factor))

    def targets(self, video, latents=None):
        """The frames that `forward(video)` reconstructs: all, and the last one repeated to fill up the last latent."""
        more = len(self.frame_index(video.shape[1], latents)) - video.shape[1]
        if more <= 0:
            return video[:, :video.shape[1] + more]
        return torch.cat([video, video[:, -1:].expand(-1, more, -1, -1, -1)], 1)

    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T' C H/s W/s. ValueError if s does not divide H and W."""
        return self._pack(self._pass(self._prepared(video), pixels=False)[0])

    def decode(self, latents):
        """Latents N T' C h w -> video N T 3 s*h s*w, clamped to [0, 1] except in training mode."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise ValueError(f"expected latents as N T {self.latent_channels} H W, got shape {tuple(latents.shape)}")
        return self._finished(self._pass(given=self._unpack(latents.to(self.last_layer.dtype)))[2])

    def forward(self, video):
        """Returns (reconstruction N T 3 H W, {"latents", "vq_loss", "perplexity", "usage", "codes"})."""
        vectors, info, output = self._pass(self._prepared(video))
        return self._finished(output), {"latents": self._pack(vectors), **info}

    @torch.no_grad()
    def tokenize(self, video):
        """Video -> [int64 N T' h w], coarse to fine. Needs eval mode."""
        return self._pass(self._prepared(video), pixels=False)[1]["codes"]

    @torch.no_grad()
    def detokenize(self, codes):
        """Codes from `tokenize` -> video, bit for bit that of `decode(encode(video))`."""
        return self.decode(self._pack(self._vectors(codes)))

    def stream(self, memory_limit=None, total_latents=None):
        """A TokenizerStream: the same results, piece by piece. memory_limit: bytes for activations (see there);
        total_latents: not needed here."""
        return TokenizerStream(self, memory_limit)

    def _prepared(self, video):
        if video.ndim != 5 or video.shape[2] != 3 or not video.shape[1]:
            raise ValueError(f"expected video as N T 3 H W with at least one frame, got shape {tuple(video.shape)}")
        if any(size % self.space_factor for size in video.shape[-2:]):
            raise ValueError(f"height and width must be multiples of {self.space_factor}, got "
                             f"{video.shape[-2]}x{video.shape[-1]}: crop, or pad with torch.nn.functional.pad")
        frames = (self.targets(video).flatten(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)
        return frames.unflatten(0, (len(video), -1))

    def _finished(self, video):
        return (video + 1) / 2 if self.training else ((video + 1) / 2).clamp(0, 1)

    def _run(self, block, x):
        return recomputed(block, x) if self.gradient_checkpointing and torch.is_grad_enabled() else block(x)

    def _pass(self, video=None, given=None, pixels=True):
        """Quantize a video (N T 3 H W in [-1, 1]), or take the vectors `given`, a list of N T' C h w, coarse to fine.

        Returns (vectors, info without "latents", decoded video in [-1, 1], or None if it is not asked for).
        """
        raise NotImplementedError


# ---- VQ-VAE-2 ----------------------------------------------------------------------------------------------------


class ReZero(nn.Module):
    """Residual block whose branch starts at weight 0 (Bachlechner et al. 2020)."""

    def __init__(self, channels, res_channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, res_channels, 3, padding=1, bias=False), nn.BatchNorm2d(res_channels), nn.ReLU(True),
            nn.Conv2d(res_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(True))
        self.alpha = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return self.layers(x) * self.alpha + x


class ResidualStack(nn.Module):
    """Residual blocks in a row."""

    def __init__(self, channels, res_channels, count):
        super().__init__()
        self.stack = nn.Sequential(*(ReZero(channels, res_channels) for _ in range(count)))

    def forward(self, x):
        return self.stack(x)


def resize(convolution, n_in, n_out):
    """A layer that halves (nn.Conv2d) or doubles (nn.ConvTranspose2d) the size."""
    return nn.Sequential(convolution(n_in, n_out, 4, stride=2, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(True))


class Encoder(nn.Module):
    """(B, n_in, H, W) -> (B, hidden, H / rate, W / rate)."""

    def __init__(self, n_in, hidden, res_channels, res_layers, rate):
        super().__init__()
        widths = [n_in, hidden // 2, *[hidden] * (rate.bit_length() - 2)]
        self.layers = nn.Sequential(
            *(resize(nn.Conv2d, *pair) for pair in zip(widths, widths[1:])),
            nn.Conv2d(widths[-1], hidden, 3, padding=1), nn.BatchNorm2d(hidden),
            ResidualStack(hidden, res_channels, res_layers))

    def forward(self, x, run):
        return run(self.layers, x)


class Decoder(nn.Module):
    """(B, n_in, h, w) -> (B, n_out, h * rate, w * rate)."""

    def __init__(self, n_in, hidden, n_out, res_channels, res_layers, rate):
        super().__init__()
        widths = [hidden, hidden // 2, *[n_out] * (rate.bit_length() - 2)]
        self.layers = nn.Sequential(
            nn.Conv2d(n_in, hidden, 3, padding=1), ResidualStack(hidden, res_channels, res_layers),
            *(resize(nn.ConvTranspose2d, *pair) for pair in zip(widths, widths[1:])),
            nn.Conv2d(widths[-1], n_out, 3, padding=1), nn.BatchNorm2d(n_out))

    def forward(self, x, run):
        return self.layers[-2:](run(self.layers[:-2], x))  # the adaptive GAN weight needs the last layer's gradient


class Upscaler(nn.Module):
    """Enlarges a level's vectors to the size of the next finer level, stage by stage."""

    def __init__(self, channels, rates):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(*(layer for _ in range(rate.bit_length() - 1)
                            for layer in resize(nn.ConvTranspose2d, channels, channels))) for rate in rates)


class CodeLayer(EMAQuantizer):
    """1x1 convolution and EMA codebook, with the published names: `embed` and `embed_avg` are (dim, count)."""

    def __init__(self, n_in, n_embed, dim, beta, **options):
        super().__init__(n_embed, dim, beta, **options)
        self.conv_in = nn.Conv2d(n_in, dim, 1)

    def make_tables(self, weight, sizes):
        self.register_buffer("embed", weight.t().contiguous())
        self.register_buffer("cluster_size", sizes)
        self.register_buffer("embed_avg", self.embed * sizes)

    def tables(self):
        return self.embed.t(), self.cluster_size, self.embed_avg.t()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.conv_in._apply(fn, recurse)  # has the model's dtype, unlike the codebook
        return self

    def forward(self, x):
        return super().forward(self.conv_in(x))


class OtherCodeLayer(nn.Module):
    """1x1 convolution and any quantizer."""

    def __init__(self, n_in, quantizer):
        super().__init__()
        self.conv_in, self.quantizer = nn.Conv2d(n_in, quantizer.dim, 1), quantizer
        self.codes_per_position = quantizer.codes_per_position

    def forward(self, x):
        return self.quantizer(self.conv_in(x))

    def codes_to_vectors(self, codes):
        return self.quantizer.codes_to_vectors(codes)


class VQVAE2(Tokenizer):
    """VQ-VAE-2: each frame becomes nb_levels maps of codes, level l + 1 smaller than level l by scaling_rates[l + 1].

    (VqVae2, below, is another network.) hidden_channels, res_channels, nb_res_layers: width and depth. embed_dim,
    nb_entries: channels of a code and number of codes (elsewhere n_embed) in every level's codebook. scaling_rates:
    powers of two; the first is the finest level's, in pixels. quantizer: "ema" (published), "vq" or "optvq" (with
    eval_nearest=True by default); quantizer_options go to its class in quantize.py. beta: weight of the commitment
    loss in vq_loss (published: 0.25, applied by the trainer; beta=1 gives the number that the published model returns).

    Codes are listed coarse to fine. A latent has one position for each coarsest code. Its channels are the vectors of
    all levels at that position, coarse to fine (finer levels: pixel_unshuffle). ValueError for settings that do not
    fit.
    """

    def __init__(self, hidden_channels=128, res_channels=32, nb_res_layers=2, nb_levels=3, embed_dim=64, nb_entries=512,
                 scaling_rates=(8, 4, 2), quantizer="ema", beta=0.25, **quantizer_options):
        super().__init__()
        check_arguments(VQVAE2, locals())
        rates = list(scaling_rates)
        if len(rates) != nb_levels or any(rate < 2 or rate & (rate - 1) for rate in rates):
            raise ValueError(f"scaling_rates must be nb_levels={nb_levels} powers of two, got {rates}")
        if hidden_channels % 2:
            raise ValueError(f"hidden_channels must be even, got {hidden_channels}")
        if quantizer == "optvq":
            quantizer_options.setdefault("eval_nearest", True)
        self.nb_levels, self.time_factor, self.space_factor, self.image_channels = nb_levels, 1, math.prod(rates), 3
        self.ratios = [math.prod(rates[nb_levels - i:]) for i in range(nb_levels)]  # see _pack
        self.latent_channels = embed_dim * sum(ratio ** 2 for ratio in self.ratios)
        common, top = (res_channels, nb_res_layers), nb_levels - 1
        self.encoders = nn.ModuleList(Encoder(hidden_channels if i else 3, hidden_channels, *common, rate)
                                      for i, rate in enumerate(rates))
        self.codebooks = nn.ModuleList(
            make_code_layer(quantizer, hidden_channels + (embed_dim if i < top else 0), embed_dim, nb_entries, beta,
                            quantizer_options) for i in range(nb_levels))
        self.decoders = nn.ModuleList(
            Decoder(embed_dim * (nb_levels - i), hidden_channels, embed_dim if i else 3, *common, rate)
            for i, rate in enumerate(rates))
        self.upscalers = nn.ModuleList(Upscaler(embed_dim, rates[1:nb_levels - i][::-1]) for i in range(top))
        per_level = self.codebooks[0].codes_per_position
        self.codebook_sizes = [nb_entries] * nb_levels * per_level  # for each tensor in the list that `tokenize` gives
        self.code_strides = [self.space_factor // ratio for ratio in self.ratios for _ in range(per_level)]  # in pixels
        self.gradient_checkpointing = False
        self.numbers_per_pixel = 6 * hidden_channels // 4  # activations alive at a time, roughly; streams use it
        self.config = dict(hidden_channels=hidden_channels, res_channels=res_channels, nb_res_layers=nb_res_layers,
                           nb_levels=nb_levels, embed_dim=embed_dim, nb_entries=nb_entries, scaling_rates=rates,
                           quantizer=quantizer, beta=beta, **quantizer_options)

    @property
    def last_layer(self):
        """Weight of the decoder's last convolution, for the adaptive GAN weight."""
        return self.decoders[0].layers[-2].weight

    def _vectors(self, codes):
        k = self.codebooks[0].codes_per_position
        return [layer.codes_to_vectors(codes[i * k:(i + 1) * k]).transpose(1, 2)
                for i, layer in enumerate(reversed(self.codebooks))]

    def _pack(self, vectors):
        return torch.cat([F.pixel_unshuffle(v, ratio) for v, ratio in zip(vectors, self.ratios)], 2)

    def _unpack(self, latents):
        embed_dim = self.config["embed_dim"]
        parts = latents.split([embed_dim * ratio ** 2 for ratio in self.ratios], 2)
        return [F.pixel_shuffle(part, ratio) for part, ratio in zip(parts, self.ratios)]

    def _pass(self, video=None, given=None, pixels=True):
        """Runs all encoders, fine to coarse; then quantizes and decodes, coarse to fine. See the base class."""
        shape, features, vectors, infos, carried, above = (given[0] if given else video).shape[:2], [], [], [], [], None
        for encoder in [] if given else self.encoders:
            features.append(encoder(features[-1] if features else video.flatten(0, 1), self._run))
        for i, level in enumerate(reversed(range(self.nb_levels))):
            if given:
                vector = given[i].flatten(0, 1)
            else:
                own = features[level] if above is None else torch.cat([features[level], above], 1)
                vector, info = self.codebooks[level](own)
                infos.append(info)
            carried = [self.upscalers[j].stages[i - j - 1](v) for j, v in enumerate(carried)]
            if level or pixels:
                above = self.decoders[level](torch.cat([vector, *carried], 1), self._run)
            vectors.append(vector)
            carried.append(vector)
        info = {"codes": [codes.unflatten(0, shape) for info in infos for codes in info["codes"]]}
        for key, total in (("vq_loss", torch.sum), ("perplexity", torch.mean), ("usage", torch.mean)):
            info.update({key: total(torch.stack([info[key] for info in infos]))} if infos else {})
        return [v.unflatten(0, shape) for v in vectors], info, above.unflatten(0, shape) if pixels else None


def make_code_layer(kind, n_in, dim, n_embed, beta, options):
    """The codebook of one level. ValueError for an unknown quantizer, or options that it does not have."""
    others = {"vq": VectorQuantizer, "optvq": SinkhornQuantizer}
    if kind not in ("ema", *others):
        raise ValueError(f"unknown quantizer {kind!r}; there are ema, {', '.join(others)}")
    try:
        if kind == "ema":
            return CodeLayer(n_in, n_embed, dim, beta, **options)
        return OtherCodeLayer(n_in, others[kind](n_embed, dim, beta, **options))
    except TypeError as error:
        raise ValueError(f"quantizer {kind!r}: {error}") from None


# ---- VqVae2 ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """DALL-E's residual block: four convolutions, all 3x3 except the last (encoder) or the first (decoder), 1x1."""

    def __init__(self, n_in, n_out, gain, sizes):
        super().__init__()
        widths, self.gain = [n_in, *[n_out // 4] * 3, n_out], gain
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential(OrderedDict(
            layer for i, (a, b, size) in enumerate(zip(widths, widths[1:], sizes), 1)
            for layer in ((f"relu_{i}", nn.ReLU()), (f"conv_{i}", nn.Conv2d(a, b, size, padding=size // 2)))))

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


def make_groups(widths, blocks, sizes, between):
    """[(name, blocks of one resolution)]; the layers `between` end each group but the last."""
    gain, result = (blocks * (len(widths) - 1)) ** -2, []
    for g, (n_in, n_out) in enumerate(zip(widths, widths[1:]), 1):
        layers = [(f"block_{i + 1}", Block(n_out if i else n_in, n_out, gain, sizes)) for i in range(blocks)]
        result.append((f"spatial_{g}", nn.Sequential(OrderedDict(layers + between * (g < len(widths) - 1)))))
    return result


class Half(nn.Module):
    """Encoder or decoder: `blocks_spatial` sees single frames, `blocks_tempo` clips, their frames folded into channels.
    """

    def __init__(self, spatial, tempo):
        super().__init__()
        self.blocks_spatial = nn.Sequential(OrderedDict(spatial))
        self.blocks_tempo = nn.Sequential(OrderedDict(tempo=nn.Sequential(OrderedDict(tempo))))


class ClipQuantizer(EMAQuantizer):
    """EMA codebook with the published names (the published one stores smoothed cluster sizes, and tables as
    parameters)."""

    def make_tables(self, weight, sizes):
        self.embedding = nn.Module()
        self.embedding.register_buffer("weight", weight)
        self.register_buffer("ema_cluster_size", sizes)
        self.register_buffer("ema_w", weight * sizes.unsqueeze(1))

    def tables(self):
        return self.embedding.weight, self.ema_cluster_size, self.ema_w


class Upsample(nn.Upsample):
    """Upsampling whose result has x's dtype under autocast too, which on a GPU would convert it to float32."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class VqVae2(Tokenizer):
    """A clip of sequence_length frames becomes one map of codes, 2 ** (group_count - 1) times smaller than a frame.

    (VQVAE2, above, is another network. The number of codes is vocab_size here, nb_entries there, elsewhere n_embed.)
    The encoder has group_count groups of n_blk_per_group residual blocks, of widths n_hid, 2 n_hid, ..., with
    max-pooling between them. One convolution, grouped by channel, then folds the frames into n_init channels, for an
    EMA codebook of vocab_size codes (commitment_cost, decay and quantizer_options: see EMAQuantizer). The decoder
    mirrors the encoder. Defaults are the published training settings, but for sequence_length (published: 30).
    ValueError for widths that do not fit.

    The last frame fills up a clip's last sequence; the filled-up sequence comes back whole: see `targets`.
    """

    def __init__(self, group_count=4, n_hid=64, n_init=512, vocab_size=8192, n_blk_per_group=1, sequence_length=16,
                 commitment_cost=0.25, decay=0.99, **quantizer_options):
        super().__init__()
        check_arguments(VqVae2, locals())
        width = group_count * n_hid
        if n_init % width or n_hid % 4:
            raise ValueError(f"n_init={n_init} must be a multiple of group_count * n_hid = {width} (the convolution "
                             f"over time has a group for each channel), and n_hid={n_hid} of 4")
        widths = [n_hid, *(g * n_hid for g in range(1, group_count + 1))]
        self.encoder = Half(
            [("input", nn.Conv2d(3, n_hid, 7, padding=3)),
             *make_groups(widths, n_blk_per_group, (3, 3, 3, 1), [("pool", nn.MaxPool2d(2))])],
            [("relu", nn.ReLU()), ("conv", nn.Conv2d(width * sequence_length, n_init, 3, padding=1, groups=width))])
        try:
            self.vq_vae = ClipQuantizer(vocab_size, n_init, commitment_cost, decay, **quantizer_options)
        except TypeError as error:
            raise ValueError(f"quantizer: {error}") from None
        widths = [width, *(g * n_hid for g in range(group_count, 0, -1))]
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(n_hid, 3, 1)))
        self.decoder = Half(
            [*make_groups(widths, n_blk_per_group, (1, 3, 3, 3), [("upsample", Upsample(scale_factor=2))]),
             ("output", output)],
            [("conv", nn.Conv2d(n_init, width * sequence_length, 3, padding=1, groups=width)), ("relu", nn.ReLU())])
        self.time_factor, self.space_factor = sequence_length, 2 ** (group_count - 1)
        self.latent_channels, self.image_channels = n_init, 3
        self.codebook_sizes, self.code_strides = [vocab_size], [self.space_factor]  # of the one tensor of codes
        self.gradient_checkpointing = False
        self.numbers_per_pixel = 4 * n_hid  # activations alive at a time, roughly; streams use it
        self.config = dict(group_count=group_count, n_hid=n_hid, n_init=n_init, vocab_size=vocab_size,
                           n_blk_per_group=n_blk_per_group, sequence_length=sequence_length,
                           commitment_cost=commitment_cost, decay=decay, **quantizer_options)

    @property
    def last_layer(self):
        """Weight of the decoder's last convolution, for the adaptive GAN weight."""
        return self.decoder.blocks_spatial.output.conv.weight

    def _vectors(self, codes):
        return [self.vq_vae.codes_to_vectors(codes).transpose(1, 2)]

    def _pack(self, vectors):
        return vectors[0]

    def _unpack(self, latents):
        return [latents]

    def _pass(self, video=None, given=None, pixels=True):
        """`blocks_tempo` sees frames folded into channels: channel 0 of all frames first (c d). See the base class."""
        info = {}
        if given:
            vectors = given[0]
        else:
            x = self._frames(self.encoder.blocks_spatial, video.flatten(0, 1))
            x = x.unflatten(0, (-1, self.time_factor)).transpose(1, 2).flatten(1, 2)
            x = self.encoder.blocks_tempo(x).unflatten(0, (len(video), -1))
            vectors, info = self.vq_vae(x.transpose(1, 2))
            vectors = vectors.transpose(1, 2)
        if not pixels:
            return [vectors], info, None
        x = self.decoder.blocks_tempo(vectors.flatten(0, 1)).unflatten(1, (-1, self.time_factor))
        x = self._frames(self.decoder.blocks_spatial, x.transpose(1, 2).flatten(0, 1))
        return [vectors], info, x.unflatten(0, (len(vectors), -1))

    def _frames(self, blocks, x):
        for block in blocks[:-1]:
            x = self._run(block, x)
        return blocks[-1](x)  # the adaptive GAN weight needs the last layer's gradient


# ---- weights -----------------------------------------------------------------------------------------------------


def recognise(weights):
    """(VQVAE2 or VqVae2, the arguments that fit) for a state_dict, from its names and shapes. ValueError if neither."""
    def count(pattern):
        return len({match[1] for key in weights if (match := re.match(pattern, key))})

    try:
        if "encoder.blocks_tempo.tempo.conv.weight" in weights:
            n_init, frames = weights["encoder.blocks_tempo.tempo.conv.weight"].shape[:2]
            return VqVae2, dict(
                group_count=count(r"encoder\.blocks_spatial\.spatial_(\d+)\."),
                n_hid=len(weights["encoder.blocks_spatial.input.weight"]), n_init=n_init, sequence_length=frames,
                vocab_size=len(weights["vq_vae.embedding.weight"]),
                n_blk_per_group=count(r"encoder\.blocks_spatial\.spatial_1\.block_(\d+)\."))
        levels = count(r"encoders\.(\d+)\.")
        if levels > 32:
            raise ValueError(f"no VQ-VAE-2 weights: {levels} levels")
        steps = [count(rf"encoders\.{i}\.layers\.(\d+)\.0\.weight") for i in range(levels)]
        first = steps[0] if steps else 0
        stack = f"encoders.0.layers.{first + 2}.stack."
        found = dict(hidden_channels=len(weights[f"encoders.0.layers.{first}.weight"]), nb_levels=len(steps),
                     scaling_rates=[2 ** s for s in steps], res_channels=len(weights[stack + "0.layers.0.weight"]),
                     nb_res_layers=count(re.escape(stack) + r"(\d+)\."),
                     embed_dim=len(weights["codebooks.0.conv_in.bias"]))
        if "codebooks.0.embed" in weights:
            return VQVAE2, dict(found, nb_entries=weights["codebooks.0.embed"].shape[1])
        nb_entries, code_dim = weights["codebooks.0.quantizer.embedding.weight"].shape
        if code_dim == found["embed_dim"] and "codebooks.0.quantizer.proj.weight" not in weights:
            return VQVAE2, dict(found, nb_entries=nb_entries, quantizer="vq")
        return VQVAE2, dict(found, nb_entries=nb_entries, quantizer="optvq", num_head=found["embed_dim"] // code_dim)
    except KeyError as error:
        raise ValueError(f"no VQ-VAE-2 or VqVae2 weights: {error} is missing") from None


def load_vqvae(source, **overrides):
    """(VQVAE2 or VqVae2 in eval mode, a description) from published weights (.pt) or our own; runs no code.

    source: a path, or a state_dict; also a checkpoint of VqVaeVideo's training (with a "state_dict"), or weights from
    several GPUs ("module."). overrides: arguments of the model that weights do not tell. ValueError if the weights do
    not fit.
    """
    try:
        weights = source if isinstance(source, dict) else torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise ValueError(f"{source} is damaged or no file of weights, or holds code, which is not run") from None
    if not isinstance(weights, dict) or not isinstance(weights.get("state_dict", weights), dict):
        raise ValueError("no VQ-VAE-2 or VqVae2 weights: no state_dict")
    weights = {re.sub(r"^(module|_orig_mod)\.", "", str(k)): v for k, v in weights.get("state_dict", weights).items()}
    kind, arguments = recognise(weights)
    model = kind(**{**arguments, **overrides})
    weights = {k: v for k, v in weights.items() if not k.endswith((".started", ".usage_count"))}  # for training only
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit {kind.__name__}: "
                         + " ".join(str(error).splitlines()[1].split())[:200]) from None
    return model.eval(), f"{kind.__name__}, {' + '.join(map(str, model.codebook_sizes))} codes"
