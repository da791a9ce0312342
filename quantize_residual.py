"""Quantizers made of several: residual, and product (grouped). See quantize.py."""
import torch
from torch import nn

from quantize_base import Quantizer, check_arguments, check_estimator, pass_gradient
from quantize_optvq import SinkhornQuantizer
from quantize_table import EMAQuantizer, VectorQuantizer


class Several(Quantizer):
    """A quantizer made of several, `layers`: each gives one code for a position."""

    def merged(self, infos):
        """The infos of the layers as one: means, and all codes."""
        mean = {key: torch.stack([info[key] for info in infos]).mean() for key in ("vq_loss", "perplexity", "usage")}
        return {**mean, "codes": [code for info in infos for code in info["codes"]]}

    def defer(self, before_reduce=None):
        super().defer(before_reduce)
        for layer in self.layers:
            layer.defer(before_reduce)

    def begin(self):
        for layer in self.layers:
            layer.begin()

    def update(self):
        return self.merged_statistics([layer.update() for layer in self.layers])

    def merged_statistics(self, statistics):
        counts = [s.pop("counts") for s in statistics]
        counts += [torch.zeros_like(counts[0])] * (len(self.layers) - len(counts))
        return {"counts": torch.cat(counts),
                **{key: torch.stack([s[key] for s in statistics]).mean() for key in statistics[0]}}


class ResidualQuantizer(Several):
    """RQ-VAE (Lee et al. 2022): each of `depth` quantizers codes the residual that the ones before it left.

    kind: "vq", "ema" or "sinkhorn", with its own **options. shared: one codebook for all depths (update() then counts
    them together). The loss is the mean over the depths, whose commitment terms pull z towards every partial sum, as
    published. estimator: of the gradient through the sum of all codes (see TableQuantizer). With deferred, one depth
    per step gets its k-means start: its residual means nothing before the depths above it have started.

    quantizer_dropout: in training, the probability that the decoder gets only the first k codes of a clip, where
        PyTorch's CPU generator draws k uniformly from 1 to depth (SoundStream, Zeghidour et al. 2021, arXiv
        2107.03312). One model then serves all bit rates. What differs: all depths learn from all clips.
    levels: how many depths are used outside of training; see `use_levels` in quantize.py.
    """

    nested = True

    def __init__(self, depth, n_embed, dim, shared=False, kind="vq", quantizer_dropout=0.0,
                 estimator="straight_through", deferred=False, **options):
        check_arguments(ResidualQuantizer, locals())
        check_estimator(estimator)
        kinds = {"vq": VectorQuantizer, "ema": EMAQuantizer, "sinkhorn": SinkhornQuantizer}
        if kind not in kinds or options.get("num_head", 1) != 1:
            raise ValueError(f"kind {kind!r} must be one of {', '.join(kinds)}, with num_head 1")
        if options.get("cosine"):
            raise ValueError("cosine=True: codes of length 1 cannot code what is left over")
        if quantizer_dropout > 1:
            raise ValueError(f"quantizer_dropout={quantizer_dropout}: a probability from 0 to 1 is wanted")
        super().__init__(dim, n_embed, depth, deferred)
        self.estimator, self.quantizer_dropout, self.levels, self.clips = estimator, quantizer_dropout, depth, 1
        self.layers = nn.ModuleList(kinds[kind](n_embed, dim, deferred=deferred, **options)
                                    for _ in range(1 if shared else depth))

    def depths(self):
        return [self.layers[i % len(self.layers)] for i in range(self.codes_per_position)]

    def vectors(self, codes):
        return sum(layer.vectors(codes[:, i:i + 1]).float() for i, layer in zip(range(codes.shape[1]), self.depths()))

    def forward(self, z):
        self.clips = len(z)
        return super().forward(z)

    def quantize_rows(self, rows):
        left, total, infos = rows, 0, []
        kept = self.levels_kept(rows) if self.training and self.quantizer_dropout > 0 else None
        for number, layer in enumerate(self.depths()[:None if self.training else self.levels]):
            quantized, info = layer.quantize_rows(left)
            quantized = quantized.detach()
            left = left - quantized
            total = total + (quantized if kept is None else torch.where(kept > number, quantized, 0.0))
            infos.append(info)
        return pass_gradient(self.estimator, rows, total), self.merged(infos)

    def levels_kept(self, rows):
        """How many levels of each row the decoder gets, (n, 1); the same number for all rows of a clip."""
        most = self.codes_per_position
        drawn, dropped = torch.randint(1, most + 1, (self.clips,)), torch.rand(self.clips) < self.quantizer_dropout
        kept = torch.where(dropped, drawn, most).repeat_interleave(len(rows) // self.clips)
        return kept.unsqueeze(1).to(rows.device, non_blocking=True)

    def update(self):
        statistics, starting = [], False
        for layer in self.layers:
            if starting:
                layer.begin()
                continue
            starting = layer.waits_for_start()
            statistics.append(layer.update())
        return self.merged_statistics(statistics)


class ProductQuantizer(Several):
    """Product codes (Jegou et al. 2011): the channels are cut into `groups` equal parts, each with its own codebook. So
    few codes stand for many vectors, n_embed ** groups, at groups * log2(n_embed) bits a position.

    kind: "vq" or "ema", with its own **options. The loss is the mean over the groups.
    """

    def __init__(self, groups, n_embed, dim, kind="ema", deferred=False, **options):
        check_arguments(ProductQuantizer, locals())
        kinds = {"vq": VectorQuantizer, "ema": EMAQuantizer}
        if kind not in kinds:
            raise ValueError(f"kind {kind!r} must be one of {', '.join(kinds)}")
        if dim % groups:
            raise ValueError(f"dim {dim} cannot be cut into {groups} equal groups")
        super().__init__(dim, n_embed, groups, deferred)
        self.layers = nn.ModuleList(kinds[kind](n_embed, dim // groups, deferred=deferred, **options)
                                    for _ in range(groups))

    def vectors(self, codes):
        return torch.cat([layer.vectors(codes[:, i:i + 1]) for i, layer in enumerate(self.layers)], 1)

    def quantize_rows(self, rows):
        parts = [layer.quantize_rows(part) for layer, part in zip(self.layers, rows.chunk(len(self.layers), 1))]
        return torch.cat([quantized for quantized, _ in parts], 1), self.merged([info for _, info in parts])
