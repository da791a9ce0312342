"""What training minimises, and what validation measures.

A term of the loss has a weight in config.py. One whose weight is 0 is not computed, nor is a half of the model that no
term needs.
"""
import math

import torch
import torch.nn.functional as F

import metrics
from config import ConfigError, parse_buckets
from losses import PerceptualLoss, pixel_loss
from seraena import Seraena

LATENT_FACTS = ("latent_mean", "latent_square", "teacher_mean", "teacher_square")


class Objective:
    """The loss of a micro-batch, with everything that it needs besides the model. ConfigError for settings in conflict.

    `names` are the scalars that a call gives: "loss" (weighted, with its graph), the unweighted terms ("..._loss"),
    "squared_error" of the pixels, and mean and mean square of the latents, ours and the teacher's: a wrong scale shows
    there first.
    """

    def __init__(self, cfg, model, device, autocast):
        self.cfg, self.model, self.autocast = cfg, model, autocast
        teacher, from_teacher = bool(cfg.latent_cache), cfg.decoder_input == "teacher"
        if not teacher and (from_teacher or cfg.encoder_weight > 0):
            name = "decoder_input=teacher" if from_teacher else f"encoder_weight={cfg.encoder_weight}"
            raise ConfigError(f"{name} needs teacher latents: set latent_cache=FOLDER (made by latent_cache.py)")
        reaches_weights = cfg.train_decoder or cfg.train_encoder and not from_teacher
        self.pixels = reaches_weights and max(cfg.pixel_weight, cfg.perceptual_weight, cfg.seraena_weight) > 0
        self.latents = cfg.train_encoder and cfg.encoder_weight > 0
        if cfg.train_encoder and not self.latents and (from_teacher or not self.pixels):
            raise ConfigError("no term of the loss trains the encoder: set encoder_weight above 0, or "
                              "train_encoder=false")
        if cfg.train_decoder and not self.pixels:
            raise ConfigError("no term of the loss trains the decoder: set pixel_weight above 0, or "
                              "train_decoder=false")
        self.runs_encoder = self.latents or self.pixels and not from_teacher
        weights = {"reconstruction_loss": cfg.pixel_weight, "perceptual_loss": cfg.perceptual_weight,
                   "seraena_loss": cfg.seraena_weight} if self.pixels else {}
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        if self.latents:
            self.weights["encoder_loss"] = cfg.encoder_weight
        self.perceptual = make_perceptual(cfg, device) if "perceptual_loss" in self.weights else None
        self.seraena = make_seraena(cfg, model, device) if "seraena_loss" in self.weights else None
        self.names = ["loss", *self.weights, *(["squared_error"] if self.pixels else []),
                      *(LATENT_FACTS[:2] if self.runs_encoder else []), *(LATENT_FACTS[2:] if teacher else [])]
        self.encode, self.decode = (torch.compile(f) if cfg.compile else f for f in (model.encode, model.decode))

    def begin(self):
        """Before a step's micro-batches; a step may begin again after memory ran out."""
        if self.seraena:
            self.seraena.begin()

    def __call__(self, video, latents, share):
        """{name: scalar} of a micro-batch that is `share` of its step.

        video: N T 3 H W in [0, 1]; latents: the teacher's, N T' C h w, float, or None.
        """
        cfg, model, values = self.cfg, self.model, {}
        with self.autocast:
            own = self.encode(video) if self.runs_encoder else None
            source = latents if cfg.decoder_input == "teacher" else own
            output = self.decode(source) if self.pixels else None
        if latents is not None:
            latents_count, frames_count = model.aligned(video.shape[1], latents.shape[1])
            values.update(teacher_mean=latents.mean(), teacher_square=latents.square().mean())
        if own is not None:
            own = own.float()
            values.update(latent_mean=own.detach().mean(), latent_square=own.detach().square().mean())
        if self.latents:
            values["encoder_loss"] = F.mse_loss(own[:, :latents_count], latents[:, :latents_count])
        if self.pixels:
            output, target = output.float(), model.targets(video, source.shape[1])
            if source is latents:
                output, target = output[:, :frames_count], target[:, :frames_count]
            values["squared_error"] = F.mse_loss(output.detach(), target)
            if cfg.pixel_weight > 0:
                values["reconstruction_loss"] = pixel_loss(cfg.pixel_loss, output, target)
            if self.perceptual:
                values["perceptual_loss"] = self.perceptual(output, target)
            if self.seraena:
                with self.autocast:
                    corrected = self.seraena.targets(target, output.detach(), source.detach().float(), share)
                values["seraena_loss"] = F.mse_loss(output, corrected)
        values["loss"] = sum(weight * values[name] for name, weight in self.weights.items())
        return values

    def step(self):
        """After the model's own step, on all ranks together: the discriminator's."""
        if self.seraena:
            self.seraena.step()

    def state(self):
        """What a checkpoint keeps of it, the same on all ranks."""
        return self.seraena.training_state() if self.seraena else None

    def load_state(self, state):
        if self.seraena and state:
            self.seraena.load_training_state(state)

    def rank_state(self):
        """What a checkpoint keeps of it for this rank."""
        return self.seraena.rank_state(self.cfg.seraena_save_replay) if self.seraena else None

    def load_rank_state(self, state):
        if self.seraena and state:
            self.seraena.load_rank_state(state)

    def score(self, result):
        """What "best" means, from `evaluate`'s result: dB of the half that is trained, or of the whole."""
        if not self.cfg.train_decoder and self.latents:
            return -10 * math.log10(max(result["latent_mse"], 1e-10))
        return result["psnr" if self.cfg.train_encoder or "teacher_psnr" not in result else "teacher_psnr"]


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
                      replay_bytes=cfg.seraena_replay_mb * 1_000_000, replay_device=cfg.seraena_replay_device,
                      seed=cfg.seed).to(device, memory_format=torch.channels_last)
    sizes = {size for size, *_ in parse_buckets(cfg)}
    try:
        seraena.reserve(*((size, size, size // model.space_factor, size // model.space_factor) for size in sizes))
    except ValueError as error:
        raise ConfigError(f"seraena_replay_mb={cfg.seraena_replay_mb}: {error}") from None
    return seraena


@torch.no_grad()
def evaluate(model, samples, device, autocast, control):
    """Means over all ranks' clips, each counted once. All ranks call it.

    samples: this rank's share, [{"video": uint8 T 3 H W, and, from a latent cache, "latents": T' C h w}]. Returns
    ({"mse", "psnr" (frames at most 100 dB), "ssim", "sharpness" (variance of the Laplacian, all frames' over the
    originals'), "count"}, [up to four (original, reconstruction) of this rank, T 3
    H W on the CPU]); with teacher latents also "latent_mse", the mean and mean square of both latents, and
    "teacher_psnr", of decoding the teacher's.
    """
    mean, shown = metrics.Mean("mse", "psnr", "ssim", "detail", "original_detail"), []
    latents_mean, teacher_mean = metrics.Mean("latent_mse", *LATENT_FACTS), metrics.Mean("teacher_psnr")
    for sample in samples:
        video = sample["video"][None].to(device).float().div_(255)
        with autocast:
            own = model.encode(video)
            output = model.decode(own)
        own, output, target = own.float(), output.float().clamp(0, 1), model.targets(video)
        mean.add(mse=metrics.mse(output, target), psnr=metrics.psnr(output, target).clamp(max=100),
                 ssim=metrics.ssim(output, target), detail=metrics.laplacian_variance(output),
                 original_detail=metrics.laplacian_variance(target))
        if len(shown) < 4:
            shown.append((target[0].cpu(), output[0].cpu()))
        if "latents" not in sample:
            continue
        latents = sample["latents"][None].to(device).float()
        latents_count, frames_count = model.aligned(video.shape[1], latents.shape[1])
        latents_mean.add(latent_mse=(own[:, :latents_count] - latents[:, :latents_count]).square().mean()[None],
                         latent_mean=own.mean()[None], latent_square=own.square().mean()[None],
                         teacher_mean=latents.mean()[None], teacher_square=latents.square().mean()[None])
        with autocast:
            output = model.decode(latents)
        output = output.float().clamp(0, 1)[:, :frames_count]
        target = model.targets(video, latents.shape[1])[:, :frames_count]
        teacher_mean.add(teacher_psnr=metrics.psnr(output, target).clamp(max=100))
    result = mean.reduce(control)
    result["sharpness"] = result.pop("detail") / max(result.pop("original_detail"), 1e-12)
    for more in (latents_mean, teacher_mean):
        more = more.reduce(control)
        if more.pop("count"):
            result.update(more)
    return result, shown


def spread(facts):
    """Mean squares as roots: {"latent_square": 4.0} -> {"latent_rms": 2.0}; the rest as it is."""
    return {name.replace("_square", "_rms") if name in LATENT_FACTS else name:
            value ** 0.5 if name in LATENT_FACTS and name.endswith("_square") else value
            for name, value in facts.items()}
