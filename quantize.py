"""Vector quantizers: VQ, EMA, Sinkhorn (OptVQ), residual, FSQ. This file works alone: it needs only torch.

    quantizer = EMAQuantizer(1024, 256, kmeans_init=True, restart_below=1.0)
    quantized, info = quantizer(z)                         # z: N C H W or N C T H W; the same shape comes back
    quantized = quantizer.codes_to_vectors(info["codes"])  # bit for bit the same (in eval mode: no update in between)

`info` has always the same keys:
    vq_loss     scalar, float32, to be added to the training loss (zero for FSQ)
    codes       list of `codes_per_position` int64 tensors N H W or N T H W, each in [0, num_codes)
    perplexity  scalar: exp of the entropy of the codes in this batch, mean over the list
    usage       scalar: share of the codebook that this batch used, mean over the codebooks
Distances and statistics are float32, inside autocast too, and multiplied as such, whatever the process allows (TF32, or
bfloat16 on a CPU: see true_float32); `quantized` has the dtype of z. Codebooks stay float32 where a model is cast to
bfloat16 or float16. Nothing of size positions x codes is ever held: such work is done in blocks of `chunk` numbers (the
default, 64 MB).

Several ranks. By default a training forward sums its statistics (codebook averages, perplexity, usage) over all ranks
before it returns. With deferred=True, or after `defer`, a forward only collects them, without any communication, and
the loop decides:

    for q in quantizers(model): q.begin()        # forget what was collected; also to redo or to skip a step
    ... forward and backward of all micro-batches ...
    for q in quantizers(model): q.update()       # on all ranks: sum, learn; returns the step's perplexity and usage

so a rank that fails inside its forward leaves no other rank waiting in a reduction (the one that is left,
SinkhornQuantizer's, can ask first: `defer`). Several micro-batches then count as one batch. Eval mode never
communicates or learns, so ranks may evaluate different numbers of batches.
"""
import contextlib
import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 24  # numbers in one block of distances
# The names for precision that PyTorch 2.9 brought. Once one of them was set, reading the older ones is an error.
NEW_NAMES = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@contextlib.contextmanager
def true_float32(kind):
    """Within it float32 is multiplied as float32: no TF32 on a GPU, no bfloat16 on a CPU, and no autocast.

    kind: a device's type, "cuda" say. TF32 keeps 10 of 23 bits: emulated, it changes 0.1 to 3 % of all codes, and SSIM
    by up to 0.03. What was set before is set again at the end. torch.compile bakes precision into its kernels: what
    needs this is to be kept out of it, by torch.compiler.disable. (quantize.py and metrics.py, which work alone, both
    have this function.)
    """
    backends, before = torch.backends, []
    if NEW_NAMES:
        for place in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv):
            if place.fp32_precision not in ("ieee", "none"):
                before.append((place, place.fp32_precision))
                place.fp32_precision = "ieee"
    else:
        products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        for place, precision in before:
            place.fp32_precision = precision
        if not NEW_NAMES:
            torch.set_float32_matmul_precision(products)
            backends.cudnn.allow_tf32 = convolutions


def stays_float32(function):
    """`function`, which moves or casts a tensor (as for Module._apply), without its casts to bfloat16 and float16."""
    def move(tensor):
        moved = function(tensor)
        low = moved.dtype in (torch.bfloat16, torch.float16) and tensor.dtype == torch.float32
        return tensor.to(moved.device) if low else moved
    return move


def blocks(rows, count, chunk):
    """Yields (slice of the rows, buffer of as many rows and `count` columns), with at most `chunk` numbers in it.

    It is the same memory each time: buffers made one by one fragment the heap (4 GB, measured with 16 MB each).
    """
    size = max(1, chunk // count)
    buffer = rows.new_empty(min(size, len(rows)), count)
    for start in range(0, len(rows), size):
        yield slice(start, start + size), buffer[:len(rows) - start]


@torch.no_grad()
def nearest(rows, codebook, chunk=CHUNK):
    """Index of the nearest code (Euclidean) for each row: (n, dim), (count, dim) -> (n,) int64."""
    half_norms, flipped = codebook.square().sum(1) / -2, codebook.t()
    with true_float32(rows.device.type):
        return torch.cat([torch.addmm(half_norms, rows[part], flipped, out=buffer).argmax(1)
                          for part, buffer in blocks(rows, len(codebook), chunk)])


@torch.no_grad()
def ema_update(cluster_size, embed_avg, counts, sums, decay, eps):
    """Exponential moving averages of a codebook (van den Oord et al. 2017, appendix A.1), in place.

    cluster_size (count,) and embed_avg (count, dim) take in a step's counts and sums (over all ranks). Returns the new
    codebook (count, dim): embed_avg over the Laplace-smoothed sizes. Views of tensors stored (dim, count) work too.
    """
    cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
    total = cluster_size.sum()
    smoothed = (cluster_size + eps) / (total + len(cluster_size) * eps) * total
    return embed_avg / smoothed.unsqueeze(1)


@torch.no_grad()
def kmeans(rows, count, iterations=10, generator=None, chunk=CHUNK):
    """`count` centres of the rows (n, dim), by Lloyd's iterations from random rows; a centre left empty is drawn anew.

    generator: a CPU generator; the result depends on it and on the rows alone.
    """
    first = torch.randperm(len(rows), generator=generator)[torch.arange(count) % len(rows)]
    centres = rows[first.to(rows.device)]
    for _ in range(iterations):
        codes = nearest(rows, centres, chunk)
        counts = rows.new_zeros(count, 1).index_add_(0, codes, rows.new_ones(len(rows), 1))
        means = torch.zeros_like(centres).index_add_(0, codes, rows) / counts.clamp(min=1)
        spare = rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
        centres = torch.where(counts > 0, means, spare)
    return centres


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor):
    """In place, and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows, share):
    """At most `share` rows of each rank, the same on all of them: ((world * share, dim), how many are there, a tensor).

    Neighbours come from different ranks. Empty places, and rows that are not finite, come last and do not count.
    """
    marked = rows.new_zeros(share, rows.shape[1] + 1)
    marked[:len(rows), :-1], marked[:len(rows), -1] = rows, rows.isfinite().all(1).float()
    everyone = [marked]
    if world_size() > 1:
        everyone = [torch.empty_like(marked) for _ in range(world_size())]
        dist.all_gather(everyone, marked)
    marked = torch.stack(everyone, 1).flatten(0, 1)
    marked = marked[marked[:, -1].argsort(descending=True, stable=True)]
    return marked[:, :-1], marked[:, -1].sum()


def check_arguments(cls, given):
    """ValueError for an argument of a constructor that is of another kind than its default: whole numbers are 1 or more
    (0 or more where the default is 0), other numbers finite and 0 or more, and tuples hold whole numbers from 0 on.
    What has no default is a whole number; what has None is not looked at. given: the constructor's locals()."""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        default, value = parameter.default, given.get(name)
        if name in ("self", "n_in") or parameter.kind == parameter.VAR_KEYWORD or default is None:
            continue
        least = 0 if default == 0 else 1
        kind = int if default is parameter.empty else type(default)
        fits, words = {
            bool: (isinstance(value, bool), "true or false is"), str: (isinstance(value, str), "a word is"),
            int: (type(value) is int and value >= least, f"a whole number from {least} on is"),
            float: (type(value) in (int, float) and 0 <= value < math.inf, "a number from 0 on is"),
            tuple: (isinstance(value, (tuple, list)) and all(type(v) is int and v >= 0 for v in value),
                    "whole numbers like 1,2,4 are")}[kind]
        if not fits:
            raise ValueError(f"{name}={value!r}: {words} wanted")


def straight_through(rows, quantized):
    """The value of `quantized`, exactly, with the gradient going to `rows` unchanged."""
    return quantized.detach() + (rows - rows.detach())  # the bracket is 0; without it, rounding would change bits


class Quantizer(nn.Module):
    """Layout, statistics over batches and ranks, begin/update. A quantizer adds assign(rows) and vectors(codes).

    Not for use inside activation checkpointing: a forward that runs twice would be counted twice.
    """

    def __init__(self, dim, num_codes, codes_per_position=1, deferred=False):
        super().__init__()
        self.dim, self.num_codes, self.codes_per_position = dim, num_codes, codes_per_position
        self.deferred, self.before_reduce = deferred, None  # see `defer`
        # Registered before its memory is touched: what builds a stranger's model looks at sizes there.
        self.register_buffer("counts", torch.empty(codes_per_position, num_codes), persistent=False)
        self.counts.zero_()

    def forward(self, z):
        """z: N C H W or N C T H W with C = dim. Returns (quantized, info): see the top of this file."""
        if z.ndim not in (4, 5) or z.shape[1] != self.dim:
            raise ValueError(f"expected N {self.dim} H W or N {self.dim} T H W, got {tuple(z.shape)}")
        last = z.movedim(1, -1)
        with true_float32(z.device.type):
            quantized, info = self.quantize_rows(last.reshape(-1, self.dim).float())
        info["codes"] = [codes.view(last.shape[:-1]) for codes in info["codes"]]
        return quantized.to(z.dtype).view(last.shape).movedim(-1, 1), info

    def codes_to_vectors(self, codes):
        """The list of codes that forward gave -> what it quantized to, N C H W or N C T H W.

        The codes must be below num_codes; that is not checked here, where a GPU would have to wait for it.
        """
        shapes = [tuple(c.shape) for c in codes]
        if len(codes) != self.codes_per_position or len(set(shapes)) > 1 or len(shapes[0]) not in (3, 4):
            raise ValueError(f"expected {self.codes_per_position} tensors, all N H W or all N T H W, got {shapes}")
        with true_float32(codes[0].device.type):
            rows = self.vectors(torch.stack([c.reshape(-1) for c in codes], 1).long())
        return rows.view(*shapes[0], self.dim).movedim(-1, 1)

    def _apply(self, fn, recurse=True):
        return super()._apply(stays_float32(fn), recurse)  # or a model in bfloat16 would find other codes

    def quantize_rows(self, rows):
        """(n, dim) float32 -> (quantized (n, dim), info with codes (n,))."""
        quantized, codes, loss = self.assign(rows)  # codes: (n, codes_per_position)
        counts = torch.zeros_like(self.counts, dtype=torch.float32)
        counts.scatter_add_(1, codes.t(), counts.new_ones(()).expand(codes.t().shape))
        statistics = self.statistics(counts)
        if self.training:
            self.counts += counts
            self.observe(rows.detach(), codes)
            if not self.deferred:
                statistics = {key: value for key, value in self.update().items() if key in statistics}
        return quantized, {"vq_loss": loss, "codes": list(codes.unbind(1)), **statistics}

    def statistics(self, counts):
        """counts (codes_per_position, num_codes) -> {"perplexity", "usage"}."""
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return {"perplexity": torch.special.entr(shares).sum(1).exp().mean(), "usage": counts.any(0).float().mean()}

    def observe(self, rows, codes):
        """Collect from a training batch what `learn` needs besides the counts."""

    def learn(self, counts):
        """Learn from a step; counts (codes_per_position, num_codes) are those of all ranks."""

    def defer(self, before_reduce=None):
        """From now on learn in `update`, not in forward. before_reduce: called before each reduction that is left in a
        forward; it raises where another rank has failed."""
        self.deferred, self.before_reduce = True, before_reduce

    def begin(self):
        """Forget what was collected since the last update: before a step, and where one is redone or skipped."""
        self.counts.zero_()

    @torch.no_grad()
    def update(self):
        """Once per step, on all ranks: learn from what was collected on all of them, and forget it.

        Returns the step's {"perplexity", "usage", "counts" (codes_per_position, num_codes)}, of all ranks. In eval mode
        (a frozen quantizer) nothing is learned.
        """
        if self.training:
            self.learn(sum_over_ranks(self.counts))
        statistics = {**self.statistics(self.counts), "counts": self.counts.clone()}
        self.begin()
        return statistics


def quantizers(model):
    """The model's quantizers, each once; those that are parts of another (a residual's) are left to that one."""
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    parts = {id(part) for m in found for part in m.modules() if part is not m}
    return [m for m in found if id(m) not in parts]


class StartingQuantizer(Quantizer):
    """One codebook of code_dim numbers a code that can start from its first batch.

    kmeans_init: the first training batch (of all ranks, at most 8 vectors per code) sets the codebook; with deferred,
        in the first update(), so that the first step runs on the random one. A loaded codebook counts as started. It
        adds a small entry to the state_dict, where the published layout has no place for it.
    A kind of quantizer adds set_codebook(centres).
    """

    def __init__(self, dim, num_codes, codes_per_position, kmeans_init, seed, chunk, deferred):
        super().__init__(dim, num_codes, codes_per_position, deferred)
        self.code_dim = dim // codes_per_position
        self.kmeans_init, self.is_started, self.fresh, self.seed, self.chunk = kmeans_init, False, [], seed, chunk
        if kmeans_init:
            self.register_buffer("started", torch.tensor(False))

    def waits_for_start(self):
        """The flag is in the state_dict, and also in Python, so that no later step has to ask the GPU."""
        if self.kmeans_init and not self.is_started:
            self.is_started = bool(self.started)
        return self.kmeans_init and not self.is_started

    def draw(self, rows, generator=None):
        """At most this rank's share of the vectors that a start or a restart needs, at random."""
        per_code = 8 if self.waits_for_start() else 1
        share = math.ceil(per_code * self.num_codes / world_size())
        order = torch.randperm(len(rows), generator=generator)[:share]
        return rows[order.to(rows.device, non_blocking=True)], share

    def observe(self, rows, codes):
        if self.waits_for_start():
            self.fresh.append(self.draw(rows.reshape(-1, self.code_dim))[0])

    def collected(self):
        return torch.cat([self.counts.new_zeros(0, self.code_dim, dtype=torch.float32), *self.fresh])  # perhaps none

    @torch.no_grad()
    def start(self, rows):
        generator = torch.Generator().manual_seed(self.seed)
        rows, found = gather_rows(*self.draw(rows, generator))
        if not found:
            return
        centres = kmeans(rows[:int(found)], self.num_codes, generator=generator, chunk=self.chunk)
        if world_size() > 1:  # the last bits of sums on a GPU vary
            dist.broadcast(centres, src=0)
        self.started.fill_(True)
        self.set_codebook(centres)

    def learn(self, counts):
        if self.waits_for_start():
            self.start(self.collected())

    def begin(self):
        super().begin()
        self.fresh = []

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name, default in {"started": torch.tensor(True), "usage_count": self._buffers.get("usage_count")}.items():
            if name in self._buffers:  # weights saved without the option
                state_dict.setdefault(prefix + name, default)
        self.is_started = False  # ask the loaded flag
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TableQuantizer(StartingQuantizer):
    """Nearest neighbour in one table, with its options; VQ and EMA differ in how the table learns.

    kmeans_init: see StartingQuantizer.
    restart_below: after each update, a code with a lower average count per step (the mean of all codes is vectors per
        step / n_embed; a fifth of that works) becomes a random vector of the step, the same on all ranks. Its count
        and sums are set along with it, to twice the threshold: else the next average would bring the old vector back.
        Without any use it then lives log(2) / (1 - decay) steps. Vectors are drawn with PyTorch's CPU generator,
        which a checkpoint holds. It adds a small entry to the state_dict, as kmeans_init does.
    """

    def __init__(self, n_embed, dim, beta=0.25, decay=0.99, kmeans_init=False, restart_below=0.0, seed=0, chunk=CHUNK,
                 deferred=False):
        check_arguments(TableQuantizer, locals())
        super().__init__(dim, n_embed, 1, kmeans_init, seed, chunk, deferred)
        self.beta, self.decay, self.restart_below = beta, decay, restart_below
        self.start_size = 2.0 * restart_below or 1.0

    def tables(self):
        """(weight (count, dim), average counts (count,) or None, average sums (count, dim) or None), to write into."""
        raise NotImplementedError

    def vectors(self, codes):
        return F.embedding(codes[:, 0], self.tables()[0])

    def search(self, rows):
        """(n, dim) -> codes (n, 1), after the k-means start where that is due."""
        if self.training and not self.deferred and self.waits_for_start():
            self.start(rows.detach())
        return nearest(rows.detach(), self.tables()[0].detach().float(), self.chunk).unsqueeze(1)

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
            self.place(dead & (turn < found), rows[turn.clamp(0, len(rows) - 1)])

    def set_codebook(self, centres):
        self.place(self.started.expand(self.num_codes), centres)

    def place(self, chosen, vectors):
        """Where `chosen` (count,) is true, set the code to its vector in (count, dim), with all that goes with it."""
        weight, sizes, sums = self.tables()
        weight.copy_(torch.where(chosen.unsqueeze(1), vectors, weight))
        if sizes is not None:
            sizes.masked_fill_(chosen, self.start_size)
        if sums is not None:
            sums.copy_(torch.where(chosen.unsqueeze(1), vectors * self.start_size, sums))


class VectorQuantizer(TableQuantizer):
    """A codebook learned by gradient: taming-transformers' VectorQuantizer2, state_dict `embedding.weight`.

    The loss is |sg(z) - e|^2 + beta |z - sg(e)|^2 (means). With legacy=True, taming's default, beta stands at the first
    term, the codebook's, instead of the second, the commitment. **options: see TableQuantizer; with restart_below, a
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
        return straight_through(rows, quantized), codes, loss

    def average(self, counts):
        if self.restart_below > 0:
            self.usage_count.mul_(self.decay).add_(counts, alpha=1 - self.decay)


class EMAQuantizer(TableQuantizer):
    """A codebook of moving averages: taming-transformers' EMAVectorQuantizer. Only the commitment has a gradient.

    state_dict: `embedding.weight`, `embedding.cluster_size`, `embedding.embed_avg`: buffers, so no optimizer sees them.
    What differs: fresh cluster sizes are not 0, with which a code not used at once flies off by 1 / eps. A model with
    other names or (dim, count) tables overrides `make_tables` and `tables`. **options: see TableQuantizer.
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
        return straight_through(rows, quantized), codes, self.beta * F.mse_loss(rows, quantized)

    def observe(self, rows, codes):
        super().observe(rows, codes)
        self.sums.index_add_(0, codes[:, 0], rows)

    def average(self, counts):
        weight, sizes, sums = self.tables()
        weight.copy_(ema_update(sizes, sums, counts, sum_over_ranks(self.sums), self.decay, self.eps))

    def begin(self):
        super().begin()
        self.sums.zero_()


class SinkhornQuantizer(StartingQuantizer):
    """OptVQ (Zhang et al. 2024, github.com/zbr17/OptVQ): codes by optimal transport between a batch and the codebook.

    It is "optvq" in QUANTIZERS and "sinkhorn" as the kind of a ResidualQuantizer: one thing, after the paper and after
    the algorithm (Sinkhorn's iterations) that solves the transport.

    state_dict: `embedding.weight` (n_embed, dim / num_head), `proj.weight`, `proj.bias`. A vector is cut into num_head
    pieces, all coded with the same (projected) codebook. normalize_mode: how distances become costs: "all" (zero mean,
    unit deviation), "dim" (over sqrt(dim)), "null". use_prob: draw codes from the plan, not its largest entries.
    eval_nearest: a piece's code depends on its batch, as published also in inference. True takes the nearest code in
        eval mode, so that codes do not depend on what else is encoded (a stream, another batch size).
    across_ranks: in training, the marginals are those of all ranks' batches together. This communicates inside forward:
        where a rank fails before it, the others wait until the process group's timeout. A loop that redoes failed steps
        gives `defer` a function that is called before each reduction and raises if a rank has failed; or wants
        False, which balances each rank's batch by itself.
    loss_q_type: what pulls pieces and codes together: "l2" or "l1" distance to the code taken, the codes' part times
        beta; or "ce": the cross-entropy of the code taken among all, with minus the distances (not squared) for logits.
    kmeans_init: see StartingQuantizer. The projection then starts as the identity, so that the centres are the codes.
    What differs: the plan and the logits are never stored (distances are computed again in blocks); the costs' mean and
    deviation are those of all ranks too, whose batches may be unequal; the published k-means takes other features, a
    class's at a time, and leaves the random projection in front of its centres.
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
        """Of the codes (m,) among all, in blocks that the backward pass computes again; a scalar."""
        def block(pieces, codes):
            with true_float32(pieces.device.type):  # the backward pass, which comes here again, is outside of it
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
        # As torch.multinomial draws, to the bit, which would have the host wait for a GPU to say that all is finite.
        return torch.cat([(p / torch.empty_like(p).exponential_() if self.use_prob else p).argmax(1) for p in plan])

    def plan(self, pieces, codebook):
        """Yields the transport plan in blocks, whose rows are not normalised; each takes the place of the one before.

        Sinkhorn's iterations (Cuturi 2013) in log space: the plan is exp(u[code] + v[piece] - scale * distance), so two
        vectors are all that is kept. The guards of 1e-8 are the published ones, and shape the result: they limit the
        pull of what is far from everything.
        """
        scale, low, count = self.cost_scale(pieces, codebook)
        u = (scale * low).expand(self.num_codes)  # the largest entry of the first plan is 1
        v = pieces.new_zeros(len(pieces))
        for i in range(self.n_iters):
            share = pieces.new_zeros(self.num_codes)
            for part, block, top in self.kernel(pieces, codebook, u, scale):
                if i > 0:
                    total = (block.sum(1).log() + top + v[part]).exp()
                    v[part] -= ((total + 1e-8) * count).log()
                share += (top + v[part]).exp() @ block
            share = self.reduce(share)
            if i == 0:  # the first plan is normalised as a whole
                v -= share.sum().log()
                share = share / share.sum()
            u = u - ((share + 1e-8) * self.num_codes).log()
        for _, block, _ in self.kernel(pieces, codebook, u, scale):
            yield block

    def kernel(self, pieces, codebook, u, scale):
        """Yields (slice of the pieces, exp(u - scale * distance - top), top (rows,)): each row's largest entry is 1."""
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
        scale = low.new_ones(()) * (self.epsilon / deviation)  # a fill: a number from the host would be waited for
        return scale.to(low), low, (entries / self.num_codes).to(low)

    def reduce(self, tensor, op="SUM"):
        if self.training and self.across_ranks and world_size() > 1:
            if self.before_reduce:
                self.before_reduce()
            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
        return tensor


class ResidualQuantizer(Quantizer):
    """RQ-VAE (Lee et al. 2022): each of `depth` quantizers codes what the ones before it left over.

    kind: "vq", "ema" or "sinkhorn", with its own **options. shared: one codebook for all depths (update() then counts
    them together). The loss is the mean over the depths, whose commitment terms pull z towards every partial sum, as
    published. With deferred, k-means starts take one step per depth: what a depth is left with means nothing before
    those above it have started.
    """

    def __init__(self, depth, n_embed, dim, shared=False, kind="vq", deferred=False, **options):
        check_arguments(ResidualQuantizer, locals())
        kinds = {"vq": VectorQuantizer, "ema": EMAQuantizer, "sinkhorn": SinkhornQuantizer}
        if kind not in kinds or options.get("num_head", 1) != 1:
            raise ValueError(f"kind {kind!r} must be one of {', '.join(kinds)}, with num_head 1")
        super().__init__(dim, n_embed, depth, deferred)
        self.layers = nn.ModuleList(kinds[kind](n_embed, dim, deferred=deferred, **options)
                                    for _ in range(1 if shared else depth))

    def depths(self):
        return [self.layers[i % len(self.layers)] for i in range(self.codes_per_position)]

    def vectors(self, codes):
        return sum(layer.vectors(codes[:, i:i + 1]).float() for i, layer in enumerate(self.depths()))

    def quantize_rows(self, rows):
        left, total, infos = rows, 0, []
        for layer in self.depths():
            quantized, info = layer.quantize_rows(left)
            left, total = left - quantized.detach(), total + quantized.detach()
            infos.append(info)
        mean = {key: torch.stack([info[key] for info in infos]).mean() for key in ("vq_loss", "perplexity", "usage")}
        return straight_through(rows, total), {**mean, "codes": [code for info in infos for code in info["codes"]]}

    def defer(self, before_reduce=None):
        super().defer(before_reduce)
        for layer in self.layers:
            layer.defer(before_reduce)

    def begin(self):
        for layer in self.layers:
            layer.begin()

    def update(self):
        statistics, starting = [], False
        for layer in self.layers:
            if starting:
                layer.begin()
                continue
            starting = layer.waits_for_start()
            statistics.append(layer.update())
        counts = [s.pop("counts") for s in statistics]
        counts += [torch.zeros_like(counts[0])] * (len(self.layers) - len(counts))
        return {"counts": torch.cat(counts),
                **{key: torch.stack([s[key] for s in statistics]).mean() for key in statistics[0]}}


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al. 2023): each of len(levels) bounded channels is rounded to its levels.

    Nothing to learn, and no loss. levels: 3 or more each. dim: channels of z; where it is not len(levels), `proj_in`
    and `proj_out` translate. A code is the mixed-radix number of the channels' levels, the first channel counting ones;
    vectors are in [-1, 1]. The gradient goes straight through the rounding, but not through the bounding tanh.
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

    def project(self, layer, rows):
        """In float32 also where the layer was loaded in another type."""
        return rows if isinstance(layer, nn.Identity) else F.linear(rows, layer.weight.float(), layer.bias.float())

    def vectors(self, codes):
        half = self.levels // 2
        return self.project(self.proj_out, (codes // self.radix % self.levels - half) / half)

    def assign(self, rows):
        reach = (self.levels - 1) * (1 + 1e-3) / 2  # a little past the outermost level, or it could not be reached
        offset = (self.levels % 2 == 0) * 0.5  # an even number of levels has no middle one
        bounded = torch.tanh(self.project(self.proj_in, rows) + torch.atanh(offset / reach)) * reach - offset
        levels = bounded.round().detach()
        quantized = straight_through(bounded, levels) / (self.levels // 2)
        codes = ((levels.long() + self.levels // 2) * self.radix).sum(1, keepdim=True)
        return self.project(self.proj_out, quantized), codes, rows.new_zeros(())


# ---- what the tokenizers share -----------------------------------------------------------------------------------


QUANTIZERS = {"vq": VectorQuantizer, "ema": EMAQuantizer, "optvq": SinkhornQuantizer, "rvq": ResidualQuantizer,
              "fsq": FSQ}


def make_quantizer(kind, dim, n_embed, beta, options):
    """A quantizer by its short name. ValueError for an unknown name, or options that do not fit."""
    if kind not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {kind!r}; there are {', '.join(QUANTIZERS)}")
    book = {} if kind == "fsq" else {"n_embed": n_embed, "beta": beta}
    try:
        return QUANTIZERS[kind](dim=dim, **book, **options)
    except TypeError as error:  # an option that it does not have, or that is missing
        raise ValueError(f"quantizer {kind!r}: {error}") from None


class TokenizerStream:
    """Encodes and decodes clips piece by piece, however the pieces are cut. For a model in eval mode.

        stream = model.stream()
        for frames in pieces:                                  # N t 3 H W, any t
            show(stream.decode(stream.encode(frames)))         # or stream.detokenize(stream.tokenize(frames))
        show(stream.flush())

    Work is done on fixed groups of frames, counted from the clip's start, so the result does not depend on the cutting.
    A call returns what is complete so far, possibly 0 frames; with last=True, what it takes ends the clip. A group is
    one latent, or as many as keep the activations under about `memory_limit` bytes (larger groups keep a GPU busy).
    """

    def __init__(self, model, memory_limit=None):
        self.model, self.memory_limit = model, memory_limit
        self._held = {}  # name of a call: what it has taken of an incomplete group

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
