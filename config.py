"""All settings of a training run: edit here, or override on the command line.

    python train.py                          # the demo
    python train.py taehv data=videos/       # a preset and overrides
    python train.py runs/x/config.json       # the settings of a run, which goes on; with name=NEW another one
    python train.py --help                   # every setting
"""
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import sys


@dataclasses.dataclass
class Config:
    # ---- the run
    name: str = ""                  # run folder under out_dir; empty: the preset's name
    out_dir: str = "runs"           # folder of the run folders
    max_steps: int = 10000          # optimizer steps
    max_minutes: float = 0.0        # of training (validation and saving left out) after which it ends; 0: no limit
    seed: int = 0                   # of the initial weights and of the data order
    device: str = "auto"            # auto, cpu, cuda, cuda:N or mps; auto prefers a GPU
    precision: str = "auto"         # auto, bf16 (autocast) or fp32 (TF32 on GPUs); auto: bf16 where the hardware has it
    compile: bool = False           # torch.compile the model: minutes at the start, faster steps on a GPU
    resume: str = "auto"            # auto: newest good checkpoint of the run folder; none: a new run; or a path
    init_from: str = ""             # weights to start from: published (a name or a file), or a checkpoint of ours
    timeout_minutes: float = 30.0   # how long a rank waits for the others before the run is given up

    # ---- data
    data: str = ""                  # folder (recursive), file, annotation .json, .csv; or "demo": synthetic
    data_root: str = ""             # folder that the paths of a .json or .csv are relative to; empty: its own
    latent_cache: str = ""          # folder that latent_cache.py made: its clips and teacher latents instead of data
    val_data: str = ""              # the same for validation; empty: val_fraction of the files of data
    val_fraction: float = 0.05      # part of the files held out, chosen by their names; 0: no validation
    val_clips: int = 64             # validation clips at most
    val_size: int = 0               # height and width of validation clips, pixels; 0: size, or the first bucket's
    max_val_images: int = 0         # frames in these clips at most; 0: as many as they have
    val_metrics: str = ""           # measured besides MSE, PSNR, SSIM and sharpness: "lpips,fid" (LPIPS of AlexNet)
    best_by: str = "psnr"           # what best.pt is best in: psnr, ssim, mse or lpips (with val_metrics=lpips)
    # (Where a teacher's latents are learnt, the pictures are those decoded from the teacher's latents, and best is the
    # lowest (error of these pictures) x (error of the latents). A half that is not trained does not count.)
    val_clips_per_video: int = 2    # fixed clips of each validation video
    size: int = 128                 # height and width of training clips, pixels
    frames: int = 12                # frames per clip; 1: images; for taecvx 8k or 8k + 1
    batch_size: int = 4             # clips per rank and micro-step
    buckets: str = ""               # several shapes: "128x12:0.8:4, 256x12:0.2:1" (size x frames:probability:batch)
    accumulation: int = 1           # micro-steps per optimizer step
    min_frame_delta: int = 1        # spacing of a clip's frames in the video: drawn from this ...
    max_frame_delta: int = 5        # ... to this, frames
    random_crop: bool = True        # a random square, resized; off: the largest centred square
    min_crop: float = 0.0           # its smallest side as a part of the shorter edge (and not below size)
    flip: bool = True               # left-right, half of the clips
    color_jitter: float = 0.0       # brightness, contrast, saturation by up to this factor, hue by a quarter of it
    blur: float = 0.0               # probability of a slight Gaussian blur
    use_images: bool = False        # only the images of the data, each a clip of one frame
    image_sequences: bool = False   # make clips of several frames from unrelated images
    max_pixels: int = 100_000_000   # of an image or a frame (height x width); larger files are passed over
    workers: int = -1               # data processes per rank; -1: by the number of cores

    # ---- model
    model: str = "taehv"            # taehv, vqgan, vqvae2, vqvae_video, vq_latents or dcae
    net: dict = dataclasses.field(default_factory=dict)  # arguments of the model's class; one of them: net.NAME=VALUE
    variant: str = ""               # taehv: row of VARIANTS in model_taehv.py; empty: that of init_from, or else taehv
    patch_size: int = 0             # taehv: pixels folded into channels at the border; 0: the variant's
    latent_channels: int = 0        # taehv: channels of a latent; 0: the variant's (or, as above, those of init_from)
    init: str = "colours"           # fresh weights: colours (starts with each cell's mean colour) or pytorch (taehv)
    train_encoder: bool = True      # off: the encoder keeps its weights (taehv)
    train_decoder: bool = True      # off: the decoder keeps its weights (taehv)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    # ---- loss: a term whose weight is 0 costs nothing
    decoder_input: str = "own"      # latents that the decoder learns from: own (the encoder's) or teacher (the cache's)
    pixel_weight: float = 1.0       # of the pixel loss
    pixel_loss: str = "l1"          # l1, l2, charbonnier or l1+l2, of pixels in [0, 1] (l1+l2 is |d| + 2 d^2)
    encoder_weight: float = 0.0     # of the squared error of the encoder's latents against the cache's
    vq_weight: float = 1.0          # of a tokenizer's codebook and commitment loss
    perceptual_weight: float = 0.0  # of LPIPS
    perceptual_net: str = "vgg"     # its backbone: vgg or alex (the loss's; validation measures with alex)
    perceptual_frames: int = 2      # frames of each clip that it looks at, drawn anew each time; 0: all
    seraena_weight: float = 0.0     # of the squared distance to Seraena's corrected frames (adversarial sharpness)
    seraena_frames: int = 3         # consecutive frames that its discriminator sees as one image
    seraena_lr: float = 3e-4        # its discriminator's learning rate
    seraena_replay_mb: int = 512    # memory for its replayed samples, MB per rank
    seraena_replay_device: str = "same"  # where they lie: same (the model's device) or pinned (the host's memory)
    seraena_save_replay: bool = True     # into the checkpoints, one file per rank; off: refilled after a resume
    gan_weight: float = 0.0         # of a PatchGAN's term; with gan_adaptive, relative to the other terms' gradient
    gan_adaptive: bool = True       # scale it by the gradients at the decoder's last layer, as VQGAN does
    gan_max_weight: float = 10000.0  # the most that this scale can be
    gan_start: int = 0              # step at which it begins; before, it costs nothing
    gan_ramp: int = 1000            # steps over which its weight then grows
    gan_every: int = 1              # the discriminator learns in every n-th step
    gan_dims: int = 2               # 2: it sees frames; 3: clips
    gan_loss: str = "hinge"         # hinge or vanilla
    gan_norm: str = "batch"         # its normalisation: batch, group or none
    gan_lr: float = 1e-5            # the discriminator's learning rate (AdamW's, without warm-up or schedule)
    gan_beta1: float = 0.5          # the discriminator's AdamW: decay of its mean gradient
    gan_beta2: float = 0.9          # the discriminator's AdamW: decay of its mean squared gradient
    gan_weight_decay: float = 0.0   # the discriminator's AdamW: weight decay
    gan_clip: float = 0.0           # norm above which the discriminator's gradients are scaled down; 0: never
    gan_lecam: float = 0.0          # weight of the LeCam regulariser

    # ---- optimizer
    lr: float = 3e-4                # AdamW's peak learning rate
    schedule: str = "cosine"        # constant, cosine (to lr_final at max_steps), exponential (lr_decay)
    warmup_steps: int = 100         # linear from 0
    lr_final: float = 0.05          # cosine: the last learning rate, as a part of lr
    lr_decay: float = 0.99          # exponential: factor per 1000 steps
    beta1: float = 0.9              # AdamW
    beta2: float = 0.95             # AdamW
    weight_decay: float = 0.01      # AdamW
    grad_clip: float = 1.0          # gradient norm above which gradients are scaled down; 0: never
    ema_decay: float = 0.999        # of the weight average, which is validated and saved; rises from 0.1 at first
    max_bad_steps: int = 20         # steps in a row with a loss or gradient that is not finite before the run stops

    # ---- logging and checkpoints
    wandb: str = ""                 # project of Weights & Biases that TensorBoard's curves are copied to; empty: none
    log_every: int = 10             # steps
    val_every: int = 500            # steps
    save_every: int = 500           # steps
    keep_last: int = 3              # newest checkpoints kept, besides the best


# What several presets share: the settings of published trainers. Those count pixels on [-1, 1], ours on [0, 1]: their
# l1 weighs 2 here, their l2 weighs 4. They validate the weights themselves, ours their average, and read clips
# unflipped. Their optimizers have an eps of 1e-8 (OptVQ's 1e-7), ours 1e-7.

# CompVis/taming-transformers: taming/models/vqgan.py, configs/faceshq_vqgan.yaml. Ours departs: lr is 1e-4, where its
# 4.5e-6 times the clips of a step gives 3.6e-5 for 8 and 2.9e-4 for 64; and the PatchGAN's term grows over
# gan_ramp=1000 steps, where its starts at full weight.
VQGAN = dict(model="vqgan", frames=1, size=256, batch_size=8, max_steps=200000, lr=1e-4, schedule="constant",
             warmup_steps=0, beta1=0.5, beta2=0.9, weight_decay=0.0, grad_clip=0.0, pixel_weight=2.0,
             perceptual_weight=1.0, gan_weight=0.8, gan_start=30000, gan_lr=1e-4)
# zbr17/OptVQ: configs/imagenet/optvq_256_f16_h4.yaml: 64 clips a step on eight ranks, with the README's 2e-6 a clip.
# Ours departs: the discriminator begins at gan_start and its term grows (theirs learns from the first step on, and its
# term starts at full weight), its rate is constant (theirs follows the model's), weight decay is for all weights
# (theirs for those of convolutions and linear layers), and clips are neither blurred nor jittered in colour (blur=0.5
# color_jitter=0.4 min_crop=0.45 come near).
OPTVQ = dict(VQGAN, max_steps=1000000, lr=1.28e-4, schedule="cosine", warmup_steps=10000, lr_final=0.0, beta1=0.9,
             beta2=0.999, weight_decay=0.05, grad_clip=1.0, pixel_loss="l1+l2", perceptual_weight=3.0, gan_weight=1.0,
             gan_start=150000, gan_lr=1.28e-4, gan_beta1=0.9, gan_beta2=0.999, gan_weight_decay=0.05, gan_clip=1.0)
# vvvm23/vqvae-2: hps.py (ffhq256), trainer.py. Ours departs: 16 clips a rank, its 128 on eight; and three levels, the
# default of its class, where ffhq256 has two (net.nb_levels=2 net.scaling_rates=4,2).
VQVAE2 = dict(model="vqvae2", frames=1, size=256, batch_size=16, max_steps=100000, lr=1e-4, schedule="constant",
              warmup_steps=0, beta2=0.999, weight_decay=0.0, grad_clip=0.0, pixel_loss="l2", pixel_weight=4.0)
# hpcaitech/Open-Sora: configs/vae/train/video_dc_ae.py. Ours departs: its loss is the sum over a frame's 196 608
# numbers, so that its clip at 1 scales every gradient down, ours is their mean; and all ranks take images in the same
# step, 8 on each, where there each rank but the first decides for itself, and takes one.
DCAE = dict(model="dcae", size=256, frames=32, batch_size=1, buckets="256x32:0.8:1, 256x1:0.2:8", max_frame_delta=1,
            lr=5e-5, schedule="constant", warmup_steps=0, beta2=0.98, weight_decay=0.0, ema_decay=0.99,
            max_steps=100000, pixel_weight=2.0, perceptual_weight=0.5, perceptual_frames=0)
# Its second stage, video_dc_ae_disc.py. The adaptive weight ends at 10 000 for that sum: at 10 000 / 196 608 for a
# mean.
DCAE_DISC = dict(gan_weight=0.05, gan_dims=3, gan_ramp=0, gan_max_weight=0.051, gan_lr=1e-4, gan_beta1=0.9,
                 gan_beta2=0.98, gan_clip=1.0)
# The same network, narrow, for minutes on a CPU: settings of ours.
DCAE_SMALL = dict(model="dcae", data="demo", size=64, frames=8, batch_size=2, max_frame_delta=1, lr=2e-4, max_steps=150,
                  warmup_steps=20, ema_decay=0.95, log_every=5, val_every=50, save_every=50, workers=1,
                  net=dict(width_list=(32, 32, 64, 64, 64, 64), encoder_depth_list=(1,) * 6,
                           decoder_depth_list=(1,) * 6, latent_channels=64))

PRESETS = {
    # Synthetic clips, a few minutes on two cores.
    "demo": dict(data="demo", size=64, max_steps=120, batch_size=4, max_frame_delta=2, warmup_steps=20, lr=3e-4,
                 ema_decay=0.95, log_every=5, val_every=40, save_every=40, val_clips=12, workers=1),
    # A TAEHV from scratch on your own videos.
    "taehv": dict(max_steps=50000, batch_size=8),
    # The published training notebook's optimizer, batches and crops with pixels only, as squared errors: neither a
    # teacher's latents nor Seraena. The table in docs/speed.md compares with it.
    "taehv_notebook": dict(init="pytorch", size=64, batch_size=16, pixel_loss="l2", schedule="constant", warmup_steps=0,
                           grad_clip=0.0, max_steps=50000),
    # A TAEHV that speaks a big VAE's latents: add latent_cache=FOLDER, made by latent_cache.py, and variant=... . The
    # encoder learns the teacher's latents, the decoder the pixels from the teacher's latents. train_encoder=false or
    # train_decoder=false trains one half alone; init_from=FILE.pth goes on from published weights.
    "taehv_distill": dict(max_steps=10000, decoder_input="teacher", encoder_weight=1.0),
    # The same with the adversarial corrector: sharper, at a lower PSNR. Best from a distilled model: init_from=... .
    # Weights as in madebyollin/seraena's notebook: squared errors of the latents, of pixels and to the corrected
    # frames, each 1. Corrections have unit deviation: they pull 14 times as hard as pixels that are 0.07 off. Ours
    # departs: a cosine with warm-up, gradients clipped, 4 clips (there constant, unclipped, 16), 512 MB of replayed
    # samples (there 16 384, which is 2.5 GB at 64 px).
    "taehv_seraena": dict(max_steps=10000, decoder_input="teacher", encoder_weight=1.0, pixel_loss="l2",
                          seraena_weight=1.0),
    # Published weights on your own domain: add init_from=taew2_1 (or a file).
    "taehv_finetune": dict(max_steps=10000, batch_size=8, lr=1e-4, warmup_steps=200),
    # Tokenizers of single frames (f16, 1024 codes), of videos or of images. LPIPS from the start, the PatchGAN later.
    # vqgan_ema has a quantizer of ours in taming's recipe, vqvae2_optvq OptVQ's in vvvm23's.
    "vqgan": dict(VQGAN, net=dict(quantizer="vq")),
    "vqgan_ema": dict(VQGAN, net=dict(quantizer="ema", kmeans_init=True, restart_below=0.1)),
    "vqgan_optvq": dict(OPTVQ, net=dict(quantizer="optvq", num_head=4, n_embed=16384, kmeans_init=True)),
    "vqvae2": dict(VQVAE2),
    "vqvae2_optvq": dict(VQVAE2, net=dict(quantizer="optvq")),
    # Codes for the latents of a frozen TAEHV: add latent_cache=FOLDER init_from=taew2_1 (or a file). Only the
    # quantizer and a small network behind it learn; pixel_weight=1 lets them learn through the decoder too.
    "vq_latents": dict(model="vq_latents", batch_size=32, max_steps=20000, lr=1e-3, encoder_weight=1.0,
                       pixel_weight=0.0, net=dict(quantizer="ema", n_embed=4096, kmeans_init=True, restart_below=0.1)),
    # A clip of 16 frames in one map of codes: zhangxuan1918/VqVaeVideo, train/videos2. It counts pixels in ImageNet's
    # deviations: its squared errors weigh 19.6 here. Ours departs: 128 px and 512 channels (there 256 and 1024), and
    # one Adam for all steps (there a new one in each, so without momentum, and with a rate that never decays).
    "vqvae_video": dict(model="vqvae_video", net=dict(sequence_length=16), frames=16, size=128, batch_size=4,
                        max_frame_delta=1, max_steps=160000, lr=1e-4, schedule="exponential", lr_decay=0.98,
                        warmup_steps=0, beta2=0.999, weight_decay=0.0, grad_clip=0.0, pixel_loss="l2",
                        pixel_weight=19.6),
    # Video DC-AE: stage one, then stage two with a PatchGAN over clips (add init_from=runs/dcae). The same on a CPU, in
    # minutes: dcae_small, then dcae_small_disc with init_from=runs/dcae_small.
    "dcae": dict(DCAE),
    "dcae_disc": dict(DCAE, **DCAE_DISC, gradient_checkpointing=True),
    "dcae_small": dict(DCAE_SMALL),
    "dcae_small_disc": dict(DCAE_SMALL, **{**DCAE_DISC, "gan_max_weight": 0.81}),  # 10 000 / (3 * 64 * 64)
}


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and the way out."""


def load_config(arguments):
    """["taehv", "lr=1e-4", ...] -> Config. The preset comes first and may be left out (demo). In its place may stand a
    file like a run's config.json, with the run's name among its settings. ConfigError otherwise."""
    preset, overrides = "demo", list(arguments)
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    if overrides and "=" not in overrides[0]:
        preset = overrides.pop(0)
    if preset.endswith(".json"):
        values = read_settings(preset, kinds)
        preset = os.path.basename(preset).removesuffix(".json")
    elif preset in PRESETS:
        values = dict(PRESETS[preset])
    else:
        raise ConfigError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}, or a "
                          "run's config.json")
    for item in overrides:
        key, separator, text = item.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not separator:
            raise ConfigError(f"{item!r} is no key=value")
        if key.startswith("net."):
            values["net"] = {**values.get("net", {}), key[4:]: parse_literal(key, text)}
            continue
        if key not in kinds or kinds[key] is dict:
            raise ConfigError(f"unknown key {key!r}{nearest(key, kinds)}; python train.py --help lists all")
        values[key] = parse(key, text, kinds[key])
    values["net"] = fitting(values.get("net", {}), [item.partition("=")[0].removeprefix("--") for item in overrides])
    config = Config(**values)
    config.name = config.name or preset
    if preset == "taehv_finetune" and not config.init_from and config.resume in ("auto", "none"):
        raise ConfigError("taehv_finetune needs init_from=FILE, the weights to go on from (published, or a run of "
                          "yours); the preset taehv starts from scratch")
    if config.use_images:
        use_images(config, overrides)
    check(config)
    return config


def read_settings(path, kinds):
    """{key: value} of a JSON file of settings, as a run leaves in config.json; what it lacks has the default."""
    from untrusted import SETTINGS, read_json  # here: without such a file, this one works alone
    try:
        values = read_json(path, SETTINGS)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; a preset or a run's config.json is wanted") from None
    except ValueError as error:  # not UTF-8, not JSON, nested too deeply, too long
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: an object of settings like {{"lr": 1e-4}} is wanted')
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(key, kinds)}; python train.py --help lists all")
        kind, given = kinds[key], json.dumps(value)[:50]
        if kind is float and type(value) is int and abs(value) < 2 ** 63:
            values[key] = value = float(value)
        if type(value) is not kind or kind is int and abs(value) >= 2 ** 63:
            meant = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "an object"}
            raise ConfigError(f"{path}: {key}={given}: {meant[kind]} is wanted")
    values["net"] = {key: tuples(value) for key, value in values.get("net", {}).items()}
    return values


def tuples(value):
    """JSON's lists as the tuples that they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def fitting(net, given):
    """`net` without a preset's quantizer options where another quantizer was chosen, which does not have them."""
    kind = net.get("kind", "vq") if net.get("quantizer") == "rvq" else net.get("quantizer")
    takes = {"kmeans_init": ("vq", "ema", "optvq"), "restart_below": ("vq", "ema"), "num_head": ("optvq",)}
    return {key: value for key, value in net.items()
            if key not in takes or kind in takes[key] or f"net.{key}" in given}


def parse(key, text, kind):
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "on": True,
                    "false": False, "0": False, "no": False, "off": False}[text.lower()]
        if kind is int and len(text) > 18:  # more than the machine's integers hold
            raise ValueError
        return kind(text)
    except (ValueError, KeyError):
        meant = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{key}={text}: {meant} is wanted") from None


def parse_literal(key, text):
    """A number, boolean, tuple of these or word: 32, true, 1,2,4, false,true,true, ema."""
    try:
        return ast.literal_eval(re.sub(r"\b(true|false)\b", lambda word: word[0].capitalize(), text, flags=re.I))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if re.fullmatch(r"[A-Za-z_]\w*", text):
            return text
        raise ConfigError(f"{key}={text}: a number, true, false, a word, or several like 1,2,4 are wanted") from None


def nearest(word, words):
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_buckets(config):
    """[(size, frames, probability, batch), ...] of a Config."""
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
            if int(value) > (most := next(limit for limit, keys in AT_MOST.items() if key in keys.split())):
                raise ConfigError(f"buckets: {item.strip()!r}: {key} at most {most} is wanted")
        buckets.append((int(match[1]), int(match[2]), float(match[3]), int(match[4])))
    return buckets


CHOICES = {
    "precision": ("auto", "bf16", "fp32"),
    "model": ("taehv", "vqgan", "vqvae2", "vqvae_video", "vq_latents", "dcae"),
    "init": ("colours", "pytorch"),
    "gan_loss": ("hinge", "vanilla"),
    "gan_norm": ("batch", "group", "none"),
    "gan_dims": (2, 3),
    "decoder_input": ("own", "teacher"),
    "pixel_loss": ("l1", "l2", "charbonnier", "l1+l2"),
    "perceptual_net": ("vgg", "alex"),
    "seraena_replay_device": ("same", "pinned"),
    "schedule": ("constant", "cosine", "exponential"),
    "best_by": ("psnr", "ssim", "mse", "lpips"),
}
AT_LEAST = {0: "seed max_minutes val_fraction min_crop color_jitter blur patch_size latent_channels lr warmup_steps "
               "lr_final lr_decay beta1 beta2 weight_decay grad_clip ema_decay pixel_weight encoder_weight "
               "perceptual_weight perceptual_frames seraena_weight seraena_lr vq_weight val_size max_val_images "
               "gan_weight gan_start gan_ramp gan_lr gan_lecam gan_max_weight gan_beta1 gan_beta2 gan_weight_decay "
               "gan_clip",
            1: "max_steps val_clips val_clips_per_video frames batch_size accumulation min_frame_delta max_frame_delta "
               "max_pixels max_bad_steps log_every val_every save_every keep_last seraena_frames seraena_replay_mb "
               "gan_every",
            0.1: "timeout_minutes", 16: "size", -1: "workers"}
# Far above what any run needs: what is greater is a slip, and would fill the memory or fail after minutes.
AT_MOST = {0.9: "val_fraction", 1: "min_crop color_jitter blur lr_final lr_decay",
           0.9999: "beta1 beta2 gan_beta1 gan_beta2 ema_decay",
           1000: "val_clips_per_video perceptual_frames seraena_frames patch_size", 2 ** 14: "size val_size",
           2 ** 16: "frames batch_size accumulation latent_channels",
           10 ** 6: "timeout_minutes val_clips keep_last min_frame_delta max_frame_delta seraena_replay_mb",
           10 ** 11: "max_steps warmup_steps gan_start gan_ramp gan_every log_every val_every save_every max_bad_steps "
                     "max_val_images",
           10 ** 30: "lr gan_lr seraena_lr grad_clip gan_clip gan_lecam gan_max_weight weight_decay gan_weight_decay "
                     "pixel_weight encoder_weight vq_weight perceptual_weight seraena_weight gan_weight max_minutes",
           2 ** 62: "seed"}
WORKERS_PER_CORE = 16  # each is a process of about 100 MB; 5000 on two cores took down the machine
# Of `net`: what counts layers, which are built one by one, and all other numbers (codes, channels, frames).
DEPTHS, MOST_LAYERS, MOST_OTHERS = ("num_res_blocks", "nb_res_layers", "nb_levels", "n_blk_per_group", "group_count",
                                    "blocks", "depth", "encoder_depth_list", "decoder_depth_list"), 128, 2 ** 24


def use_images(config, overrides):
    """Images are clips of one frame."""
    if config.image_sequences or any(re.match(r"(--)?(buckets|frames)=(?!1$)", o) for o in overrides):
        raise ConfigError("use_images=true makes clips of one frame: leave out frames, buckets and image_sequences")
    config.frames, config.buckets = 1, ""


def check(config):
    """ConfigError for values that no run can use. What depends on the model or the machine is checked there."""
    if config.precision == "fp16":
        raise ConfigError("precision=fp16: training would need loss scaling, which is not here; bf16 and fp32 work")
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            value, words = getattr(config, key), [str(choice) for choice in choices]
            raise ConfigError(f"{key}={value}{nearest(str(value), words)}: one of {', '.join(words)} is wanted")
    for field in dataclasses.fields(config):
        if field.type is float and not math.isfinite(value := getattr(config, field.name)):
            raise ConfigError(f"{field.name}={value}: a finite number is wanted")
    for limits, word, fits in ((AT_LEAST, "least", float.__ge__), (AT_MOST, "most", float.__le__)):
        for limit, keys in limits.items():
            for key in keys.split():
                if not fits(float(getattr(config, key)), float(limit)):
                    raise ConfigError(f"{key}={getattr(config, key)}: at {word} {limit} is wanted")
    if 0 < config.val_size < 16:
        raise ConfigError(f"val_size={config.val_size}: at least 16 is wanted, or 0 for the size of training")
    check_workers("workers", config.workers)
    check_net(config.net)
    if wrong := [m for m in config.val_metrics.split(",") if m.strip() not in ("", "lpips", "fid")]:
        raise ConfigError(f"val_metrics={config.val_metrics}: {wrong[0].strip()!r} is neither lpips nor fid")
    if config.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):  # a mere folder has none
        raise ConfigError(f"wandb={config.wandb} needs a package: pip install wandb, or leave it out")
    if config.best_by == "lpips" and "lpips" not in config.val_metrics:
        raise ConfigError("best_by=lpips needs val_metrics=lpips, which measures it")
    if config.min_frame_delta > config.max_frame_delta:
        raise ConfigError(f"min_frame_delta={config.min_frame_delta} is above max_frame_delta={config.max_frame_delta}")
    if not re.fullmatch(r"[\w.+-]+", config.name) or set(config.name) == {"."}:
        raise ConfigError(f"name={config.name}: letters, digits and . _ + - are wanted")
    if config.model != "taehv" and not (config.train_encoder and config.train_decoder):
        raise ConfigError(f"train_encoder=false or train_decoder=false with model={config.model}: only taehv can be "
                          "trained by halves")
    if config.latent_cache and config.model not in ("taehv", "vq_latents"):
        raise ConfigError(f"latent_cache with model={config.model}: only taehv and vq_latents learn from a teacher")
    if config.model == "vq_latents":
        check_vq_latents(config)
    if config.init == "pytorch" and (config.model != "taehv" or config.init_from):
        given = f"init_from={config.init_from}" if config.init_from else f"model={config.model}"
        raise ConfigError(f"init=pytorch with {given}: it is for a taehv from scratch")
    if not (config.train_encoder or config.train_decoder):
        raise ConfigError("train_encoder=false and train_decoder=false leave nothing to train")
    if config.latent_cache and config.buckets:
        raise ConfigError("buckets with latent_cache: the cache has one shape; set size and frames instead")
    if config.latent_cache and config.val_size:
        raise ConfigError("val_size with latent_cache: the cache has one size; leave val_size out")
    parse_buckets(config)


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
    """Whether a model of these settings could be too large for a machine."""
    numbers = [("", config.latent_channels), ("", 64 * config.patch_size)]
    numbers += [(key, number) for key, value in config.net.items()
                for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, (int, float))]
    codes = ("n_embed", "nb_entries", "vocab_size")
    return any(number > (16 if key in DEPTHS else 2 ** 17 if key in codes else 512) for key, number in numbers)


def check_vq_latents(config):
    for key in ("gan_weight", "seraena_weight"):
        if getattr(config, key) > 0:
            raise ConfigError(f"{key}={getattr(config, key)} with model=vq_latents: its decoder is frozen, set it to 0")
    if config.decoder_input != "own":
        raise ConfigError("decoder_input=teacher with model=vq_latents: its decoder is frozen and gets its own latents")


def usage():
    """What --help prints: presets, then every setting with its default and its comment above."""
    lines = ["python train.py [PRESET or runs/NAME/config.json] [key=value ...]", "", "presets:"]
    for name, values in PRESETS.items():
        items = [(k, v) for k, v in values.items() if k != "net"]
        items += [(f"net.{k}", v) for k, v in values.get("net", {}).items()]
        lines.append(f"  {name:16} {', '.join(f'{k}={v}' for k, v in items)}")
    for line in inspect.getsource(Config).splitlines()[2:]:
        field = re.match(r"    (\w+): (\w+) = (\S+)\s+# (.*)", line)
        if field:
            default = "" if field[2] == "dict" else field[3].strip('"')
            lines.append(f"  {field[1] + '=' + default:30} {field[4]}")
        elif "# ----" in line:
            lines += ["", line.split("----")[1].strip() + ":"]
    return "\n".join(lines)


def exit_with_usage(arguments):
    """Print the usage and leave if the command line asks for it."""
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(usage())
        sys.exit(0)
