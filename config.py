"""All settings of a training run: edit here, or override on the command line.

    python train.py                          # the demo
    python train.py taehv data=videos/       # a preset and overrides
    python train.py runs/x/config.json       # resumes that run with its settings; name=NEW starts another with them
    python train.py --help                   # every setting
"""
import ast
import dataclasses
import inspect
import json
import os
import re
import sys
from typing import Literal, get_args

from check_config import ConfigError, check, nearest, without_effect


@dataclasses.dataclass
class Config:
    # ---- the run
    name: str = ""                  # name of the run folder in out_dir; empty: the preset's name
    out_dir: str = "runs"           # folder that holds the run folders
    max_steps: int = 10000          # optimizer steps after which the run ends
    max_minutes: float = 0.0        # minutes of training after which the run ends, validation and saving not counted;
                                    # a cosine schedule ends with them; 0: no limit
    seed: int = 0                   # seeds the initial weights and the data order
    device: str = "auto"            # device that trains: auto, cpu, cuda, cuda:N or mps; auto prefers a GPU
    precision: Literal["auto", "bf16", "fp32"] = "auto"
                                    # number format of the computation: bf16 is autocast, fp32 uses TF32 on GPUs, and
                                    # auto takes bf16 where the hardware has it
    compile: bool = False           # whether torch.compile translates the model: minutes at the start, then faster
                                    # steps on a GPU
    resume: str = "auto"            # checkpoint to resume from: auto takes the newest usable one in the run folder,
                                    # none starts a new run; or a path
    init_from: str = ""             # weights to start from: published ones (a name or a file), or a checkpoint of ours
    timeout_minutes: float = 30.0   # minutes that a rank waits for the others before the run is given up

    # ---- data
    data: str = ""                  # videos and images to train on: a folder (with its subfolders), a file, an
                                    # annotation .json, a table .csv, or "demo", which makes synthetic clips
    data_root: str = ""             # folder that the paths in a .json or .csv start from; empty: that file's folder
    latent_cache: str = ""          # folder made by latent_cache.py: its clips and teacher's latents replace data
    clip_cache: str = ""            # folder made by latent_cache.py --teacher none (or another): its clips replace
                                    # data, and are cropped and flipped anew each time
    val_data: str = ""              # validation videos, given as data is (or a second cache of the same kind); empty:
                                    # val_fraction of the files of data
    val_fraction: float = 0.05      # fraction of the files held out for validation, chosen by their names; 0: none
    val_clips: int = 64             # number of validation clips at most
    val_size: int = 0               # height and width of validation clips, pixels; 0: size, or the first bucket's
    val_metrics: str = ""           # metrics that validation adds to MSE, PSNR, SSIM, sharpness and flicker: lpips (of
                                    # AlexNet), fid, or both as lpips,fid
    best_by: Literal["psnr", "ssim", "mse", "lpips"] = "psnr"
                                    # validation metric that chooses best.pt (lpips needs val_metrics=lpips). With a
                                    # teacher's latents, best.pt has the lowest product of two errors: that of the
                                    # pictures decoded from them, and that of the encoder's latents; a half that is not
                                    # trained does not count
    val_clips_per_video: int = 2    # number of validation clips cut from each video, always the same ones
    size: int = 128                 # height and width of training clips, pixels
    frames: int = 12                # number of frames in a clip; 1: images; taecvx takes 8k or 8k + 1
    batch_size: int = 4             # number of clips per rank and micro-step
    buckets: str = ""               # several clip shapes instead of size, frames and batch_size, each written as
                                    # size x frames:probability:batch, as in "128x12:0.8:4, 256x12:0.2:1"
    accumulation: int = 1           # number of micro-steps whose gradients make up an optimizer step
    clips_per_open: int = 1         # number of clips that are cut from a video each time it is opened, one for each of
                                    # as many steps: loading is faster, but these steps see the same files
    min_frame_delta: int = 1        # smallest distance between a clip's frames in its video, frames of the video
    max_frame_delta: int = 5        # largest distance between them; each clip's distance is drawn from this range
    random_crop: bool = True        # whether clips are random squares of the video; off: its largest centred square
    min_crop: float = 0.0           # smallest side of these squares as a fraction of the video's shorter side (a square
                                    # is never smaller than size)
    flip: bool = True               # whether half of the clips are mirrored left to right
    color_jitter: float = 0.0       # largest change of brightness, contrast and saturation, as a fraction; hue changes
                                    # by a quarter of it
    blur: float = 0.0               # probability that a clip is slightly blurred (by a Gaussian)
    use_images: bool = False        # whether only the images in data are used, each as a clip of one frame
    image_sequences: bool = False   # whether unrelated images are joined into clips of several frames
    max_pixels: int = 100_000_000   # largest height x width of an image or a frame; larger files are skipped
    workers: int = -1               # number of data processes per rank; -1: one if the model runs on the CPU, else one
                                    # for each core, up to 16

    # ---- model
    model: Literal["taehv", "vqgan", "vqvae2", "vqvae_video", "vq_latents", "dcae"] = "taehv"
                                    # kind of model
    net: dict = dataclasses.field(default_factory=dict)
                                    # arguments of the model's class; net.NAME=VALUE sets one of them
    variant: str = ""               # taehv: row of VARIANTS in model_taehv.py; empty: that of init_from, or taehv
    patch_size: int = 0             # taehv: side of the squares of pixels that are folded into channels, pixels;
                                    # 0: the variant's
    latent_channels: int = 0        # taehv: number of channels of a latent; 0: that of init_from, or the variant's
    init: Literal["clips", "colours", "pytorch"] = "clips"
                                    # taehv: fresh weights. clips fits them to some of the training clips in closed form
                                    # (fit_taehv.py), colours starts as an autoencoder that keeps the mean colour of
                                    # each cell (init_taehv.py), pytorch with PyTorch's own random weights
    train_encoder: bool = True      # taehv: whether the encoder learns; off: it keeps its weights
    train_decoder: bool = True      # taehv: whether the decoder learns; off: it keeps its weights
    gradient_checkpointing: bool = False
                                    # whether the backward pass computes activations again: less memory, more time

    # ---- loss: a term whose weight is 0 costs nothing
    decoder_input: Literal["own", "teacher"] = "own"
                                    # latents that the decoder learns from: its own encoder's, or the teacher's in the
                                    # latent cache
    own_share: float = 0.0          # decoder_input=teacher: probability that a clip is decoded from the own encoder's
                                    # latents instead (the encoder does not learn from it)
    pixel_weight: float = 1.0       # weight of the pixel loss
    pixel_loss: Literal["l1", "l2", "charbonnier", "l1+l2"] = "l1"
                                    # distance of pixels in [0, 1] that the pixel loss averages (l1+l2 is |d| + 2 d^2)
    encoder_weight: float = 0.0     # weight of the squared error of the encoder's latents against the latent cache's
    vq_weight: float = 1.0          # weight of a tokenizer's codebook and commitment loss
    temporal_weight: float = 0.0    # weight of the distance between the changes from frame to frame: against flicker
    wavelet_weight: float = 0.0     # weight of the distance between the details of Haar wavelets in space and time
    wavelet_levels: int = 2         # number of wavelet_weight's levels: details of 2 pixels and frames, of 4, ...
    perceptual_weight: float = 0.0  # weight of the LPIPS loss
    perceptual_net: Literal["vgg", "alex"] = "vgg"
                                    # backbone network of the LPIPS loss (validation measures with alex)
    perceptual_frames: int = 2      # number of frames of each clip that the LPIPS loss compares, drawn anew in each
                                    # micro-step; 0: all
    seraena_weight: float = 0.0     # weight of the squared distance to the frames that Seraena has corrected, which
                                    # makes results sharper
    seraena_frames: int = 3         # number of consecutive frames that Seraena's discriminator sees as one image
    seraena_lr: float = 3e-4        # learning rate of Seraena's discriminator
    seraena_pairs: bool = False     # whether Seraena's discriminator learns from each fake together with its original:
                                    # in small batches it then tells them apart much sooner; off, as published: each
                                    # sample is either an original or a fake
    seraena_replay_mb: int = 512    # memory for Seraena's replayed samples, MB per rank
    seraena_save_replay: bool = True
                                    # whether checkpoints hold Seraena's replayed samples, in one file per rank; off:
                                    # they are collected anew after a resume
    gan_weight: float = 0.0         # weight of the PatchGAN's term; with gan_adaptive relative to the gradient of the
                                    # other terms
    gan_adaptive: bool = True       # whether gan_weight is scaled by the gradients at the decoder's last layer, as in
                                    # VQGAN
    gan_max_weight: float = 10000.0  # largest factor that gan_adaptive scales it by
    gan_start: int = 0              # step in which the PatchGAN starts; before that it costs nothing
    gan_ramp: int = 1000            # number of steps from gan_start on in which its weight grows to gan_weight
    gan_every: int = 1              # number of steps from one update of the PatchGAN to the next
    gan_dims: Literal[2, 3] = 2     # input of the PatchGAN: 2 for single frames, 3 for clips
    gan_loss: Literal["hinge", "vanilla"] = "hinge"
                                    # loss of the PatchGAN
    gan_norm: Literal["batch", "group", "none"] = "batch"
                                    # normalisation in the PatchGAN
    gan_lr: float = 1e-5            # learning rate of the PatchGAN, the same in all steps
    gan_beta1: float = 0.5          # decay per step of the mean gradient in the PatchGAN's AdamW
    gan_beta2: float = 0.9          # decay per step of the mean squared gradient in the PatchGAN's AdamW
    gan_weight_decay: float = 0.0   # weight decay in the PatchGAN's AdamW
    gan_clip: float = 0.0           # gradient norm above which the PatchGAN's gradients are scaled down; 0: never
    gan_lecam: float = 0.0          # weight of the LeCam regulariser in the PatchGAN's loss

    # ---- optimizer
    lr: float = 3e-4                # highest learning rate of AdamW, which the schedule starts from; parts of a TAEHV
                                    # may have multiples of it
    encoder_lr_factor: float = 1.0  # learning rate of a TAEHV's encoder, as a multiple of lr
    latents_lr_factor: float = 1.0  # learning rate of a TAEHV's last encoder layer, which gives the latents, as a
                                    # multiple of the encoder's
    schedule: Literal["constant", "cosine", "exponential"] = "cosine"
                                    # course of the learning rate after the warm-up: cosine falls to lr_final at
                                    # max_steps or max_minutes, exponential falls by lr_decay
    warmup_steps: int = 100         # steps in which the learning rate rises linearly to lr
    lr_final: float = 0.05          # cosine: learning rate at the end, as a fraction of lr
    lr_decay: float = 0.99          # exponential: factor of the learning rate per 1000 steps
    beta1: float = 0.9              # decay per step of the mean gradient in AdamW
    beta2: float = 0.95             # decay per step of the mean squared gradient in AdamW
    weight_decay: float = 0.01      # weight decay in AdamW
    grad_clip: float = 1.0          # gradient norm above which gradients are scaled down; 0: never
    ema_decay: float = 0.999        # decay per step of the average of the weights, which is validated and saved; it
                                    # starts at 0.1 and rises to this
    max_bad_steps: int = 20         # number of steps in a row with a loss or gradient that is not finite after which
                                    # the run stops, at the next log line

    # ---- logging and checkpoints
    wandb: str = ""                 # project of Weights & Biases that gets a copy of TensorBoard's curves; empty: none
    log_every: int = 10             # number of steps from one log line to the next
    val_every: int = 500            # number of steps from one validation to the next
    save_every: int = 500           # number of steps from one checkpoint to the next
    keep_last: int = 3              # number of newest checkpoints that are kept, besides best.pt and the newest one
                                    # from before the loss went wrong


# Settings of published trainers, which several presets share. Their pixels are in [-1, 1], ours in [0, 1]: an l1 of
# theirs has the weight 2 here, an l2 the weight 4. They validate the weights themselves, and we validate their average.
# They do not flip clips. The eps of their optimizers is 1e-8 (OptVQ's is 1e-7), ours is 1e-7.

# CompVis/taming-transformers: taming/models/vqgan.py, configs/faceshq_vqgan.yaml. Differences: lr is 1e-4 here, and
# theirs is 4.5e-6 times the clips of a step, 3.6e-5 for 8 and 2.9e-4 for 64. The PatchGAN's term grows over
# gan_ramp=1000 steps here, and theirs starts at full weight.
VQGAN = dict(model="vqgan", frames=1, size=256, batch_size=8, max_steps=200000, lr=1e-4, schedule="constant",
             warmup_steps=0, beta1=0.5, beta2=0.9, weight_decay=0.0, grad_clip=0.0, pixel_weight=2.0,
             perceptual_weight=1.0, gan_weight=0.8, gan_start=30000, gan_lr=1e-4)
# zbr17/OptVQ: configs/imagenet/optvq_256_f16_h4.yaml, for 64 clips a step on eight ranks: lr is the README's 2e-6 times
# 64. Differences: our discriminator begins at gan_start and its term grows (theirs learns from the first step on, and
# its term starts at full weight), its learning rate is constant (theirs follows the model's), weight decay applies to
# all weights (theirs to those of convolutions and linear layers), and clips are neither blurred nor jittered in colour
# (blur=0.5 color_jitter=0.4 min_crop=0.45 come near).
OPTVQ = dict(VQGAN, max_steps=1000000, lr=1.28e-4, schedule="cosine", warmup_steps=10000, lr_final=0.0, beta1=0.9,
             beta2=0.999, weight_decay=0.05, grad_clip=1.0, pixel_loss="l1+l2", perceptual_weight=3.0, gan_weight=1.0,
             gan_start=150000, gan_lr=1.28e-4, gan_beta1=0.9, gan_beta2=0.999, gan_weight_decay=0.05, gan_clip=1.0)
# vvvm23/vqvae-2: hps.py (ffhq256), trainer.py. Differences: 16 clips per rank, which on eight ranks are its 128; and
# three levels, the default of its class, where ffhq256 has two (net.nb_levels=2 net.scaling_rates=4,2).
VQVAE2 = dict(model="vqvae2", frames=1, size=256, batch_size=16, max_steps=100000, lr=1e-4, schedule="constant",
              warmup_steps=0, beta2=0.999, weight_decay=0.0, grad_clip=0.0, pixel_loss="l2", pixel_weight=4.0)
# hpcaitech/Open-Sora: configs/vae/train/video_dc_ae.py. Differences: its loss is the sum over the 196 608 numbers of a
# frame, so its gradient clipping at 1 scales every gradient down; our loss is their mean. All our ranks take images in
# the same step, 8 on each; there each rank but the first decides for itself, and takes one.
DCAE = dict(model="dcae", size=256, frames=32, batch_size=1, buckets="256x32:0.8:1, 256x1:0.2:8", max_frame_delta=1,
            lr=5e-5, schedule="constant", warmup_steps=0, beta2=0.98, weight_decay=0.0, ema_decay=0.99,
            max_steps=100000, pixel_weight=2.0, perceptual_weight=0.5, perceptual_frames=0)
# Its second stage, video_dc_ae_disc.py. Its adaptive weight is at most 10 000 for the sum: 10 000 / 196 608 for our
# mean.
DCAE_DISC = dict(gan_weight=0.05, gan_dims=3, gan_ramp=0, gan_max_weight=0.051, gan_lr=1e-4, gan_beta1=0.9,
                 gan_beta2=0.98, gan_clip=1.0)
# The same network, narrow, for minutes on a CPU. These settings are ours.
DCAE_SMALL = dict(model="dcae", data="demo", size=64, frames=8, batch_size=2, max_frame_delta=1, lr=2e-4, max_steps=150,
                  warmup_steps=20, ema_decay=0.95, log_every=5, val_every=50, save_every=50, workers=1,
                  net=dict(width_list=(32, 32, 64, 64, 64, 64), encoder_depth_list=(1,) * 6,
                           decoder_depth_list=(1,) * 6, latent_channels=64))

SMALL_TAEHV = dict(encoder_widths=(32, 32, 48, 48), decoder_widths=(128, 64, 48, 32))  # 3.3 M parameters

PRESETS = {
    # Synthetic clips, a few minutes on two cores.
    # The network is that of taehv_small: in the same time it gets 0.6 dB more than one of full width (docs/results.md).
    "demo": dict(data="demo", size=64, max_steps=240, batch_size=4, max_frame_delta=2, warmup_steps=20, lr=3e-4,
                 ema_decay=0.95, log_every=5, val_every=80, save_every=80, val_clips=12, workers=1, net=SMALL_TAEHV),
    # A TAEHV from scratch on your own videos. Squared errors, as in the published notebook: in short runs they bring
    # more PSNR and SSIM than l1, at the same sharpness (docs/results.md).
    "taehv": dict(max_steps=50000, batch_size=8, pixel_loss="l2"),
    # 3.3 M parameters instead of 11.3 M, and clips of 64 px, for minutes or hours on a CPU: add max_minutes=25.
    # Small crops and squared errors learn most in a short time (docs/results.md).
    "taehv_small": dict(size=64, batch_size=4, pixel_loss="l2", warmup_steps=50, max_steps=50000, net=SMALL_TAEHV),
    # The optimizer, batches and crops of the published training notebook, with the squared error of pixels as the only
    # loss: neither a teacher's latents nor Seraena. The table in docs/speed.md compares with it.
    "taehv_notebook": dict(init="pytorch", size=64, batch_size=16, pixel_loss="l2", schedule="constant", warmup_steps=0,
                           grad_clip=0.0, max_steps=50000),
    # A TAEHV for the latents of a big VAE: add latent_cache=FOLDER, made by latent_cache.py, and variant=... . The
    # encoder learns the teacher's latents, and the decoder learns the pixels from the teacher's latents.
    # train_encoder=false or train_decoder=false trains one half; init_from=FILE.pth starts from published weights.
    # A quarter of the clips are decoded from its own latents: without them, encoding and decoding with it gets worse at
    # first. The encoder learns latents sooner at three times the learning rate, and its last layer, whose weights are
    # large if they are fitted, at eight times that (docs/results.md).
    "taehv_distill": dict(max_steps=10000, decoder_input="teacher", encoder_weight=1.0, own_share=0.25,
                          encoder_lr_factor=3.0, latents_lr_factor=8.0, pixel_loss="l2"),
    # A second stage for a distilled model, with the adversarial corrector: sharper, at a lower PSNR. Add
    # init_from=runs/tiny train_encoder=false .
    # Weights as in madebyollin/seraena's notebook: the squared errors of the latents, of the pixels and to the
    # corrected frames have the weight 1 each. Corrections have unit deviation: they pull 14 times as hard as pixels
    # that are 0.07 off. Differences: a cosine schedule with warm-up, clipped gradients and 4 clips (there constant,
    # unclipped and 16); 512 MB of replayed samples (there 16 384 samples, which are 2.5 GB at 64 px); frames are not
    # clamped in training (there they are); the discriminator sees 9 frames as three images (there 12, with the first
    # three repeated). With few clips in a step, this has no visible effect for a long time; with seraena_pairs=true
    # seraena_lr=1e-3 seraena_weight=0.2 it has one within 300 steps of 4 clips (docs/results.md).
    "taehv_seraena": dict(max_steps=10000, decoder_input="teacher", encoder_weight=1.0, pixel_loss="l2",
                          seraena_weight=1.0),
    # A published decoder for your own domain: add init_from=taew2_1 (or a file) and latent_cache=FOLDER, the big VAE's
    # latents of your videos, which the decoder learns to decode. With data=FOLDER instead, the decoder learns from the
    # latents of its own encoder, which are close to the VAE's. The encoder keeps its weights; with train_encoder=true
    # its latents move away from the VAE's.
    "taehv_finetune": dict(max_steps=10000, batch_size=8, lr=1e-4, warmup_steps=200, pixel_loss="l2",
                           train_encoder=False),
    # Tokenizers of single frames (16x downsampling, 1024 codes), of videos or of images. LPIPS starts at once, the
    # PatchGAN later. vqgan_ema is taming's recipe with a quantizer of ours, vqvae2_optvq is vvvm23's with OptVQ's.
    "vqgan": dict(VQGAN, net=dict(quantizer="vq")),
    "vqgan_ema": dict(VQGAN, net=dict(quantizer="ema", kmeans_init=True, restart_below=0.1)),
    "vqgan_optvq": dict(OPTVQ, net=dict(quantizer="optvq", num_head=4, n_embed=16384, kmeans_init=True)),
    "vqvae2": dict(VQVAE2),
    "vqvae2_optvq": dict(VQVAE2, net=dict(quantizer="optvq")),
    # Codes for the latents of a frozen TAEHV: add latent_cache=FOLDER init_from=taew2_1 (or a file). Only the
    # quantizer and a small network behind it learn; pixel_weight=1 lets them learn through the decoder too.
    "vq_latents": dict(model="vq_latents", batch_size=32, max_steps=20000, lr=1e-3, encoder_weight=1.0,
                       pixel_weight=0.0, net=dict(quantizer="ema", n_embed=4096, kmeans_init=True, restart_below=0.1)),
    # A clip of 16 frames as one map of codes: zhangxuan1918/VqVaeVideo, train/videos2. Its pixels are in units of
    # ImageNet's standard deviations, so its squared errors have the weight 19.6 here. Differences: 128 px and 512
    # channels (there 256 and 1024), and one Adam for all steps (there each step makes a new one, which has no momentum
    # and a learning rate that never decays).
    "vqvae_video": dict(model="vqvae_video", net=dict(sequence_length=16), frames=16, size=128, batch_size=4,
                        max_frame_delta=1, max_steps=160000, lr=1e-4, schedule="exponential", lr_decay=0.98,
                        warmup_steps=0, beta2=0.999, weight_decay=0.0, grad_clip=0.0, pixel_loss="l2",
                        pixel_weight=19.6),
    # Video DC-AE: stage one, then stage two with a PatchGAN over clips (add init_from=runs/dcae). dcae_small, then
    # dcae_small_disc with init_from=runs/dcae_small, take minutes on a CPU.
    "dcae": dict(DCAE),
    "dcae_disc": dict(DCAE, **DCAE_DISC, gradient_checkpointing=True),
    "dcae_small": dict(DCAE_SMALL),
    "dcae_small_disc": dict(DCAE_SMALL, **{**DCAE_DISC, "gan_max_weight": 0.81}),  # 10 000 / (3 * 64 * 64)
}


def load_config(arguments):
    """["taehv", "lr=1e-4", ...] -> Config. The first argument is a preset, or the path of a settings file like a run's
    config.json; without one, the preset is demo. ConfigError for settings that no run can use."""
    preset, overrides = "demo", list(arguments)
    kinds, given = {field.name: kind_of(field.type) for field in dataclasses.fields(Config)}, set()
    if overrides and "=" not in overrides[0]:
        preset = overrides.pop(0)
    if preset.endswith(".json"):
        values = {**read_settings(preset, kinds), **run_of(preset)}
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
            known = item in PRESETS or item.endswith(".json")
            raise ConfigError(f"{item!r} is no key=value" + "; a preset comes first, before the settings" * known)
        given.add(key)
        if key.startswith("net."):
            values["net"] = {**values.get("net", {}), key[4:]: parse_literal(key, text)}
            continue
        if key not in kinds or kinds[key] is dict:
            raise ConfigError(f"unknown key {key!r}{nearest(key, kinds)}; python train.py --help lists all")
        values[key] = parse(key, text, kinds[key])
    drop_unsuited(values, given)
    config = Config(**values)
    config.name = config.name or preset
    if preset == "taehv_finetune":
        if not config.init_from and config.resume in ("auto", "none"):
            raise ConfigError("taehv_finetune needs init_from=FILE, the weights to go on from (published, or a run of "
                              "yours); the preset taehv starts from scratch")
        if config.latent_cache and "decoder_input" not in values:
            config.decoder_input = "teacher"
    for key, why in without_effect(config).items():  # an error on the command line; from a preset or a file, ignored
        if (value := getattr(config, key)) != DEFAULTS[key]:
            if key in given:
                raise ConfigError(f"{key}={value} {why}; leave {key} out")
            setattr(config, key, DEFAULTS[key])
    if config.use_images:  # clips of one frame
        if config.image_sequences or "frames" in given and config.frames > 1 or "buckets" in given and config.buckets:
            raise ConfigError("use_images=true makes clips of one frame: leave out frames, buckets and image_sequences")
        config.frames, config.buckets = 1, ""
    check(config)
    return config


def run_of(path):
    """{"out_dir", "name"} of the run whose folder holds this config.json; {} for any other file. The folder may have
    been moved or copied since the file was written."""
    folder = os.path.dirname(path) or "."
    if os.path.basename(path) != "config.json" or not os.path.exists(os.path.join(folder, "train.log")):
        return {}
    return {"out_dir": os.path.normpath(os.path.join(folder, os.pardir)),
            "name": os.path.basename(os.path.abspath(folder))}


def drop_unsuited(values, given):
    """Remove from a preset's settings `values`, in place, those that only suit choices of the preset which the command
    line has changed: clip shapes, widths, options of a quantizer, learning rates of an encoder. given: the names of the
    settings on the command line. ConfigError for buckets= together with a setting that they replace."""
    net = values.get("net", {})
    if values.get("buckets") and (shape := sorted(given & {"size", "frames", "batch_size"})):
        if "buckets" in given:
            raise ConfigError(f"{shape[0]}={values[shape[0]]} with buckets={values['buckets']}: each bucket has its "
                              f"own; leave {shape[0]} out")
        values["buckets"] = ""
    quantizer = net.get("kind", {"rvq": "vq", "product": "ema"}.get(net.get("quantizer"), net.get("quantizer")))
    takes = {"kmeans_init": ("vq", "ema", "optvq"), "restart_below": ("vq", "ema"), "num_head": ("optvq",)}
    other_model = "model" in given or "init_from" in given and values["init_from"]
    values["net"] = {key: value for key, value in net.items() if f"net.{key}" in given or not (
        key in takes and quantizer not in takes[key] or other_model and key.endswith("widths"))}
    # taehv_distill's learning rates and its own_share suit an encoder that learns from latents alone. Its
    # latents_lr_factor suits a last layer that was fitted to the latents (fit_taehv.can_fit).
    alone = "decoder_input" in given and values["decoder_input"] == "own" or (
        "train_encoder" in given and not values["train_encoder"])
    unfitted = ("init_from" in given and values["init_from"] or "init" in given and values["init"] != "clips"
                or values.get("variant", "").endswith(("super", "wide", "h3")))
    for key, is_unsuited in dict(own_share=alone, encoder_lr_factor=alone, latents_lr_factor=alone or unfitted).items():
        if is_unsuited and key not in given:
            values.pop(key, None)


def read_settings(path, kinds):
    """{key: value} of a JSON file of settings such as a run's config.json. ConfigError if it cannot be read."""
    from untrusted import SETTINGS, read_json  # here, so that config.py and check_config.py work without untrusted.py
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
    """A value from JSON with its lists, at any depth, turned into tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def kind_of(annotation):
    """The type of a setting, or of its choices: bool, int, float, str or dict."""
    return type(get_args(annotation)[0]) if get_args(annotation) else annotation


def parse(key, text, kind):
    """`text` as a value of type `kind`, for the setting `key`. ConfigError if it is not one."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "on": True,
                    "false": False, "0": False, "no": False, "off": False}[text.lower()]
        if kind is int and len(text) > 18:  # may be more than 64 bits hold
            raise ValueError
        return kind(text)
    except (ValueError, KeyError):
        meant = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{key}={text}: {meant} is wanted") from None


def parse_literal(key, text):
    """The value of a net.KEY=TEXT: a number, a boolean, a tuple of these, or a word, as in 32, true, 1,2,4 or ema."""
    try:
        return ast.literal_eval(re.sub(r"\b(true|false)\b", lambda word: word[0].capitalize(), text, flags=re.I))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if re.fullmatch(r"[A-Za-z_]\w*", text):
            return text
        raise ConfigError(f"{key}={text}: a number, true, false, a word, or several like 1,2,4 are wanted ([]: none)"
                          ) from None


DEFAULTS = vars(Config())
CHOICES = {field.name: get_args(field.type) for field in dataclasses.fields(Config) if get_args(field.type)}


def usage():
    """The text of --help: the presets, then every setting with its default, its choices and its comment in Config."""
    lines = ["python train.py [PRESET or runs/NAME/config.json] [key=value ...]", "",
             'Without a preset: demo. What each is for: README.md, "Presets".', "", "presets:"]
    for name, values in PRESETS.items():
        items = [(k, v) for k, v in values.items() if k != "net"]
        items += [(f"net.{k}", v) for k, v in values.get("net", {}).items()]
        lines.append(f"  {name:16} {', '.join(f'{k}={v}' for k, v in items)}")
    for line in inspect.getsource(Config).splitlines()[2:]:
        if field := re.match(r"    (\w+): (.+?) = (\S+)", line):
            default = "" if field[1] == "net" else field[3].strip('"')
            start = f"  {field[1] + '=' + default:32} "
            if field[1] in CHOICES:
                lines.append(f"{start}one of {', '.join(map(str, CHOICES[field[1]]))}")
                start = " " * 35
        if "# ----" in line:
            lines += ["", line.split("----")[1].strip() + ":"]
        elif "# " in line:
            lines.append(start + line.split("# ", 1)[1])
            start = " " * 35
    return "\n".join(lines)


def exit_with_usage(arguments):
    """Print the usage and leave if the command line asks for it."""
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(usage())
        sys.exit(0)
