"""Train a video autoencoder.

    python train.py                                            # the demo, on one GPU or the CPU
    python train.py taehv data=videos/ name=mine               # your videos, one GPU
    torchrun --nproc_per_node 8 train.py taehv data=videos/    # eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --rdzv_id 1 train.py taehv data=videos/

Settings: config.py, or key=value here. The same command again resumes. Ctrl-C or SIGTERM saves and ends; twice ends at once.
"""
import copy
import math
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import data as datasets
import metrics
from config import ConfigError, exit_with_usage, load_config, parse_buckets
from device import DeviceError, describe, peak_memory, pick_device, pick_precision, synchronize, tune
from logbook import Logbook, count, summary
from losses import pixel_loss
from ranks import Gradients, StopSignal, agree, from_rank_0, gather, start_ranks


def train(cfg):
    # ---- ranks, log, and everything that can be wrong before the first step --------------------------------------------
    device = pick_device(cfg.device)
    tune(device)
    dtype = pick_precision(cfg.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    rank, world, control = start_ranks(device, cfg.timeout_minutes)
    folder = os.path.join(cfg.out_dir, cfg.name)
    log, stop = Logbook(folder, rank), StopSignal()
    buckets = [datasets.Bucket(*b) for b in parse_buckets(cfg)]
    torch.manual_seed(cfg.seed)
    model, origin = make_model(cfg, buckets)
    resume_from = from_rank_0(control, lambda: find_resume(cfg, folder, log))
    train_sources, val_sources, found = from_rank_0(control, lambda: find_data(cfg))
    clips = datasets.TrainClips(train_sources, cfg.seed, cfg.min_frame_delta, cfg.max_frame_delta,
                                datasets.Augment(cfg.random_crop, cfg.min_crop, cfg.flip, cfg.color_jitter, cfg.blur),
                                cfg.image_sequences)
    for bucket in buckets:
        clips.check(bucket)

    # ---- model, its average, optimizer, and their state in the run that goes on ----------------------------------------
    model.to(device, memory_format=torch.channels_last).train()
    model.gradient_checkpointing = cfg.gradient_checkpointing
    model.encoder.requires_grad_(cfg.train_encoder)
    model.decoder.requires_grad_(cfg.train_decoder)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = Gradients(parameters, world)
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=device.type in ("cuda", "cpu"))
    step, samples, best = 0, 0, -math.inf
    if resume_from:
        state = checkpoint.read(resume_from)
        restore(state, model, average, optimizer, resume_from)
        step, samples, best = state["step"], state["samples"], state["best"]
        if state["world"] == world:
            checkpoint.restore_random_state(state["random"][rank], device)
        del state
    forward = torch.compile(model) if cfg.compile else model

    log(summary(model, buckets[0].size, buckets[0].frames, device), screen=False)
    log.start(asdict(cfg), step)
    log(f"{cfg.model} {cfg.variant}: {count(model) / 1e6:.1f} M parameters, {origin}; {describe(device)}, "
        f"{str(dtype).removeprefix('torch.')}, {world} rank{'s' * (world > 1)}")
    for line in found:
        log(line)
    if resume_from:
        log(f"resumed from {resume_from} at step {step}")
    if step >= cfg.max_steps:
        log(f"nothing to do: step {step} of {cfg.max_steps}; set max_steps higher to go on, or name=... for a new run")
        return

    schedule = datasets.TrainSchedule(clips, buckets, cfg.seed, world, rank, cfg.accumulation, step, samples)
    workers = cfg.workers if cfg.workers >= 0 else datasets.default_workers(device.type)
    batches = iter(datasets.make_loader(clips, workers, device.type == "cuda", batch_sampler=schedule))
    val_clips = datasets.ValClips(val_sources, buckets[0].size, buckets[0].frames, cfg.val_clips_per_video, cfg.val_clips)
    val_share = datasets.load_val(val_clips, rank, world, log)

    # ---- one step's forward and backward passes on this rank, and saving -----------------------------------------------
    def accumulate(micro_batches, pieces):
        """Adds up gradients; returns (loss, squared error), means over the step's clips, or None if memory ran out."""
        gradients.flat.zero_()
        totals = torch.zeros(2, device=device)
        try:
            for batch in micro_batches:
                for part in batch.split(math.ceil(len(batch) / pieces)):
                    video = as_video(part, device)
                    with autocast:
                        output = forward(video)[0]
                    output, target = output.float(), model.targets(video)
                    loss = pixel_loss(cfg.pixel_loss, output, target)
                    share = len(part) / len(batch) / len(micro_batches)  # the shares of a step add up to 1: its gradient
                    (loss * share).backward()                            # is the mean over its clips, however they are cut
                    error = (output.detach() - target).square().mean()
                    totals += torch.stack([loss.detach(), error]) * share
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return totals

    def save():
        """Every rank calls this. Returns what went wrong, or an empty string."""
        states = gather(control, checkpoint.random_state(device))
        if rank > 0:
            return ""
        problem = checkpoint.save_run(folder, dict(
            model_name=cfg.model, model_config=model.config, config=asdict(cfg), step=step, samples=samples, best=best,
            world=world, random=states, model=model.state_dict(), ema=average.state_dict(),
            optimizer=optimizer.state_dict()), cfg.keep_last)
        log(problem or f"step {step}: saved {folder}/step_{step:08d}.pt")
        return problem

    def give_up(reason, way_out):
        saved = "the run is not saved" if save() else "the run is saved"
        raise ConfigError(f"{reason} at step {step}; {saved}. {way_out}")

    # ---- the loop ------------------------------------------------------------------------------------------------------
    bar = tqdm(initial=step, total=cfg.max_steps, unit="step", disable=rank > 0, dynamic_ncols=True, smoothing=0.05)
    pieces = 1                                        # parts of a micro-batch; doubles when memory runs out
    bad_row = bad_all = torch.zeros((), device=device)  # skipped steps: in a row, and in all
    sums, good = torch.zeros(2, device=device), torch.zeros((), device=device)  # since the last log line
    clips_done, since = 0, time.monotonic()
    stopping = False
    while step < cfg.max_steps and not stopping:
        micro_batches = []
        for batch in (next(batches) for _ in range(cfg.accumulation)):
            log.notes(batch["notes"])
            micro_batches.append(batch["video"])
        while True:
            totals = accumulate(micro_batches, pieces)
            stopping, out_of_memory = agree(control, stop, totals is None)
            if not out_of_memory:
                break
            if pieces >= len(micro_batches[0]):
                give_up("out of memory with one clip at a time", "Set gradient_checkpointing=true, or a smaller size or frames.")
            pieces *= 2  # every rank does the whole step again, in smaller parts
            totals = None
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
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        for mine, other in zip(average.buffers(), model.buffers()):
            mine.copy_(other)

        bad_row, bad_all, good = (bad_row + bad) * bad, bad_all + bad, good + 1 - bad
        sums = sums + torch.where(bad > 0, 0.0, totals)
        step_clips = cfg.accumulation * world * len(micro_batches[0])
        step, samples, clips_done = step + 1, samples + step_clips, clips_done + step_clips
        bar.update()

        if step % cfg.log_every == 0 or step == cfg.max_steps or stopping:
            if world > 1:
                dist.all_reduce(sums)
            loss, error = (sums / world / good).tolist()
            synchronize(device)
            speed, psnr = clips_done / (time.monotonic() - since), -10 * math.log10(max(error, 1e-10))
            log.scalars(step, train__loss=loss, train__reconstruction_loss=loss, train__learning_rate=learning_rate(cfg, step - 1),
                        train__gradient_norm=norm, train__clips_per_second=speed, train__skipped_steps=bad_all,
                        train__gpu_memory_gb=peak_memory(device) / 1e9 if device.type == "cuda" else 0.0)
            bar.set_postfix_str(f"loss {loss:.4f}, {psnr:.2f} dB, {speed:.1f} clips/s", refresh=False)
            log(f"step {step}: loss {loss:.5f}, psnr {psnr:.2f} dB, gradient norm {norm:.3f}, {speed:.2f} clips/s"
                + (f", {int(bad_all)} steps skipped (not finite)" if bad_all > 0 else ""), screen=bool(bad_row > 0))
            sums, good = torch.zeros_like(sums), torch.zeros_like(good)
            clips_done, since = 0, time.monotonic()
            if bad_row >= cfg.max_bad_steps:
                give_up(f"the loss or a gradient was not finite {int(bad_row)} steps in a row",
                        "The weights are those from before. Try a lower lr, precision=fp32, or other data.")
        if val_clips.items and not stopping and (step % cfg.val_every == 0 or step == cfg.max_steps):
            result, shown = evaluate(average, val_share, device, autocast, control)
            log(f"step {step}: validation psnr {result['psnr']:.2f} dB, ssim {result['ssim']:.4f}, mse {result['mse']:.5f} "
                f"over {result['count']} frames")
            log.scalars(step, val__mse=result["mse"], val__psnr=result["psnr"], val__ssim=result["ssim"])
            log.pictures(step, shown)
            if result["psnr"] > best:
                best = result["psnr"]
                if rank == 0:
                    problem = checkpoint.save_best(folder, dict(
                        model_name=cfg.model, model_config=model.config, step=step, val=result, ema=average.state_dict()))
                    log(problem) if problem else None
            clips_done, since = 0, time.monotonic()
        if step % cfg.save_every == 0 or step == cfg.max_steps or stopping:
            save()
    bar.close()
    log.close()
    log(f"stopped by a signal after step {step} of {cfg.max_steps}: the same command goes on from here" if stopping else
        f"done: {step} steps. Look at them: python infer.py {folder} VIDEO, and tensorboard --logdir {folder}")


# ---- in the order in which train() calls them ----------------------------------------------------------------------------


def make_model(cfg, buckets):
    """(model on the CPU, where its weights come from); ConfigError if settings, buckets and weights do not fit together."""
    try:
        model = checkpoint.build_model(cfg.model, checkpoint.model_config(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for bucket in buckets:
        if bucket.size % model.space_factor:
            raise ConfigError(f"size={bucket.size}: {cfg.model} {cfg.variant} takes multiples of {model.space_factor}")
    if not cfg.init_from:
        return model, "from scratch"
    source, words = checkpoint.load_model(cfg.init_from)
    given, own = source.state_dict(), model.state_dict()
    different = [k for k in own.keys() | given.keys() if k not in own or k not in given or own[k].shape != given[k].shape]
    if different:
        raise ConfigError(f"init_from={cfg.init_from} is {words}, which does not fit model={cfg.model} variant={cfg.variant} "
                          f"({min(different)} differs): set variant, patch_size and latent_channels to match")
    model.load_state_dict(given)
    return model, f"from {cfg.init_from}"


def find_resume(cfg, folder, log):
    """Path of the checkpoint to go on from, or None."""
    present = checkpoint.checkpoints(folder)
    if cfg.resume == "none":
        if present:
            raise ConfigError(f"resume=none, but {folder} holds checkpoints: choose another name=, or remove that folder")
        return None
    if cfg.resume != "auto":
        checkpoint.read(cfg.resume)
        return cfg.resume
    path, problems = checkpoint.newest_checkpoint(folder)
    for problem in problems:
        log(f"warning: {problem}; the one before it is used")
    if present and not path:
        raise ConfigError(f"none of the {len(present)} checkpoints in {folder} can be read: choose another name=")
    return path


def find_data(cfg):
    """(training sources, validation sources, lines that say what was found)."""
    data, val_data = cfg.data, cfg.val_data
    if data == "demo":
        data, val_data = "demo_data/train", "demo_data/val"
        datasets.make_demo("demo_data")
    train, refused = datasets.probe(datasets.find_sources(data, cfg.data_root))
    if val_data:
        val, more = datasets.probe(datasets.find_sources(val_data, cfg.data_root))
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
        clips = sum(max(1, s.frames // cfg.frames) for s in sources)
        lines.append(f"{name}: {len(sources)} files, {clips} separate clips of {cfg.frames} frames")
    lines += [f"refused: {path}: {reason}" for path, reason in refused]
    if not val:
        lines.append("no validation: for one, set val_data=FOLDER, or val_fraction (and have two files or more)")
    elif not val_data:
        lines.append("held out: " + ", ".join(s.key for s in val[:20]) + (" ..." if len(val) > 20 else ""))
    return train, val, lines


def restore(state, model, average, optimizer, path):
    """Put a checkpoint's weights and optimizer state in place; ConfigError if it is another model's."""
    if state.get("model_config") != model.config:
        raise ConfigError(f"{path} is a checkpoint of {state.get('model_config', 'something else')}, not of {model.config}: "
                          "choose another name= for this run")
    if "optimizer" not in state:
        raise ConfigError(f"{path} holds weights only: give it as init_from=, not as resume=")
    if len(state["optimizer"]["param_groups"][0]["params"]) != len(optimizer.param_groups[0]["params"]):
        raise ConfigError(f"{path} trained other parts: keep train_encoder and train_decoder, or give it as init_from=")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])


def as_video(clips, device):
    """uint8 N T 3 H W -> float in [0, 1] on the device."""
    return clips.to(device, non_blocking=True).float().div_(255)


def is_out_of_memory(error):
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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


@torch.no_grad()
def evaluate(model, clips, device, autocast, control):
    """Mean MSE, PSNR (frames at most 100 dB) and SSIM over all ranks' clips, each frame counted once. Every rank calls it.

    `clips`: this rank's share, uint8 T 3 H W each. Returns ({"mse", "psnr", "ssim", "count"}, [up to four (original,
    reconstruction) of this rank, T 3 H W on the CPU]).
    """
    mean, shown = metrics.Mean("mse", "psnr", "ssim"), []
    for clip in clips:
        video = as_video(clip[None], device)
        with autocast:
            output = model(video)[0]
        output, target = output.float().clamp(0, 1), model.targets(video)
        mean.add(mse=metrics.mse(output, target), psnr=metrics.psnr(output, target).clamp(max=100),
                 ssim=metrics.ssim(output, target))
        if len(shown) < 4:
            shown.append((target[0].cpu(), output[0].cpu()))
    return mean.reduce(control), shown


def main():
    exit_with_usage(sys.argv[1:])
    try:
        train(load_config(sys.argv[1:]))
    except (ConfigError, DeviceError, datasets.DataError, checkpoint.CheckpointError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
