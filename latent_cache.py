"""The reference-latent cache: clips with their teacher's latents on disk, so that training needs no teacher.

    python latent_cache.py --teacher taehv:taew2_1.pth --data videos/ --out cache/ --clips 20000 --size 128 --frames 12
    torchrun --nproc_per_node 8 latent_cache.py --teacher diffusers:AutoencoderKLWan:Wan2.1/vae --data videos/ ...
    python train.py taehv_distill latent_cache=cache/
    python latent_cache.py --teacher none --data videos/ --out clips/ --clips 20000 --size 160     # clips alone
    python train.py taehv clip_cache=clips/ size=128

The same command again goes on where it stopped, and a larger --clips adds to a finished cache. cache_files.py describes
the files.
"""
from screen import end_at_ctrl_c, ended_by_sigterm, guard_screen, one_line, progress_bar

end_at_ctrl_c(__name__)
import argparse
import contextlib
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import sys
import traceback

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data as datasets
import file_index
from cache_files import (ARRAYS, FORMAT, MAX_INDEX, MAX_ORIGINS, NO_TEACHER, STORED, ShardWriter, file_crc,
                         shard_is_done, shard_path, write_index)
from check_config import ConfigError, check_workers
from data_files import find_sources
from device import (DeviceError, cores_per_rank, default_workers, describe, host_memory, is_out_of_memory, pick_device,
                    pick_precision, tune)
from lock import NAME as LOCK, InUse, locked
from model_taehv import RELATIVES, TAEHV, VARIANTS
from ranks import from_rank_0, gather, start_ranks
from teachers import KINDS, TeacherError, load_teacher
from untrusted import read_json
from video_files import MAX_PIXELS, DataError

UNFINISHED = re.compile(r"(shard_\d+\.(clips\.npy|latents\.npy|json)|index\.json)\.\d+\.tmp")
NO_STUDENT = ("no student here speaks latents of this shape: a TAEHV joins 8, 16, 24 ... pixels and 1, 2, 4 or 8 "
              "frames into one")


def plan_cache(options, teacher, dtype, sources):
    """The index of the cache that the options ask for, not yet complete. The teacher, if there is one, encodes one clip
    of zeros, which gives the shape of its latents. TeacherError if it cannot."""
    frames, size = options.frames, options.size
    about, latents = dict(spec=NO_TEACHER, name="no teacher", fingerprint="", pools_pairs=None, precision=""), []
    if teacher:
        about = dict(spec=teacher.spec, name=teacher.name, fingerprint=teacher.fingerprint,
                     pools_pairs=teacher.pools_pairs, precision=str(dtype).removeprefix("torch."))
        try:
            latents = list(teacher.encode(torch.zeros(1, frames, 3, size, size)).shape[1:])
        except (ValueError, RuntimeError) as error:
            raise TeacherError(f"teacher {teacher.spec}: {frames} frames of {size}x{size} cannot be encoded "
                               f"({checkpoint.first_line(error)}); LTX takes 8k + 1 frames, most others 4k + 1"
                               ) from None
    several = {"clips_per_open": options.clips_per_open} if options.clips_per_open > 1 else {}
    keys = "\n".join(f"{s.key} {s.frames}" for s in sources)
    return dict(
        format=FORMAT, complete=False, clips=options.clips, shard_clips=options.shard_clips, frames=frames, size=size,
        teacher=about, latents=latents, latent_dtype=options.latent_dtype,
        sampling=dict(seed=options.seed, min_frame_delta=options.min_frame_delta, flip=options.flip,
                      max_frame_delta=options.max_frame_delta, random_crop=options.random_crop,
                      min_crop=options.min_crop, **several,
                      data=hashlib.sha256(keys.encode()).hexdigest()[:16]), shards=[])


def prepare_folder(out, plan):
    """Make the folder, or check that it holds a cache of this plan; write the plan, and return it with the number of
    clips that the cache was begun for, if that is larger. DataError if the folder cannot be used."""
    path = os.path.join(out, "index.json")
    try:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(path):
            old = read_json(path, MAX_INDEX)
            free = ("complete", "clips", "shards", "teacher")
            pairs = [(k, old.get(k), plan[k]) for k in plan if k not in (*free, "sampling")]
            pairs += [(k, old["sampling"].get(k), v) for k, v in plan["sampling"].items() if k != "data"]
            for k in ("fingerprint", "precision"):
                pairs.append((f"teacher's {k}", old["teacher"].get(k), plan["teacher"][k]))
            different = [f"{k} {a} there, {b} asked for" for k, a, b in pairs if a != b]
            if not different and old["sampling"] != plan["sampling"]:
                different = ["it was made from other files, or these have changed"]
            if different:
                raise DataError(f"--out {out}: holds a cache of another kind ({different[0]}): use another folder")
            plan["clips"] = max(plan["clips"], int(old["clips"]))
        elif set(os.listdir(out)) - {LOCK}:
            raise DataError(f"--out {out}: is not empty, and no cache: use another folder")
        for name in os.listdir(out):
            if UNFINISHED.fullmatch(name):  # what a killed run left behind
                os.remove(os.path.join(out, name))
        latents = 2 * int(np.prod(plan["latents"])) if plan["latents"] else 0
        wanted = plan["clips"] * (plan["frames"] * plan["size"] ** 2 * 3 + latents)
        wanted -= sum(os.path.getsize(os.path.join(out, n)) for n in os.listdir(out) if n.endswith(".npy"))
        free = shutil.disk_usage(out).free
        if wanted > free:
            raise DataError(f"--out {out}: {wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        write_index(out, plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"--out {out}: {checkpoint.first_line(error)}: use another folder") from None
    return plan


def build(options):
    """Make the cache that the options ask for. Raises DataError, TeacherError, DeviceError, CheckpointError or
    InUse."""
    with contextlib.ExitStack() as at_end:
        build_in(options, at_end)


def build_in(options, at_end):
    """The body of `build`. at_end: an ExitStack, which releases the folder's lock at the end."""
    learns = options.teacher != NO_TEACHER
    device = pick_device(options.device if learns else "cpu")
    tune(device)
    dtype = pick_precision(options.precision, device) if learns else torch.float32
    # Ranks communicate only at the start and the end, over gloo: with NCCL, a rank that fails could not end alone.
    rank, world, control = start_ranks(torch.device("cpu"), timeout_minutes=24 * 60)
    say = print if rank == 0 else lambda *_: None
    if unlocked := from_rank_0(control, lambda: at_end.enter_context(locked(options.out, "choose another --out"))):
        say(f"warning: {unlocked}")
    teacher = load_teacher(options.teacher, device, dtype) if learns else None
    if learns:
        teacher.check_frames(options.frames)
    sources, refused, notes = from_rank_0(control, lambda: file_index.probe(
        find_sources(options.data, options.data_root), options.max_pixels, options.data, options.data_root))
    for line in [*notes, *(f"refused: {path}: {reason}" for path, reason in refused)]:
        say(line)
    clips = datasets.TrainClips(sources, options.seed, options.min_frame_delta, options.max_frame_delta,
                                datasets.Augment(options.random_crop, options.min_crop, options.flip),
                                max_pixels=options.max_pixels, clips_per_open=options.clips_per_open)
    clips.check(datasets.Bucket(options.size, options.frames, 1.0, 1))
    plan = plan_cache(options, teacher, dtype, sources)
    plan = from_rank_0(control, lambda: prepare_folder(options.out, plan))
    settings = student_settings(plan) if learns else ""
    if learns:
        say(f"teacher: {teacher.name}, on {describe(device)}, {plan['teacher']['precision']}; {options.frames} frames "
            f"of {options.size}x{options.size} give latents {tuple(plan['latents'])}")
    counts = [min(options.shard_clips, plan["clips"] - start) for start in range(0, plan["clips"], options.shard_clips)]
    kinds = ARRAYS if learns else ARRAYS[:1]
    missing = from_rank_0(control, lambda: [i for i, n in enumerate(counts)
                                            if not shard_is_done(options.out, i, n, kinds)])
    kept = plan["clips"] - sum(counts[i] for i in missing)
    say(f"{plan['clips']} clips in {len(counts)} shards" + (f", {kept} of them from before" if kept else "")
        + f" (--clips {options.clips}: the cache was begun for more)" * (plan["clips"] > options.clips))
    if learns and not settings:
        say(f"warning: {NO_STUDENT}")
    if missing[rank::world]:
        write_shards(options, teacher, device, clips, missing[rank::world], counts, tuple(plan["latents"]),
                     disable=rank > 0)
    gather(control, None)  # wait until all ranks are done
    if rank == 0:
        for i in range(len(counts)):
            about = read_json(shard_path(options.out, i, "json"), MAX_ORIGINS)
            crc32 = {**about["crc32"], "json": file_crc(shard_path(options.out, i, "json"))}
            plan["shards"].append({"clips": about["clips"], "crc32": crc32})
        write_index(options.out, {**plan, "complete": True})
    cache, size = shlex.quote(options.out), options.size if learns else max(16, options.size // 10 * 8)
    command = f"taehv_distill {settings} latent_cache={cache}" if learns else f"taehv clip_cache={cache}"
    say(f"done: python train.py {command} size={size} frames={options.frames}" if settings or not learns else
        f"done: {NO_STUDENT}")


def student_settings(plan):
    """The settings with which train.py builds a TAEHV that can learn a plan's latents, such as "variant=taew2_2"; with
    its shape spelled out if no variant has it; "" if no TAEHV has that shape."""
    frames, size, pairs = plan["frames"], plan["size"], plan["teacher"]["pools_pairs"]
    latents, channels, height, width = plan["latents"]
    patch = size // (8 * height)
    if (height * 8 * patch, width * 8 * patch) != (size, size):
        return ""

    def fits(**arguments):
        with torch.device("meta"):  # no weights: only its frame counts are needed
            model = TAEHV(**arguments)
        try:
            model.aligned(frames, latents)
        except ValueError:
            return False
        return True

    variants = [v for v, row in VARIANTS.items() if (row.patch_size, row.latent_channels) == (patch, channels)
                and not row.arch_variant and v not in RELATIVES and (v == "taecvx") == bool(pairs)]
    if re.search("Wan|Qwen", plan["teacher"]["name"]):
        variants.sort(key=lambda v: v != "taew2_1")  # Hunyuan Video's variant has the same shape, and would come first
    for variant in variants:
        if fits(variant=variant):
            return f"variant={variant}"
    pools = [((2, 2, 1), (1, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((2, 1, 1), (1, 1, 2)), ((1, 1, 1), (1, 1, 1))]
    if latents == frames:  # clips of 1 or 2 frames would fit other time factors too
        pools = pools[-1:]
    for down, up in pools:
        if fits(variant="taecvx" if pairs else "taehv", patch_size=patch, latent_channels=channels,
                encoder_time_downscale=down, decoder_time_upscale=up):
            return (f"{'variant=taecvx ' if pairs else ''}patch_size={patch} latent_channels={channels} "
                    f"net.encoder_time_downscale={','.join(map(str, down))} "
                    f"net.decoder_time_upscale={','.join(map(str, up))}")
    return ""


def encode(teacher, video, samples, shape, dtype):
    """video N T 3 H W in [0, 1] -> latents N T' C h w on the CPU, in the stored dtype `dtype`. shape: the expected
    (T', C, h, w); samples: where the clips come from, for messages. TeacherError, naming the clip, if the latents have
    another shape or are not finite, or if the teacher raises an error of any kind, which becomes its __cause__."""
    def mistake(n, words):
        origin = samples[n]["origin"]
        return TeacherError(f"{words} (clip {n + 1} of a batch of {len(samples)}: {origin['file']} from frame "
                            f"{origin['first']} on); the finished shards are kept: the same command goes on from there")
    try:
        latents = teacher.encode(video, shape)
    except TeacherError as error:
        raise mistake(error.clip, str(error)) from None
    except Exception as error:
        raise mistake(0, f"teacher {teacher.spec}: encode raised {type(error).__name__}: "
                         f"{checkpoint.first_line(error)}"
                         + ": set --batch-size lower" * is_out_of_memory(error)) from error
    stored = latents.to(dtype).cpu()
    for n, one in enumerate(stored):
        if not one.isfinite().all():
            raise mistake(n, f"teacher {teacher.spec}: its latents, up to {latents[n].abs().max().item():.4g}, are not "
                             f"finite as {str(dtype).removeprefix('torch.')}: try --latent-dtype bfloat16")
    return stored


def write_shards(options, teacher, device, clips, shards, counts, shape, disable):
    """Make this rank's clips and write them, shard by shard, with their latents if there is a teacher. shards: numbers
    of the shards; counts: clips in each shard of the cache; shape: (T', C, h, w) of a clip's latents."""
    pool = len(clips.pool(options.frames))

    def batches_of_keys():
        for i in shards:
            first = i * options.shard_clips
            for start in range(0, counts[i], options.batch_size):
                numbers = (divmod(first + k, options.clips_per_open)
                           for k in range(start, min(start + options.batch_size, counts[i])))
                yield [datasets.Key(*divmod(opening, pool), options.size, options.frames, part)
                       for opening, part in numbers]

    workers = options.workers if options.workers >= 0 else default_workers(device) if teacher else cores_per_rank()
    loader = DataLoader(clips, batch_sampler=batches_of_keys(), num_workers=workers, collate_fn=list,
                        worker_init_fn=datasets.start_worker, prefetch_factor=2 if workers else None,
                        multiprocessing_context=datasets.worker_context() if workers else None)
    batches, noted = datasets.endless(loader), set()
    with progress_bar(total=sum(counts[i] for i in shards), unit="clip", disable=disable) as bar:
        for i in shards:
            with ShardWriter(options.out, i, counts[i]) as shard:
                for _ in range(0, counts[i], options.batch_size):
                    samples = next(batches)
                    for note in (note for s in samples for note in s["notes"]):
                        if note not in noted:  # printed once, though a file gives many clips
                            tqdm.write(f"{note[0]}: {note[1]}")
                        noted.add(note)
                    video = torch.stack([s["video"].permute(0, 2, 3, 1) for s in samples])  # N T H W 3
                    shard.write("clips", video.numpy())
                    shard.origins += [s["origin"] for s in samples]
                    bar.update(len(samples))
                    if not teacher:
                        continue
                    latents = encode(teacher, video.to(device).permute(0, 1, 4, 2, 3).float().div_(255), samples, shape,
                                     getattr(torch, options.latent_dtype))
                    raw = latents.view(torch.int16).numpy().view(np.uint16)
                    shard.write("latents", raw if options.latent_dtype == "bfloat16" else latents.numpy())


def parse(arguments=None):
    """Options from the command line. Exits with code 2 and one line if they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"latent_cache.py: {one_line(message)}\n")  # one line, without usage
    parser.add_argument("--teacher", required=True, metavar="SPEC", help=f"{KINDS}; none for clips without latents")
    parser.add_argument("--data", required=True,
                        help="folder, file, annotation .json or table .csv, as train.py's data=")
    parser.add_argument("--data-root", default="", help="folder that an annotation's paths are relative to")
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="number of clips in the cache")
    parser.add_argument("--size", type=int, default=128, help="height and width, pixels (%(default)s)")
    parser.add_argument("--frames", type=int, default=12,
                        help="frames per clip (%(default)s); CogVideoX takes 8k or 8k + 1, LTX 8k + 1")
    parser.add_argument("--min-frame-delta", type=int, default=1, help="spacing of frames: from this (%(default)s) ...")
    parser.add_argument("--max-frame-delta", type=int, default=5, help="... to this (%(default)s)")
    parser.add_argument("--random-crop", action=argparse.BooleanOptionalAction, default=True,
                        help="cut random squares and resize them; off: the largest centred one")
    parser.add_argument("--min-crop", type=float, default=0.0,
                        help="smallest side of a random square, as a fraction of the video's shorter side")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                        help="mirror half of the clips left to right")
    parser.add_argument("--clips-per-open", type=int, default=0, metavar="N",
                        help="clips cut from a video each time it is opened; 0: 1, or 4 without a teacher")
    parser.add_argument("--latent-dtype", choices=sorted(STORED), default="float16",
                        help="number format of the stored latents (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="clips that the teacher sees at once (%(default)s)")
    parser.add_argument("--shard-clips", type=int, default=256, help="clips per shard, made whole (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the clips (%(default)s)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
                        help="files whose frames have more are passed over (%(default)s)")
    parser.add_argument("--workers", type=int, default=-1, help="data processes per rank; -1: by the number of cores")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"),
                        help="number format of the teacher's computation")
    options = parser.parse_args(arguments)
    delta = options.min_frame_delta
    for name, (least, most) in dict(clips=(1, 10 ** 7), size=(16, 2 ** 14), frames=(1, 2 ** 16),
                                    min_frame_delta=(1, 10 ** 6), max_frame_delta=(delta, max(delta, 10 ** 6)),
                                    max_pixels=(1, math.inf),
                                    clips_per_open=(0, 64), batch_size=(1, 2 ** 16), shard_clips=(1, 10 ** 6),
                                    seed=(0, 2 ** 62),
                                    workers=(-1, math.inf), min_crop=(0, 1)).items():
        value, key = getattr(options, name), f"--{name.replace('_', '-')}"
        if not value >= least:
            parser.error(f"{key} {value}: at least {least} is wanted")
        if not value <= most:
            parser.error(f"{key} {value}: at most {most} is wanted")
    options.clips_per_open = options.clips_per_open or (4 if options.teacher == NO_TEACHER else 1)
    try:
        check_workers("--workers", options.workers)
    except ConfigError as error:
        parser.error(str(error))
    needed = options.size ** 2 * options.frames * 3 * options.batch_size * (5 + max(0, options.workers))
    if needed > (there := host_memory()):  # a batch in bytes and in float32, and one for each data process
        parser.error(f"--size {options.size} --frames {options.frames} --batch-size {options.batch_size} --workers "
                     f"{options.workers}: the batches alone take {needed / 1e9:,.0f} GB, and this machine has "
                     f"{there / 1e9:,.0f}: set one of these lower")
    return options


def main():
    guard_screen()
    options, code = parse(), 0
    try:
        with ended_by_sigterm():
            build(options)
    except (DataError, TeacherError, DeviceError, checkpoint.CheckpointError, InUse, OSError) as error:
        if error.__cause__ is not None and isinstance(error, TeacherError):  # the teacher's author needs the traceback
            traceback.print_exception(error.__cause__)
        if not isinstance(error, InUse) or int(os.environ.get("RANK", 0)) == 0:  # all ranks raise this together
            print(f"latent_cache.py: {one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        print("stopped: the same command goes on from here", file=sys.stderr)
        code = 128 + (error.args[0] if error.args else signal.SIGINT)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
