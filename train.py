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
from dataclasses import asdict, dataclass

from screen import end_at_ctrl_c, guard_screen, one_line

# OpenMP's threads would spin for milliseconds wherever one waits for another, and take the cores from data processes
# and other programs: beside those, a step took six times the processor's time (docs/speed.md). Read at import torch.
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
from evaluate import describe_validation, evaluate, load_judges, spread
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
    """One run, from the settings to its last checkpoint. Returns the exit code. ConfigError, DeviceError, DataError,
    CheckpointError, InUse or NotSaved say in one line what is wrong; all ranks raise the same."""
    with contextlib.ExitStack() as at_end:  # however the run ends, it lets its folder go
        trainer = Trainer(cfg, at_end)
        if trainer.nothing_to_do():
            return 0
        at_end.callback(vars(trainer).pop, "batches", None)  # while they are held, Python waits for their processes
        trainer.start()
        cfg, run = trainer.cfg, trainer.run
        stop = StopSignal()
        last = stopping = False  # whether the step that was done is the run's last; whether a signal ends it there
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

            # ---- update, unless something is not finite on any rank
            trainer.update(micro_batches, vote.time)
            last, stopping = run.step >= cfg.max_steps or vote.time >= 1, vote.stop

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
    """How far a run is. A checkpoint holds it."""
    step: int = 0         # optimizer steps done, skipped ones too
    samples: int = 0      # clips that they took
    seconds: float = 0.0  # of training, before this process began
    pieces: int = 1       # parts of a micro-batch; doubles when memory runs out


class Trainer:
    """What a run needs, and what is done in each step; all ranks call the same methods. Errors: see `train`."""

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
        # What init_from settled is a setting of the run, and the scale of the latents that the clips have.
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
        # What is logged is averaged along, and BatchNorm's statistics.
        self.gradients = Gradients(self.parameters, len(self.objective.names), batch_statistics(model))
        self.optimizer = make_optimizer(model, cfg, self.device)
        self.trend = Trend(self.device, loss=self.objective.describe_loss())
        self.meter = Meter(self.objective.names, self.device)
        self.saver = Saver(self.folder, cfg, self.control, self.log, self.trend, at_end)

        # ---- how far it is
        if self.rank:  # each rank draws numbers of its own: all are made from one seed, for the initial weights
            torch.manual_seed(cfg.seed + self.rank)
        self.run, self.changes = Run(), ""
        if self.resumed_from:
            self.resume()
        copy_from_rank_0([*model.state_dict().values(), *self.average.state_dict().values()])
        self.objective.prepare()
        self.time_limit = 60 * cfg.max_minutes or math.inf

    def resume(self):
        """Take up the state of the checkpoint to go on from."""
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
        """Say in the log what will run, and set up what the loop takes from."""
        cfg, run, log, model = self.cfg, self.run, self.log, self.model
        log(everywhere(self.control, lambda: summarize(model, self.buckets[0], self.autocast)), screen=False)
        from_rank_0(self.control, lambda: log.mirror(cfg.wandb, asdict(cfg), bool(self.resumed_from)))
        log.start(asdict(cfg), run.step)
        title = " ".join(filter(None, [cfg.model, model.config.get("variant")]))
        log(f"{title}: {count(model) / 1e6:.1f} M parameters, {self.origin}; {describe(self.device)}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.world} rank{'s' * (self.world > 1)}")
        lack = self.saver.lack_of_room(
            model.state_dict(), self.average.state_dict(), self.average.state_dict(), self.objective.state(),
            self.parameters, self.parameters)  # the average is in two files; AdamW has two means of each parameter
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
                        disable=self.rank > 0 or None)  # None: in a file there are log lines in its place
        self.clock = log.clock = Clock(run.seconds)
        self.clips_done = 0  # since the last log line

    # ---- a step --------------------------------------------------------------------------------------------------

    def take_clips(self):
        """([this rank's micro-batches of a step], what is wrong with its data or "")."""
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
        """Adds up the gradients and the objective's scalars over this rank's clips. Returns the Vote of all ranks."""
        vote, out_of_memory, gradients, names = None, False, self.gradients, self.objective.names
        gradients.begin()
        try:
            self.objective.begin(self.run.step)
            for batch in micro_batches:
                size = math.ceil(len(batch["video"]) / self.run.pieces)
                for start in range(0, len(batch["video"]), size):
                    part = {k: v[start:start + size].to(self.device, non_blocking=True).float()
                            for k, v in batch.items()}
                    # A step's fractions add up to 1: its gradient is the mean over its clips, however they are cut.
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
        """Memory ran out on some rank: from here on all ranks cut micro-batches into twice as many parts."""
        if self.run.pieces >= len(micro_batches[0]["video"]):
            self.give_up("out of memory with one clip at a time",
                         "Set gradient_checkpointing=true, or a smaller size or frames.")
        self.run.pieces *= 2
        torch.cuda.empty_cache()
        self.log(f"step {self.run.step + 1}: out of memory; micro-batches are split in {self.run.pieces} from here on")

    def update(self, micro_batches, time):
        """Average the gradients over the ranks; optimizer, discriminators, codebooks, average of the weights."""
        cfg, run, optimizer = self.cfg, self.run, self.optimizer
        self.learning_rate = learning_rate(cfg, run.step, time)
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
        """A line and the curves of the steps since the last one. The run ends here if all was not finite for long."""
        run, log, meter = self.run, self.log, self.meter.read()
        values = {**spread(meter.means), **self.objective.codes_used()}
        figures, (course, warnings) = self.objective.figures.read(), self.trend.read(run.step)
        synchronize(self.device)
        speed, self.clips_done = self.clips_done / self.clock.lap(), 0
        log.scalars(run.step, "train", **values, **figures, **course, gradient_norm=meter.gradient_norm,
                    learning_rate=self.learning_rate, clips_per_second=speed,
                    skipped_steps=meter.skipped, resident_memory_gb=resident_memory() / 1e9,
                    gpu_memory_gb=peak_memory(self.device) / 1e9 if self.device.type == "cuda" else 0.0)
        line = describe_step(values)
        if self.cfg.max_minutes:  # as many steps as the minutes will allow, by those done
            self.bar.total = min(self.cfg.max_steps, math.ceil(run.step * max(1, self.time_limit / self.clock.total())))
        self.bar.set_postfix_str(f"{line}, {speed:.1f} clips/s", refresh=False)
        log(f"step {run.step}: {line}, gradient norm {meter.gradient_norm:.3f}{describe_trend(course)}"
            f"{describe_figures(figures)}, {speed:.2f} clips/s"
            + (f", {meter.skipped} steps skipped (not finite)" if meter.skipped else ""),
            screen=self.bar.disable or meter.skipped_in_a_row > 0)
        for warning in warnings:
            log(f"step {run.step}: {warning}")
        if meter.skipped_in_a_row >= self.cfg.max_bad_steps:
            self.saver.settle()  # which checkpoint is sound is known then
            way_out = where_to_go_on(self.folder, self.model, self.trend, run.step, meter.skipped_in_a_row)
            self.give_up(f"the loss or a gradient was not finite {meter.skipped_in_a_row} steps in a row",
                         f"{way_out} Try a lower lr, precision=fp32, or other data.")

    def evaluate(self, model):
        return evaluate(model, self.val_clips, self.device, self.autocast, self.control, **self.judges)

    def validate(self):
        """Measure the average of the weights; keep it as best.pt if it is the best so far."""
        step, log = self.run.step, self.log
        with self.clock.stopped():
            try:
                result, shown = self.evaluate(self.average)
            except DeviceError as error:
                self.give_up(str(error), "Set val_size lower.")
            log(f"step {step}: validation {describe_validation(result)}, after {self.clock.total() / 60:.2f} minutes"
                + "".join(f", {half} {result[f'{half}_fps']:.1f} frames/s" for half in ("encode", "decode")
                          if result[f"{half}_fps"]))
            log.scalars(step, "val", **spread({name: value for name, value in result.items() if name != "count"}))
            log.pictures(step, shown)
            self.best.offer(step, result, self.average)

    def save(self, is_last):
        """Copy what a checkpoint holds, and have it written. If it is the last, wait for that, and return, on every
        rank, why it could not be saved, or an empty string."""
        with self.clock.stopped():
            run = {**vars(self.run), "seconds": self.clock.total()}
            return self.saver.run(
                self.run.step, self.objective.rank_state(), checkpoint.random_state(self.device),
                lambda states, sound: dict(
                    model_name=self.cfg.model, model_config=self.model.config, config=asdict(self.cfg), **run,
                    tally=self.meter.state(), world=self.world, random=states, teacher=self.clips.teacher,
                    model=self.model.state_dict(), ema=self.average.state_dict(),
                    optimizer=self.optimizer.state_dict(), trend={**self.trend.state(), "sound": sound},
                    objective=self.objective.state()), is_last)

    def give_up(self, reason, way_out):
        """Save, and raise what ends the run."""
        self.gradients.give_up()  # this step, if it was not done
        if unsaved := self.save(is_last=True):
            raise NotSaved(f"{reason} at step {self.run.step}; {self.saver.not_saved(unsaved)}. {way_out}")
        raise ConfigError(f"{reason} at step {self.run.step}; the run is saved. {way_out}")

    def end(self, stopped_by, unsaved):
        """After the last step. stopped_by: the StopSignal that ended it early, or None. Returns the exit code."""
        self.bar.close()
        self.log.close()
        if unsaved:
            raise NotSaved(self.saver.not_saved(unsaved))
        if stopped_by is not None:  # it is false itself on ranks that got no signal
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
        # All ranks raise these together; before they have met, those of one machine.
        if int(os.environ.get("RANK" if dist.is_initialized() else "LOCAL_RANK", 0)) == 0:
            print(f"train.py: {one_line(str(error))}", file=sys.stderr)
        code = 1 if isinstance(error, NotSaved) else 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
