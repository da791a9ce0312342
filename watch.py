"""The health of a run: means of its scalars, figures of the discriminators, trends of the loss and the gradient norm.

All figures are collected on the device, step by step, and read when a line is logged: in between, nothing here waits
for the GPU. They are part of a checkpoint, so a resumed run logs the same as an uninterrupted one.
This file works alone: torch only.
"""
import math
from typing import NamedTuple

import torch


class Meter:
    """Means of a step's scalars since the last log line, and the steps that were skipped, all on the device."""

    def __init__(self, names, device):
        self.names = names
        self.sums = torch.zeros(len(names), device=device)  # over the steps since the last line that were not skipped
        self.finite, self.skipped_in_a_row, self.skipped = (torch.zeros((), device=device) for _ in range(3))
        self.gradient_norm = torch.zeros((), device=device)  # the last step's

    def add(self, totals, gradient_norm, bad):
        """totals: a step's scalars, as in `names`; bad: 1.0 on the device if the step was skipped."""
        self.sums += torch.where(bad > 0, torch.zeros_like(totals), totals)
        self.finite += 1 - bad
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * bad
        self.skipped += bad
        self.gradient_norm = gradient_norm

    def read(self):
        """Returns a Reading, and starts new means. The host waits for the device here."""
        *sums, finite, in_a_row, skipped = self.state().tolist()
        self.sums.zero_()
        self.finite.zero_()
        means = {name: total / finite if finite else math.nan for name, total in zip(self.names, sums)}
        return Reading(means, int(in_a_row), int(skipped), self.gradient_norm.item())

    def state(self):
        """One tensor on the CPU: the sums, then the numbers of finite steps, of steps skipped in a row, and of skipped
        steps in all."""
        return torch.cat([self.sums, torch.stack([self.finite, self.skipped_in_a_row, self.skipped])]).cpu()

    def load_state(self, state):
        """Load what `state` returned. A state of other scalars is ignored."""
        if len(state) == len(self.names) + 3:
            self.sums.copy_(state[:-3])
            for own, given in zip((self.finite, self.skipped_in_a_row, self.skipped), state[-3:]):
                own.copy_(given)


class Reading(NamedTuple):
    means: dict            # over the steps since the last line that were not skipped; NaN if there were none
    skipped_in_a_row: int  # number of steps skipped in a row up to now
    skipped: int           # number of steps skipped in all
    gradient_norm: float   # of the last step


class Figures:
    """Means of the figures that the discriminators report, since the last log line.

    names: {prefix: (names of the figures)}. The figures are already means over the ranks, so the same on each.
    """

    def __init__(self, names, device):
        self.names = names
        self.scores = {prefix: torch.tensor([name.startswith("score") for name in all_names], device=device)
                       for prefix, all_names in names.items()}
        # sums: for each figure its sum, and the number of steps in it. skipped: number of steps skipped in all.
        self.sums = {prefix: torch.zeros(2, len(all_names), device=device) for prefix, all_names in names.items()}
        self.skipped = {prefix: torch.zeros((), device=device) for prefix in names}

    @torch.no_grad()
    def add(self, prefix, values, skipped, learned=True):
        """Add a step. values: {name: scalar on the device}; skipped: number of steps that the discriminator has skipped
        in all, a scalar on the device; learned: whether it has learned in this step. The step does not count if it was
        skipped, or if nothing was learned. A score of exactly 0 does not count: the step drew no sample for it."""
        counts = (skipped == self.skipped[prefix]).float() * learned
        self.skipped[prefix] = skipped.detach().clone()
        found = torch.stack([values[name].detach().float() for name in self.names[prefix]])
        counts = counts * (~self.scores[prefix] | (found != 0))
        self.sums[prefix] += torch.stack([torch.where(counts > 0, found, 0.0), counts])

    def read(self):
        """{"gan_score_real": mean since the last call, ..., "gan_skipped_steps": number in all}. Figures without a
        value since the last call are left out."""
        result = {}
        for prefix, all_names in self.names.items():
            sums, counts = self.sums[prefix].tolist()
            result.update({f"{prefix}_{name}": s / n for name, s, n in zip(all_names, sums, counts) if n})
            result[f"{prefix}_skipped_steps"] = self.skipped[prefix].item()
            self.sums[prefix].zero_()
        return result

    def state(self):
        return {"sums": self.sums, "skipped": self.skipped}

    def load_state(self, state):
        for own, given in ((self.sums, state.get("sums", {})), (self.skipped, state.get("skipped", {}))):
            for prefix in own:
                if prefix in given and given[prefix].shape == own[prefix].shape:
                    own[prefix].copy_(given[prefix])


def describe_figures(figures):
    """The figures as the end of a log line: ", gan: loss 0.912, real 0.31, fake -0.27, weight 1.4"."""
    line = ""
    for prefix in ("gan", "seraena"):
        shown = [f"{word} {figures[f'{prefix}_{name}']:.3g}" for word, name in
                 (("loss", "discriminator_loss"), ("real", "score_real"), ("fake", "score_fake"),
                  ("weight", "adaptive_weight"), ("skipped", "skipped_steps")) if figures.get(f"{prefix}_{name}")]
        line += f", {prefix}: {', '.join(shown)}" * bool(shown)
    return line


def describe_trend(trend):
    """A part of a log line, after the gradient norm: " ± 31 %, loss trend -2.4 %"; "" if there is no trend yet."""
    if not trend:
        return ""
    return f" ± {100 * trend['gradient_norm_deviation']:.0f} %, loss trend {100 * trend['loss_trend']:+.1f} %"


class Sound(NamedTuple):
    """The newest sound checkpoint, see Trend."""
    step: int = None  # None: there is none
    loss: float = math.inf  # the mean loss then


class Trend:
    """Watches the loss and the gradient norm over the last `window` steps, and warns if either goes wrong.

    The loss goes wrong if its mean over the later half of the window is above that of the earlier half by more than a
    quarter, and by more than four standard errors of the difference, so not by chance. The gradient norm goes wrong if
    its standard deviation is more than twice its mean and it does not fall. (At the start of a run it falls from a high
    value, which is normal.) There is no warning before `least` steps, and each warning comes once per window at most.

    A checkpoint is sound if it was saved before the loss went wrong; `judge` decides that. loss: a description of the
    loss. The steps in a checkpoint with another description are ignored, since the two losses cannot be compared.
    """

    RISE, CHANCE, DEVIATION = 1.25, 4.0, 2.0
    # A checkpoint's loss is the mean over its last RECENT steps. Fewer than ENOUGH steps are not judged.
    RECENT, ENOUGH = 20, 10
    # {n: factor}: the loss goes wrong if its mean over n steps exceeds a sound checkpoint's loss by this factor.
    LEAPS = {RECENT: 2.0, 1: 4.0}

    def __init__(self, device, window=1000, least=200, loss=""):
        self.window, self.least, self.loss = window, least, loss
        # A ring buffer, 3 x window: loss, gradient norm, and 1 for a finite step. Step n is in column n % window.
        self.kept = torch.zeros(3, window, device=device)
        self.warned = {"loss": -window, "gradient norm": -window}  # the step of the last warning
        self.sound = Sound()

    def add(self, step, loss, norm, bad):
        """Add step `step`, counted from 0. loss, norm, bad: scalars on the device; bad: 1.0 for a skipped step, which
        is left out."""
        values = torch.stack([loss, norm, torch.ones_like(loss)]).to(self.kept)
        self.kept[:, step % self.window] = torch.where(bad > 0, 0.0, values)

    def read(self, step):
        """After `step` steps: ({"loss_trend": 0.1 if the later half's mean is 10 % above the earlier half's,
        "gradient_norm_deviation": standard deviation over mean}, [warnings]). The dict is empty before eight steps."""
        loss, norm, finite = self.steps(step)
        loss, norm = loss[finite], norm[finite]
        if len(loss) < 8:
            return {}, []
        (before, after), (norm_before, norm_after) = (x.tensor_split(2) for x in (loss, norm))
        deviation = norm.std() / norm.mean().clamp(min=1e-30)
        wrong = {"loss": self.rises(loss),
                 "gradient norm": deviation > self.DEVIATION and norm_after.mean() >= norm_before.mean()}
        texts = {"loss": f"the loss rises: mean {after.mean():.4g} over the last {len(after)} steps, "
                         f"{before.mean():.4g} over the {len(before)} before",
                 "gradient norm": f"the gradient norm is unsteady: mean {norm.mean():.3g}, deviation {norm.std():.3g} "
                                  f"over the last {len(norm)} steps"}
        warnings = []
        for name in wrong:
            if wrong[name] and len(loss) >= self.least and step - self.warned[name] >= self.window:
                self.warned[name] = step
                warnings.append(f"warning: {texts[name]}; the run may be going wrong: look at the curves, and try a "
                                "lower lr")
        return {"loss_trend": ((after.mean() - before.mean()) / before.mean().abs().clamp(min=1e-30)).item(),
                "gradient_norm_deviation": deviation.item()}, warnings

    def steps(self, step):
        """(losses, gradient norms, whether they are finite) of the last `window` steps before step `step`."""
        order = torch.arange(max(0, step - self.window), step) % self.window
        loss, norm, finite = self.kept.cpu().double()[:, order]
        return loss, norm, finite > 0

    def rises(self, loss):
        """Whether the later half of the losses is above the earlier half, by RISE and by more than chance explains."""
        before, after = loss.tensor_split(2)
        standard_error = (before.var() / len(before) + after.var() / len(after)).sqrt()
        rise = after.mean() - before.mean()
        return bool(rise > (self.RISE - 1) * before.mean().abs() and rise > self.CHANCE * standard_error)

    def has_risen(self, step):
        """Whether the loss has gone wrong after `step` steps: it rises, or is far above that of the newest sound
        checkpoint. Skipped steps are left out. False if fewer than ENOUGH steps remain."""
        loss, _, finite = self.steps(step)
        loss = loss[finite]
        if len(loss) < self.ENOUGH:
            return False
        return self.rises(loss) or any(loss[-count:].mean() > leap * self.sound.loss
                                       for count, leap in self.LEAPS.items())

    def judge(self, step):
        """The value of `sound` once a checkpoint after `step` steps is saved: that checkpoint, if the last step was not
        skipped and the loss has not gone wrong; else `sound` stays as it is."""
        loss, _, finite = self.steps(step)
        if not finite[-1:].any() or self.has_risen(step):
            return self.sound
        return Sound(step, loss[finite][-self.RECENT:].mean().item() if finite.sum() >= self.ENOUGH else math.inf)

    def state(self):
        return {"kept": self.kept, "warned": self.warned, "sound": tuple(self.sound), "loss": self.loss}

    def load_state(self, state):
        """Load what `state` returned. A state with another window or another loss, or none, is ignored."""
        if "kept" in state and state["kept"].shape == self.kept.shape and state.get("loss") == self.loss:
            self.kept.copy_(state["kept"])
            self.warned = {name: int(state["warned"][name]) for name in self.warned}
            step, loss = state["sound"]
            self.sound = Sound(step if step is None else int(step), float(loss))


def describe_step(values):
    """The objective's scalars as a part of a log line: "loss 0.04310, psnr 21.90 dB"."""
    parts = [f"loss {values['loss']:.5f}"]
    if "squared_error" in values:
        parts.append(f"psnr {-10 * math.log10(max(values['squared_error'], 1e-10)):.2f} dB")
    terms = [name for name in values if name.endswith("_loss")]
    parts += [f"{name.removesuffix('_loss')} {values[name]:.4f}" for name in terms if len(terms) > 1]
    if "codebook_use" in values:
        parts.append(f"codes used {100 * values['codebook_use']:.1f} %")
    return ", ".join(parts)
