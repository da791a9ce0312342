"""The clips that a run trains and validates on: from files, from a clip cache, or from a latent cache with its
teacher's latents.

All kinds of training clips have `check(bucket)` and `batches(schedule, workers, pin_memory)`. All kinds of validation
clips have `share(rank, world, note)` and a length.
"""
import os
from typing import NamedTuple

import numpy as np

import data
import file_index
from cache_files import LatentCache
from check_config import ConfigError
from clip_cache import TrainCuts, ValCuts
from data_files import find_sources, split_sources
from init_taehv import fits_teacher, scale_to_teacher
from ranks import everywhere, from_rank_0, gather
from synthetic import make_demo
from video_files import DataError

# Bytes of clips whose checksums are compared at each start, in some 10 s. In larger caches only file sizes are
# compared.
MOST_COMPARED = 16e9


class Clips(NamedTuple):
    """The clips of a run."""
    train: object
    val: object
    teacher: str  # fingerprint of the teacher whose latents come with the clips; empty without a teacher
    lines: list   # lines for the log that describe the clips


def find(cfg, buckets, model, rank, world, control):
    """The Clips of a run; all ranks call this. DataError if no clip is found, or if a bucket's shape cannot be cut from
    them; ConfigError if they do not fit the model."""
    found = (from_latent_cache(cfg, model, rank, world, control) if cfg.latent_cache
             else from_clip_cache(cfg, buckets[0], rank, world, control) if cfg.clip_cache
             else from_files(cfg, buckets[0], control))
    for bucket in buckets:
        found.train.check(bucket)
    return found


def share(val, rank, world, control, note):
    """This rank's validation clips. note: function that is called with each [(path, what was odd)]. DataError on all
    ranks if none of the clips can be read."""
    mine = val.share(rank, world, note)
    if len(val) and not any(gather(control, len(mine))):
        raise DataError("none of the clips for validation can be read; train.log names their files: set val_data to "
                        "others, or val_fraction=0")
    return mine


def first_batches(cfg, found, bucket, workers):
    """The training batches of this bucket from step 0 on; training will see the same clips."""
    return found.train.batches(data.TrainSchedule(found.train, [bucket], cfg.seed), workers)


def from_files(cfg, bucket, control):
    """The Clips of a run that reads video and image files."""
    train, val, found = from_rank_0(control, lambda: find_files(cfg, bucket.frames))
    clips = data.TrainClips(train, cfg.seed, cfg.min_frame_delta, cfg.max_frame_delta, augment_of(cfg),
                            cfg.image_sequences, cfg.max_pixels, cfg.clips_per_open)
    val_clips = data.ValClips(val, cfg.val_size or bucket.size, bucket.frames, cfg.val_clips_per_video,
                              cfg.val_clips, cfg.image_sequences, cfg.max_pixels)
    if val and not len(val_clips):
        found.append(f"no validation: no held-out file gives clips of {bucket.frames} frames")
    return Clips(clips, val_clips, "", found)


def find_files(cfg, frames):
    """(training sources, validation sources, lines for the log). frames: length of the clips that the lines count."""
    path, val_path = cfg.data, cfg.val_data
    if path == "demo":
        path, val_path = "demo_data/train", val_path or "demo_data/val"
        try:
            make_demo("demo_data")
        except OSError as error:
            raise DataError(f"data=demo: demo_data cannot be written here ({error})") from None
    train, refused, notes = probe_path(cfg, "data", path)
    if val_path:
        val, more, more_notes = probe_path(cfg, "val_data", val_path)
        refused, notes = refused + more, notes + more_notes
    else:
        train, val = split_sources(train, cfg.val_fraction)
    if not train:
        raise DataError(f"data: none of the {len(refused)} files of {path!r} can be read; the first: "
                        f"{refused[0][0]}: {refused[0][1]}")
    if val_path and not val:
        raise DataError(f"val_data: none of the files of {val_path!r} can be read")
    lines = notes
    if val_path and (both := {os.path.realpath(s.path) for s in train} & {os.path.realpath(s.path) for s in val}):
        lines.append(f"warning: {len(both)} of the {len(val)} files of val_data are training files too: validation and "
                     "best.pt say nothing of other videos")
    for name, sources in (("training", train), ("validation", val)):
        usable = [s for s in sources if frames == 1 or cfg.image_sequences or not s.is_image]
        clips, images = sum(max(1, s.frames // frames) for s in usable), len(sources) - len(usable)
        lines.append(f"{name}: {len(usable)} files, {clips} separate clips of {frames} frames"
                     + f"; {images} images are left out (image_sequences=true joins them to clips)" * (images > 0))
    lines += [f"refused: {name}: {reason}" for name, reason in refused]
    if not val:
        lines.append("no validation: for one, set val_data=FOLDER, or val_fraction (and have two files or more)")
    elif not val_path:
        lines += describe_held_out([source.key for source in val])
    return train, val, lines


def probe_path(cfg, setting, path):
    """Find and probe the files of `path`: (sources that can be read, [(path, why another cannot)], [lines about the
    index of files]). setting: the one that names `path`, for DataError."""
    try:
        sources = find_sources(path, cfg.data_root, cfg.use_images)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None
    return file_index.probe(sources, cfg.max_pixels, path, cfg.data_root, cfg.use_images)


def describe_held_out(names):
    """[a line that names the files held out for validation]; [] if there are none."""
    return ["held out: " + ", ".join(names[:20]) + " ..." * (len(names) > 20)] if names else []


def describe_overlap(cache, other):
    """[a warning] if two different caches were made from the same files, else []."""
    same = other is not cache and cache.made_from == other.made_from is not None
    return ["warning: val_data was made from the same files as the training's cache: validation and best.pt say "
            "nothing of other videos"] * same


def augment_of(cfg):
    return data.Augment(cfg.random_crop, cfg.min_crop, cfg.flip, cfg.color_jitter, cfg.blur)


def open_cache(path, rank, world, control, clips_only=False):
    """Each rank opens the LatentCache and compares the checksums of a part of it. DataError on all ranks if one of them
    finds damage."""
    def opened():
        cache = LatentCache(path, clips_only)
        if problem := cache.problem(rank, world, MOST_COMPARED):
            raise DataError(problem)
        return cache
    return everywhere(control, opened)


def note_uncompared(cache):
    """The end of a log line about a cache that is too large to compare all checksums; "" for a smaller one."""
    size = cache.clip_bytes
    return f"; too large ({size / 1e9:.0f} GB) to compare checksums" if size > MOST_COMPARED else ""


def from_clip_cache(cfg, bucket, rank, world, control):
    """The Clips of a run that reads a clip cache."""
    cache = open_cache(cfg.clip_cache, rank, world, control, clips_only=True)
    size = cfg.val_size or bucket.size
    mine, held_back, held_out = cache.split_by_file(0 if cfg.val_data else cfg.val_fraction)
    other = cache
    if cfg.val_data:
        try:
            other = open_cache(cfg.val_data, rank, world, control, clips_only=True)
        except DataError as error:
            raise DataError(f"val_data has to be a second clip cache: {error}") from None
    val = ValCuts(other, np.arange(len(other)) if cfg.val_data else held_back, size, bucket.frames,
                  cfg.val_clips, "val_size" if cfg.val_size else "size")
    lines = [f"clip cache: {len(cache)} clips of {cache.size}x{cache.size}x{cache.frames} from {len(cache.names)} files"
             + note_uncompared(cache),
             f"training: {len(mine)} clips, validation: {len(val)}"]
    lines += describe_held_out(held_out) + describe_overlap(cache, other)
    return Clips(TrainCuts(cache, mine, cfg.seed, augment_of(cfg)), val, "", lines)


def from_latent_cache(cfg, model, rank, world, control):
    """The Clips of a run that reads a latent cache. DataError if it is damaged or not complete, ConfigError if it does
    not fit the model."""
    caches = [open_cache(path, rank, world, control) for path in (cfg.latent_cache, cfg.val_data) if path]
    for cache in caches:
        latents, channels, height, width = cache.latent_shape
        if channels != model.latent_channels or height * model.space_factor != cache.size \
                or width * model.space_factor != cache.size:
            variant = getattr(model, "taehv", model).variant
            raise ConfigError(f"latent_cache={cache.path}: latents {cache.latent_shape} of {cache.size} pixels do not "
                              f"fit variant={variant} ({model.latent_channels} channels, 1/{model.space_factor})")
        cache.check_alignment(model)
        if cache.fingerprint != caches[0].fingerprint:
            raise ConfigError(f"val_data={cache.path} holds latents of another teacher than {cfg.latent_cache}")
    clips, val_clips, held_out = caches[0].split(0 if cfg.val_data else cfg.val_fraction, cfg.seed, cfg.val_clips)
    if cfg.val_data:
        val_clips = caches[1].all(cfg.seed, cfg.val_clips)
    if cfg.model == "vq_latents" and not model.scale:
        model.calibrate(clips.sample(256))
    lines = [f"latent cache: {len(caches[0])} clips with latents of {caches[0].teacher['name']}"
             + note_uncompared(caches[0]),
             f"training: {len(clips)} clips, validation: {len(val_clips)}"]
    if cfg.model == "taehv":
        lines += suit_to_teacher(cfg, model, clips.sample(256))
    lines += describe_held_out(held_out) + describe_overlap(caches[0], caches[-1])
    return Clips(clips, val_clips, caches[0].fingerprint, lines)


def suit_to_teacher(cfg, model, latents):
    """If net.scaled_latents asks for it, or is left open and the latents need it, a fresh model gets a scale with which
    its layers see the teacher's latents with mean 0 and deviation 1. latents: N T' C h w. Returns [a line for the log]
    or []."""
    wanted, fits = cfg.net.get("scaled_latents"), fits_teacher(model, latents)  # wanted is None if it is left open
    may = not cfg.init_from and wanted is not False and (wanted or model.latents_scale is None)
    if not may and not fits:
        return ["warning: the teacher's latents are too large or too small for this model: a fresh one without "
                "net.scaled_latents=false gets a scale for them (docs/distil.md)"]
    if not may or fits and not wanted:
        return []
    scale_to_teacher(model, latents)
    return ["the teacher's latents come to the layers with mean 0 and deviation 1 in each channel (net.scaled_latents)"]
