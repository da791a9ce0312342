"""Adversarial training: a PatchGAN discriminator for frames or clips, its losses, its optimizer, all in one object.

    adversary = Adversary(dims=2, start=30000, ramp=1000, device=device)
    for step in range(steps):
        adversary.begin(step)                                    # again, if the step has to be done again
        for video, fraction in micro_batches:                    # the fractions of a step add up to 1
            output = model(video)
            loss = (output - video).abs().mean()
            with autocast:
                loss = loss + adversary.generator_term(video, output, loss, model.last.weight, fraction)
            (loss * fraction).backward()
        figures = adversary.step(limit=1.0)                      # all ranks together; the model's own step beside it

This file works alone: torch only. Only `begin` (once) and `step` talk to the other ranks: what may run out of memory on
one rank alone (`generator_term`) never waits for another. Nothing here waits for the GPU. Given `gradients=Gradients`
(of ranks.py), it works on several ranks, and a step that is not finite or is done again leaves no trace.
"""
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

LOSSES = ("hinge", "vanilla")
NORMS = ("batch", "group", "none")


class PatchGAN(nn.Module):
    """Scores overlapping patches of video N T C H W, RGB in [0, 1]: real ones above 0, fake ones below.

    dims=2: each frame by itself, scores (N T, 1, h, w), h = H / 2^n_layers - 2. Needs 3 * 2^n_layers pixels or more.
    Names and shapes are those of taming-transformers' NLayerDiscriminator (pix2pix: kernels of 4; with 3 layers, a
    patch has 70 pixels).
    dims=3: clips of any length, scores (N, 1, ceil(T / 4), h, w), h = ceil(H / 2^n_layers). Names and shapes are those
    of Open-Sora 2's NLayerDiscriminator3D (kernels of 3; the first two layers halve time; dropout draws from PyTorch's
    generator). An image is a clip of one frame. Every kernel is padded, so short and odd clips need no special case.

    n_layers: 0 takes the published 3 or 5. norm: "batch" as published, over this rank's batch; "group" (32 groups) or
    "none". dropout: for dims=3. Initial weights as published: normal, deviation 0.02. What differs: the published
    networks take [-1, 1]; this one scales its input to that. ValueError for frames too small to score.
    """

    def __init__(self, dims=2, channels=3, ndf=64, n_layers=0, norm="batch", dropout=0.3):
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"dims is {dims!r}: 2 scores frames, 3 scores clips")
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; there are {', '.join(NORMS)}")
        self.dims, self.norm = dims, norm
        self.n_layers = n_layers or (3 if dims == 2 else 5)
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        kernel = 4 if dims == 2 else 3
        widths = [ndf * min(2 ** n, 8) for n in range(self.n_layers + 1)]
        layers = [conv(channels, ndf, kernel, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for n in range(1, self.n_layers + 1):
            stride = 1 if n == self.n_layers else 2 if dims == 2 or n == 1 else (1, 2, 2)
            layers += [conv(widths[n - 1], widths[n], kernel, stride, 1, bias=norm == "none"),
                       self.norm_layer(widths[n]), nn.LeakyReLU(0.2, inplace=True)]
            if dims == 3:
                layers.append(nn.Dropout(dropout))
        self.main = nn.Sequential(*layers, conv(widths[-1], 1, kernel, 1, 1))
        for layer in self.main:
            if isinstance(layer, conv):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif norm == "batch" and hasattr(layer, "running_mean"):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def norm_layer(self, width):
        if self.norm == "batch":
            return (nn.BatchNorm2d if self.dims == 2 else nn.BatchNorm3d)(width)
        return nn.GroupNorm(math.gcd(32, width), width) if self.norm == "group" else nn.Identity()

    def forward(self, video):
        n, t, _, *size = video.shape
        least = 3 * 2 ** self.n_layers if self.dims == 2 else 1
        if min(size) < least:
            raise ValueError(f"the discriminator of {self.n_layers} layers needs frames of {least} pixels or more, "
                             f"got {size[0]}x{size[1]}: larger frames, or n_layers={self.n_layers - 1}")
        if self.dims == 3 and self.norm == "batch" and n * math.ceil(t / 4) == 1 and max(size) <= 2 ** self.n_layers:
            raise ValueError(f"one clip of {t} frames of {size[0]}x{size[1]} leaves BatchNorm a single value: larger "
                             "frames, longer clips, several clips in a batch, or norm='group'")
        video = video * 2 - 1
        return self.main(video.flatten(0, 1) if self.dims == 2 else video.transpose(1, 2))


def generator_loss(scores):
    """Minus the mean score of the fakes, a scalar; the same for "hinge" and "vanilla" (as in taming)."""
    return -scores.mean()


def discriminator_loss(kind, real, fake):
    """Mean over real and fake scores of relu(1 -+ score), "hinge", or of softplus(-+score), "vanilla"; a scalar."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ValueError(f"unknown adversarial loss {kind!r}; there are {', '.join(LOSSES)}")


def adaptive_weight(loss, fake, gradient, last_layer, most=1e4):
    """|d loss / d last_layer| / (|d generator loss / d last_layer| + 1e-4), at most `most` (VQGAN, Esser et al. 2021).

    `gradient`: of the generator loss with respect to `fake`. last_layer: the weight of the decoder's last layer, or any
    other tensor that both losses depend on (`fake` itself if backward cannot run twice through the model's graph, as
    with torch.compile). 0 if a gradient is not finite. Returns a detached scalar on the device.
    """
    towards, = torch.autograd.grad(loss, last_layer, retain_graph=True)
    against, = torch.autograd.grad(fake, last_layer, gradient.to(fake.dtype), retain_graph=True)
    towards, against = (torch.linalg.vector_norm(g.float()) for g in (towards, against))
    weight = (towards / (against + 1e-4)).clamp(0, most)
    return torch.where(towards.isfinite() & against.isfinite(), weight, 0.0)


class Adversary(nn.Module):
    """A discriminator with everything that trains it. See the top of this file for the loop.

    loss: "hinge" or "vanilla". The generator's term is generator_loss * weight * ramp * adaptive weight (1 if not
    `adaptive`). Before step `start` nothing runs at all. From then on the term grows to its full weight within `ramp`
    steps, and the discriminator learns in every `every`-th step. lecam: weight of the LeCam regulariser (Tseng et al.
    2021), which holds real scores near the running mean of fake scores, and fake scores near that of real ones; the
    means have decay `lecam_decay` and are debiased. max_weight: upper limit of the adaptive weight. lr, betas,
    weight_decay: of AdamW. channels, ndf, n_layers, norm, dropout: as in PatchGAN, which is `discriminator`; load
    published weights with `adversary.discriminator.load_state_dict(...)`.

    gradients: ranks.Gradients, or a class with the same calls. It averages gradients, BatchNorm's running statistics
    and scores over the ranks, so the discriminator stays bit for bit equal on all ranks, and all ranks skip a step that
    is not finite on one of them. None: a single process, which skips no step; ValueError on several ranks. Each
    micro-batch has an adaptive weight of its own, since a mean over the ranks would have to communicate in the middle
    of the backward pass. So two ranks match one rank with two micro-batches, not one with a batch twice as large. The
    same holds for BatchNorm, which normalises by the micro-batch.
    """

    FIGURES = ("discriminator_loss", "generator_loss", "score_real", "score_fake", "adaptive_weight")

    def __init__(self, dims=2, channels=3, ndf=64, n_layers=0, norm="batch", dropout=0.3, loss="hinge", weight=0.8,
                 start=0, ramp=0, every=1, adaptive=True, max_weight=1e4, lecam=0.0, lecam_decay=0.999, lr=1e-5,
                 betas=(0.5, 0.9), weight_decay=0.0, device="cpu", gradients=None):
        super().__init__()
        if gradients is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("on several ranks Adversary needs gradients=Gradients, the class in ranks.py")
        if loss not in LOSSES:
            raise ValueError(f"unknown adversarial loss {loss!r}; there are {', '.join(LOSSES)}")
        if every < 1:
            raise ValueError(f"every is {every}: the discriminator learns in every n-th step, n at least 1")
        self.loss, self.weight, self.start, self.ramp, self.every = loss, weight, start, ramp, every
        self.adaptive, self.max_weight, self.lecam, self.lecam_decay = adaptive, max_weight, lecam, lecam_decay
        self.discriminator = PatchGAN(dims, channels, ndf, n_layers, norm, dropout)
        self.register_buffer("lecam_means", torch.zeros(3))  # sums of real and fake scores, and of their weights
        self.register_buffer("figures", torch.zeros(len(self.FIGURES)))  # of the discriminator's last step
        self.register_buffer("skipped", torch.zeros(()))  # number of steps that were not finite
        self.to(device, memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=lr, betas=betas,
                                           weight_decay=weight_decay,
                                           fused=torch.device(device).type in ("cuda", "cpu"))
        self.now, self.make_gradients, self.gradients = -1, gradients, None

    def prepare(self):
        """With `gradients`, copy rank 0's discriminator to all ranks. All ranks call it together, before the first step
        and after loading; if nobody has, `begin` does so in the first step from `start` on."""
        if self.make_gradients:
            self.gradients = self.make_gradients(self.discriminator.parameters(), len(self.FIGURES),
                                                 self.discriminator.buffers())

    # ---- one step: begin, generator_term for each micro-batch, step ------------------------------------------------

    def active(self):
        """Whether the current step is `start` or later."""
        return self.now >= self.start

    def weighs(self):
        """Whether generator_term needs the gradient of the reconstruction loss in this step."""
        return self.active() and self.adaptive

    def learns(self):
        """Whether the discriminator learns in this step."""
        return self.active() and (self.now - self.start) % self.every == 0

    def begin(self, step):
        """Start step `step` (from 0), or start it again: forgets what generator_term has added up since (but without
        `gradients`, BatchNorm keeps what it saw)."""
        self.now = step
        if not self.active():
            return
        if not self.make_gradients:
            self.optimizer.zero_grad()
            self.totals = torch.zeros_like(self.figures)
            return
        if self.gradients is None:
            self.prepare()
        self.gradients.begin()
        self.totals = self.gradients.totals

    def generator_term(self, real, fake, reconstruction_loss=None, last_layer=None, fraction=1.0):
        """The weighted term to add to the loss, a scalar (0.0 before `start`); adds up the discriminator's gradient.

        real, fake: N T C H W in [0, 1], `fake` with its graph. reconstruction_loss, last_layer: as in adaptive_weight
        (ignored if not adaptive). fraction: this micro-batch's fraction of the step. If the term's gradient is not
        finite, the term is left out (weight 0): the model still learns to reconstruct, and `step` skips the
        discriminator's update. Call it within autocast to run the convolutions in bf16 (except for clips on a CPU, see
        `precision`); the losses are float32 either way. ValueError for shapes that differ or are too small, and for an
        adaptive weight without a last layer that is trained.
        """
        if not self.active():
            return 0.0
        if real.shape != fake.shape:
            raise ValueError(f"real {tuple(real.shape)} and fake {tuple(fake.shape)} differ in shape")
        if self.adaptive and (last_layer is None or not last_layer.requires_grad):
            raise ValueError("the adaptive weight needs a last layer that is trained; without one set adaptive=False")
        # With a leaf of their own, one pass over the fakes gives the gradients of both networks, and neither graph sees
        # the other. Published trainers pass the fakes twice, and run backward through the discriminator twice for the
        # weight: 0.55 s instead of 0.41 s (2D; 3D 0.58 and 0.44 s; TAEHV, 6 frames of 96 pixels, CPU time of one core).
        leaf = fake.detach().float().requires_grad_()
        with self.precision(fake.device.type):
            scores_fake = self.discriminator(leaf)
            scores_real = self.discriminator(real.detach().float()) if self.learns() else None
        with torch.autocast(fake.device.type, enabled=False):
            scores_fake = scores_fake.float()
            value = generator_loss(scores_fake)
            gradient, = torch.autograd.grad(value, leaf, retain_graph=self.learns())
            if self.adaptive:
                weight = adaptive_weight(reconstruction_loss, fake, gradient, last_layer, self.max_weight)
            else:
                weight = torch.ones_like(value)
            weight = torch.where(torch.linalg.vector_norm(gradient).isfinite(), weight, 0.0)
            if self.learns():
                self.learn(scores_real.float(), scores_fake, value.detach(), weight, fraction)
            factor = weight * (self.weight * min(1.0, (self.now - self.start + 1) / max(1, self.ramp)))
            value, gradient = (torch.where(weight > 0, x.detach() * factor, 0.0) for x in (value, gradient))
            term = (fake * gradient).sum()         # has the right gradient ...
            return term + (value - term).detach()  # ... and now the right value too

    def precision(self, kind):
        """A context: the caller's autocast, but none for clips on a CPU. There, PyTorch's (oneDNN's) bf16 3D
        convolutions are wrong on CPUs with AMX or AVX-512: the weights' gradient is stale memory, even NaN, for kernel
        rows that see only padding (clips of 1 and 2 frames; seen with torch 2.14 and 2.15), and so is a result one
        pixel wide after a stride (github.com/pytorch/pytorch/pull/188426)."""
        wrong = kind == "cpu" and self.discriminator.dims == 3
        return torch.autocast(kind, enabled=False) if wrong else contextlib.nullcontext()

    def learn(self, real, fake, value, weight, fraction):
        loss = discriminator_loss(self.loss, real, fake)
        if self.lecam:
            mean_real, mean_fake, seen = self.lecam_means
            mean_real, mean_fake = mean_real / seen.clamp(min=1e-6), mean_fake / seen.clamp(min=1e-6)
            apart = F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()
            loss = loss + self.lecam * torch.where(seen > 0, apart, 0.0)
        (loss * fraction).backward(inputs=list(self.discriminator.parameters()))
        figures = torch.stack([loss.detach(), value, real.detach().mean(), fake.detach().mean(), weight])
        self.totals += figures * fraction

    def step(self, limit=0.0):
        """End the step; all ranks call it. limit: if above 0, the gradient's norm is clipped to it.

        With `gradients`, no rank changes anything if a gradient, score or statistic is not finite on any rank. Returns
        scalars on the device: FIGURES, means over the ranks, of the last step in which the discriminator learned (zeros
        before the first), and "skipped", the number of skipped steps.
        """
        if self.learns():
            self.update(limit)
        elif self.active() and self.gradients:
            self.gradients.give_up()  # this rank's fakes alone must not move the statistics
        return {**dict(zip(self.FIGURES, self.figures.clone())), "skipped": self.skipped.clone()}

    @torch.no_grad()
    def update(self, limit):
        """The discriminator's optimizer step, all ranks together; nothing changes if a figure is not finite."""
        if self.gradients:
            _, bad = self.gradients.step(self.optimizer, limit)
        else:
            if limit > 0:
                torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), limit)
            self.optimizer.step()
            bad = torch.zeros_like(self.skipped)
        seen = torch.stack([self.totals[2], self.totals[3], torch.ones_like(bad)])
        lecam_means = self.lecam_means.lerp(seen, 1 - self.lecam_decay)
        self.lecam_means.copy_(torch.where(bad > 0, self.lecam_means, lecam_means))
        self.figures.copy_(torch.where(bad > 0, self.figures, self.totals))
        self.skipped += bad

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def training_state(self):
        """All that an exact resume needs, the same on all ranks; torch.load(weights_only=True) reads it.

        The tensors are not copies: save or copy them before the next step.
        """
        return {"adversary": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_training_state(self, state):
        """Load what training_state gave, but keep the optimizer's current settings (lr, betas, ...). ValueError for the
        state of another discriminator."""
        own, given = self.state_dict(), state["adversary"]
        different = [k for k in own.keys() | given.keys() if k not in own or k not in given
                     or own[k].shape != given[k].shape]
        if different:
            raise ValueError(f"the state is of another discriminator ({min(different)} differs): keep its dims, ndf, "
                             "n_layers and norm, or start without it")
        self.load_state_dict(given)
        settings = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0].update(settings)
        self.gradients = None
