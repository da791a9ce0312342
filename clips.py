"""What a run trains and validates on: clips of files, or of a latent cache with its teacher's latents.

Both kinds of training clips have `check(bucket)` and `batches(schedule, workers, pin_memory)`, both kinds of validation
clips `share(rank, world, note)` and a length.
"""
from typing import NamedTuple

import data
from config import ConfigError
from data import DataError
from latent_cache import LatentCache
from ranks import from_rank_0, gather
from synthetic import make_demo


class Clips(NamedTuple):
    """What was found."""
    train: object
    val: object
    teacher: str  # fingerprint of the teacher whose latents come with them; empty for none
    lines: list   # what was found, in words


def find(cfg, buckets, model, rank, world, control):
    """The Clips of a run; all ranks call it. DataError if there are none, ConfigError if they do not fit the model or
    a bucket."""
    found = (find_cached_clips(cfg, model, rank, world, control) if cfg.latent_cache
             else find_clips(cfg, buckets[0], control))
    for bucket in buckets:
        found.train.check(bucket)
    return found


def find_clips(cfg, bucket, control):
    """Clips of files."""
    train, val, found = from_rank_0(control, lambda: find_files(cfg, bucket.frames))
    augment = data.Augment(cfg.random_crop, cfg.min_crop, cfg.flip, cfg.color_jitter, cfg.blur)
    clips = data.TrainClips(train, cfg.seed, cfg.min_frame_delta, cfg.max_frame_delta, augment, cfg.image_sequences,
                            cfg.max_pixels)
    val_clips = data.ValClips(val, cfg.val_size or bucket.size, bucket.frames, cfg.val_clips_per_video,
                              val_limit(cfg, bucket.frames), cfg.image_sequences, cfg.max_pixels)
    if val and not len(val_clips):
        found.append(f"no validation: no held-out file gives clips of {bucket.frames} frames")
    return Clips(clips, val_clips, "", found)


def find_files(cfg, frames):
    """(training sources, validation sources, lines that say what was found, counting clips of `frames` frames)."""
    path, val_path = cfg.data, cfg.val_data
    if path == "demo":
        path, val_path = "demo_data/train", "demo_data/val"
        try:
            make_demo("demo_data")
        except OSError as error:
            raise DataError(f"data=demo: demo_data cannot be written here ({error})") from None
    train, refused = data.probe(data.find_sources(path, cfg.data_root, cfg.use_images), cfg.max_pixels)
    if val_path:
        val, more = data.probe(data.find_sources(val_path, cfg.data_root, cfg.use_images), cfg.max_pixels)
        refused += more
    else:
        train, val = data.split_sources(train, cfg.val_fraction)
    if not train:
        raise DataError(f"data: none of the {len(refused)} files of {path!r} can be read; the first: "
                        f"{refused[0][0]}: {refused[0][1]}")
    if val_path and not val:
        raise DataError(f"val_data: none of the files of {val_path!r} can be read")
    lines = []
    for name, sources in (("training", train), ("validation", val)):
        clips = sum(max(1, s.frames // frames) for s in sources)
        lines.append(f"{name}: {len(sources)} files, {clips} separate clips of {frames} frames")
    lines += [f"refused: {name}: {reason}" for name, reason in refused]
    if not val:
        lines.append("no validation: for one, set val_data=FOLDER, or val_fraction (and have two files or more)")
    elif not val_path:
        lines.append("held out: " + ", ".join(s.key for s in val[:20]) + (" ..." if len(val) > 20 else ""))
    return train, val, lines


def find_cached_clips(cfg, model, rank, world, control):
    """Clips of latent caches; DataError if one is not whole, ConfigError if it does not fit the model."""
    caches = [from_rank_0(control, lambda p=path: LatentCache(p)) for path in (cfg.latent_cache, cfg.val_data) if path]
    for cache in caches:
        problems = gather(control, cache.problem(rank, world))
        if any(problems):
            raise DataError(next(filter(None, problems)))
        latents, channels, height, width = cache.latent_shape
        if channels != model.latent_channels or height * model.space_factor != cache.size \
                or width * model.space_factor != cache.size:
            raise ConfigError(f"latent_cache={cache.path}: latents {cache.latent_shape} of {cache.size} pixels do not "
                              f"fit variant={cfg.variant} ({model.latent_channels} channels, 1/{model.space_factor})")
        cache.check_alignment(model)
        if cache.fingerprint != caches[0].fingerprint:
            raise ConfigError(f"val_data={cache.path} holds latents of another teacher than {cfg.latent_cache}")
    limit = val_limit(cfg, caches[0].frames)
    clips, val_clips, held_out = caches[0].split(0 if cfg.val_data else cfg.val_fraction, cfg.seed, limit)
    if cfg.val_data:
        val_clips = caches[1].all(cfg.seed, limit)
    if cfg.model == "vq_latents" and not model.scale:
        model.calibrate(clips.sample(256))
    lines = [f"latent cache: {len(caches[0])} clips with latents of {caches[0].teacher['name']}",
             f"training: {len(clips)} clips, validation: {len(val_clips)}"]
    if held_out:
        lines.append("held out: " + ", ".join(held_out[:20]) + (" ..." if len(held_out) > 20 else ""))
    return Clips(clips, val_clips, caches[0].fingerprint, lines)


def val_limit(cfg, frames):
    """How many clips of `frames` frames validation may take."""
    return min(cfg.val_clips, max(1, cfg.max_val_images // frames)) if cfg.max_val_images else cfg.val_clips
