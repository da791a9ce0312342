"""Train a video autoencoder.

    python train.py                                            # the demo, on one GPU or the CPU
    python train.py taehv data=videos/ name=mine               # your videos, one GPU
    torchrun --nproc_per_node 8 train.py taehv data=videos/    # eight GPUs
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py taehv data=videos/

The settings are in config.py; key=value overrides one of them. A run's config.json can be given instead of a preset.
The same command again resumes the run. Ctrl-C or SIGTERM saves a checkpoint and ends it.
"""
import contextlib
import copy
import math
import os
import sys
from dataclasses import asdict, dataclass

from screen import end_at_ctrl_c, guard_screen, one_line

# By default, OpenMP's threads spin while they wait, and take cores from data processes and other programs: beside
# those, a step took six times the CPU time (docs/speed.md). OpenMP reads this variable when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
end_at_ctrl_c(__name__)
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import clips
import data
import models
from best import Best
from check_config import ConfigError, parse_buckets
from config import exit_with_usage, load_config
from device import (DeviceError, default_workers, describe, is_out_of_memory, peak_memory, pick_device, pick_precision,
                    to_device, resident_memory, synchronize, tune)
from evaluate import describe_validation, evaluate, load_judges, rms_of
from fit_taehv import start_from_clips
from lock import InUse
from logbook import Clock, Logbook, count, summarize
from objective import Objective, remarks
from optimizer import average_weights, learning_rate, make_optimizer
from ranks import (Gradients, LeftStep, StopSignal, Vote, agree, batch_statistics, copy_from_rank_0, end_at_once,
                   everywhere, from_rank_0, gather, start_ranks)
from resuming import check_start, describe_changes, find_resume, restore, take_folder, where_to_go_on
from saving import NotSaved, Saver
from step_taehv import speed_up
from video_files import DataError
from watch import Meter, Trend, describe_figures, describe_step, describe_trend


def train(cfg):
    """Run one training, from its settings to its last checkpoint. Returns the exit code. ConfigError, DeviceError,
    DataError, CheckpointError, InUse or NotSaved, raised by all ranks, say in one line what is wrong."""
    with contextlib.ExitStack() as at_end:  # unlocks the run folder, however the run ends
        trainer = Trainer(cfg, at_end)
        if trainer.nothing_to_do():
            return 0
        at_end.callback(vars(trainer).pop, "batches", None)  # or Python would wait for the data processes
        trainer.start()
        cfg, run = trainer.cfg, trainer.run
        stop = StopSignal()
        last = stopping = False  # whether this step is the run's last; whether a signal ends the run after this step
        while not last and not stopping:
            # ---- take this step's clips
            micro_batches, trouble = trainer.take_clips()

            # ---- forward and backward, repeated in smaller parts if memory ran out on any rank
            vote = trainer.accumulate(micro_batches, stop, trouble)
            while vote.out_of_memory and not vote.no_data:
                trainer.split(micro_batches)
                vote = trainer.accumulate(micro_batches, stop, trouble)
            if vote.no_data:
                trainer.give_up(f"no data ({trouble or 'on another rank'})", "Look at the files that train.log names.")

            # ---- update the weights, unless the loss or a gradient is not finite on some rank
            trainer.update(micro_batches, vote.elapsed)
            last, stopping = run.step >= cfg.max_steps or vote.elapsed >= 1, vote.stop

            # ---- once in a while: log, validate, save
            trainer.saver.settle([])
            if run.step % cfg.log_every == 0 or last:
                trainer.log_step()
            if trainer.validates and (last or run.step % cfg.val_every == 0 and not stopping):
                trainer.validate()
            if run.step % cfg.save_every == 0 or last or stopping:
                unsaved = trainer.save(is_last=last or stopping)
        return trainer.end(stop if stopping and not last else None, unsaved)


@dataclass
class Run:
    """The progress of a run. Checkpoints hold it."""
    step: int = 0         # optimizer steps done, including skipped ones
    samples: int = 0      # clips that these steps used
    seconds: float = 0.0  # of training, before this process began
    pieces: int = 1       # parts that a micro-batch is split into; doubles when memory runs out


class Trainer:
    """The state of a run, and the stages of a step. All ranks call the same methods. Errors: see `train`."""

    def __init__(self, cfg, at_end):
        # ---- ranks, folder and log
        self.device = pick_device(cfg.device)
        tune(self.device)
        self.dtype = pick_precision(cfg.precision, self.device, trains_volumes=cfg.model == "dcae")
        self.autocast = (contextlib.nullcontext() if self.dtype == torch.float32
                         else torch.autocast(self.device.type, self.dtype))
        self.rank, self.world, self.control = start_ranks(self.device, cfg.timeout_minutes)
        self.folder = os.path.join(cfg.out_dir, cfg.name)
        self.unlocked = from_rank_0(self.control, lambda: take_folder(cfg, self.folder, at_end))
        self.log = Logbook(self.folder, self.rank)

        # ---- everything that can be wrong before the first step
        self.buckets = [data.Bucket(*bucket) for bucket in parse_buckets(cfg)]
        torch.manual_seed(cfg.seed)
        self.model, self.origin = everywhere(self.control, lambda: models.make_model(cfg, self.buckets))
        self.objective = everywhere(self.control, lambda: Objective(cfg, self.model, self.device, self.autocast,
                                                                    self.control))
        self.judges = everywhere(self.control, lambda: load_judges(cfg, self.device))
        restarted, = agree(self.control, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)
        self.resumed_from = from_rank_0(self.control, lambda: find_resume(cfg, self.folder, restarted, self.log))
        self.clips = clips.find(cfg, self.buckets, self.model, self.rank, self.world, self.control)
        # Settings that were left open get their values: the shape from init_from, the scale from the clips' latents.
        self.cfg = cfg = models.with_shape(cfg, self.model)
        self.validates = len(self.clips.val) > 0
        self.workers = cfg.workers if cfg.workers >= 0 else default_workers(self.device)
        if cfg.model == "taehv" and cfg.init == "clips" and not cfg.init_from and not self.resumed_from:
            self.origin += from_rank_0(self.control, lambda: start_from_clips(self.model, clips.first_batches(
                cfg, self.clips, self.buckets[0], self.workers), self.buckets[0].frames))

        # ---- model, its average, optimizer, meters
        model = to_device(self.model, self.device).train()
        if cfg.model in ("taehv", "vq_latents"):
            speed_up(model)
        getattr(model, "taehv", model).gradient_checkpointing = cfg.gradient_checkpointing
        if cfg.model == "taehv":
            model.encoder.requires_grad_(cfg.train_encoder)
            model.decoder.requires_grad_(cfg.train_decoder)
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # The logged scalars and BatchNorm's statistics are averaged over the ranks together with the gradients.
        self.gradients = Gradients(self.parameters, len(self.objective.names), batch_statistics(model))
        self.optimizer = make_optimizer(model, cfg, self.device)
        self.trend = Trend(self.device, loss=self.objective.describe_loss())
        self.meter = Meter(self.objective.names, self.device)
        self.saver = Saver(self.folder, cfg, self.control, self.log, self.trend, at_end)

        # ---- progress
        if self.rank:  # all ranks made the initial weights from one seed; from here on each draws its own numbers
            torch.manual_seed(cfg.seed + self.rank)
        self.run, self.changes = Run(), ""
        if self.resumed_from:
            self.resume()
        copy_from_rank_0([*model.state_dict().values(), *self.average.state_dict().values()])
        self.objective.prepare()
        self.time_limit = 60 * cfg.max_minutes or math.inf

    def resume(self):
        """Load the checkpoint that the run goes on from."""
        path, cfg, run = self.resumed_from, self.cfg, self.run
        state = everywhere(self.control, lambda: checkpoint.read(path))
        try:
            restore(state, self.model, self.average, self.optimizer, self.clips.teacher, path)
            check_start(state["config"], cfg, path)
            self.changes = describe_changes(state["config"], cfg)
            run.step, run.samples, run.seconds = state["step"], state["samples"], float(state.get("seconds", 0))
            if (state["config"]["batch_size"], state["config"]["buckets"]) == (cfg.batch_size, cfg.buckets):
                run.pieces = state["pieces"]
            self.meter.load_state(state["tally"])
            self.objective.load_state(state.get("objective") or {})
            self.trend.load_state(state.get("trend") or {})
            if state["world"] == self.world:
                checkpoint.restore_random_state(state["random"][self.rank], self.device)
        except checkpoint.MISSHAPEN as error:
            raise ConfigError(f"{path} is no checkpoint of such a run ({type(error).__name__}: "
                              f"{checkpoint.first_line(error)}): choose another name= for this one") from None
        if state["world"] != self.world:
            return
        rank_state, problem = checkpoint.read_rank(path, self.rank)
        try:
            self.objective.load_rank_state(rank_state)
        except ValueError as error:
            problem = f"the file of rank {self.rank} beside {path}: {checkpoint.first_line(error)}"
        for problem in filter(None, gather(self.control, problem)):
            self.log(f"warning: {problem}; that rank goes on without its replayed samples")

    def nothing_to_do(self):
        run, cfg = self.run, self.cfg
        if run.step < cfg.max_steps and run.seconds < self.time_limit:
            return False
        self.log.event("nothing to do", run.step, f"nothing to do: step {run.step} of {cfg.max_steps}, "
                       f"{run.seconds / 60:.1f} minutes of training; set max_steps or max_minutes higher to go on, or "
                       "name=... for a new run")
        return True

    def start(self):
        """Log what will run, and set up the clips, best.pt, the progress bar and the clock."""
        cfg, run, log, model = self.cfg, self.run, self.log, self.model
        log(everywhere(self.control, lambda: summarize(model, self.buckets[0], self.autocast)), screen=False)
        from_rank_0(self.control, lambda: log.mirror(cfg.wandb, asdict(cfg), bool(self.resumed_from)))
        log.start(asdict(cfg), run.step)
        title = " ".join(filter(None, [cfg.model, model.config.get("variant")]))
        log(f"{title}: {count(model) / 1e6:.1f} M parameters, {self.origin}; {describe(self.device)}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.world} rank{'s' * (self.world > 1)}")
        lack = self.saver.lack_of_room(
            model.state_dict(), self.average.state_dict(), self.average.state_dict(), self.objective.state(),
            self.parameters, self.parameters)  # the average is in two files; AdamW has two moments of each parameter
        for line in filter(None, [*remarks(cfg, model, self.device, self.dtype), *self.clips.lines,
                                  self.unlocked and f"warning: {self.unlocked}", lack, self.changes]):
            log(line)
        if self.resumed_from:
            log.event("resumed", run.step, f"resumed from {self.resumed_from} at step {run.step}"
                      + (f"; micro-batches are split in {run.pieces}, since memory ran out" if run.pieces > 1 else ""))

        schedule = data.TrainSchedule(self.clips.train, self.buckets, cfg.seed, self.world, self.rank, cfg.accumulation,
                                      run.step, run.samples)
        self.batches = self.clips.train.batches(schedule, self.workers, pin_memory=self.device.type == "cuda")
        self.val_clips = clips.share(self.clips.val, self.rank, self.world, self.control, log.notes)
        about = dict(model_name=cfg.model, model_config=model.config)
        self.best = Best(about, self.objective, self.val_clips, self.saver)
        self.best.take_up(self.average, bool(self.resumed_from),
                          (lambda model: self.evaluate(model)[0]) if self.validates else None)
        self.bar = tqdm(initial=run.step, total=cfg.max_steps, unit="step", dynamic_ncols=True, smoothing=0.05,
                        disable=self.rank > 0 or None)  # None: no bar in a file, which gets the log lines instead
        self.clock = log.clock = Clock(run.seconds)
        self.clips_done = 0  # since the last log line

    # ---- a step --------------------------------------------------------------------------------------------------

    def take_clips(self):
        """Returns ([this rank's micro-batches of a step], why its data cannot be read or "")."""
        micro_batches = []
        try:
            for _ in range(self.cfg.accumulation):
                batch = next(self.batches)
                self.log.notes(batch.pop("notes"))
                micro_batches.append(batch)
        except DataError as error:
            return micro_batches, str(error)
        return micro_batches, ""

    def accumulate(self, micro_batches, stop, trouble):
        """Add up the gradients and the objective's scalars over this rank's clips. Returns the Vote of all ranks."""
        vote, out_of_memory, gradients, names = None, False, self.gradients, self.objective.names
        gradients.begin()
        try:
            self.objective.begin(self.run.step)
            for batch in micro_batches:
                size = math.ceil(len(batch["video"]) / self.run.pieces)
                for start in range(0, len(batch["video"]), size):
                    part = {k: v[start:start + size].to(self.device, non_blocking=True).float()
                            for k, v in batch.items()}
                    # A step's fractions add up to 1, so its gradient is the mean over its clips, however it is split.
                    fraction = len(part["video"]) / len(batch["video"]) / len(micro_batches)
                    values = self.objective(part["video"].div_(255), part.get("latents"), fraction)
                    if batch is micro_batches[-1] and start + size >= len(batch["video"]):
                        gradients.last_pass()
                    (values["loss"] * fraction).backward()
                    gradients.totals += torch.stack([values[name].detach() for name in names]) * fraction
        except LeftStep as left:
            vote = left.vote
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = True
        gradients.send_rest()
        return vote or Vote(out_of_memory, bool(stop), bool(trouble), self.clock.total() / self.time_limit
                            ).count(self.control)

    def split(self, micro_batches):
        """Memory ran out on some rank: from here on, all ranks split micro-batches into twice as many parts."""
        if self.run.pieces >= len(micro_batches[0]["video"]):
            self.give_up("out of memory with one clip at a time",
                         "Set gradient_checkpointing=true, or a smaller size or frames.")
        self.run.pieces *= 2
        torch.cuda.empty_cache()
        self.log(f"step {self.run.step + 1}: out of memory; micro-batches are split in {self.run.pieces} from here on")

    def update(self, micro_batches, elapsed):
        """Average the gradients over the ranks. Update weights, discriminators, codebooks and the averaged weights."""
        cfg, run, optimizer = self.cfg, self.run, self.optimizer
        self.learning_rate = learning_rate(cfg, run.step, elapsed)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * self.learning_rate
        norm, bad = self.gradients.step(optimizer, cfg.grad_clip)
        self.objective.step(bad)
        decay = min(cfg.ema_decay, (1 + run.step) / (10 + run.step))
        average_weights(self.average, self.model, decay)
        self.trend.add(run.step, self.objective.steady_loss(self.gradients.totals), norm, bad)
        self.meter.add(self.gradients.totals, norm, bad)
        taken = cfg.accumulation * self.world * len(micro_batches[0]["video"])
        run.step, run.samples, self.clips_done = run.step + 1, run.samples + taken, self.clips_done + taken
        self.bar.update()

    # ---- once in a while -----------------------------------------------------------------------------------------

    def log_step(self):
        """Log the steps since the last log line. End the run if the last max_bad_steps steps were not finite."""
        run, log, meter = self.run, self.log, self.meter.read()
        values = {**rms_of(meter.means), **self.objective.codes_used()}
        figures, (trend, warnings) = self.objective.figures.read(), self.trend.read(run.step)
        synchronize(self.device)
        speed, self.clips_done = self.clips_done / self.clock.lap(), 0
        log.scalars(run.step, "train", **values, **figures, **trend, gradient_norm=meter.gradient_norm,
                    learning_rate=self.learning_rate, clips_per_second=speed,
                    skipped_steps=meter.skipped, resident_memory_gb=resident_memory() / 1e9,
                    gpu_memory_gb=peak_memory(self.device) / 1e9 if self.device.type == "cuda" else 0.0)
        line = describe_step(values)
        if self.cfg.max_minutes:  # the number of steps that fit into max_minutes at the speed so far
            self.bar.total = min(self.cfg.max_steps, math.ceil(run.step * max(1, self.time_limit / self.clock.total())))
        self.bar.set_postfix_str(f"{line}, {speed:.1f} clips/s", refresh=False)
        log(f"step {run.step}: {line}, gradient norm {meter.gradient_norm:.3f}{describe_trend(trend)}"
            f"{describe_figures(figures)}, {speed:.2f} clips/s"
            + (f", {meter.skipped} steps skipped (not finite)" if meter.skipped else ""),
            screen=self.bar.disable or meter.skipped_in_a_row > 0)
        for warning in warnings:
            log(f"step {run.step}: {warning}")
        if meter.skipped_in_a_row >= self.cfg.max_bad_steps:
            self.saver.settle()  # a save that is still being written may be the newest sound checkpoint
            way_out = where_to_go_on(self.folder, self.model, self.trend, run.step, meter.skipped_in_a_row)
            self.give_up(f"the loss or a gradient was not finite {meter.skipped_in_a_row} steps in a row",
                         f"{way_out} Try a lower lr, precision=fp32, or other data.")

    def evaluate(self, model):
        return evaluate(model, self.val_clips, self.device, self.autocast, self.control, **self.judges)

    def validate(self):
        """Validate the averaged weights, and save them as best.pt if they are the best so far."""
        step, log = self.run.step, self.log
        with self.clock.stopped():
            try:
                result, shown = self.evaluate(self.average)
            except DeviceError as error:
                self.give_up(str(error), "Set val_size lower.")
            log(f"step {step}: validation {describe_validation(result)}, after {self.clock.total() / 60:.2f} minutes"
                + "".join(f", {half} {result[f'{half}_fps']:.1f} frames/s" for half in ("encode", "decode")
                          if result[f"{half}_fps"]))
            log.scalars(step, "val", **rms_of({name: value for name, value in result.items() if name != "count"}))
            log.pictures(step, shown)
            self.best.offer(step, result, self.average)

    def save(self, is_last):
        """Copy the state of the run, which a thread then writes as a checkpoint. is_last: wait for the thread, and
        return, on every rank, why the checkpoint could not be saved, or an empty string."""
        with self.clock.stopped():
            run = {**vars(self.run), "seconds": self.clock.total()}
            return self.saver.run(
                self.run.step, self.objective.rank_state(), checkpoint.random_state(self.device),
                lambda states, sound: dict(
                    model_name=self.cfg.model, model_config=self.model.config, config=asdict(self.cfg), **run,
                    tally=self.meter.state(), world=self.world, random=states, teacher=self.clips.teacher,
                    model=self.model.state_dict(), ema=self.average.state_dict(),
                    optimizer=self.optimizer.state_dict(), trend={**self.trend.state(), "sound": tuple(sound)},
                    objective=self.objective.state()), is_last)

    def give_up(self, reason, way_out):
        """Save a last checkpoint and end the run: ConfigError, or NotSaved where that checkpoint could not be saved."""
        self.gradients.give_up()  # restores BatchNorm's statistics, if this step was not completed
        if unsaved := self.save(is_last=True):
            raise NotSaved(f"{reason} at step {self.run.step}; {self.saver.not_saved(unsaved)}. {way_out}")
        raise ConfigError(f"{reason} at step {self.run.step}; the run is saved. {way_out}")

    def end(self, stopped_by, unsaved):
        """After the last step. stopped_by: the StopSignal that ended it early, or None. Returns the exit code."""
        self.bar.close()
        self.log.close()
        if unsaved:
            raise NotSaved(self.saver.not_saved(unsaved))
        if stopped_by is not None:  # compared with None, since bool(stopped_by) is False on ranks without a signal
            again = "resume=auto" if self.cfg.resume == "none" else "the same command"
            cause = "torchrun was killed: stopped" if stopped_by.orphaned() else "stopped by a signal"
            self.log.event("stopped", self.run.step, f"{cause} after step {self.run.step} of {self.cfg.max_steps}: "
                           f"{again} goes on from here")
            return stopped_by.exit_code(self.control)
        self.log.event("done", self.run.step, f"done: {self.run.step} steps in {self.clock.total() / 60:.1f} minutes. "
                       f"Look at them: python infer.py {self.folder} VIDEO, and tensorboard --logdir {self.folder}")
        return 0


def main():
    guard_screen()
    exit_with_usage(sys.argv[1:])
    sys.excepthook = end_at_once
    try:
        code = train(load_config(sys.argv[1:]))
    except (ConfigError, DeviceError, DataError, checkpoint.CheckpointError, InUse, NotSaved) as error:
        # All ranks raise these together, so one rank prints. Before the process group exists, one of each machine does.
        if int(os.environ.get("RANK" if dist.is_initialized() else "LOCAL_RANK", 0)) == 0:
            print(f"train.py: {one_line(str(error))}", file=sys.stderr)
        code = 1 if isinstance(error, NotSaved) else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
