"""OptVQ: codes by optimal transport between a batch and the codebook. See quantize.py."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from quantize_base import (
    CHUNK, StartingQuantizer, blocks, check_arguments, nearest, straight_through, true_float32, world_size,
)


class SinkhornQuantizer(StartingQuantizer):
    """OptVQ (Zhang et al. 2024, github.com/zbr17/OptVQ): codes by optimal transport between a batch and the codebook.

    QUANTIZERS calls it "optvq", after the paper. ResidualQuantizer's kind "sinkhorn" is the same class, after the
    algorithm (Sinkhorn's iterations) that solves the transport.

    state_dict: `embedding.weight` (n_embed, dim / num_head), `proj.weight`, `proj.bias`. A vector is cut into num_head
    pieces, all coded with the same (projected) codebook. normalize_mode: how distances become costs: "all" (zero mean,
    unit deviation), "dim" (over sqrt(dim)), "null". use_prob: sample codes from the transport plan instead of taking
        its largest entries.
    eval_nearest: as published, a piece's code depends on its batch, in inference too. True takes the nearest code in
        eval mode, so that codes do not depend on the rest of the batch (as for a stream, or another batch size).
    across_ranks: in training, the marginals are those of all ranks' batches together. This communicates inside forward:
        if a rank fails before it, the others wait until the process group's timeout. A loop that redoes failed steps
        gives `defer` a function that is called before each reduction and raises if a rank has failed. False balances
        each rank's batch by itself, without communication.
    loss_q_type: what pulls pieces and codes together: "l2" or "l1" distance to the code taken, the codes' part times
        beta; or "ce": the cross-entropy of the code taken among all, with minus the distances (not squared) as logits.
    kmeans_init: see StartingQuantizer. The projection then starts as the identity, so that the centres are the codes.
    What differs: the plan and the logits are never stored (distances are recomputed in blocks); the costs' mean and
    deviation are also those of all ranks, whose batches may differ in size; the published k-means takes other features,
    those of one class at a time, and leaves the random projection in front of its centres.
    """

    def __init__(self, n_embed, dim, beta=0.25, num_head=1, epsilon=10.0, n_iters=5, normalize_mode="all",
                 use_prob=False, use_proj=True, loss_q_type="l2", across_ranks=True, eval_nearest=False,
                 kmeans_init=False, seed=0, chunk=CHUNK, deferred=False):
        check_arguments(SinkhornQuantizer, locals())
        if dim % num_head:
            raise ValueError(f"dim {dim} cannot be cut into num_head {num_head} equal pieces")
        if normalize_mode not in ("all", "dim", "null") or loss_q_type not in ("l2", "l1", "ce"):
            raise ValueError(f"normalize_mode {normalize_mode!r} must be all, dim or null, and "
                             f"loss_q_type {loss_q_type!r} l2, l1 or ce")
        super().__init__(dim, n_embed, num_head, kmeans_init, seed, chunk, deferred)
        self.beta, self.epsilon, self.n_iters, self.normalize_mode = beta, epsilon, n_iters, normalize_mode
        self.use_prob, self.loss_q_type = use_prob, loss_q_type
        self.across_ranks, self.eval_nearest = across_ranks, eval_nearest
        self.embedding = nn.Embedding(n_embed, self.code_dim)
        self.proj = nn.Linear(self.code_dim, self.code_dim) if use_proj else nn.Identity()
        if use_proj:
            nn.init.normal_(self.proj.weight, std=self.code_dim ** -0.5)

    def vectors(self, codes):
        return self.proj(self.embedding.weight)[codes].flatten(1)

    def assign(self, rows):
        pieces = rows.reshape(-1, self.code_dim)
        if self.training and not self.deferred and self.waits_for_start():
            self.start(pieces.detach())
        codebook = self.proj(self.embedding.weight).float()
        codes = self.search(pieces.detach(), codebook.detach())
        quantized = codebook[codes]
        if self.loss_q_type == "ce":
            loss = self.cross_entropy(pieces, codebook, codes)
        else:
            distance = F.mse_loss if self.loss_q_type == "l2" else F.l1_loss
            loss = distance(pieces, quantized.detach()) + self.beta * distance(quantized, pieces.detach())
        return straight_through(rows, quantized.view_as(rows)), codes.view(-1, self.codes_per_position), loss

    def cross_entropy(self, pieces, codebook, codes):
        """Mean cross-entropy of the codes (m,) among all codes, a scalar. The backward pass recomputes the blocks."""
        def block(pieces, codes):
            with true_float32(pieces.device.type):  # the backward pass runs this outside forward's true_float32
                return F.cross_entropy(-torch.cdist(pieces, codebook), codes, reduction="sum")

        size = max(1, self.chunk // self.num_codes)
        parts = zip(pieces.split(size), codes.split(size))
        return sum(checkpoint(block, *part, use_reentrant=False) for part in parts) / len(pieces)

    @torch.no_grad()
    def set_codebook(self, centres):
        self.embedding.weight.copy_(centres)
        if isinstance(self.proj, nn.Linear):
            nn.init.eye_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    @torch.no_grad()
    def search(self, pieces, codebook):
        """(m, dim / num_head), (n_embed, dim / num_head) -> codes (m,)."""
        if self.eval_nearest and not self.training:
            return nearest(pieces, codebook, self.chunk)
        plan = self.plan(pieces, codebook)
        # Samples bit for bit like torch.multinomial, which would make the host wait for the GPU's check of the numbers.
        return torch.cat([(p / torch.empty_like(p).exponential_() if self.use_prob else p).argmax(1) for p in plan])

    def plan(self, pieces, codebook):
        """Yields the transport plan in blocks of rows, which are not normalised. Each block overwrites the one before.

        Sinkhorn's iterations (Cuturi 2013) in log space: the plan is exp(u[code] + v[piece] - scale * distance), so
        only the two vectors are stored. The guards of 1e-8 are the published ones, and affect the result: they limit
        the pull of pieces and codes that are far from all others.
        """
        scale, low, count = self.cost_scale(pieces, codebook)
        u = (scale * low).expand(self.num_codes)  # the largest entry of the first plan is 1
        v = pieces.new_zeros(len(pieces))
        for i in range(self.n_iters):
            code_mass = pieces.new_zeros(self.num_codes)
            for part, block, top in self.kernel(pieces, codebook, u, scale):
                if i > 0:
                    total = (block.sum(1).log() + top + v[part]).exp()
                    v[part] -= ((total + 1e-8) * count).log()
                code_mass += (top + v[part]).exp() @ block
            code_mass = self.reduce(code_mass)
            if i == 0:  # the first plan is normalised as a whole
                v -= code_mass.sum().log()
                code_mass = code_mass / code_mass.sum()
            u = u - ((code_mass + 1e-8) * self.num_codes).log()
        for _, block, _ in self.kernel(pieces, codebook, u, scale):
            yield block

    def kernel(self, pieces, codebook, u, scale):
        """Yields (slice of the pieces, exp(u - scale * distance - top), top (rows,)); `top` makes each row's largest
        entry 1."""
        for part, block in self.distances(pieces, codebook):
            top = block.mul_(-scale).add_(u).amax(1)
            yield part, block.sub_(top.unsqueeze(1)).exp_(), top

    def distances(self, pieces, codebook):
        norms, flipped = codebook.square().sum(1), codebook.t()
        for part, buffer in blocks(pieces, self.num_codes, self.chunk):
            torch.addmm(norms, pieces[part], flipped, alpha=-2, out=buffer)
            yield part, buffer.add_(pieces[part].square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()

    def cost_scale(self, pieces, codebook):
        """(factor from a distance to epsilon * cost, smallest distance, number of pieces), 0-d tensors."""
        moments, low = 0, []
        for _, block in self.distances(pieces, codebook):
            low.append(block.min())
            mean = block.mean()
            squares = torch.linalg.vector_norm(block.sub_(mean)).double().square()  # torch.var is ten times slower
            total = mean.double() * block.numel()
            moments = moments + torch.stack([torch.full_like(total, block.numel()), total, squares + total * mean])
        low = self.reduce(torch.stack(low).min(), "MIN")
        entries, total, squares = self.reduce(moments)
        deviation = {"all": ((squares - total.square() / entries) / (entries - 1)).sqrt() + 1e-6,
                     "dim": self.code_dim ** 0.5, "null": 1.0}[self.normalize_mode]
        scale = low.new_ones(()) * (self.epsilon / deviation)  # filled on the device: a copy from the host would wait
        return scale.to(low), low, (entries / self.num_codes).to(low)

    def reduce(self, tensor, op="SUM"):
        if self.training and self.across_ranks and world_size() > 1:
            if self.before_reduce:
                self.before_reduce()
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
        return tensor
