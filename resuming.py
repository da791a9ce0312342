"""Resuming a run: finds the checkpoint to go on from, checks that it suits the run, and restores its state."""
import json
import os

import checkpoint
import lock
from check_config import ConfigError


def take_folder(cfg, folder, at_end):
    """Make the run's folder, and lock it until the ExitStack `at_end` is closed. Returns "", or why this file system
    cannot lock it. ConfigError if the folder cannot be written to; InUse if another process has it."""
    try:
        unlocked = at_end.enter_context(lock.locked(folder, "choose another name="))
        checkpoint.remove_leftovers(folder)
        checkpoint.probe(folder)
    except OSError as error:
        raise ConfigError(f"out_dir={cfg.out_dir}: {folder} cannot be made or written to ({error.strerror})") from None
    return unlocked


def find_resume(cfg, folder, restarted, log):
    """The path of the checkpoint to go on from, or None. restarted: whether torchrun has restarted these ranks, which
    then go on from the run's own checkpoints. ConfigError if resume= does not suit what the folder holds."""
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


def check_start(saved, cfg, path):
    """ConfigError if init_from= differs from that in `saved`, the settings (a dict) of the checkpoint at `path`:
    resuming would ignore it. (For vq_latents it may differ, since the file with its TAEHV may have moved.)"""
    began = saved.get("init_from", "")
    if cfg.init_from and cfg.model != "vq_latents" and os.path.normpath(cfg.init_from) != os.path.normpath(began):
        raise ConfigError(f"init_from={cfg.init_from}, but {path} is there to go on from, which began "
                          f"{f'with {began}' if began else 'from scratch'}: choose another name= for a new run, or "
                          "leave init_from out")


# Settings that do not affect what a run learns: how long it goes on, where its files are, and what it logs.
NOT_LEARNING = ("name out_dir resume init_from device max_steps max_minutes workers log_every val_every save_every "
                "keep_last timeout_minutes wandb").split()


def describe_changes(saved, cfg):
    """A log line with the settings that affect learning and differ from those saved in a checkpoint, or ""."""
    changed = [f"{key}={value} ({saved[key]} before)" for key, value in vars(cfg).items()
               if key in saved and key not in NOT_LEARNING and json.dumps(saved[key]) != json.dumps(value)]
    return "settings that have changed: " + ", ".join(changed) if changed else ""


def restore(state, model, average, optimizer, teacher, path):
    """Load a checkpoint's weights and optimizer state. teacher: fingerprint of this run's teacher, or "". ConfigError
    if the checkpoint belongs to another model, teacher or choice of trained parts, or holds weights only."""
    if (learnt := state.get("teacher", "")) != teacher:  # checked first: another teacher can also change the model
        other = "another teacher" if learnt and teacher else "a teacher" if learnt else "no latent cache"
        raise ConfigError(f"{path} learnt from {other}: choose another name= for this run, with init_from=")
    if not same_model(state.get("model_config"), model.config):
        saved, own = state.get("model_config"), model.config
        found = [f"{key} is {saved.get(key)}, and {own.get(key)} here" for key in {**saved, **own}
                 if saved.get(key) != own.get(key)] if isinstance(saved, dict) else ["something else"]
        raise ConfigError(f"{path} is a checkpoint of another model ({'; '.join(found)}): choose another name= for "
                          "this run, or init_from= in the place of resume=")
    if "optimizer" not in state:
        raise ConfigError(f"{path} holds weights only: give it as init_from=, not as resume=")
    today = optimizer.state_dict()["param_groups"]
    if parameter_numbers(state["optimizer"]["param_groups"]) != parameter_numbers(today):
        raise ConfigError(f"{path} trained other parts: keep train_encoder and train_decoder, or give it as init_from=")
    counts = state["step"], state["samples"], state.setdefault("pieces", 1) - 1
    if any(type(count) is not int or not 0 <= count < 2 ** 60 for count in counts) or not 0 <= float(
            state.get("seconds", 0)) < 1e12:
        raise ConfigError(f"{path} counts impossible steps, samples or seconds: choose another name= for this run")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    # The parameter groups are those of the present settings, not the saved ones. The order of parameters is the same.
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": today})
    for parameter, kept in optimizer.state.items():
        if not kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape or kept["step"].numel() != 1:
            raise ValueError("its optimizer's state is of other weights")


def parameter_numbers(groups):
    """The numbers of the parameters in an optimizer's param_groups, in their order."""
    return [number for group in groups for number in group["params"]]


def same_model(saved, ours):
    """Whether two configurations of a model are equal, except perhaps for how its codebooks are initialised, which does
    not matter any more."""
    return isinstance(saved, dict) and {**saved, "kmeans_init": None} == {**ours, "kmeans_init": None}


def where_to_go_on(folder, model, trend, step, skipped):
    """Advice after `skipped` steps in a row that were not finite: which step the weights are from, and, if the run had
    gone wrong before that, which checkpoint to go on from."""
    finite = not checkpoint.not_finite(model.state_dict())
    words = f"The weights are those of step {step - skipped}, from before"
    if finite and not trend.has_risen(step):
        return f"{words}."
    words += ", when the loss had risen already." if finite else ", and not finite."
    sound = checkpoint.step_path(folder, trend.sound.step)
    if sound and os.path.exists(sound):
        words += f" resume={sound} name=OTHER goes on from before that."
    return words
