"""Train a video autoencoder.

    python train.py                                            # the demo, on one GPU or the CPU
    python train.py taehv data=videos/ name=mine               # your videos, one GPU
    torchrun --nproc_per_node 8 train.py taehv data=videos/    # eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py taehv data=videos/

Settings: config.py, or key=value here; a run's config.json may stand in the preset's place. The same command again
resumes. Ctrl-C or SIGTERM saves and ends.
"""
import contextlib
import copy
import math
import os
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import data as datasets
import models
from best import Best
from config import ConfigError, exit_with_usage, load_config, parse_buckets
from device import (DeviceError, default_workers, describe, is_out_of_memory, peak_memory, pick_device,
                    pick_precision, place, resident_memory, synchronize, tune)
from evaluate import describe_validation, evaluate, load_judges, spread
from latent_cache import LatentCache
from lock import InUse, locked
from logbook import Clock, Logbook, count, summary
from objective import Objective
from ranks import (Gradients, LeftStep, StopSignal, agree, batch_statistics, copy_from_rank_0, end_at_once,
                   from_rank_0, gather, start_ranks, stay_together)
from saving import NotSaved, Saver
from screen import guard_screen, one_line
from step_taehv import speed_up
from synthetic import make_demo
from watch import Trend, describe_figures, describe_trend


def train(cfg):
    """One run, from the settings to its last checkpoint. Returns the exit code. ConfigError, DeviceError, DataError,
    CheckpointError, InUse or NotSaved say in one line what is wrong; all ranks raise the same."""
    with contextlib.ExitStack() as at_end:  # however the run ends, it lets its folder go
        return run(cfg, at_end)


def run(cfg, at_end):
    # ---- ranks, log, and everything that can be wrong before the first step ----------------------------------------
    device = pick_device(cfg.device)
    tune(device)
    dtype = pick_precision(cfg.precision, device, trains_volumes=cfg.model == "dcae")
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    rank, world, control = start_ranks(device, cfg.timeout_minutes)
    folder = os.path.join(cfg.out_dir, cfg.name)
    unlocked = from_rank_0(control, lambda: take_folder(cfg, folder, at_end))
    log = Logbook(folder, rank)
    buckets = [datasets.Bucket(*b) for b in parse_buckets(cfg)]
    torch.manual_seed(cfg.seed)
    model, origin = models.make_model(cfg, buckets)
    cfg = models.with_shape(cfg, model)  # what init_from settled is a setting of the run
    objective = Objective(cfg, model, device, autocast)
    for quantizer in objective.quantizers:
        quantizer.before_reduce = lambda: stay_together(control, 4)  # the flags of `accumulate`
    judges = load_judges(cfg, device)
    restarted, = agree(control, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
    resume_from = from_rank_0(control, lambda: find_resume(cfg, folder, restarted, log))
    if cfg.latent_cache:
        clips, val_clips, teacher, found = find_cached_clips(cfg, model, rank, world, control)
    else:
        clips, val_clips, teacher, found = find_clips(cfg, buckets[0], control)
    for bucket in buckets:
        clips.check(bucket)

    # ---- model, its average, optimizer, and their state in the run that goes on -----------------------------------
    place(model, device).train()
    if cfg.model in ("taehv", "vq_latents"):
        speed_up(model)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.model == "taehv":
        model.encoder.requires_grad_(cfg.train_encoder)
        model.decoder.requires_grad_(cfg.train_decoder)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # What is logged is averaged along, and BatchNorm's statistics.
    gradients = Gradients(parameters, world, len(objective.names), batch_statistics(model))
    # eps: gradients of 1e-10 are rounding noise, which PyTorch's 1e-8 turns into steps (3e-6 apart on 1 and 2 ranks).
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                  eps=1e-7, fused=device.type in ("cuda", "cpu"))
    trend = Trend(device, loss=objective.describe_loss())
    step, samples, seconds = 0, 0, 0.0
    pieces = 1  # parts of a micro-batch; doubles when memory runs out
    # Since the last log line: sums of the objective's scalars, good steps; and steps skipped, in a row and in all.
    tally = torch.zeros(len(objective.names) + 3, device=device)
    if resume_from:
        state = checkpoint.read(resume_from)
        try:
            restore(state, model, average, optimizer, teacher, resume_from)
            step, samples = state["step"], state["samples"]
            seconds = float(state.get("seconds", 0))
            if (state["config"]["batch_size"], state["config"]["buckets"]) == (cfg.batch_size, cfg.buckets):
                pieces = state["pieces"]
            if len(state["tally"]) == len(tally):
                tally.copy_(state["tally"])
            objective.load_state(state.get("objective") or {})
            trend.load_state(state.get("trend") or {})
            if state["world"] == world:
                checkpoint.restore_random_state(state["random"][rank], device)
        except checkpoint.MISSHAPEN as error:
            raise ConfigError(f"{resume_from} is no checkpoint of such a run ({type(error).__name__}: "
                              f"{checkpoint.first_line(error)}): choose another name= for this one") from None
        if state["world"] == world:
            rank_state, problem = checkpoint.read_rank(resume_from, rank)
            try:
                objective.load_rank_state(rank_state)
            except ValueError as error:
                problem = f"the file of rank {rank} beside {resume_from}: {checkpoint.first_line(error)}"
            for problem in filter(None, gather(control, problem)):
                log(f"warning: {problem}; that rank goes on without its replayed samples")
        del state
    copy_from_rank_0([*model.state_dict().values(), *average.state_dict().values()])

    time_limit = 60 * cfg.max_minutes or math.inf
    if step >= cfg.max_steps or seconds >= time_limit:
        log(f"nothing to do: step {step} of {cfg.max_steps}, {seconds / 60:.1f} minutes of training; set max_steps or "
            "max_minutes higher to go on, or name=... for a new run")
        return 0
    log(summarize(model, buckets[0], device), screen=False)
    if cfg.wandb and (problem := from_rank_0(control, lambda: log.mirror(cfg.wandb, asdict(cfg), bool(resume_from)))):
        raise ConfigError(problem)
    log.start(asdict(cfg), step)
    title = " ".join(filter(None, [cfg.model, model.config.get("variant")]))
    log(f"{title}: {count(model) / 1e6:.1f} M parameters, {origin}; {describe(device)}, "
        f"{str(dtype).removeprefix('torch.')}, {world} rank{'s' * (world > 1)}")
    if dtype == torch.bfloat16 and device.type == "cpu" and cfg.model == "dcae":
        log("warning: bf16 gradients of 3D convolutions are wrong on a CPU for short clips; leave precision at auto")
    saver = Saver(folder, cfg.keep_last, control, log, trend)
    lack = saver.lack_of_room(model.state_dict(), average.state_dict(), average.state_dict(), objective.state(),
                              parameters, parameters)  # of files: the average twice, AdamW's two means
    for line in filter(None, [*found, unlocked and f"warning: {unlocked}", lack]):
        log(line)
    if resume_from:
        log(f"resumed from {resume_from} at step {step}"
            + (f"; micro-batches are split in {pieces}, since memory ran out" if pieces > 1 else ""))

    schedule = datasets.TrainSchedule(clips, buckets, cfg.seed, world, rank, cfg.accumulation, step, samples)
    batches = clips.batches(schedule, cfg.workers if cfg.workers >= 0 else default_workers(device),
                            pin_memory=device.type == "cuda")
    val_share = val_clips.share(rank, world, log.notes)

    def validate(model):
        return evaluate(model, val_share, device, autocast, control, **judges)

    best = Best(dict(model_name=cfg.model, model_config=model.config), objective, val_share, saver)
    best.take_up(average, bool(resume_from), (lambda model: validate(model)[0]) if len(val_clips) else None)

    # ---- one step's forward and backward passes on this rank, and saving ------------------------------------------
    def accumulate(micro_batches, pieces, trouble):
        """Adds up the gradients and the objective's scalars over this rank's clips. Returns what all ranks agree on:
        (memory ran out, stop, time is over, trouble)."""
        out_of_memory = False
        gradients.begin()
        objective.begin(step)
        try:
            for batch in micro_batches:
                size = math.ceil(len(batch["video"]) / pieces)
                for start in range(0, len(batch["video"]), size):
                    part = {k: v[start:start + size].to(device, non_blocking=True).float() for k, v in batch.items()}
                    # The shares of a step add up to 1: its gradient is the mean over its clips, however they are cut.
                    share = len(part["video"]) / len(batch["video"]) / len(micro_batches)
                    values = objective(part["video"].div_(255), part.get("latents"), share)
                    (values["loss"] * share).backward()
                    gradients.totals += torch.stack([values[name].detach() for name in objective.names]) * share
        except LeftStep as left:
            return left.flags
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        return agree(control, out_of_memory, stop, clock.total() >= time_limit, trouble)

    def save():
        """Every rank calls this. Returns, on every rank, why the run could not be saved, or an empty string."""
        return saver.run(step, objective.rank_state(), checkpoint.random_state(device), lambda states: dict(
            model_name=cfg.model, model_config=model.config, config=asdict(cfg), step=step, samples=samples,
            seconds=clock.total(), pieces=pieces, tally=tally.cpu(), world=world, random=states, teacher=teacher,
            model=model.state_dict(), ema=average.state_dict(), optimizer=optimizer.state_dict(),
            trend={**trend.state(), "sound": trend.judge(step)}, objective=objective.state()))

    def give_up(reason, way_out):
        gradients.begin()  # the statistics as they were before this step, if it is not done
        if unsaved := save():
            raise NotSaved(f"{reason} at step {step}; {saver.not_saved(unsaved)}. {way_out}")
        raise ConfigError(f"{reason} at step {step}; the run is saved. {way_out}")

    # ---- the loop -------------------------------------------------------------------------------------------------
    stop = StopSignal()
    bar = tqdm(initial=step, total=cfg.max_steps, unit="step", disable=rank > 0, dynamic_ncols=True, smoothing=0.05)
    clips_done, clock = 0, Clock(seconds)
    stopping = last = False  # stopped from outside; the run's last step
    while not last and not stopping:
        micro_batches, trouble = [], ""
        try:
            for batch in (next(batches) for _ in range(cfg.accumulation)):
                log.notes(batch.pop("notes"))
                micro_batches.append(batch)
        except datasets.DataError as error:
            trouble = str(error)
        while True:
            out_of_memory, stopping, time_over, no_data = accumulate(micro_batches, pieces, trouble)
            if no_data:
                give_up(f"no data ({trouble or 'on another rank'})", "Look at the files that train.log names.")
            if not out_of_memory:
                break
            if pieces >= len(micro_batches[0]["video"]):
                give_up("out of memory with one clip at a time",
                        "Set gradient_checkpointing=true, or a smaller size or frames.")
            pieces *= 2  # every rank does the whole step again, in smaller parts
            torch.cuda.empty_cache()
            log(f"step {step + 1}: out of memory; micro-batches are split in {pieces} from here on")

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        norm, bad = gradients.reduce(cfg.grad_clip)
        if optimizer.defaults["fused"]:
            optimizer.grad_scale, optimizer.found_inf = None, bad  # the kernel itself skips a bad step: no host waits
            optimizer.step()
        elif not bad:
            optimizer.step()
        decay = min(cfg.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():  # or the average drags along a graph that grows with each step
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        for mine, other in zip(average.buffers(), model.buffers()):
            mine.copy_(other)

        objective.step(bad)
        trend.add(step, objective.steady_loss(gradients.totals), norm, bad)
        good = torch.cat([gradients.totals, 1 - bad[None]])
        good = torch.where(bad > 0, torch.zeros_like(good), good)
        tally = torch.cat([tally[:-2] + good, (tally[-2:-1] + 1) * bad, tally[-1:] + bad])
        step_clips = cfg.accumulation * world * len(micro_batches[0]["video"])
        step, samples, clips_done = step + 1, samples + step_clips, clips_done + step_clips
        last = step >= cfg.max_steps or time_over
        bar.update()

        if step % cfg.log_every == 0 or last:
            *sums, good, bad_row, bad_all = tally.tolist()
            values = spread({name: s / good if good else math.nan for name, s in zip(objective.names, sums)})
            values.update(objective.codes_used())
            figures, (course, warnings) = objective.figures.read(), trend.read(step)
            synchronize(device)
            speed = clips_done / clock.lap()
            log.scalars(step, "train", **values, **figures, **course, gradient_norm=norm,
                        learning_rate=learning_rate(cfg, step - 1), clips_per_second=speed,
                        skipped_steps=bad_all, resident_memory_gb=resident_memory() / 1e9,
                        gpu_memory_gb=peak_memory(device) / 1e9 if device.type == "cuda" else 0.0)
            line = describe_step(values)
            bar.set_postfix_str(f"{line}, {speed:.1f} clips/s", refresh=False)
            log(f"step {step}: {line}, gradient norm {norm:.3f}{describe_trend(course)}{describe_figures(figures)}, "
                f"{speed:.2f} clips/s"
                + (f", {int(bad_all)} steps skipped (not finite)" if bad_all else ""), screen=bad_row > 0)
            for warning in warnings:
                log(f"step {step}: {warning}")
            tally[:-2] = 0
            clips_done = 0
            if bad_row >= cfg.max_bad_steps:
                give_up(f"the loss or a gradient was not finite {int(bad_row)} steps in a row",
                        f"{where_to_go_on(folder, model, trend, step, int(bad_row))} Try a lower lr, precision=fp32, "
                        "or other data.")
        if len(val_clips) and (last or step % cfg.val_every == 0 and not stopping):
            with clock.stopped():
                result, shown = validate(average)
            log(f"step {step}: validation {describe_validation(result)}, after {clock.total() / 60:.2f} minutes"
                + "".join(f", {half} {result[f'{half}_fps']:.1f} frames/s" for half in ("encode", "decode")
                          if result[f"{half}_fps"]))
            log.scalars(step, "val", **spread({name: value for name, value in result.items() if name != "count"}))
            log.pictures(step, shown)
            best.offer(step, result, average)
        if step % cfg.save_every == 0 or last or stopping:
            with clock.stopped():
                unsaved = save()
            if unsaved and not last and not stopping:
                log(f"the checkpoint of step {step} could not be saved: {unsaved}; the run goes on; {saver.on_disk}")
    bar.close()
    log.close()
    if unsaved:
        raise NotSaved(saver.not_saved(unsaved))
    if stopping and not last:
        again = "resume=auto" if cfg.resume == "none" else "the same command"
        cause = "torchrun was killed: stopped" if stop.orphaned() else "stopped by a signal"
        log(f"{cause} after step {step} of {cfg.max_steps}: {again} goes on from here")
        return stop.exit_code(control)
    log(f"done: {step} steps in {clock.total() / 60:.1f} minutes. Look at them: python infer.py {folder} VIDEO, and "
        f"tensorboard --logdir {folder}")
    return 0


# ---- in the order in which train() calls them --------------------------------------------------------------------


def take_folder(cfg, folder, at_end):
    """Makes the run's folder and locks it until `at_end` is closed. Returns "", or why it cannot be locked."""
    try:
        unlocked = at_end.enter_context(locked(folder, "choose another name="))
        checkpoint.remove_leftovers(folder)
        checkpoint.probe(folder)
    except OSError as error:
        raise ConfigError(f"out_dir={cfg.out_dir}: {folder} cannot be made or written to ({error.strerror})") from None
    return unlocked


def find_resume(cfg, folder, restarted, log):
    """Path of the checkpoint to go on from, or None. `restarted`: torchrun has started these ranks anew."""
    present = checkpoint.checkpoints(folder)
    if cfg.resume == "none" and present and not restarted:
        raise ConfigError(f"resume=none, but {folder} holds checkpoints: choose another name=, or remove it")
    if cfg.resume not in ("auto", "none"):
        wanted = checkpoint.read_run(cfg.resume)
        if not present:
            return cfg.resume
        if os.path.realpath(cfg.resume) in [os.path.realpath(p) for p in present[1:]] and not restarted:
            raise ConfigError(f"resume={cfg.resume}, but {folder} holds newer checkpoints than step "
                              f"{wanted.get('step')}: choose another name= to branch off, or remove those")
    path, problems = checkpoint.newest_checkpoint(folder)
    for problem in problems:
        log(f"warning: {problem}; the one before it is used")
    if present and not path:
        raise ConfigError(f"none of the {len(present)} checkpoints in {folder} can be read: choose another name=")
    return path


def find_clips(cfg, bucket, control):
    """(training clips, validation clips, "" for no teacher, lines that say what was found), from files; DataError if
    there are none."""
    train, val, found = from_rank_0(control, lambda: find_files(cfg, bucket.frames))
    augment = datasets.Augment(cfg.random_crop, cfg.min_crop, cfg.flip, cfg.color_jitter, cfg.blur)
    clips = datasets.TrainClips(train, cfg.seed, cfg.min_frame_delta, cfg.max_frame_delta, augment, cfg.image_sequences,
                                cfg.max_pixels)
    val_clips = datasets.ValClips(val, cfg.val_size or bucket.size, bucket.frames, cfg.val_clips_per_video,
                                  val_limit(cfg, bucket.frames), cfg.image_sequences, cfg.max_pixels)
    if val and not len(val_clips):
        found.append(f"no validation: no held-out file gives clips of {bucket.frames} frames")
    return clips, val_clips, "", found


def val_limit(cfg, frames):
    """How many clips of `frames` frames validation may take."""
    return min(cfg.val_clips, max(1, cfg.max_val_images // frames)) if cfg.max_val_images else cfg.val_clips


def find_files(cfg, frames):
    """(training sources, validation sources, lines that say what was found, counting clips of `frames` frames)."""
    data, val_data = cfg.data, cfg.val_data
    if data == "demo":
        data, val_data = "demo_data/train", "demo_data/val"
        try:
            make_demo("demo_data")
        except OSError as error:
            raise datasets.DataError(f"data=demo: demo_data cannot be written here ({error})") from None
    train, refused = datasets.probe(datasets.find_sources(data, cfg.data_root, cfg.use_images), cfg.max_pixels)
    if val_data:
        val, more = datasets.probe(datasets.find_sources(val_data, cfg.data_root, cfg.use_images), cfg.max_pixels)
        refused += more
    else:
        train, val = datasets.split_sources(train, cfg.val_fraction)
    if not train:
        raise datasets.DataError(f"data: none of the {len(refused)} files of {data!r} can be read; the first: "
                                 f"{refused[0][0]}: {refused[0][1]}")
    if val_data and not val:
        raise datasets.DataError(f"val_data: none of the files of {val_data!r} can be read")
    lines = []
    for name, sources in (("training", train), ("validation", val)):
        clips = sum(max(1, s.frames // frames) for s in sources)
        lines.append(f"{name}: {len(sources)} files, {clips} separate clips of {frames} frames")
    lines += [f"refused: {path}: {reason}" for path, reason in refused]
    if not val:
        lines.append("no validation: for one, set val_data=FOLDER, or val_fraction (and have two files or more)")
    elif not val_data:
        lines.append("held out: " + ", ".join(s.key for s in val[:20]) + (" ..." if len(val) > 20 else ""))
    return train, val, lines


def find_cached_clips(cfg, model, rank, world, control):
    """(training clips, validation clips, the teacher's fingerprint, lines), from latent caches; DataError if one is not
    whole, ConfigError if it does not fit the model."""
    caches = [from_rank_0(control, lambda p=path: LatentCache(p)) for path in (cfg.latent_cache, cfg.val_data) if path]
    for cache in caches:
        problems = gather(control, cache.problem(rank, world))
        if any(problems):
            raise datasets.DataError(next(filter(None, problems)))
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
    return clips, val_clips, caches[0].fingerprint, lines


def where_to_go_on(folder, model, trend, step, bad_row):
    """After `bad_row` steps that were skipped, in words: what the weights are, and the checkpoint to go on from if they
    were bad before."""
    finite = not checkpoint.not_finite(model.state_dict())
    words = f"The weights are those of step {step - bad_row}, from before"
    if finite and not trend.has_risen(step):
        return f"{words}."
    words += ", when the loss had risen already." if finite else ", and not finite."
    sound = checkpoint.step_path(folder, trend.sound[0])
    if sound and os.path.exists(sound):
        words += f" resume={sound} name=OTHER goes on from before that."
    return words


def summarize(model, bucket, device):
    """`summary` of the model; ConfigError where a clip does not fit the memory even without gradients."""
    try:
        return summary(model, bucket.size, bucket.frames, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory with one clip of {bucket.frames} frames of {bucket.size}x{bucket.size}: set "
                          "size or frames lower") from None


def restore(state, model, average, optimizer, teacher, path):
    """Put a checkpoint's weights and optimizer state in place; ConfigError if it is another model's."""
    if not same_model(state.get("model_config"), model.config):
        raise ConfigError(f"{path} is a checkpoint of {state.get('model_config', 'something else')}, "
                          f"not of {model.config}: choose another name= for this run")
    if "optimizer" not in state:
        raise ConfigError(f"{path} holds weights only: give it as init_from=, not as resume=")
    if len(state["optimizer"]["param_groups"][0]["params"]) != len(optimizer.param_groups[0]["params"]):
        raise ConfigError(f"{path} trained other parts: keep train_encoder and train_decoder, or give it as init_from=")
    if state.get("teacher", "") != teacher:
        raise ConfigError(f"{path} learnt from {'another teacher' if state.get('teacher') else 'no latent cache'}: "
                          "choose another name= for this run, with init_from=")
    counts = state["step"], state["samples"], state.setdefault("pieces", 1) - 1
    if any(type(count) is not int or not 0 <= count < 2 ** 60 for count in counts) or not 0 <= float(
            state.get("seconds", 0)) < 1e12:
        raise ConfigError(f"{path} counts impossible steps, samples or seconds: choose another name= for this run")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(settings)  # today's settings, not those of the day it was saved
    for parameter, kept in optimizer.state.items():
        if not kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape or kept["step"].numel() != 1:
            raise ValueError("its optimizer's state is of other weights")


def same_model(saved, ours):
    """Whether two configurations of a model differ at most in how its codebooks start, which a checkpoint has behind
    it."""
    return isinstance(saved, dict) and {**saved, "kmeans_init": None} == {**ours, "kmeans_init": None}


def learning_rate(cfg, step):
    """Of optimizer step `step`, counted from 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "cosine":
        done = min(1, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
        return cfg.lr * (cfg.lr_final + (1 - cfg.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))
    if cfg.schedule == "exponential":
        return cfg.lr * cfg.lr_decay ** ((step - cfg.warmup_steps) / 1000)
    return cfg.lr


def describe_step(values):
    """The objective's scalars in short: "loss 0.0431, 21.90 dB"."""
    parts = [f"loss {values['loss']:.5f}"]
    if "squared_error" in values:
        parts.append(f"psnr {-10 * math.log10(max(values['squared_error'], 1e-10)):.2f} dB")
    terms = [name for name in values if name.endswith("_loss")]
    parts += [f"{name.removesuffix('_loss')} {values[name]:.4f}" for name in terms if len(terms) > 1]
    if "codebook_use" in values:
        parts.append(f"codes used {100 * values['codebook_use']:.1f} %")
    return ", ".join(parts)


def main():
    guard_screen()
    exit_with_usage(sys.argv[1:])
    sys.excepthook = end_at_once
    try:
        code = train(load_config(sys.argv[1:]))
    except (ConfigError, DeviceError, datasets.DataError, checkpoint.CheckpointError, InUse, NotSaved) as error:
        if int(os.environ.get("RANK", 0)) == 0:  # all ranks raise these together
            print(f"train.py: {one_line(str(error))}", file=sys.stderr)
        code = 1 if isinstance(error, NotSaved) else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
