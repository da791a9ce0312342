"""Seraena: an adversarial corrector. Its targets, "the output, a little more real", are trained towards with plain L2.

    seraena = Seraena(c_im=9, c_ctx=16, seed=0).to(device)   # groups of 3 RGB frames, latents of 16 channels
    for step in range(steps):
        seraena.begin()                                      # again, if the step has to be done again
        for video, latents, fraction in micro_batches:       # the fractions of a step add up to 1
            with autocast:
                output = model.decode(latents)
                corrected = seraena.targets(video, output, latents, fraction)
            loss = (output - video).abs().mean() + 0.05 * (output.float() - corrected).square().mean()
            (loss * fraction).backward()
        figures = seraena.step()                             # all ranks together; the model's own step beside it

A patch discriminator learns to tell groups of frames from their reconstructions, given the latents. The correction is
the direction that brings its scores of the reconstruction to those of the original. Method, state_dict names and
results are those of github.com/madebyollin/seraena (seraena.py), whose own call, `step_and_make_correction_targets`,
is here too. What differs: the replayed samples have a byte budget, and training can be saved and resumed exactly. Given
`gradients=Gradients` (of ranks.py), it works on several ranks, and a step that is not finite or is done again leaves no
trace.

This file works alone: torch only. Only `begin` (once) and `step` talk to the other ranks. `targets`, which may run out
of memory on one rank alone, never waits for another. Only saving waits for the GPU.
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def group_frames(video, n):
    """N T C H W -> (N ceil(T / n)) (n C) H W: each n consecutive frames, from the clip's start on, as one image.

    The clip's last frame fills up its last group. T may be any number from 1 on.
    """
    missing = -video.shape[1] % n
    if missing:
        video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    return video.unflatten(1, (-1, n)).flatten(0, 1).flatten(1, 2)


def ungroup_frames(images, frames, n):
    """The inverse of group_frames for clips of `frames` frames: (N groups) (n C) H W -> N T C H W, without padding."""
    groups = math.ceil(frames / n)
    return images.unflatten(0, (-1, groups)).unflatten(2, (n, -1)).flatten(1, 2)[:, :frames]


class PatchDiscriminator(nn.Module):
    """Scores patches of images at six depths: N c_im H W in [0, 1], context N c_ctx h w -> N 6 H/8 W/8.

    The context (latents, of any size) is resized to the images' size (nearest). Fakes should score 1, originals
    -1. Names and shapes are those of PatchDiscWithContext in the published seraena.py. ValueError for other numbers of
    channels, or fewer than 16x16 pixels.
    """

    def __init__(self, c_im, c_ctx):
        super().__init__()
        self.c_im, self.c_ctx = c_im, c_ctx
        widths, strides = (c_im + c_ctx, 64, 128, 256, 512, 512, 512), (1, 2, 2, 2, 1, 1)
        self.blocks = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(n_in, n_out, 4 if stride == 2 else 3, stride, 1, bias=False),
                          nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))
            for n_in, n_out, stride in zip(widths, widths[1:], strides)))
        self.proj = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths[1:])

    def forward(self, images, context):
        height, width = images.shape[-2:]
        if images.shape[1] != self.c_im or context.shape[1] != self.c_ctx or min(height, width) < 16:
            raise ValueError(f"images {tuple(images.shape)} and context {tuple(context.shape)} should have c_im="
                             f"{self.c_im} and c_ctx={self.c_ctx} channels, and 16x16 pixels or more")
        x = torch.cat([images * 2 - 1, F.interpolate(context, (height, width))], 1)
        scores = []
        for block, proj in zip(self.blocks, self.proj):
            x = block(x)
            scores.append(F.adaptive_avg_pool2d(proj(x), (height // 8, width // 8)))
        return torch.cat(scores, 1)


class ReplayBuffer:
    """Samples of past steps, as rows of one tensor of at most `limit` bytes, which is allocated once and kept.

    The shapes that occur get equal parts of it. In a full part, new rows replace random ones, as published: old samples
    grow rare but some stay, so the discriminator remembers faults that the model had long ago. (Replacing the oldest
    would forget all of these at once.) `bytes` is the memory taken, `counts` the number of rows for each shape.
    """

    def __init__(self, limit, dtype=torch.bfloat16):
        self.limit, self.dtype = limit, dtype
        self.memory, self.parts, self.counts = None, {}, {}

    @property
    def bytes(self):
        return 0 if self.memory is None else self.memory.numel() * self.dtype.itemsize

    def reserve(self, shapes, device):
        """Make room for samples of these shapes, ((c_im, H, W), ..., (c_ctx, h, w)) each, besides the known ones.

        A new shape divides the memory anew, and empties it. ValueError if a part cannot hold a single sample.
        """
        shapes = list(dict.fromkeys([*self.parts, *shapes]))
        if len(shapes) == len(self.parts):
            return
        part = self.limit // self.dtype.itemsize // len(shapes)  # size of a part, in numbers
        lengths = [sum(math.prod(s) for s in shape) for shape in shapes]
        if max(lengths) > part:
            channels, height, width = shapes[lengths.index(max(lengths))][0]
            size = max(lengths) * self.dtype.itemsize
            raise ValueError(f"replay_bytes={self.limit} cannot hold one sample of each of {len(shapes)} shapes: one "
                             f"of {channels} channels of {height}x{width} with what belongs to it takes {size} bytes, "
                             f"so give {size * len(shapes)} bytes at least, better room for hundreds")
        if self.memory is None:
            self.memory = torch.empty(self.limit // self.dtype.itemsize, dtype=self.dtype, device=device)
        self.counts = dict.fromkeys(shapes, 0)
        self.parts = {shape: self.memory[i * part:(i + 1) * part][:part // length * length].view(-1, length)
                      for i, (shape, length) in enumerate(zip(shapes, lengths))}

    def add(self, shape, rows, generator):
        """rows: (n, length), of the buffer's dtype. Which rows they replace is drawn from `generator` (CPU)."""
        part, count = self.parts[shape], self.counts[shape]
        rows = rows[:len(part)]
        free = min(len(rows), len(part) - count)
        slots = list(range(count, count + free))
        if free < len(rows):
            slots += torch.randperm(count, generator=generator)[:len(rows) - free].tolist()  # no slot twice
        for slot, row in zip(slots, rows):
            part[slot].copy_(row)
        self.counts[shape] = count + free

    def draw(self, shape, n, generator):
        """n random rows of this shape, float32: [(image c_im H W, ..., context c_ctx h w), ...]."""
        if n == 0:
            return []
        slots = torch.randint(self.counts[shape], (n,), generator=generator).tolist()
        rows = torch.stack([self.parts[shape][slot] for slot in slots]).float()
        return list(zip(*(x.unflatten(1, s) for x, s in zip(rows.split([math.prod(s) for s in shape], 1), shape))))

    def state(self):
        """[{"shape", "rows"}] on the CPU. Waits for the GPU."""
        return [{"shape": shape, "rows": part[:self.counts[shape]].to("cpu", copy=True)}
                for shape, part in self.parts.items()]

    def load(self, state, device):
        """Load what `state` gave: the reserved shapes, or all if none is reserved. If there are more rows than room,
        the first ones. ValueError for rows that do not fit their shape."""
        samples = [(saved["shape"], saved["rows"]) for saved in state]
        for shape, rows in samples:
            if rows.shape[1:] != (sum(map(math.prod, shape)),):
                raise ValueError(f"its rows of {tuple(rows.shape[1:])} numbers are no samples of {shape}")
        if not self.parts:
            self.reserve([shape for shape, _ in samples], device)
        self.counts = dict.fromkeys(self.parts, 0)
        for shape, rows in samples:
            if (part := self.parts.get(shape)) is not None:
                count = self.counts[shape] = min(len(rows), len(part))
                part[:count].copy_(rows[:count])


class Seraena(nn.Module):
    """The discriminator with everything that trains it. See the top of this file for the loop.

    c_im: channels of one image that the discriminator sees; 3 n for groups of n RGB frames. c_ctx: channels of the
    latents. lr, betas: of AdamW. replay_bytes: most memory for replayed samples on each rank. The first step allocates
    all of it on the module's device. replay_dtype: dtype in which the samples are stored.
    seed: seeds the initial weights and, together with the rank, everything random. PyTorch's global generators are not
    touched. Create a Seraena after init_process_group.

    Each sample that the discriminator learns from is an original with probability 1/2, else a fresh or a replayed fake
    with equal probability. (Published: fresh ones are the first half of the batch. With a clip's groups in a row, those
    would be the starts of clips.) Replayed samples come from earlier steps.

    pairs: not published. Each fake, fresh or replayed with equal probability, comes with its own original, so the
    discriminator learns from twice as many samples. What a picture shows is then no hint, so in small batches the
    discriminator learns where it otherwise does not (docs/results.md, "Adversarial stages"). Originals are stored with
    the fakes, so replay_bytes hold about half as many samples.

    gradients: ranks.Gradients, or a class with the same calls. It averages gradients and BatchNorm's running statistics
    over the ranks, so the discriminator stays bit for bit equal on all ranks, and all ranks skip a step that is not
    finite on one of them. None: a single process, which skips no step, as published; ValueError on several ranks. In
    training mode BatchNorm normalises by the micro-batch.
    """

    def __init__(self, c_im, c_ctx, lr=3e-4, betas=(0.9, 0.99), replay_bytes=512 << 20, replay_dtype=torch.bfloat16,
                 seed=0, gradients=None, pairs=False):
        super().__init__()
        if gradients is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("on several ranks Seraena needs gradients=Gradients, the class in ranks.py")
        self.c_im, self.c_ctx, self.pairs = c_im, c_ctx, pairs
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.disc = PatchDiscriminator(c_im, c_ctx)
        self.optimizer = torch.optim.AdamW(self.disc.parameters(), lr=lr, betas=betas, fused=True)
        self.replay = ReplayBuffer(replay_bytes, replay_dtype)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.generator = torch.Generator().manual_seed((seed * 65536 + rank) % 2 ** 63)
        self.make_gradients, self.gradients = gradients, None

    def reserve(self, *sizes):
        """Optional, before training: divide the replay memory among all sizes (H, W, h, w) of frames and latents that
        will occur. Without this call, each new size divides the memory anew, and empties it.

        ValueError if the budget is too small for one sample of each size; without this call, `targets` raises it.
        """
        self.replay.reserve([((self.c_im, *size[:2]),) * (1 + self.pairs) + ((self.c_ctx, *size[2:]),)
                             for size in sizes], self.device())

    def prepare(self):
        """With `gradients`, copy rank 0's discriminator to all ranks. All ranks call it together, before the first step
        and after loading."""
        if self.make_gradients:
            self.gradients = self.make_gradients(self.disc.parameters(), 5, self.disc.buffers())

    def device(self):
        return self.disc.proj[0].weight.device

    # ---- one step: begin, targets for each micro-batch, step -------------------------------------------------------

    @torch.no_grad()
    def begin(self):
        """Start a step, or start it again: undoes what `targets` did since, except that random numbers stay consumed
        (and that without `gradients`, BatchNorm keeps what it saw).

        All ranks call it. The first time, and after loading, it calls `prepare` if nobody has.
        """
        self.pending = []
        if not self.make_gradients:
            self.optimizer.zero_grad()
            self.sums = torch.zeros(5, device=self.device())
            return
        if self.gradients is None:
            self.prepare()
        self.gradients.begin()
        self.sums = self.gradients.totals

    def targets(self, real, fake, latents, fraction=1.0):
        """fake + correction, N T C H W, float32, detached; also adds up the discriminator's gradient.

        real, fake: N T C H W in [0, 1] (fake may exceed it), T from 1; C divides c_im. latents: N T' c_ctx h w, any T',
        h and w; every group of frames (group_frames) of a clip gets the mean over all its latents as context, as in the
        published notebook. fraction: this micro-batch's fraction of the step. Call it within autocast to run the
        convolutions in bf16; scores, loss and correction are float32 either way. ValueError for shapes that do not fit.

        The correction comes from the discriminator before this step's update (published: after it). The update waits
        for all ranks, and a rank must not wait before it has got through its own backward passes. eps is the published
        one at 64x64 pixels, the frame size of the published notebook.
        """
        if real.ndim != 5 or real.shape != fake.shape or self.c_im % real.shape[2]:
            raise ValueError(f"real {tuple(real.shape)} and fake {tuple(fake.shape)} should have one shape, N T C H W, "
                             f"with a C that divides c_im={self.c_im}")
        if latents.ndim != 5 or len(latents) != len(real):
            raise ValueError(f"latents {tuple(latents.shape)}: N T' C h w with N={len(real)} is needed")
        frames, n = real.shape[1], self.c_im // real.shape[2]
        real, fake = (group_frames(video.detach().float(), n) for video in (real, fake))
        context = latents.detach().float().mean(1, keepdim=True)
        context = context.expand(-1, math.ceil(frames / n), -1, -1, -1).flatten(0, 1)
        # A pixel's gradient is inversely proportional to the number of pixels. With eps scaled like it, the correction
        # is equally strong at all sizes.
        eps = 1e-5 * 64 ** 2 / math.prod(real.shape[-2:])
        corrected = fake + self.correction(real, fake, context, eps)
        self.learn(real, fake, context, fraction)
        return ungroup_frames(corrected, frames, n)

    @torch.no_grad()
    def step(self, limit=0.0):
        """End the step; all ranks call it. limit: if above 0, the gradient's norm is clipped to it.

        With `gradients`, no rank's discriminator changes if a gradient, score or statistic is not finite on any rank.
        The step's fakes, clamped to a sane range, go to the replay buffer either way. Returns scalars on the device,
        means over the ranks: "disc_loss" (1 for a discriminator that knows nothing, 0 for one that is certain),
        "score_real" and "score_fake" (0 if none was drawn), and "skipped", 1 if the step was not finite (the others may
        then not be finite either).
        """
        if self.gradients:
            _, bad = self.gradients.step(self.optimizer, limit)
        else:
            if limit > 0:
                torch.nn.utils.clip_grad_norm_(self.disc.parameters(), limit)
            self.optimizer.step()
            bad = self.sums.new_zeros(())
        for shape, rows in self.pending:
            self.replay.add(shape, rows, self.generator)
        self.pending = []
        loss, real, fake, reals, fakes = self.sums.clone()
        return {"disc_loss": loss, "score_real": real / reals.clamp(min=1e-6),
                "score_fake": fake / fakes.clamp(min=1e-6), "skipped": bad}

    def step_and_make_correction_targets(self, real, fake, ctx):
        """The published call, a whole step at once: real, fake N c_im H W in [0, 1], ctx N c_ctx h w ->
        (fake + correction, debug).

        The discriminator is updated first. All ranks must call it together: a loop that has to survive running out of
        memory on one rank uses begin, targets and step. debug: tensors on the device, "disc_loss" and the
        discriminator's inputs, outputs and targets, "disc_in", "disc_in_ctx", "disc_pred", "disc_targets".
        """
        real, fake, ctx = (x.detach().float() for x in (real, fake, ctx))
        self.begin()
        debug = self.learn(real, fake, ctx, 1.0)
        self.step()
        return fake + self.correction(real, fake, ctx), debug

    # ---- its parts -------------------------------------------------------------------------------------------------

    def scores(self, images, context):
        """The discriminator's scores, float32, within the caller's autocast but without its cache of bf16 weights. A
        copy that is cached without gradient recording has no gradient later (PyTorch issue 112583), and is stale after
        the optimizer's step."""
        kind = images.device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            return self.disc(images, context).float()

    def correction(self, real, fake, context, eps=1e-5):
        """What to add to `fake` to bring its scores to those of `real`: minus the gradient of the scores' squared
        distance, divided by (that gradient's deviation over the batch + eps). real, fake: N c_im H W; context: N c_ctx
        h w, float32. Returns N c_im H W.

        eps matters: it is about as large as the deviation, so corrections grow as the discriminator learns.
        """
        self.disc.eval()
        with torch.no_grad():
            wanted = self.scores(real, context)
        with torch.enable_grad():
            fake = fake.detach().requires_grad_()
            distance = (self.scores(fake, context) - wanted).square().mean((1, 2, 3)).sum()
            gradient, = torch.autograd.grad(distance, fake)
        return -gradient / (gradient.std(correction=0) + eps)

    def learn(self, real, fake, context, fraction):
        """Adds up the gradient of the discriminator's loss * fraction. Keeps the fakes (with `pairs` the originals too)
        until `step` puts them into the replay buffer."""
        # In range and without NaN: a bad step must not come back as a replayed sample.
        kept = [(fake, (-1, 2)), *([(real, (-1, 2))] if self.pairs else []), (context, (-1e3, 1e3))]
        shape = tuple(tuple(x.shape[1:]) for x, _ in kept)
        self.replay.reserve([shape], fake.device)
        rows = torch.cat([x.nan_to_num().clamp(*limits).flatten(1) for x, limits in kept], 1)
        self.pending.append((shape, rows.to(self.replay.dtype)))
        fakes, originals = (self.choose_pairs if self.pairs else self.choose)(shape, real, fake, context)
        images, contexts = (torch.stack(x) for x in zip(*fakes, *originals))
        n = len(fakes)
        wanted = images.new_ones(len(images), 1, 1, 1)
        wanted[n:].fill_(-1)
        self.disc.train()
        with torch.enable_grad():
            scores = self.scores(images, contexts)
            loss = (scores - wanted).square().mean()
            (loss * fraction).backward(inputs=list(self.disc.parameters()))
        scores, loss = scores.detach(), loss.detach()
        each = scores.mean((1, 2, 3))
        self.sums[:3] += torch.stack([loss * fraction, each[n:].sum(), each[:n].sum()])
        self.sums[3] += len(originals)
        self.sums[4] += n
        return {"disc_loss": loss, "disc_in": images, "disc_in_ctx": contexts, "disc_pred": scores,
                "disc_targets": wanted.expand(scores.shape)}

    # Random numbers are drawn and samples chosen on the host. On the device, the choice would be a mask, and samples
    # would be fetched that nobody uses.

    def choose(self, shape, real, fake, context):
        """The samples to learn from, as published: ([(fake, context), ...], [(original, context), ...])."""
        chance = torch.rand(len(real), generator=self.generator).tolist()
        fresh = [i for i, x in enumerate(chance) if x < (0.25 if self.replay.counts[shape] else 0.5)]
        kept = [i for i, x in enumerate(chance) if x >= 0.5]
        replayed = self.replay.draw(shape, len(chance) - len(fresh) - len(kept), self.generator)
        return [*((fake[i], context[i]) for i in fresh), *replayed], [(real[i], context[i]) for i in kept]

    def choose_pairs(self, shape, real, fake, context):
        """The same, each fake with its original."""
        chance = torch.rand(len(real), generator=self.generator).tolist()
        fresh = [i for i, x in enumerate(chance) if x < 0.5 or not self.replay.counts[shape]]
        replayed = self.replay.draw(shape, len(real) - len(fresh), self.generator)
        triples = [*((fake[i], real[i], context[i]) for i in fresh), *replayed]
        return [(one, its) for one, _, its in triples], [(one, its) for _, one, its in triples]

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def training_state(self):
        """Discriminator and optimizer, the same on all ranks, in a dict that torch.load(weights_only=True) reads."""
        return {"seraena": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_training_state(self, state):
        """Load what training_state gave, but keep the current learning rate and betas. ValueError for the state of
        another discriminator."""
        own, given = self.state_dict(), state["seraena"]
        different = [k for k in own.keys() | given.keys() if k not in own or k not in given
                     or own[k].shape != given[k].shape]
        if different:
            raise ValueError(f"the state is of another discriminator ({min(different)} differs): keep its c_im (frames "
                             "in a group) and c_ctx, or start without it")
        self.load_state_dict(given)
        settings = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0].update(settings)
        self.gradients = None

    def rank_state(self, with_replay=True):
        """This rank's own state between two steps: its generator and, with_replay, its replayed samples (up to
        replay_bytes, on the CPU). Without these a resumed run is not exact: the buffer fills anew."""
        return {"generator": self.generator.get_state(), "replay": self.replay.state() if with_replay else None}

    def load_rank_state(self, state):
        """Load what rank_state gave. Call it after moving the module to its device. Samples of sizes that are not
        reserved, or from a run with another `pairs`, are left out. ValueError for anything else; the replay buffer is
        then empty."""
        try:
            self.generator.set_state(state["generator"].cpu())
            if state["replay"] is not None:
                self.replay.load([x for x in state["replay"] if len(x["shape"]) == 2 + self.pairs], self.device())
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            self.replay.counts = dict.fromkeys(self.replay.parts, 0)
            raise ValueError(f"it holds no state of a rank ({type(error).__name__}: {error})") from None
