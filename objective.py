"""The training objective: a weighted sum of loss terms.

Each term has a weight in config.py. A term whose weight is 0 is not computed, and an encoder or decoder that no term
needs is not run. To add a term that compares pixels, write its function in losses.py, add its weight to config.py, and
add a line to `pixel_terms`.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from adversary import Adversary
from check_config import ConfigError, parse_buckets, what_learns
from device import cores_per_rank
from evaluate import LATENT_FACTS
from losses import PerceptualLoss, pixel_loss, temporal_loss, wavelet_loss
from metrics import MEASURES
from quantize import Quantizer, quantizers
from ranks import Gradients, stay_together
from seraena import Seraena
from watch import Figures


def pixel_terms(cfg, device):
    """The terms that compare a reconstruction with its target: {name: (weight, make)}. make() returns a function of
    (output, target), both N T 3 H W, the target in [0, 1], which returns a scalar."""
    return {
        "reconstruction_loss": (cfg.pixel_weight, lambda: lambda *pair: pixel_loss(cfg.pixel_loss, *pair)),
        "temporal_loss": (cfg.temporal_weight, lambda: temporal_loss),
        "wavelet_loss": (cfg.wavelet_weight, lambda: lambda *pair: wavelet_loss(*pair, cfg.wavelet_levels)),
        "perceptual_loss": (cfg.perceptual_weight, lambda: make_perceptual(cfg, device)),
    }


class ModelOutputs(NamedTuple):
    """What a model computes from a micro-batch; None for what no term needs."""
    own: torch.Tensor      # the encoder's latents, N T' C h w
    source: torch.Tensor   # the latents that were decoded
    output: torch.Tensor   # the decoded frames, N t 3 H W, float
    target: torch.Tensor   # the frames that the output should reconstruct, N t 3 H W in [0, 1]
    vq_loss: torch.Tensor  # a tokenizer's codebook and commitment loss


class Objective:
    """Computes the loss of a micro-batch. Holds the discriminators and the networks that its terms need; ConfigError if
    one of these cannot be made. control: the ranks' process group for messages, None for one rank.

    `names` are the scalars that a call returns: "loss" (weighted, with its graph), the unweighted terms ("..._loss"),
    "squared_error" of the pixels, and the mean and mean square of our latents and of the teacher's, where a wrong scale
    shows first.
    """

    def __init__(self, cfg, model, device, autocast, control=None):
        self.cfg, self.model, self.device, self.autocast = cfg, model, device, autocast
        self.requantizes = hasattr(model, "requantize")  # a tokenizer of latents, between a frozen encoder and decoder
        learns, teacher = what_learns(cfg), bool(cfg.latent_cache)
        self.trains_decoder = learns.decoder
        self.compares_pixels, self.learns_latents = learns.from_pixels, learns.from_latents
        check_sizes(cfg, model, learns.from_pixels)
        decodes_own = cfg.decoder_input == "own" or cfg.own_share > 0
        self.runs_encoder = self.learns_latents or self.compares_pixels and decodes_own
        terms = pixel_terms(cfg, device)
        weights = {**{name: weight for name, (weight, _) in terms.items()}, "seraena_loss": cfg.seraena_weight}
        self.weights = {name: weight for name, weight in weights.items() if self.compares_pixels and weight > 0}
        if self.learns_latents:
            self.weights["encoder_loss"] = cfg.encoder_weight
        self.pixel_terms = {name: make() for name, (_, make) in terms.items() if name in self.weights}
        self.seraena = make_seraena(cfg, model, device) if "seraena_loss" in self.weights else None
        self.adversary = make_adversary(cfg, device) if cfg.gan_weight > 0 and self.compares_pixels else None
        self.quantizers = quantizers(model)
        if cfg.compile:
            Quantizer.forward = torch.compiler.disable(Quantizer.forward)  # see quantize.true_float32
        for quantizer in self.quantizers:
            # A codebook learns in `step`, which all ranks reach. Before a quantizer reduces something over the ranks
            # within forward, stay_together checks that all of them are there.
            quantizer.defer(lambda: stay_together(control))
        self.code_counts = {}  # number of a quantizer: how often each of its codes was used since the last `codes_used`
        if self.quantizers:
            self.weights["vq_loss"] = cfg.vq_weight
        self.names = ["loss", *self.weights, *(["squared_error"] if self.compares_pixels else []),
                      *(["adversarial_loss"] if self.adversary else []),
                      *(LATENT_FACTS[:2] if self.runs_encoder else []), *(LATENT_FACTS[2:] if teacher else [])]
        opponents = {"gan": self.adversary and self.adversary.FIGURES,
                     "seraena": self.seraena and ("discriminator_loss", "score_real", "score_fake")}
        self.figures = Figures({name: figures for name, figures in opponents.items() if figures}, device)
        # The adversarial terms rise as a discriminator learns, which does not mean that the run goes wrong.
        coefficients = {"loss": 1.0, "adversarial_loss": -1.0, "seraena_loss": -self.weights.get("seraena_loss", 0.0)}
        self.steady_weights = torch.tensor([coefficients.get(name, 0.0) for name in self.names], device=device)
        calls = (model.encode, model.decode, model)
        self.encode, self.decode, self.forward = (torch.compile(f) if cfg.compile else f for f in calls)

    def prepare(self):
        """All ranks call this together, after loading and before the first step."""
        for part in filter(None, (self.seraena, self.adversary)):
            part.prepare()

    def begin(self, step):
        """Call this before a step's micro-batches, and again if the step is repeated because memory ran out."""
        for part in (self.seraena, *self.quantizers):
            if part:
                part.begin()
        if self.adversary:
            self.adversary.begin(step)

    def __call__(self, video, latents, fraction):
        """Returns {name: scalar}. video: N T 3 H W in [0, 1]; latents: the teacher's, N T' C h w, float, or None;
        fraction: the number of these clips over that of all clips that this rank takes in the step.
        """
        made = self.run_model(video, latents)
        values = {} if made.vq_loss is None else {"vq_loss": made.vq_loss}
        values.update(self.latent_values(made.own, video, latents))
        surrogate = 0.0
        if self.compares_pixels:
            # Both the adaptive weight and the step need the gradient of these terms. It is computed once, at a leaf:
            # otherwise the backward pass would run through LPIPS's network twice.
            leaf = made.output.detach().requires_grad_() if self.adversary and self.adversary.weighs() else made.output
            values.update(self.pixel_values(made, leaf, fraction))
            if leaf is not made.output:
                surrogate = self.surrogate_of(values, leaf, made.output)
        values["loss"] = surrogate + sum(weight * values[name] for name, weight in self.weights.items())
        if self.adversary:
            values["adversarial_loss"] = self.adversarial_term(made, values["loss"], fraction)
            values["loss"] = values["loss"] + values["adversarial_loss"]
        return values

    def run_model(self, video, latents):
        """Encode and decode a micro-batch, as far as the terms need it. Arguments as in `__call__`."""
        cfg, model, own, output, vq_loss = self.cfg, self.model, None, None, None
        with self.autocast:
            if latents is None:
                output, info = self.forward(video)
                own = source = info["latents"]
            elif self.requantizes:
                own, info = model.requantize(latents)
                source, output = own, self.decode(own) if self.compares_pixels else None
            else:
                own = self.encode(video) if self.runs_encoder else None
                source = self.mix_latents(own, latents) if cfg.decoder_input == "teacher" else own
                output = self.decode(source) if self.compares_pixels else None
        if self.quantizers:
            vq_loss = info["vq_loss"]
        if not self.compares_pixels:
            return ModelOutputs(own, source, None, None, vq_loss)
        if latents is not None and (cfg.decoder_input == "teacher" or self.requantizes):
            _, count = model.aligned(video.shape[1], latents.shape[1])
            target = model.targets(video, latents.shape[1])[:, :count]
            output = output[:, :count]
        else:
            target = model.targets(video)
        return ModelOutputs(own, source, output.float(), target, vq_loss)

    def latent_values(self, own, video, latents):
        """The means and mean squares of both latents, and the encoder's loss. Arguments as in `__call__`."""
        values = {}
        if latents is not None:
            values.update(teacher_mean=latents.mean(), teacher_square=latents.square().mean())
        if own is not None:
            own = own.float()
            values.update(latent_mean=own.detach().mean(), latent_square=own.detach().square().mean())
        if self.learns_latents:
            count, _ = self.model.aligned(video.shape[1], latents.shape[1])
            values["encoder_loss"] = F.mse_loss(own[:, :count], latents[:, :count])
            if self.scaled():  # divided by the teacher's variance, which is about 1 for other teachers
                values["encoder_loss"] = values["encoder_loss"] * self.model.latents_scale.pow(-2).mean().reciprocal()
        return values

    def pixel_values(self, made, output, fraction):
        """The terms that compare frames with their target. output: made.output, or a leaf with its values."""
        values = {"squared_error": F.mse_loss(output.detach(), made.target)}
        with self.autocast:
            for name, term in self.pixel_terms.items():
                values[name] = term(output, made.target)
        if self.seraena:
            with self.autocast:
                context = self.model._own(made.source) if self.scaled() else made.source
                corrected = self.seraena.targets(made.target, output.detach(), context.detach().float(), fraction)
            values["seraena_loss"] = F.mse_loss(output, corrected)
        return values

    def adversarial_term(self, made, loss, fraction):
        """The PatchGAN's term. loss: the weighted sum of the other terms."""
        with self.autocast:
            # A compiled graph allows only one backward pass: there the adaptive weight takes gradients at the pixels.
            last = made.output if self.cfg.compile else self.last_layer()
            term = self.adversary.generator_term(made.target, made.output, loss, last, fraction)
        # Before gan_start the term is the float 0.0. torch.as_tensor would wait for the GPU.
        return term if torch.is_tensor(term) else made.output.new_zeros(())

    def scaled(self):
        """Whether the model scales the teacher's latents, whose deviation is far from 1. clips.find decides it."""
        return self.model.config.get("scaled_latents")

    def mix_latents(self, own, latents):
        """The teacher's latents, replaced by the encoder's own in a fraction `own_share` of the clips, drawn at random.
        No gradient reaches the encoder."""
        if not self.cfg.own_share:
            return latents
        own = torch.cat([own.detach().to(latents.dtype), latents[:, own.shape[1]:]], 1)  # a teacher may have one more
        drawn = torch.rand(len(latents), 1, 1, 1, 1, device=latents.device) < self.cfg.own_share
        return torch.where(drawn, own, latents)

    def surrogate_of(self, values, leaf, output):
        """A scalar of value 0 that has the gradient of the terms in `values` that were computed at `leaf`, a detached
        copy of `output`. The terms keep their values, without their graphs."""
        names = [*self.pixel_terms, *(["seraena_loss"] if self.seraena else [])]
        gradient, = torch.autograd.grad(sum(self.weights[name] * values[name] for name in names), leaf)
        values.update({name: values[name].detach() for name in names})
        term = (output * gradient).sum()
        return term - term.detach()

    def last_layer(self):
        """The weight of the decoder's last layer."""
        return self.model.last_layer if hasattr(self.model, "last_layer") else self.model.decoder[-1].weight

    @torch.no_grad()
    def step(self, bad):
        """Update discriminators and codebooks. All ranks call this together after the model's own step. `bad`: 1.0 on
        the device if that step was not finite; then the codebooks stay as they are."""
        if self.seraena:
            found = self.seraena.step()
            self.figures.add("seraena", {**found, "discriminator_loss": found["disc_loss"]},
                             self.figures.skipped["seraena"] + found["skipped"])
        if self.adversary:
            found = self.adversary.step(self.cfg.gan_clip)
            self.figures.add("gan", found, found["skipped"], self.adversary.learns())
        for i, quantizer in enumerate(self.quantizers):
            learned = [*quantizer.buffers(), *quantizer.parameters()]
            before = [tensor.clone() for tensor in learned]
            counts = quantizer.update()["counts"] * (1 - bad)
            for now, old in zip(learned, before):
                now.copy_(torch.where(bad > 0, old, now))
            self.code_counts[i] = counts + (self.code_counts[i] if i in self.code_counts else 0)

    def steady_loss(self, totals):
        """The loss without the adversarial terms, a scalar on the device. totals: the step's scalars, as in `names`."""
        return totals @ self.steady_weights

    def describe_loss(self):
        """The terms and weights of `steady_loss`, as a text. Losses with different texts cannot be compared."""
        return ", ".join([self.cfg.pixel_loss, *(f"{weight:g} x {name}" for name, weight in self.weights.items())])

    def codes_used(self):
        """{"codebook_use", "perplexity"} of all ranks' codes since the last call, means over the codebooks; or {}."""
        if not self.code_counts:
            return {}
        used = [counts / counts.sum(1, keepdim=True).clamp(min=1) for counts in self.code_counts.values()]
        self.code_counts = {}
        return {"codebook_use": torch.stack([(u > 0).float().mean() for u in used]).mean().item(),
                "perplexity": torch.stack([torch.special.entr(u).sum(1).exp().mean() for u in used]).mean().item()}

    def state(self):
        """The part of its state that is the same on all ranks, for a checkpoint."""
        parts = {"seraena": self.seraena, "adversary": self.adversary}
        return {"code_counts": self.code_counts, "figures": self.figures.state(),
                **{name: p.training_state() for name, p in parts.items() if p}}

    def load_state(self, state):
        """Load what `state` returned. ConfigError if it belongs to other discriminators."""
        self.code_counts = {i: c.to(self.device) for i, c in state.get("code_counts", {}).items()}
        self.figures.load_state(state.get("figures", {}))
        for name, part in {"seraena": self.seraena, "adversary": self.adversary}.items():
            if part and name in state:
                try:
                    part.load_training_state(state[name])
                except ValueError as error:
                    raise ConfigError(f"resume: {error}") from None

    def rank_state(self):
        """The part of its state that each rank has for itself, for a checkpoint; None if there is none."""
        return self.seraena.rank_state(self.cfg.seraena_save_replay) if self.seraena else None

    def load_rank_state(self, state):
        if self.seraena and state:
            self.seraena.load_rank_state(state)

    def best_by(self):
        """What `score` measures, as a text. Scores with different texts cannot be compared."""
        description = self.cfg.best_by
        if self.from_teacher():
            description = " x ".join([f"{description} from the teacher's latents"] * self.trains_decoder
                                     + ["latent error"] * self.learns_latents)
        return description

    def from_teacher(self):
        """Whether the run distils a teacher's latents. Then reconstructions through the model's own latents do not show
        how well it does: its encoder and decoder fit each other from the first step on. (A tokenizer of latents is
        judged by its reconstructions all the same.)"""
        return bool(self.learns_latents or self.cfg.decoder_input == "teacher") and not self.requantizes

    def score(self, result):
        """The score of `evaluate`'s result, dB, higher is better: -10 log10 of an error. By cfg.best_by, the error of
        the pictures is mse, 1 - ssim, lpips, or 10^(-psnr / 10). With a teacher, the error is a product of up to two
        factors: that of the pictures decoded from its latents, if the decoder is trained, and the squared error of the
        encoder's latents over the mean square of the teacher's, if the encoder learns them."""
        name, prefix, errors = self.cfg.best_by, "teacher_" if self.from_teacher() else "", []
        if self.trains_decoder or not self.from_teacher():
            value = result[prefix + name]
            errors.append({"psnr": 10 ** (-value / 10), "ssim": 1 - value}.get(name, value))
        if self.from_teacher() and self.learns_latents:
            errors.append(result["latent_mse"] / max(result["teacher_square"], 1e-10))
        return sum(-10 * math.log10(max(error, 1e-10)) for error in errors)


def remarks(cfg, model, device, dtype):
    """[lines for the log: warnings and notes about settings that may not do what the user expects]"""
    lines, most = [], max(frames for _, frames, *_ in parse_buckets(cfg))
    if dtype == torch.bfloat16 and device.type == "cpu" and cfg.model == "dcae":
        lines.append("warning: bf16 gradients of 3D convolutions are wrong on a CPU for short clips: leave "
                     "precision=auto")
    if cfg.model == "taehv" and 1 < most < 3 * model.time_factor > 3:  # 1: images
        lines.append(f"note: the model is trained on {most} frames ({model.latent_frames(most)} latents), and is worse "
                     f"later in longer videos: set frames={3 * model.time_factor} or more, or end with "
                     f"frames={7 * model.time_factor} (docs/training.md)")
    if device.type == "cuda" and (cores := cores_per_rank()) < 4 and not (cfg.latent_cache or cfg.clip_cache):
        lines.append(f"warning: {cores} CPU core{'s' * (cores > 1)} for each rank: the GPU will wait for clips. Give "
                     "the job more cores (docs/cluster.md), or train from a cache of clips (docs/training.md)")
    if cfg.gan_weight > 0 and cfg.gan_start >= cfg.max_steps:
        lines.append(f"note: the PatchGAN starts at step {cfg.gan_start} (gan_start), and the run ends at "
                     f"{cfg.max_steps}: it has no part in it")
    return lines


def decoded_size(model, size):
    """Height and width of the frames decoded from clips of `size` pixels: smaller if the model makes previews."""
    return size * getattr(model, "space_upscale", model.space_factor) // model.space_factor


def decoded_frames(model, frames):
    """The number of frames that the model decodes from a clip of `frames` frames."""
    taehv = getattr(model, "taehv", model)
    return len(taehv.frame_index(frames)) if hasattr(taehv, "frame_index") else frames


def check_sizes(cfg, model, from_pixels):
    """ConfigError if the decoded frames are too small or too few for a term of the loss, or too small for the metric
    that chooses best.pt. from_pixels: whether decoded frames are compared with the clips."""
    shapes = parse_buckets(cfg)
    sizes = [size for size, *_ in shapes]
    if from_pixels and cfg.temporal_weight > 0 and max(decoded_frames(model, frames) for _, frames, *_ in shapes) < 2:
        raise ConfigError(f"temporal_weight={cfg.temporal_weight}: of {shapes[0][1]} frames the model decodes one, in "
                          "which nothing changes: set more frames, or temporal_weight=0")
    smallest, judged = decoded_size(model, min(sizes)), decoded_size(model, cfg.val_size or sizes[0])
    for setting, least, weight in (
            (f"gan_weight={cfg.gan_weight}", 24, cfg.gan_weight if cfg.gan_dims == 2 else 0),
            (f"seraena_weight={cfg.seraena_weight}", 16, cfg.seraena_weight),
            (f"perceptual_net={cfg.perceptual_net}", 32 if cfg.perceptual_net == "alex" else 16,
             cfg.perceptual_weight)):
        if from_pixels and weight > 0 and smallest < least:
            raise ConfigError(f"{setting}: frames of {least} pixels or more are wanted, and the model decodes "
                              f"{smallest}: set a larger size, or leave it out")
    if judged < (least := MEASURES[cfg.best_by].least):
        raise ConfigError(f"best_by={cfg.best_by} needs frames of {least} pixels, and validation decodes {judged}: set "
                          "val_size, or best_by=psnr")


def make_perceptual(cfg, device):
    try:
        return PerceptualLoss(cfg.perceptual_net, cfg.perceptual_frames).to(device)
    except ImportError:
        raise ConfigError(f"perceptual_weight={cfg.perceptual_weight} needs a package: pip install lpips, or set "
                          "perceptual_weight=0") from None
    except OSError as error:
        raise ConfigError(f"perceptual_weight={cfg.perceptual_weight}: {error}, or set perceptual_weight=0") from None


def make_seraena(cfg, model, device):
    seraena = Seraena(3 * cfg.seraena_frames, model.latent_channels, lr=cfg.seraena_lr,
                      replay_bytes=cfg.seraena_replay_mb * 1_000_000,
                      seed=cfg.seed, gradients=Gradients, pairs=cfg.seraena_pairs)
    seraena = seraena.to(device, memory_format=torch.channels_last)
    sizes = {(decoded_size(model, size), size // model.space_factor) for size, *_ in parse_buckets(cfg)}
    try:
        seraena.reserve(*((size, size, cells, cells) for size, cells in sizes))
    except ValueError as error:
        raise ConfigError(f"seraena_replay_mb={cfg.seraena_replay_mb}: {error}") from None
    return seraena


def make_adversary(cfg, device):
    return Adversary(dims=cfg.gan_dims, loss=cfg.gan_loss, norm=cfg.gan_norm, weight=cfg.gan_weight, lr=cfg.gan_lr,
                     start=cfg.gan_start, ramp=cfg.gan_ramp, every=cfg.gan_every, adaptive=cfg.gan_adaptive,
                     max_weight=cfg.gan_max_weight, lecam=cfg.gan_lecam, betas=(cfg.gan_beta1, cfg.gan_beta2),
                     weight_decay=cfg.gan_weight_decay, device=device, gradients=Gradients)
