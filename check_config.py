"""Checks of a run's settings, each by itself and all together. Checks that need the files, the model or the machine are
made where these are known.

    check(config)                          # ConfigError, in one line, names the setting and the way out
    without_effect(config)                 # {"own_share": "with decoder_input=own: ..."}
"""
import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import NamedTuple, get_args

# (least, most) of each setting that is a number, None for no limit. A "..._weight" that is not here has (0, HUGE). The
# most is far above what any run needs: what is greater is a slip, and would fill the memory or fail after minutes.
MANY, HUGE = 10 ** 11, 1e30
LIMITS = {
    "max_steps": (1, MANY), "max_minutes": (0, HUGE), "seed": (0, 2 ** 62), "timeout_minutes": (0.1, 10 ** 6),
    "val_fraction": (0, 0.9), "val_clips": (1, 10 ** 6), "val_size": (0, 2 ** 14), "val_clips_per_video": (1, 1000),
    "size": (16, 2 ** 14), "frames": (1, 2 ** 16), "batch_size": (1, 2 ** 16), "accumulation": (1, 2 ** 16),
    "clips_per_open": (1, 64), "min_frame_delta": (1, 10 ** 6), "max_frame_delta": (1, 10 ** 6), "min_crop": (0, 1),
    "color_jitter": (0, 1), "blur": (0, 1), "max_pixels": (1, None), "workers": (-1, None), "patch_size": (0, 1000),
    "latent_channels": (0, 2 ** 16), "own_share": (0, 1), "wavelet_levels": (1, 8), "perceptual_frames": (0, 1000),
    "seraena_frames": (1, 1000), "seraena_lr": (0, HUGE), "seraena_replay_mb": (1, 10 ** 6), "gan_start": (0, MANY),
    "gan_ramp": (0, MANY), "gan_every": (1, MANY), "gan_lr": (0, HUGE), "gan_beta1": (0, 0.9999),
    "gan_beta2": (0, 0.9999), "gan_weight_decay": (0, HUGE), "gan_clip": (0, HUGE), "gan_lecam": (0, HUGE),
    "lr": (0, HUGE), "encoder_lr_factor": (0, HUGE), "latents_lr_factor": (0, HUGE), "warmup_steps": (0, MANY),
    "lr_final": (0, 1), "lr_decay": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.9999), "weight_decay": (0, HUGE),
    "grad_clip": (0, HUGE), "ema_decay": (0, 0.9999), "max_bad_steps": (1, MANY), "log_every": (1, MANY),
    "val_every": (1, MANY), "save_every": (1, MANY), "keep_last": (1, 10 ** 6),
}
WORKERS_PER_CORE = 16  # each is a process of about 100 MB; 5000 on two cores took down the machine
# Limits for `net`: DEPTHS are the settings that count layers, which are built one by one; the others count codes,
# channels or frames.
DEPTHS, MOST_LAYERS, MOST_OTHERS = ("num_res_blocks", "nb_res_layers", "nb_levels", "n_blk_per_group", "group_count",
                                    "blocks", "depth", "encoder_depth_list", "decoder_depth_list"), 128, 2 ** 24
# Settings that take effect when clips are cut from their files, so not while training from a cache.
CUT = "min_frame_delta max_frame_delta min_crop use_images image_sequences val_clips_per_video"


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and the way out."""


def check(config):
    """ConfigError for settings that no run can use, each by itself or in combination."""
    if config.precision == "fp16":
        raise ConfigError("precision=fp16: training would need loss scaling, which is not here; bf16 and fp32 work")
    for field in dataclasses.fields(config):
        key, value, texts = field.name, getattr(config, field.name), [str(choice) for choice in get_args(field.type)]
        if texts and value not in get_args(field.type):
            raise ConfigError(f"{key}={value}{nearest(str(value), texts)}: one of {', '.join(texts)} is wanted")
        if field.type is float and not math.isfinite(value):
            raise ConfigError(f"{key}={value}: a finite number is wanted")
        least, most = limits_of(key)
        if least is not None and value < least:
            raise ConfigError(f"{key}={value}: at least {least} is wanted")
        if most is not None and value > most:
            raise ConfigError(f"{key}={value}: at most {most} is wanted")
    if 0 < config.val_size < 16:
        raise ConfigError(f"val_size={config.val_size}: at least 16 is wanted, or 0 for the size of training")
    check_workers("workers", config.workers)
    check_net(config.net)
    if wrong := [m for m in config.val_metrics.split(",") if m.strip() not in ("", "lpips", "fid")]:
        raise ConfigError(f"val_metrics={config.val_metrics}: {wrong[0].strip()!r} is neither lpips nor fid")
    if config.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):  # a mere folder has none
        raise ConfigError(f"wandb={config.wandb} needs a package: pip install wandb, or leave it out")
    if not re.fullmatch(r"[\w.+-]+", config.name) or set(config.name) == {"."}:
        raise ConfigError(f"name={config.name}: letters, digits and . _ + - are wanted, no spaces")
    parse_buckets(config)
    check_together(config)


def limits_of(key):
    """(least, most) of a setting; None for no limit."""
    return LIMITS.get(key, (0, HUGE) if key.endswith("_weight") else (None, None))


def check_together(config):
    """ConfigError for settings that exclude or need each other, as far as no file, model or machine decides it."""
    if config.best_by == "lpips" and "lpips" not in config.val_metrics:
        raise ConfigError("best_by=lpips needs val_metrics=lpips, which measures it")
    if config.min_frame_delta > config.max_frame_delta:
        raise ConfigError(f"min_frame_delta={config.min_frame_delta} is above max_frame_delta={config.max_frame_delta}")
    check_quantizer(config.net)
    check_model(config)
    check_caches(config)
    check_learning(config)
    check_losses(config)


def without_effect(config):
    """{setting: why} of the settings that have no effect, because of others. To set one of them is a mistake."""
    idle = {}

    def leave(keys, why):
        idle.update(dict.fromkeys(keys.split(), why))

    if config.latent_cache:
        leave("clip_cache", "with latent_cache: training reads one of them")
    if cache := "latent_cache" if config.latent_cache else "clip_cache" if config.clip_cache else "":
        keys = f"{CUT} random_crop flip color_jitter blur" if config.latent_cache else CUT
        leave(keys, f"with {cache}: its clips were cut from their files when it was built")
        leave("clips_per_open", f"with {cache}: no video is opened (latent_cache.py has --clips-per-open)")
        leave("data", f"with {cache}={getattr(config, cache)}: training reads the cache alone")
    if config.latent_cache:
        leave("buckets", "with latent_cache: the cache has one shape, that of size and frames")
        leave("val_size", "with latent_cache: the cache has one size")
    if config.model not in ("taehv", "vq_latents"):
        leave("variant patch_size latent_channels", f"with model={config.model}: it is for a taehv")
    if config.model != "taehv" or config.init_from:
        given = f"init_from={config.init_from}" if config.init_from else f"model={config.model}"
        leave("init", f"with {given}: it is for a taehv from scratch")
    if config.model != "taehv" or not config.train_encoder:
        leave("encoder_lr_factor latents_lr_factor", "is for a taehv whose encoder is trained")
    if not config.train_encoder:
        leave("encoder_weight", "with train_encoder=false: the encoder does not learn")
    if config.decoder_input == "own":
        leave("own_share", "with decoder_input=own: all latents are the own encoder's")
    return idle


def check_model(config):
    """ConfigError for settings that the kind of model needs but lacks, or cannot use."""
    if config.model == "vq_latents":
        for key in ("gan_weight", "seraena_weight"):
            if getattr(config, key) > 0:
                raise ConfigError(f"{key}={getattr(config, key)} with model=vq_latents: its decoder is frozen, set it "
                                  "to 0")
        if config.decoder_input != "own":
            raise ConfigError("decoder_input=teacher with model=vq_latents: its decoder is frozen and gets its own "
                              "latents")
        if not config.init_from:
            raise ConfigError("model=vq_latents needs init_from=FILE, the TAEHV around its quantizer")
        if not config.latent_cache:
            raise ConfigError("model=vq_latents needs latents: set latent_cache=FOLDER (made by latent_cache.py)")
    if config.model != "taehv" and not (config.train_encoder and config.train_decoder):
        raise ConfigError(f"train_encoder=false or train_decoder=false with model={config.model}: only taehv can "
                          "be trained by halves")


def check_caches(config):
    """ConfigError for a latent cache with a model that cannot use one, and for settings that need one but have none."""
    if config.latent_cache and config.model not in ("taehv", "vq_latents"):
        raise ConfigError(f"latent_cache with model={config.model}: only taehv and vq_latents learn from a teacher")
    if not config.latent_cache and (config.decoder_input == "teacher" or config.encoder_weight > 0):
        setting = ("decoder_input=teacher" if config.decoder_input == "teacher"
                   else f"encoder_weight={config.encoder_weight}")
        raise ConfigError(f"{setting} needs teacher latents: set latent_cache=FOLDER (made by latent_cache.py)")


def check_learning(config):
    """ConfigError if a part of the model that is trained has no term of the loss to learn from."""
    from_teacher = config.decoder_input == "teacher"
    if not (config.train_encoder or config.train_decoder):
        raise ConfigError("train_encoder=false and train_decoder=false leave nothing to train")
    learns = what_learns(config)
    if learns.encoder and not learns.from_latents and (from_teacher or not learns.from_pixels):
        raise ConfigError("no term of the loss trains the encoder: set encoder_weight above 0, or train_encoder=false")
    if learns.decoder and not learns.from_pixels:
        raise ConfigError("no term of the loss trains the decoder: set pixel_weight above 0, or train_decoder=false")


def check_losses(config):
    """ConfigError for terms of the loss that do not suit the clips' shape or the trained parts of the model."""
    shapes = parse_buckets(config)
    smallest = min(size for size, *_ in shapes)
    if config.wavelet_weight > 0 and 2 ** config.wavelet_levels > smallest:
        raise ConfigError(f"wavelet_levels={config.wavelet_levels}: clips of {smallest} pixels have "
                          f"{int(math.log2(smallest))} levels at most")
    from_pixels = what_learns(config).from_pixels
    if not from_pixels and config.model == "taehv":
        for key in ("gan_weight", "seraena_weight", "perceptual_weight", "temporal_weight", "wavelet_weight"):
            if getattr(config, key) > 0:
                raise ConfigError(f"{key}={getattr(config, key)}: the decoder does not learn, and the encoder learns "
                                  f"from latents alone; set {key}=0")
    if config.gan_weight == 0 or not from_pixels:
        return
    for size, frames, _, batch in shapes:
        if config.gan_dims == 3 and config.gan_norm == "batch" and size <= 32 and frames <= 4 and batch == 1:
            raise ConfigError(f"gan_norm=batch with gan_dims=3: one clip of {frames} frames of {size}x{size} leaves "
                              "BatchNorm a single value; set gan_norm=group, batch_size=2 or a larger size")
    if config.gan_adaptive and not config.train_decoder and not config.compile:
        raise ConfigError("gan_adaptive=true with train_decoder=false: it weighs by the decoder's last layer; set "
                          "gan_adaptive=false")


def check_quantizer(net):
    """ConfigError for options in `net` that its quantizer does not have, or with values that it cannot take. If `net`
    names no quantizer, the model has its default or that of init_from; building it then checks the rest."""
    quantizer = net.get("quantizer")
    gradient = ("vq", "ema", "simvq", "rvq", "product")
    for key, takes in (("estimator", gradient), ("cosine", ("vq", "ema", "product")), ("quantizer_dropout", ("rvq",)),
                       ("groups", ("product",)), ("entropy_weight", ("lfq", "bsq")), ("diversity", ("lfq", "bsq"))):
        if key in net and quantizer and quantizer not in takes:
            raise ConfigError(f"net.{key}={net[key]} with net.quantizer={quantizer}: only {', '.join(takes)} take it")
    if (name := net.get("estimator", "rotation")) not in ("straight_through", "rotation"):
        raise ConfigError(f"net.estimator={name}: one of straight_through, rotation is wanted")
    chance = net.get("quantizer_dropout", 0)
    if type(chance) not in (int, float) or not 0 <= chance <= 1:
        raise ConfigError(f"net.quantizer_dropout={chance}: a probability from 0 to 1 is wanted")
    if chance and net.get("depth") == 1:
        raise ConfigError(f"net.quantizer_dropout={chance} with net.depth=1: there is no level to leave out")
    codes = net.get("n_embed", 2)
    if quantizer in ("lfq", "bsq") and (type(codes) is not int or codes < 2 or codes & (codes - 1)):
        raise ConfigError(f"net.n_embed={codes} with net.quantizer={quantizer}: signs make 2, 4, 8, ... codes, a power "
                          "of 2")


def check_workers(key, workers):
    cores = os.cpu_count() or 1
    if workers > (most := max(64, WORKERS_PER_CORE * cores)):
        raise ConfigError(f"{key}={workers}: at most {most} is wanted on a machine of {cores} cores; -1 chooses")


def check_net(net):
    """ConfigError for numbers of layers, channels or codes that no machine can build."""
    for key, value in net.items():
        values = value if isinstance(value, tuple) else (value,)
        most = MOST_LAYERS if key in DEPTHS else 2 ** 62 if key == "seed" else MOST_OTHERS
        numbers = [number for number in values if isinstance(number, (int, float))]
        if len(values) > 64 or len(str(value)) > 4096:
            raise ConfigError(f"net.{key} is too long: at most 64 values are wanted")
        if wrong := [number for number in numbers if not -most <= number <= most]:
            raise ConfigError(f"net.{key}={wrong[0]}: at most {most} is wanted")


def may_be_large(config):
    """Whether a model of these settings may be too large for a machine: some number in them is unusually high."""
    numbers = [("", config.latent_channels), ("", 64 * config.patch_size)]
    numbers += [(key, number) for key, value in config.net.items()
                for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, (int, float))]
    codes = ("n_embed", "nb_entries", "vocab_size")
    return any(number > (16 if key in DEPTHS else 2 ** 17 if key in codes else 512) for key, number in numbers)


class Learns(NamedTuple):
    """Which parts of a model learn, and from what."""
    encoder: bool       # the encoder learns (in vq_latents: the quantizer and the network behind it)
    decoder: bool       # the decoder learns
    from_pixels: bool   # what is decoded is compared with the clips
    from_latents: bool  # what is encoded is compared with the teacher's latents


def what_learns(config):
    """Which parts of the model learn in a run with these settings, and from what."""
    decoder = config.train_decoder and config.model != "vq_latents"  # whose decoder is frozen
    reached = decoder or config.train_encoder and config.decoder_input == "own"
    others = ("encoder_weight", "vq_weight", "gan_weight", "gan_max_weight")  # a PatchGAN alone teaches no picture
    weights = [value for key, value in vars(config).items() if key.endswith("_weight") and key not in others]
    pixels = reached and max(weights) > 0
    return Learns(config.train_encoder, decoder, pixels, config.train_encoder and config.encoder_weight > 0)


def parse_buckets(config):
    """[(size, frames, probability, batch), ...] of a Config. ConfigError for buckets that cannot be read or used."""
    if not config.buckets.strip():
        return [(config.size, config.frames, 1.0, config.batch_size)]
    buckets = []
    for item in config.buckets.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*x\s*(\d{1,9})\s*:\s*(\d{0,9}\.?\d{1,18})\s*:\s*(\d{1,9})\s*", item)
        if not match or not int(match[1]) * int(match[2]) * int(match[4]) * float(match[3]) > 0:
            raise ConfigError(f"buckets: {item.strip()!r} is not like 128x12:0.8:4 (size x frames:probability:batch)")
        if int(match[1]) < 16:
            raise ConfigError(f"buckets: {item.strip()!r}: a size of at least 16 is wanted")
        for value, key in zip(match.group(1, 2, 4), ("size", "frames", "batch_size")):
            if int(value) > (most := LIMITS[key][1]):
                raise ConfigError(f"buckets: {item.strip()!r}: {key} at most {most} is wanted")
        buckets.append((int(match[1]), int(match[2]), float(match[3]), int(match[4])))
    return buckets


def nearest(word, known):
    """The end of an error message: " (did you mean 'size'?)" with the most similar known word, or ""."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
