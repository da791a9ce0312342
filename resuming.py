"""Which checkpoint a run goes on from, whether it is one of such a run, and its state put in place."""
import json
import os

import checkpoint
import lock
from check_config import ConfigError


def take_folder(cfg, folder, at_end):
    """Makes the run's folder and locks it until `at_end` is closed. Returns "", or why it cannot be locked."""
    try:
        unlocked = at_end.enter_context(lock.locked(folder, "choose another name="))
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


def check_start(saved, cfg, path):
    """ConfigError for an init_from= that is not in the saved settings, a dict: the checkpoint at `path` would take its
    place. (The TAEHV of a vq_latents may have moved.)"""
    began = saved.get("init_from", "")
    if cfg.init_from and cfg.model != "vq_latents" and os.path.normpath(cfg.init_from) != os.path.normpath(began):
        raise ConfigError(f"init_from={cfg.init_from}, but {path} is there to go on from, which began "
                          f"{f'with {began}' if began else 'from scratch'}: choose another name= for a new run, or "
                          "leave init_from out")


# Settings that say how long a run goes, where it stands and how it speaks, not what it learns.
ELSEWHERE = ("name out_dir resume init_from device max_steps max_minutes workers log_every val_every save_every "
             "keep_last timeout_minutes wandb").split()


def describe_changes(saved, cfg):
    """A line that names the settings of learning that are others than those saved in a checkpoint, or ""."""
    changed = [f"{key}={value} ({saved[key]} before)" for key, value in vars(cfg).items()
               if key in saved and key not in ELSEWHERE and json.dumps(saved[key]) != json.dumps(value)]
    return "settings that have changed: " + ", ".join(changed) if changed else ""


def restore(state, model, average, optimizer, teacher, path):
    """Put a checkpoint's weights and optimizer state in place; ConfigError if it is another model's."""
    if (learnt := state.get("teacher", "")) != teacher:  # first: another scale of the latents makes another model
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
    if numbers(state["optimizer"]["param_groups"]) != numbers(today):
        raise ConfigError(f"{path} trained other parts: keep train_encoder and train_decoder, or give it as init_from=")
    counts = state["step"], state["samples"], state.setdefault("pieces", 1) - 1
    if any(type(count) is not int or not 0 <= count < 2 ** 60 for count in counts) or not 0 <= float(
            state.get("seconds", 0)) < 1e12:
        raise ConfigError(f"{path} counts impossible steps, samples or seconds: choose another name= for this run")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["ema"])
    # Today's settings and groups, not those of the day it was saved: the parameters' order is the same.
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": today})
    for parameter, kept in optimizer.state.items():
        if not kept["exp_avg"].shape == kept["exp_avg_sq"].shape == parameter.shape or kept["step"].numel() != 1:
            raise ValueError("its optimizer's state is of other weights")


def numbers(groups):
    """The numbers of the parameters in an optimizer's groups, in their order."""
    return [number for group in groups for number in group["params"]]


def same_model(saved, ours):
    """Whether two configurations of a model differ at most in how its codebooks start, which a checkpoint has behind
    it."""
    return isinstance(saved, dict) and {**saved, "kmeans_init": None} == {**ours, "kmeans_init": None}


def where_to_go_on(folder, model, trend, step, skipped):
    """After `skipped` steps in a row that were not finite, in words: which step's weights these are, and the checkpoint
    to go on from if the run had gone wrong before."""
    finite = not checkpoint.not_finite(model.state_dict())
    words = f"The weights are those of step {step - skipped}, from before"
    if finite and not trend.has_risen(step):
        return f"{words}."
    words += ", when the loss had risen already." if finite else ", and not finite."
    sound = checkpoint.step_path(folder, trend.sound_step)
    if sound and os.path.exists(sound):
        words += f" resume={sound} name=OTHER goes on from before that."
    return words
