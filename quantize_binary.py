"""Quantizers without a codebook: FSQ rounds channels, LFQ and BSQ take their signs. See quantize.py."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize_base import CHUNK, Quantizer, check_arguments, mean_over_ranks, straight_through


def project(layer, rows):
    """Apply a linear layer (or nn.Identity), in float32 even if the layer was loaded in another dtype."""
    return rows if isinstance(layer, nn.Identity) else F.linear(rows, layer.weight.float(), layer.bias.float())


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023): each of len(levels) bounded channels is rounded to its levels.

    There is no codebook to learn, and no loss. levels: number of levels of each channel, 3 or more. dim: channels of z;
    if it is not len(levels), the linear layers `proj_in` and `proj_out` convert. A code is the mixed-radix number whose
    digits are the channels' levels, the first channel's the least significant; vectors are in [-1, 1]. The gradient
    goes straight through the rounding, but is that of tanh for the bounding.
    """

    def __init__(self, levels=(8, 5, 5, 5), dim=None, deferred=False):
        check_arguments(FSQ, locals())
        if not levels or min(levels) < 3:
            raise ValueError(f"levels {tuple(levels)} must all be 3 or more: of 2 one is dead (only z below -3.8 takes "
                             "it: 0.001 of 1 bit, for z of unit deviation)")
        dim, width = dim or len(levels), len(levels)
        super().__init__(dim, math.prod(levels), deferred=deferred)
        self.proj_in = nn.Linear(dim, width) if dim != width else nn.Identity()
        self.proj_out = nn.Linear(width, dim) if dim != width else nn.Identity()
        radix = [math.prod(levels[:i]) for i in range(width)]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("radix", torch.tensor(radix), persistent=False)

    def vectors(self, codes):
        half = self.levels // 2
        return project(self.proj_out, (codes // self.radix % self.levels - half) / half)

    def assign(self, rows):
        reach = (self.levels - 1) * (1 + 1e-3) / 2  # a little beyond the outermost level, which else is unreachable
        offset = (self.levels % 2 == 0) * 0.5  # an even number of levels has no middle one
        bounded = torch.tanh(project(self.proj_in, rows) + torch.atanh(offset / reach)) * reach - offset
        levels = bounded.round().detach()
        quantized = straight_through(bounded, levels) / (self.levels // 2)
        codes = ((levels.long() + self.levels // 2) * self.radix).sum(1, keepdim=True)
        return project(self.proj_out, quantized), codes, rows.new_zeros(())


class BinaryQuantizer(Quantizer):
    """Quantizes log2(n_embed) channels to their signs: what LFQ and BSQ have in common. No codebook, and no search.

    n_embed: a power of 2. dim: channels of z; if it is not log2(n_embed), the linear layers `proj_in` and `proj_out`
    convert. A code is the number whose bits are the signs, the first channel's the lowest. beta: weight of the
    commitment loss.
    entropy_weight: weight of E[H(p)] - diversity * H(E[p]), in nats: each vector should be certain of its code, and all
        codes should be used equally. p is a vector's distribution over codes: the softmax of minus the squared
        distances over `temperature`. Its bits are independent: for a channel u that becomes -size or size, the bit is 1
        with probability sigmoid(4 u size / temperature). At a temperature of 1, that of bsq-vit, all codes look alike
        to a vector, and BSQ took one code for all.
    entropy_bits: with more bits than this, H(E[p]) is the sum over groups of at most so many bits, which are taken as
        independent, as published in BSQ: 2^18 probabilities for each vector are too many.
    across_ranks: in training, E[p] is the mean over all ranks' vectors, so a rank waits in forward for the others: see
        SinkhornQuantizer. In eval mode the loss is the commitment loss alone.
    A subclass adds `size`, the absolute value of a quantized channel, and scaled(rows).
    """

    def __init__(self, n_embed, dim=None, beta=0.25, entropy_weight=0.1, diversity=1.0, temperature=0.1,
                 entropy_bits=10, across_ranks=True, chunk=CHUNK, deferred=False):
        check_arguments(BinaryQuantizer, locals())
        bits = n_embed.bit_length() - 1
        if bits < 1 or 2 ** bits != n_embed:
            raise ValueError(f"n_embed={n_embed}: signs make 2, 4, 8, 16, ... codes, a power of 2")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: a number above 0 is wanted")
        if entropy_bits > 16:
            raise ValueError(f"entropy_bits={entropy_bits}: 16 at most is wanted, for 65536 probabilities a vector")
        dim = dim or bits
        super().__init__(dim, n_embed, deferred=deferred)
        self.bits, self.beta, self.entropy_weight, self.diversity = bits, beta, entropy_weight, diversity
        self.temperature, self.entropy_bits = temperature, entropy_bits
        self.across_ranks, self.chunk = across_ranks, chunk
        self.proj_in = nn.Linear(dim, bits) if dim != bits else nn.Identity()
        self.proj_out = nn.Linear(bits, dim) if dim != bits else nn.Identity()
        self.register_buffer("radix", 2 ** torch.arange(bits), persistent=False)

    def vectors(self, codes):
        return project(self.proj_out, torch.where((codes & self.radix) > 0, self.size, -self.size))

    def assign(self, rows):
        u = self.scaled(project(self.proj_in, rows))
        signs = torch.where(u > 0, self.size, -self.size)
        codes = ((u > 0) * self.radix).sum(1, keepdim=True)
        loss = self.beta * self.commitment(u, signs)
        if self.training and self.entropy_weight > 0:
            sure, used = self.entropies(4 * self.size / self.temperature * u)
            loss = loss + self.entropy_weight * (sure - self.diversity * used)
        return project(self.proj_out, straight_through(u, signs)), codes, loss

    def commitment(self, u, signs):
        return F.mse_loss(u, signs)

    def entropies(self, logits):
        """Logits that the bits are 1, (n, bits) -> (mean over the vectors of the entropy of p, entropy of the mean p),
        in nats."""
        sure = (F.softplus(logits) - logits * logits.sigmoid()).sum(1).mean()
        groups = logits.sigmoid().tensor_split(math.ceil(self.bits / self.entropy_bits), 1)
        sums = torch.cat([self.summed(group) for group in groups])
        if self.training and self.across_ranks:
            mean = mean_over_ranks(sums, len(logits), self.before_reduce)
        else:
            mean = sums / len(logits)
        return sure, torch.special.entr(mean.clamp(min=1e-12)).sum()

    def summed(self, ones):
        """Probabilities that a group's bits are 1, (n, k) -> probabilities of its codes, summed over all n, (2^k,)."""
        def block(ones):
            codes = ones.new_ones(len(ones), 1)
            for one in ones.unbind(1):
                codes = torch.cat([codes * (1 - one).unsqueeze(1), codes * one.unsqueeze(1)], 1)
            return codes.sum(0)

        parts = ones.split(max(1, self.chunk >> ones.shape[1]))
        if len(parts) == 1:
            return block(ones)
        return sum(checkpoint(block, part, use_reentrant=False) for part in parts)


class LFQ(BinaryQuantizer):
    """Lookup-free quantization (MAGVIT-v2, Yu et al. 2023, arXiv 2310.05737): each channel becomes -1 or 1."""

    size = 1.0

    def scaled(self, rows):
        return rows


class BSQ(BinaryQuantizer):
    """Binary spherical quantization (Zhao et al. 2024, arXiv 2406.07548, github.com/zhaoyue-zephyrus/bsq-vit): LFQ of
    vectors scaled to length 1, which bounds the quantization error. Codes have length 1 too."""

    @property
    def size(self):
        return self.bits ** -0.5

    def scaled(self, rows):
        return F.normalize(rows, dim=1)

    def commitment(self, u, signs):
        return (u - signs).square().sum(1).mean()  # summed over channels, as published
