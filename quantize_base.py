"""What all vector quantizers have in common: nearest-neighbour search, statistics over batches and ranks, k-means
starts, the gradient through a code. See quantize.py.

This file works alone: it needs only torch.
"""
import contextlib
import inspect
import math

import torch
import torch.distributed as dist
from torch import nn

CHUNK = 1 << 24  # numbers in one block of distances
# Whether PyTorch has the precision settings that version 2.9 brought. Once one of them is set, reading an older setting
# is an error.
NEW_NAMES = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@contextlib.contextmanager
def true_float32(kind):
    """Within it float32 is multiplied as float32: no TF32 on a GPU, no bfloat16 on a CPU, and no autocast.

    kind: a device's type, "cuda" say. TF32 keeps 10 of 23 bits: emulated, it changes 0.1 to 3 % of all codes, and SSIM
    by up to 0.03. What was set before is set again at the end. torch.compile bakes precision into its kernels: what
    needs this is to be kept out of it, by torch.compiler.disable. (quantize_base.py and metrics.py, which work alone,
    both have this function.)
    """
    backends, before = torch.backends, []
    if NEW_NAMES:
        for backend in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv):
            if backend.fp32_precision not in ("ieee", "none"):
                before.append((backend, backend.fp32_precision))
                backend.fp32_precision = "ieee"
    else:
        products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision
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
    """Yields (slice of the rows, buffer with as many rows and `count` columns) of at most `chunk` numbers each.

    All buffers are the same memory: making new ones fragments the heap (by 4 GB, measured with 16 MB each).
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
    """Sums a tensor over all ranks in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(sums, count, before_reduce=None):
    """The mean over all ranks' rows, (k,). sums (k,): this rank's, over `count` rows. Gradients that are averaged over
    the ranks are those of this mean. Communicates inside forward: see `Quantizer.defer` for before_reduce."""
    mean = sums / count
    if world_size() == 1:
        return mean
    # Allocate before before_reduce, which tells the other ranks if this one ran out of memory.
    everyone = torch.cat([sums.detach(), sums.new_full((1,), count)])
    if before_reduce:
        before_reduce()
    dist.all_reduce(everyone)
    return everyone[:-1] / everyone[-1] + (mean - mean.detach())


def gather_rows(rows, per_rank):
    """At most `per_rank` rows of each rank, on all ranks: ((world * per_rank, dim), a tensor with the number of rows).

    The ranks' rows alternate. Unused rows, and rows that are not finite, come last and are not counted.
    """
    marked = rows.new_zeros(per_rank, rows.shape[1] + 1)
    marked[:len(rows), :-1], marked[:len(rows), -1] = rows, rows.isfinite().all(1).float()
    everyone = [marked]
    if world_size() > 1:
        everyone = [torch.empty_like(marked) for _ in range(world_size())]
        dist.all_gather(everyone, marked)
    marked = torch.stack(everyone, 1).flatten(0, 1)
    marked = marked[marked[:, -1].argsort(descending=True, stable=True)]
    return marked[:, :-1], marked[:, -1].sum()


def check_arguments(cls, given):
    """ValueError for an argument of a constructor whose type differs from its default's. Whole numbers must be at least
    1 (or 0 if the default is 0), other numbers finite and at least 0, and tuples must hold whole numbers from 0 on. An
    argument without a default must be a whole number; one whose default is None is not checked. given: the
    constructor's locals()."""
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
                    "whole numbers like 1,2,4 (one alone: 16,) are")}[kind]
        if not fits:
            raise ValueError(f"{name}={value!r}: {words} wanted")


def straight_through(rows, quantized):
    """The value of `quantized`, exactly; the gradient goes to `rows` unchanged."""
    return quantized.detach() + (rows - rows.detach())  # the bracket is 0; without it, rounding would change bits


def rotated(rows, quantized):
    """The value of `quantized` (n, dim), exactly; the gradient goes to `rows` rotated and scaled: the rotation trick
    (Fifty et al. 2024, arXiv 2410.06424).

    R rotates a row to its code's direction, in the plane of the two, and s = |code| / |row|; both count as constants.
    So the gradient is s R^T g: its angle to the row equals the angle of g to the code. What differs: if the row or the
    code is shorter than 1e-6, it has no direction, and the gradient is g itself.
    """
    with torch.no_grad():
        length, target_length = (x.norm(dim=1, keepdim=True) for x in (rows, quantized))
        has_direction = (length > 1e-6) & (target_length > 1e-6)
        row, code = rows / length.clamp(min=1e-6), quantized / target_length.clamp(min=1e-6)
        middle = row + code
        middle = middle / middle.norm(dim=1, keepdim=True).clamp(min=1e-6)
        scale = target_length / length.clamp(min=1e-6)
    turned = scale * (rows - 2 * (rows * middle).sum(1, keepdim=True) * middle
                      + 2 * (rows * row).sum(1, keepdim=True) * code)
    return straight_through(torch.where(has_direction, turned, rows), quantized)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotated}


def check_estimator(name):
    """ValueError if `name` is no estimator of the gradient through a code (ESTIMATORS)."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator {name!r} must be one of {', '.join(ESTIMATORS)}")


def pass_gradient(estimator, rows, quantized):
    """The value of `quantized` (n, dim); the gradient goes to `rows` as `estimator` says."""
    return ESTIMATORS[estimator](rows, quantized)


class Quantizer(nn.Module):
    """Base class: tensor layout, statistics over batches and ranks, begin and update. A subclass adds assign(rows) and
    vectors(codes).

    nested: whether the first few of a position's codes alone decode to a coarser vector.
    Not for use inside activation checkpointing: a forward that runs twice would be counted twice.
    """

    nested = False

    def __init__(self, dim, num_codes, codes_per_position=1, deferred=False):
        super().__init__()
        self.dim, self.num_codes, self.codes_per_position = dim, num_codes, codes_per_position
        self.deferred, self.before_reduce = deferred, None  # see `defer`
        # Registered before its memory is touched: when models.py builds a model from an untrusted file, it checks the
        # size of each buffer at its registration.
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
        """The list of codes from forward (if nested, the first few will do) -> vectors, N C H W or N C T H W.

        The codes must be below num_codes. This is not checked, since the host would have to wait for the GPU.
        """
        shapes = [tuple(c.shape) for c in codes]
        most = self.codes_per_position
        fits = (1 if self.nested else most) <= len(codes) <= most
        if not fits or len(set(shapes)) > 1 or len(shapes[0]) not in (3, 4):
            raise ValueError(f"expected {'1 to ' * self.nested}{most} tensors, all N H W or all N T H W, got {shapes}")
        with true_float32(codes[0].device.type):
            rows = self.vectors(torch.stack([c.reshape(-1) for c in codes], 1).long())
        return rows.view(*shapes[0], self.dim).movedim(-1, 1)

    def _apply(self, fn, recurse=True):
        return super()._apply(stays_float32(fn), recurse)  # else a model in bfloat16 would give other codes

    def quantize_rows(self, rows):
        """(n, dim) float32 -> (quantized (n, dim), info; its codes are (n,) each)."""
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
        fractions = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return {"perplexity": torch.special.entr(fractions).sum(1).exp().mean(), "usage": counts.any(0).float().mean()}

    def observe(self, rows, codes):
        """Collect from a training batch what `learn` needs besides the counts."""

    def learn(self, counts):
        """Learn from a step; counts (codes_per_position, num_codes) are those of all ranks."""

    def defer(self, before_reduce=None):
        """From now on learn in `update`, not in forward. before_reduce: called before each reduction that still happens
        in a forward; it should raise if another rank has failed."""
        self.deferred, self.before_reduce = True, before_reduce

    def begin(self):
        """Forget what was collected since the last update. Call it before each step, also to redo or to skip one."""
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
    """The model's quantizers, each once, without those that are part of another (as of a ResidualQuantizer)."""
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    parts = {id(part) for m in found for part in m.modules() if part is not m}
    return [m for m in found if id(m) not in parts]


class StartingQuantizer(Quantizer):
    """A quantizer with one codebook, of code_dim numbers per code, that can start from its first batch, by k-means.

    kmeans_init: the first training batch (of all ranks, at most 8 vectors per code) sets the codebook; with deferred,
        in the first update(), so that the first step uses the random codebook. A loaded codebook counts as started.
        This adds a small entry to the state_dict, which the published layout does not have.
    A subclass adds set_codebook(centres).
    """

    def __init__(self, dim, num_codes, codes_per_position, kmeans_init, seed, chunk, deferred):
        super().__init__(dim, num_codes, codes_per_position, deferred)
        self.code_dim = dim // codes_per_position
        self.kmeans_init, self.is_started, self.fresh, self.seed, self.chunk = kmeans_init, False, [], seed, chunk
        if kmeans_init:
            self.register_buffer("started", torch.tensor(False))

    def waits_for_start(self):
        """Whether the k-means start is still to come. The flag is a buffer, for the state_dict, and also a Python
        attribute, so that later steps need not wait for the GPU."""
        if self.kmeans_init and not self.is_started:
            self.is_started = bool(self.started)
        return self.kmeans_init and not self.is_started

    def draw(self, rows, generator=None):
        """(random rows, how many one rank draws at most): this rank's part of what a start or a restart needs."""
        per_code = 8 if self.waits_for_start() else 1
        per_rank = math.ceil(per_code * self.num_codes / world_size())
        order = torch.randperm(len(rows), generator=generator)[:per_rank]
        return rows[order.to(rows.device, non_blocking=True)], per_rank

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
        if world_size() > 1:  # on GPUs the last bits of sums differ between ranks
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
            if name in self._buffers:  # the weights may come from a model without the option
                state_dict.setdefault(prefix + name, default)
            else:  # or from one with it
                state_dict.pop(prefix + name, None)
        self.is_started = False  # read the loaded flag again
        super()._load_from_state_dict(state_dict, prefix, *rest)
