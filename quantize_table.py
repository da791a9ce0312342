"""Codebooks in a table: VQ (learned by gradient), EMA (by moving averages), SimVQ (through one linear layer). See
quantize.py."""
import torch
import torch.nn.functional as F
from torch import nn

from quantize_base import (
    CHUNK, Quantizer, StartingQuantizer, check_arguments, check_estimator, ema_update, gather_rows, nearest,
    pass_gradient, sum_over_ranks,
)


class TableQuantizer(StartingQuantizer):
    """Nearest-neighbour search in one codebook, the table. The subclasses, VQ and EMA, differ in how it learns.

    kmeans_init: see StartingQuantizer.
    estimator: how the gradient passes a code: "straight_through", or "rotation" (see `rotated`).
    cosine: vectors and codes are scaled to length 1 before they are compared, and what comes out has length 1
        (ViT-VQGAN, Yu et al. 2021, arXiv 2110.04627). Its projection to a few channels, 32 there, is `embed_dim` here.
    restart_below: after each update, a random vector of the step, the same on all ranks, replaces a code whose average
        count per step is lower. (The mean over all codes is vectors per step / n_embed; a fifth of that works.) The
        code's count and sums are reset too, to twice the threshold: else the next average would bring back the old
        vector. A code that stays unused then lives log(2) / (1 - decay) steps. Vectors are drawn with PyTorch's CPU
        generator, which a checkpoint holds. This adds a small entry to the state_dict, as kmeans_init does.
    """

    def __init__(self, n_embed, dim, beta=0.25, decay=0.99, kmeans_init=False, restart_below=0.0,
                 estimator="straight_through", cosine=False, seed=0, chunk=CHUNK, deferred=False):
        check_arguments(TableQuantizer, locals())
        check_estimator(estimator)
        super().__init__(dim, n_embed, 1, kmeans_init, seed, chunk, deferred)
        self.beta, self.decay, self.restart_below = beta, decay, restart_below
        self.estimator, self.cosine = estimator, cosine
        self.start_size = 2.0 * restart_below or 1.0

    def tables(self):
        """(weight (count, dim), average counts (count,) or None, average sums (count, dim) or None), to be updated in
        place."""
        raise NotImplementedError

    def vectors(self, codes):
        return self.scaled(F.embedding(codes[:, 0], self.tables()[0]))

    def scaled(self, vectors):
        return F.normalize(vectors.float(), dim=1) if self.cosine else vectors

    def quantize_rows(self, rows):
        return super().quantize_rows(self.scaled(rows))

    def search(self, rows):
        """(n, dim) -> codes (n, 1), after the k-means start if that is due."""
        if self.training and not self.deferred and self.waits_for_start():
            self.start(rows.detach())
        return nearest(rows.detach(), self.scaled(self.tables()[0].detach()).float(), self.chunk).unsqueeze(1)

    def observe(self, rows, codes):
        if self.restart_below > 0 or self.waits_for_start():
            self.fresh.append(self.draw(rows)[0])

    def learn(self, counts):
        if self.waits_for_start():
            self.start(self.collected())
            return
        self.average(counts[0])
        if self.restart_below > 0:
            rows, found = gather_rows(*self.draw(self.collected()))
            dead = self.tables()[1] < self.restart_below
            turn = dead.cumsum(0) - 1  # the first dead code gets the first vector, and so on while there are any
            self.overwrite(dead & (turn < found), rows[turn.clamp(0, len(rows) - 1)])

    def set_codebook(self, centres):
        self.overwrite(self.started.expand(self.num_codes), centres)

    def overwrite(self, chosen, vectors):
        """Set the codes that `chosen` (count,) marks to their rows of `vectors` (count, dim); resets their averages."""
        weight, sizes, sums = self.tables()
        weight.copy_(torch.where(chosen.unsqueeze(1), vectors, weight))
        if sizes is not None:
            sizes.masked_fill_(chosen, self.start_size)
        if sums is not None:
            sums.copy_(torch.where(chosen.unsqueeze(1), vectors * self.start_size, sums))


class VectorQuantizer(TableQuantizer):
    """A codebook learned by gradient: taming-transformers' VectorQuantizer2, state_dict `embedding.weight`.

    The loss is |sg(z) - e|^2 + beta |z - sg(e)|^2 (means). With legacy=True, taming's default, beta weighs the first
    term (the codebook's) instead of the second (the commitment). **options: see TableQuantizer; with restart_below, a
    buffer `usage_count` holds the average counts.
    """

    def __init__(self, n_embed, dim, beta=0.25, legacy=True, **options):
        check_arguments(VectorQuantizer, locals())
        super().__init__(n_embed, dim, beta, **options)
        self.legacy = legacy
        self.embedding = nn.Embedding(n_embed, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)
        if self.restart_below > 0:
            self.register_buffer("usage_count", torch.full((n_embed,), self.start_size))

    def tables(self):
        return self.embedding.weight, self._buffers.get("usage_count"), None

    def assign(self, rows):
        codes = self.search(rows)
        quantized = self.vectors(codes).float()
        codebook, commitment = F.mse_loss(quantized, rows.detach()), F.mse_loss(rows, quantized.detach())
        loss = self.beta * codebook + commitment if self.legacy else codebook + self.beta * commitment
        return pass_gradient(self.estimator, rows, quantized), codes, loss

    def average(self, counts):
        if self.restart_below > 0:
            self.usage_count.mul_(self.decay).add_(counts, alpha=1 - self.decay)


class EMAQuantizer(TableQuantizer):
    """A codebook of moving averages: taming-transformers' EMAVectorQuantizer. Only the commitment has a gradient.

    state_dict: `embedding.weight`, `embedding.cluster_size`, `embedding.embed_avg`: buffers, so no optimizer sees them.
    What differs: fresh cluster sizes are not 0. From 0, a code that the first step does not use would grow by 1 / eps.
    A model with other names or (dim, count) tables overrides `make_tables` and `tables`. **options: see TableQuantizer.
    """

    def __init__(self, n_embed, dim, beta=0.25, decay=0.99, eps=1e-5, **options):
        check_arguments(EMAQuantizer, locals())
        super().__init__(n_embed, dim, beta, decay, **options)
        self.eps = eps
        self.register_buffer("sums", torch.empty(n_embed, dim), persistent=False)
        self.sums.zero_()
        self.make_tables(torch.randn(n_embed, dim), torch.full((n_embed,), self.start_size))

    def make_tables(self, weight, sizes):
        """Register the tables; weight (n_embed, dim), sizes (n_embed,)."""
        self.embedding = nn.Module()
        self.embedding.register_buffer("weight", weight)
        self.embedding.register_buffer("cluster_size", sizes)
        self.embedding.register_buffer("embed_avg", weight * sizes.unsqueeze(1))

    def tables(self):
        return self.embedding.weight, self.embedding.cluster_size, self.embedding.embed_avg

    def assign(self, rows):
        codes = self.search(rows)
        quantized = self.vectors(codes).float()
        return pass_gradient(self.estimator, rows, quantized), codes, self.beta * F.mse_loss(rows, quantized)

    def observe(self, rows, codes):
        super().observe(rows, codes)
        self.sums.index_add_(0, codes[:, 0], rows)

    def average(self, counts):
        weight, sizes, sums = self.tables()
        weight.copy_(ema_update(sizes, sums, counts, sum_over_ranks(self.sums), self.decay, self.eps))

    def begin(self):
        super().begin()
        self.sums.zero_()


class SimVQ(Quantizer):
    """SimVQ (Zhu et al. 2024, arXiv 2411.02038, github.com/youngsheen/SimVQ): a codebook of fixed random vectors behind
    one linear layer that learns, so that unused codes move along with the others.

    state_dict: `embedding.weight` (a buffer), `embedding_proj.weight`, `embedding_proj.bias`. The loss is
    |sg(z) - e|^2 + beta |z - sg(e)|^2 (means). estimator: see TableQuantizer.
    """

    def __init__(self, n_embed, dim, beta=0.25, estimator="straight_through", chunk=CHUNK, deferred=False):
        check_arguments(SimVQ, locals())
        check_estimator(estimator)
        super().__init__(dim, n_embed, deferred=deferred)
        self.beta, self.estimator, self.chunk = beta, estimator, chunk
        self.embedding = nn.Module()
        self.embedding.register_buffer("weight", torch.randn(n_embed, dim) * dim ** -0.5)
        self.embedding_proj = nn.Linear(dim, dim)

    def codebook(self):
        """(n_embed, dim), float32 even if the layer was loaded in another dtype."""
        layer = self.embedding_proj
        return F.linear(self.embedding.weight, layer.weight.float(), layer.bias.float())

    def vectors(self, codes):
        return self.codebook()[codes[:, 0]]

    def assign(self, rows):
        codebook = self.codebook()
        codes = nearest(rows.detach(), codebook.detach(), self.chunk)
        quantized = codebook[codes]
        loss = F.mse_loss(quantized, rows.detach()) + self.beta * F.mse_loss(rows, quantized.detach())
        return pass_gradient(self.estimator, rows, quantized), codes.unsqueeze(1), loss
