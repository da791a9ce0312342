"""Cut a trained TAEHV's channels to a budget of parameters: a smaller model with the same latents, to be fine-tuned.

    python prune.py runs/mine --keep 0.5 --data videos/                             # half of the parameters
    python prune.py taew2_1 --parameters 5M --data videos/ --out taew2_1_small.pth  # at most 5 million
    python prune.py runs/tiny --keep 0.5 --data cache/ --part decoder               # by a teacher's latents

A channel's importance is its effect on the output, estimated from the gradients of a few clips. All layers of a stage
lose the same number of channels, the least important ones. The stage that loses the least importance for each parameter
saved is cut next, until the budget is met. Then least squares over the same clips predicts the removed channels from
those that stay, and the layers that read them get the prediction. prune_taehv.py does all this. PSNR is measured on
held-out clips. Without --data, importance is the size of the weights, and nothing is predicted.
"""
from screen import end_at_ctrl_c, ending_in_one_line, guard_screen, one_line

end_at_ctrl_c(__name__)
import argparse
import contextlib
import copy
import importlib.util
import os
import shlex

import torch
from tqdm import tqdm

import data
import models
from checkpoint import CheckpointError, first_line, write_atomically
from clip_cache import ValCuts
from data_files import find_sources, probe, split_sources
from device import DeviceError, pick_device
from evaluate import evaluate
from cache_files import CachedClips, LatentCache
from measure import alternate
from model_taehv import TAEHV, recognise
from prune_taehv import (LEAST, PARTS, by_chance, by_magnitude, by_taylor, choose_channels, compensate, cut, layers_of,
                         smallest)
from video_files import DataError
from weights_file import ExportError, as_pth, as_safetensors, folder_for

HELD_OUT = 0.1       # fraction of the files of --data that are held out, without --val-data
TIMED = 1, 12, 3, 128, 128  # shape of the video whose encoding and decoding is timed
MISTAKES = (CheckpointError, DeviceError, ExportError, OSError, DataError)


class PruneError(Exception):
    """A model that cannot be cut as asked; the message names the reason."""


# ---- clips ---------------------------------------------------------------------------------------------------------


def find_samples(options, model):
    """(clips to learn from, held-out clips, train.py's preset and data settings as text). Clips are lists of {"video":
    uint8 T 3 H W, and, from a latent cache, "latents"}."""
    if os.path.isfile(os.path.join(options.data, "index.json")):
        return cached_samples(options, model)
    sources, held_out = readable(options.data), []
    if options.val_data:
        held_out = readable(options.val_data)
    else:
        sources, held_out = split_sources(sources, HELD_OUT)
        if not held_out:
            raise PruneError(f"--data {options.data} holds one file that can be read, and PSNR wants others: set "
                             "--val-data")
    check_frames(model, options.frames)
    found = []
    for some, limit in ((sources, options.clips), (held_out, options.val_clips)):
        clips = data.ValClips(some, options.size, options.frames, -(-limit // len(some)), limit)
        found.append(clips.share(0, 1, lambda notes: None) if len(clips) else [])
        if not found[-1]:
            raise PruneError(f"{some[0].path}: no clip of {options.frames} frames can be read there")
    return *found, f"{preset_for(options)} data={shlex.quote(options.data)}"


def preset_for(options):
    """train.py's preset for fine-tuning on videos; if the encoder was cut, it has to be trained too."""
    return "taehv_finetune" if options.part == "decoder" else "taehv_finetune train_encoder=true"


def check_frames(model, frames):
    """PruneError for a number of frames that the model cannot take."""
    try:
        model.check_frames(frames)
    except ValueError as error:
        raise PruneError(f"{frames} frames: {error}") from None


def readable(path):
    """The sources under `path` that can be read. PruneError if none can."""
    sources, refused = probe(find_sources(path))
    if not sources:
        raise PruneError(f"none of the {len(refused)} files of {path} can be read; the first: {refused[0][1]}")
    return sources


def cached_samples(options, model):
    """`find_samples` from a cache of latent_cache.py."""
    cache, plain = open_cache(options.data, model)
    mine, held_out, _ = cache.split_by_file(0 if options.val_data else HELD_OUT)
    other = cache
    if options.val_data:
        other, other_plain = open_cache(options.val_data, model)
        held_out = range(len(other))
        if plain != other_plain or not plain and other.fingerprint != cache.fingerprint:
            raise PruneError(f"--val-data {options.val_data} holds other latents than {options.data}")
    if not len(held_out):
        raise PruneError(f"--data {options.data} holds clips of one file, and PSNR wants others: set --val-data")
    found = [(ValCuts(one, clips, one.size, one.frames, limit) if plain else CachedClips(one, clips, limit=limit)
              ).share(0, 1, None)
             for one, clips, limit in ((cache, mine, options.clips), (other, held_out, options.val_clips))]
    preset = f"{preset_for(options)} clip_cache={shlex.quote(options.data)}" if plain else (
        f"taehv_distill latent_cache={shlex.quote(options.data)}")
    other_half = {"both": "", "decoder": " train_encoder=false", "encoder": " train_decoder=false"}[options.part]
    return *found, f"{preset} size={cache.size} frames={cache.frames}{'' if plain else other_half}"


def open_cache(path, model):
    """(a LatentCache, whether it holds clips without latents). PruneError if it does not fit the model."""
    cache = LatentCache(path, clips_only=True)
    plain = cache.teacher.get("spec") == "none"
    if cache.size % model.space_factor:
        raise PruneError(f"{path}: clips of {cache.size} pixels; this model takes multiples of {model.space_factor}")
    if plain:
        check_frames(model, cache.frames)
        return cache, plain
    cache = LatentCache(path)
    _, channels, height, width = cache.latent_shape
    if (channels, height, width) != (model.latent_channels, *[cache.size // model.space_factor] * 2):
        raise PruneError(f"{path}: latents {cache.latent_shape} of {cache.size} pixels, where this model has "
                         f"{model.latent_channels} channels and 1/{model.space_factor} of the size")
    cache.check_alignment(model)
    return cache, plain


# ---- the command ---------------------------------------------------------------------------------------------------


def check_model(model, path):
    """PruneError for anything but a TAEHV with a plain decoder."""
    if not isinstance(model, TAEHV):
        raise PruneError(f"{path} is a {type(model).__name__}: prune.py cuts TAEHVs")
    if model.arch_variant:
        raise PruneError(f"{path} has a {model.arch_variant} decoder ({model.variant}): prune.py cuts plain ones")


def check_name(model, out):
    """PruneError unless models.py can load this model again from the file `out` of its weights."""
    if out.endswith(".safetensors"):
        if importlib.util.find_spec("safetensors") is None:
            raise PruneError(f"--out {out} needs a package: pip install safetensors")
        return
    if not out.endswith(".pth"):
        raise PruneError(f"--out {out}: a name that ends in .pth or .safetensors is wanted")
    if os.path.basename(out) == "model.pth":
        raise PruneError(f"--out {out}: a model.pth is taken for that of a run; choose another name")
    with torch.device("meta"):  # only its settings are needed
        found = TAEHV(**recognise(model.state_dict(), out))
    if found.config != model.config:
        raise PruneError(f"--out {out}: by this name the weights would be taken for {found.variant} without its own "
                         f"settings; put {model.variant} into the name, or let it end in .safetensors")


def run(options):
    """Do everything, from the options to the file of weights. PruneError or one of MISTAKES; then nothing is written.
    """
    model, words = models.load_model(options.checkpoint, options.variant)
    check_model(model, options.checkpoint)
    layers, full = layers_of(model), sum(p.numel() for p in model.parameters())
    budget = options.parameters or int(options.keep * full)
    parts = PARTS if options.part == "both" else (options.part,)
    if budget >= full:
        raise PruneError(f"--parameters {budget:,}: {options.checkpoint} has {full:,}")
    if budget < (least := smallest(model, layers, parts)):
        raise PruneError(f"{budget:,} parameters are too few: with {LEAST} channels in all stages of --part "
                         f"{options.part}, {options.checkpoint} still has {least:,}")
    out = options.out or f"{model.variant}_{budget / 1e6:.3g}M.pth"
    check_name(model, out)
    if os.path.isdir(out) or os.path.lexists(out) and not options.force:
        raise PruneError(f"{out} exists: choose another --out{'' if os.path.isdir(out) else ', or --force'}")
    options.frames = options.frames or (17 if model.is_h3 else 16 if model.is_cogvideox else 12)
    if options.size % model.space_factor:
        raise PruneError(f"--size {options.size}: {model.variant} takes multiples of {model.space_factor}")
    device = pick_device(options.device)
    with folder_for(os.path.dirname(out) or "."):
        samples, held_out, settings = [], [], f"{preset_for(options)} data=..."
        if options.data:
            samples, held_out, settings = find_samples(options, model)
        print(f"{options.checkpoint}: {words}; " + (f"{len(samples)} clips to learn from, {len(held_out)} held out"
              if samples else "without --data, the sizes of weights decide, and nothing makes up for what goes"))
        scores = (by_magnitude(model, layers) if not samples or options.by == "magnitude" else
                  by_chance(model, layers) if options.by == "random" else by_taylor(model, layers, samples, device))
        kept = choose_channels(model, layers, scores, budget, parts, options.multiple)
        small = cut(model, layers, kept)
        if samples and options.compensate:
            compensate(model, small, layers, kept, samples, device, parts)
        state = {key: value.contiguous() for key, value in small.state_dict().items()}
        print_table(model, small, held_out, device)
        write_atomically(out, as_safetensors(small, state) if out.endswith(".safetensors") else as_pth(state))
    print(f"wrote {out}; fine-tune it:\npython train.py {settings} init_from={shlex.quote(out)} name=NAME")


def print_table(model, small, held_out, device):
    """Print size, quality and speed of both models beside each other."""
    rows = {"parameters": [f"{sum(p.numel() for p in m.parameters()):,}" for m in (model, small)]}
    for part in ("encoder", "decoder"):
        rows[f"{part}_widths"] = [",".join(map(str, getattr(m, f"{part}_widths"))) for m in (model, small)]
    if held_out:
        found = [evaluate(copy.deepcopy(m).to(device), held_out, device, contextlib.nullcontext(), None)[0]
                 for m in tqdm((model, small), desc="PSNR", unit="model", leave=False, disable=None)]
        for title, key, unit in (("PSNR", "psnr", ".2f"), ("PSNR from the teacher's latents", "teacher_psnr", ".2f"),
                                 ("error of the latents, squared", "latent_mse", ".5f")):
            if key in found[0]:
                rows[title] = [f"{one[key]:{unit}}{' dB' if 'psnr' in key else ''}" for one in found]
    *_, height, width = TIMED
    height, width = (-(-side // model.space_factor) * model.space_factor for side in (height, width))
    video = torch.rand(*TIMED[:-2], height, width, device=device)
    with torch.no_grad():
        latents, calls = model.to(device).encode(video), {}
        for which, m in (("before", model), ("after", small.to(device))):
            quick = models.fast(m)
            calls.update({f"encode {which}": lambda m=quick: m.encode(video),
                          f"decode {which}": lambda m=quick: m.decode(latents)})
        seconds = alternate(calls, 5, device, limit=20)
    for half in ("encode", "decode"):
        rows[f"{half}, frames/s at {width}x{height}"] = [f"{video.shape[1] / seconds[f'{half} {which}']:.1f}"
                                                         for which in ("before", "after")]
    size = [max(map(len, column)) for column in zip(*rows.values())]
    print(f"{'':32}  {'before':>{size[0]}}  {'after':>{size[1]}}")
    for title, (old, new) in rows.items():
        print(f"{title:32}  {old:>{size[0]}}  {new:>{size[1]}}")


def number(text):
    """"5M", "500k" or "5000000" -> 5_000_000."""
    scale = {"k": 1e3, "m": 1e6}.get(text[-1:].lower(), 1)
    value = float(text[:-1] if scale > 1 else text) * scale
    if not 1 <= value < 1e12:
        raise ValueError
    return int(value)


def fraction(text):
    """A number above 0 and below 1. ValueError for any other."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"prune.py: {one_line(message)}\n")  # without lines of usage
    parser.add_argument("checkpoint", help="run folder, checkpoint (.pt), weights (.pth, .safetensors), or the name of "
                        "published ones (say taew2_1)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--parameters", type=number, metavar="N", help="most parameters of the whole model: 5M, 800k")
    budget.add_argument("--keep", type=fraction, metavar="F", help="the same as a fraction of those that it has: 0.5")
    parser.add_argument("--part", default="both", choices=("encoder", "decoder", "both"), help="what is cut (both)")
    parser.add_argument("--data", metavar="VIDEOS_OR_CACHE", help="clips to learn from: videos, or a cache of "
                        "latent_cache.py, whose teacher's latents count")
    parser.add_argument("--val-data", metavar="VIDEOS_OR_CACHE", help="clips that PSNR is measured on (default: of "
                        f"{HELD_OUT:.0%} of the files of --data, which are held out)".replace("%", "%%"))
    parser.add_argument("--clips", type=int, default=24, metavar="N",
                        help="number of clips to learn from (%(default)s)")
    parser.add_argument("--val-clips", type=int, default=16, metavar="N",
                        help="number of clips to measure on (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="height and width of clips cut from videos, pixels "
                        "(%(default)s)")
    parser.add_argument("--frames", type=int, default=0,
                        help="number of frames of clips cut from videos (12; taecvx 16, taeh3 17)")
    parser.add_argument("--by", default="taylor", choices=("taylor", "magnitude", "random"), help="importance: what a "
                        "channel does to the output, the sizes of its weights, or chance (default: %(default)s)")
    parser.add_argument("--no-compensation", dest="compensate", action="store_false", help="fold nothing into the "
                        "layers that read what goes")
    parser.add_argument("--multiple", type=int, default=16, choices=(8, 16), help="what widths are multiples "
                        "of, if they are not 8 (default: %(default)s, which CPUs compute in blocks)")
    parser.add_argument("--out", metavar="FILE", help="file to write, .pth or .safetensors (VARIANT_NM.pth)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--variant", help="what the weights are, where their shapes do not tell (say taecvx)")
    parser.add_argument("--force", action="store_true", help="write over a file that exists")
    options = parser.parse_args(arguments)
    for name in ("clips", "val_clips", "size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1 is wanted")
    if options.val_data and not options.data:
        parser.error("--val-data needs --data: without it, no clip is looked at")
    return options


def main():
    guard_screen()
    options = parse()
    with ending_in_one_line("prune.py", (PruneError, *MISTAKES), "nothing was written", first_line):
        run(options)


if __name__ == "__main__":
    main()
