"""Building models, saving runs so that no fault loses them, and loading weights of our own and of others.

A run folder holds step_00001000.pt (everything a run needs to go on), best.pt (the averaged weights that validated
best), model.pth (the newest averaged weights as a plain state_dict, for other programs) and config.json.
Nothing is loaded that could run code: all loading is weights_only.
"""
import contextlib
import dataclasses
import errno
import hashlib
import inspect
import io
import os
import pickle
import re
import struct
import warnings
import zipfile
from types import SimpleNamespace

import torch
from torch.nn.modules import module as registration

import fast_dcae
import fast_taehv
import fast_vqgan
import model_vqgan
from config import ConfigError, check_net, tuples
from model_dcae import DCAE, load_dcae
from model_taehv import (TAEHV, VARIANTS, adapt_state_dict, arguments_of, find_weights, look_alikes, put_weights,
                         read_weights)
from model_vq_latents import VQLatents
from model_vqgan import VQGAN, load_vqgan
from model_vqvae import VQVAE2, VqVae2, load_vqvae
from untrusted import SETTINGS, check_weights, read_json

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEP_FILE = re.compile(r"step_(\d{8,})\.pt")
RANK_FILE = re.compile(r"step_(\d{8,})\.rank(\d+)")
LEFTOVER = re.compile(r"(step_\d{8,}\.(pt|rank\d+)|model\.pth|best\.pt|probe)\.(\d+\.)+tmp")  # see write_atomically
# What contents that are not as expected raise.
MISSHAPEN = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, OverflowError, AssertionError,
             ZeroDivisionError)


class CheckpointError(Exception):
    """Weights that cannot be loaded; the message names the file and the reason."""


# ---- models ------------------------------------------------------------------------------------------------------


MODELS = {"taehv": TAEHV, "vqgan": VQGAN, "vqvae2": VQVAE2, "vqvae_video": VqVae2, "vq_latents": VQLatents,
          "dcae": DCAE}


def build_model(name, config):
    """A model from its name and the dict that its `config` attribute gave. ValueError for arguments that do not fit."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    try:
        check_net({key: tuples(value) for key, value in config.items()})
    except ConfigError as error:
        raise ValueError(f"model {name}: {error}") from None
    for part in (config, config.get("taehv") or {}):  # TAEHV itself reads files that are named so
        variant = part.get("variant")
        if part.get("checkpoint_path") is not None or variant not in VARIANTS and os.path.isfile(variant or ""):
            raise ValueError(f"model {name}: settings that name another file of weights, which is not read")
    try:
        return MODELS[name](**config)
    except TypeError as error:
        raise ValueError(f"model {name}: {first_line(error)}; it takes "
                         f"{', '.join(list(inspect.signature(MODELS[name]).parameters))}") from None


def fast(model):
    """A copy of a model in eval mode for inference on a CPU: the same results in less time and memory. The model itself
    where there is no such copy."""
    quick = {TAEHV: fast_taehv.fast, VQLatents: fast_taehv.fast, VQGAN: fast_vqgan.fast, DCAE: fast_dcae.fast}
    return quick[type(model)](model) if type(model) in quick else model


def model_config(config):
    """The arguments of `build_model` that a training Config asks for."""
    taehv = dict(variant=config.variant or "taehv", patch_size=config.patch_size or None,
                 latent_channels=config.latent_channels or None)
    if config.model == "vq_latents":
        return {**config.net, "taehv": {**taehv, **config.net.get("taehv", {})}}
    return {**taehv, **config.net} if config.model == "taehv" else dict(config.net)


def with_shape(config, source):
    """A copy of a training Config in which what it leaves open is as in `source`, a model of its kind (for vq_latents a
    TAEHV too): variant, patch_size, latent_channels and net. ValueError for a setting of the first three that `source`
    contradicts."""
    taehv = getattr(source, "taehv", source)
    net = dict(config.net)
    if config.model in ("taehv", "vq_latents") and isinstance(taehv, TAEHV):
        shape = dict(taehv.config)
        variant, patch_size, channels = (shape.pop(key) for key in ("variant", "patch_size", "latent_channels"))
        standard = VARIANTS[variant]
        if config.variant and config.variant != variant and VARIANTS.get(config.variant) != standard:
            raise ValueError(f"variant={config.variant}")
        for key, own in (("patch_size", patch_size), ("latent_channels", channels)):
            if getattr(config, key) not in (0, own):
                raise ValueError(f"{key}={getattr(config, key)}")
        usual = dict(encoder_time_downscale=list(standard[2]), decoder_time_upscale=list(standard[3]),
                     decoder_space_upscale=[True] * 3, arch_variant=standard[4])
        own = {key: value for key, value in shape.items() if usual.get(key) != value}
        if config.model == "taehv":
            net = {**own, **net}
        elif own:
            net["taehv"] = {**own, **net.get("taehv", {})}
        config = dataclasses.replace(
            config, variant=config.variant or variant, latent_channels=0 if channels == standard[1] else channels,
            patch_size=0 if patch_size == standard[0] else patch_size)
    if config.init_from and config.model != "taehv" and isinstance(source, MODELS[config.model]):
        takes = inspect.signature(MODELS[config.model]).parameters
        same = net.get("quantizer") in (None, source.config.get("quantizer"))  # another one has other options
        own = {key: value for key, value in source.config.items() if key != "taehv" and (same or key in takes)}
        net = {**own, **net}
    return dataclasses.replace(config, net=net)


def fingerprint(model, about=""):
    """16 hexadecimal digits that differ for other weights (or, for what is no module, another text `about`)."""
    digest = hashlib.sha256(about.encode())
    if isinstance(model, torch.nn.Module):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_model(path, variant=None, **overrides):
    """(model in eval mode, what was loaded in words) from a run folder, a checkpoint of ours, or published weights.

    `variant` and `overrides` as in `load_taehv` (or, for another family, in its own function). CheckpointError if that
    is not possible, or if weights are not finite.
    """
    path = str(path)
    if os.path.isdir(path):
        path = newest_weights(path)
    try:
        path = find_weights(path)  # a file, or published weights by name
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint: {error}") from None
    model, words = load_file(path, variant, overrides)
    check_finite(path, model.state_dict())
    return model, words


def load_file(path, variant, overrides):
    """From a file of any kind, told by what it holds."""
    try:
        state = read_foreign(path)
        with no_larger_than(path):
            if "model_config" in state:
                return load_own(path, state, variant, overrides)
            return load_foreign(path, state, variant, overrides)
    except ImportError:
        raise CheckpointError(f"checkpoint: {path!r} needs a package: pip install safetensors") from None
    except (*MISSHAPEN, OSError) as error:
        raise CheckpointError(f"checkpoint: {path!r}: {first_line(error)}") from None
    except safetensors_errors() as error:
        raise CheckpointError(f"checkpoint: {path!r} is damaged or no safetensors file: {first_line(error)}") from None


@contextlib.contextmanager
def no_larger_than(path):
    """Within, ValueError for a model with more numbers than twice this file's bytes, or more layers than could have
    names in it, as soon as the first that is too much is registered: what a file asks for is not taken from memory."""
    size = os.path.getsize(path)
    left = {"numbers": 2 * size + (1 << 20), "layers": size // 256 + 10_000}

    def take(what, number, module):
        left[what] -= number
        if left[what] < 0:
            raise ValueError(f"it asks for more {what} ({type(module).__name__}) than the file can hold weights for")

    def take_tensor(module, _, tensor):
        take("numbers", 0 if tensor is None else tensor.numel(), module)

    handles = (registration.register_module_parameter_registration_hook(take_tensor),
               registration.register_module_buffer_registration_hook(take_tensor),
               registration.register_module_module_registration_hook(lambda module, *_: take("layers", 1, module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_own(path, state, variant, overrides):
    """From a checkpoint of ours: its averaged weights."""
    try:
        arguments = {**state["model_config"], **overrides}
        if variant and state["model_name"] not in ("taehv", "vq_latents"):
            raise CheckpointError(f"checkpoint: {path!r} is a {state['model_name']}, which has no variants")
        if variant:
            about = arguments if state["model_name"] == "taehv" else arguments["taehv"]
            about["variant"] = variant
        model = build_model(state["model_name"], arguments)
        weights = state["ema"]
        model.load_state_dict(adapt_state_dict(weights, model) if overrides else weights)
        words = f"{state['model_name']}{' (' + arguments['variant'] + ')' if 'variant' in arguments else ''}"
        return model.eval(), f"{words}, step {int(state['step'])}"
    except MISSHAPEN as error:
        raise CheckpointError(f"checkpoint: {path!r} does not fit its own model: {first_line(error)}") from None


def load_foreign(path, state, variant, overrides):
    """From weights alone: the family is told by their names, but for .ckpt, which is taming's VQGAN or OptVQ."""
    about = settings_beside(path)
    if about.get("model") in ("vq_latents", "taehv"):  # their shapes may be their own
        arguments = model_config(SimpleNamespace(**about))
        if about["model"] == "vq_latents":
            model = build_model("vq_latents", {**arguments, **overrides})
            model.load_state_dict(state)
            return model.eval(), f"vq_latents ({model.taehv.variant})"
        model = build_model("taehv", {**arguments, **({"variant": variant} if variant else {}), **overrides})
        put_weights(model, state, path)
        return model.eval(), f"weights of variant {model.variant}"
    if path.endswith(".ckpt"):
        return load_vqgan(state, **overrides)
    inner = state.get("state_dict", state)
    names = " ".join(map(str, inner)) if isinstance(inner, dict) else ""
    if "quantize." in names:
        return load_vqgan(state, **{**about.get("net", {}), **overrides})
    if "codebooks.0." in names or "blocks_tempo" in names:
        return load_vqvae(state, **{**about.get("net", {}), **overrides})
    if "encoder.project_out." in names:
        return load_dcae(state), "Video DC-AE"
    model = build_model("taehv", {**arguments_of(state, path, variant or about.get("variant")), **overrides})
    put_weights(model, state, path)
    others = look_alikes(model.variant)
    doubt = f" (by name or default: {', '.join(others)} look alike)" if others and not variant else ""
    return model.eval(), f"weights of variant {model.variant}{doubt}"


def settings_beside(path):
    """The settings of the run that the model.pth of a run folder is of, or {}. ValueError if they are damaged."""
    beside = os.path.join(os.path.dirname(path), "config.json")
    if os.path.basename(path) != "model.pth" or not os.path.isfile(beside):
        return {}
    try:
        about = read_json(beside, SETTINGS)
    except ValueError as error:
        raise ValueError(f"{beside} beside it cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(about, dict) or about.get("model") not in list(MODELS):  # another program's
        return {}
    if missing := [key for key in ("variant", "patch_size", "latent_channels", "net") if key not in about]:
        raise ValueError(f"{beside} beside it has no {missing[0]!r}, as a run's has")
    if not isinstance(about["net"], dict):
        raise ValueError(f"{beside} beside it: its net is no object")
    return about


def safetensors_errors():
    """What safetensors raises for a damaged file; nothing where the package is absent."""
    try:
        from safetensors import SafetensorError
    except ImportError:
        return ()
    return SafetensorError


def newest_weights(folder):
    """best.pt of a run folder, or else its newest good checkpoint, or else model.pth."""
    best = os.path.join(folder, "best.pt")
    if os.path.isfile(best):
        return best
    path, _ = newest_checkpoint(folder)
    path = path or os.path.join(folder, "model.pth")
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint: the folder {folder!r} holds no best.pt, step_*.pt or model.pth")
    return path


def first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- reading -----------------------------------------------------------------------------------------------------


def not_finite(weights):
    """The name of the first tensor in a state_dict that holds an inf or a NaN, or "". For the 459 million weights of
    the largest model it takes 0.2 s on two cores (isfinite() of each tensor takes 5 s), and reading them several."""
    for name, tensor in weights.items():
        if torch.is_tensor(tensor) and tensor.dtype in FLOATS and tensor.layout == torch.strided and tensor.numel() \
                and not torch.stack(tensor.aminmax()).isfinite().all():
            return str(name)
    return ""


def check_finite(path, weights):
    """CheckpointError, about the file `path`, for weights that are not finite."""
    if name := not_finite(weights):
        raise CheckpointError(f"checkpoint: {path!r}: its weights are not finite ({name})")


def read_run(path):
    """`read` for a step file, whose weights are to be finite too."""
    state = read(path)
    for weights in (state.get("model"), state.get("ema")):
        if isinstance(weights, dict):
            check_finite(path, weights)
    return state


def read(path):
    """The dict in a .pt or .pth file, on the CPU. CheckpointError if it is damaged, holds code, or is no dict."""
    try:
        check_weights(path)
        with warnings.catch_warnings():  # of files in old formats
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"checkpoint: {path!r} is no file of weights, or holds code: it is not run") from None
    except (*MISSHAPEN, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError, struct.error) as error:
        raise CheckpointError(f"checkpoint: {path!r} is damaged or no file of weights ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint: {path!r} holds a {type(state).__name__}, not weights")
    return state


def read_foreign(path):
    """Likewise of a .safetensors file, or of a .ckpt, which may hold objects of the program that wrote it."""
    if path.endswith(".safetensors"):
        return read_weights(path)
    if not path.endswith(".ckpt"):
        return read(path)
    try:
        check_weights(path)
    except (*MISSHAPEN, OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, struct.error) as error:
        raise CheckpointError(f"checkpoint: {path!r} is damaged or no file of weights ({first_line(error)})") from None
    return model_vqgan.read_weights(path)


def step_path(folder, step):
    """Of a run's checkpoint of that step; None for None."""
    return None if step is None else os.path.join(folder, f"step_{step:08d}.pt")


def checkpoints(folder):
    """Paths of the step files in a run folder, newest first."""
    names = [n for n in (os.listdir(folder) if os.path.isdir(folder) else []) if STEP_FILE.fullmatch(n)]
    return [os.path.join(folder, n) for n in sorted(names, key=step_of, reverse=True)]


def step_of(path):
    """The step of a step file, by its name."""
    return int(STEP_FILE.fullmatch(os.path.basename(path))[1])


def newest_checkpoint(folder):
    """(path of the newest step file that can be used or None, [messages about newer ones that cannot])."""
    problems = []
    for path in checkpoints(folder):
        if not (problem := problem_of(path)):
            return path, problems
        problems.append(problem)
    return None, problems


def problem_of(path):
    """Why a step file cannot be used, or ""."""
    try:
        return "" if "model_config" in read_run(path) else f"{path}: not a checkpoint of a run"
    except CheckpointError as error:
        return str(error)


# ---- writing -----------------------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Write bytes under a temporary name, flush them to the disk, rename. OSError leaves nothing behind."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def probe(folder):
    """OSError if no small file can be written and flushed there."""
    path = os.path.join(folder, "probe")
    write_atomically(path, os.urandom(1 << 16))  # which no file system compresses
    os.remove(path)


def is_full(error):
    """Whether an OSError says that the disk is full, or this user's part of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def save(state, path, make_room=lambda: False):
    """OSError leaves nothing behind. While the disk is full and make_room() returns True, it is tried again."""
    while error := try_to_save(state, path):
        if not is_full(error) or not make_room():
            raise error


def try_to_save(state, path):
    """Returns the OSError that prevents it, or None; what was to be written is out of memory by then."""
    buffer = io.BytesIO()  # written by plain file calls, which fail with a plain OSError when the disk is full
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        return error.with_traceback(None)
    return None


def drop_oldest(folder, step, log=print, sound=None):
    """Remove the oldest checkpoint of a run to make room for what is saved at `step`, but neither the newest good one
    nor that of step `sound`; the newest goes only where the sound one is all that is left besides. Returns whether that
    could be done."""
    newest, _ = newest_checkpoint(folder)
    sound = step_path(folder, sound)
    others = [path for path in checkpoints(folder) if newest and path not in (newest, sound)]
    if not others and sound not in (None, newest) and not problem_of(sound):
        others = [newest]
    if not others:
        return False
    try:
        os.remove(others[-1])
        remove_rank_files(folder, but=step)
    except OSError:
        return False
    log(f"the disk is full: {others[-1]} was removed to make room")
    return True


def remove_rank_files(folder, but=None):
    """Those of steps that have no step file, except of one step. OSError."""
    kept = {os.path.basename(path).removesuffix(".pt") for path in checkpoints(folder)}
    for name in os.listdir(folder):
        match = RANK_FILE.fullmatch(name)
        if match and name.split(".")[0] not in kept and int(match[1]) != but:
            os.remove(os.path.join(folder, name))


def remove_leftovers(folder):
    """What killed saves left in a run folder, which no other process may be saving to. OSError."""
    for name in os.listdir(folder):
        if LEFTOVER.fullmatch(name):
            os.remove(os.path.join(folder, name))


def save_run(folder, state, keep_last, log=print, sound=None, sound_before=None):
    """Save a run's state as its newest checkpoint and its averaged weights as model.pth; drop all but `keep_last`, on a
    full disk some of them before. Returns why it could not be saved, or "": a full disk must not end a run.

    sound: the step of the newest sound checkpoint with this one, see `watch.Trend.judge`, which stays;
    sound_before: without it. Weights that are not finite are not saved: no run goes on from them.
    """
    step = state["step"]
    if name := not_finite(state["model"]) or not_finite(state["ema"]):
        return f"its weights are not finite ({name})"
    try:
        remove_leftovers(folder)
        for what, path in ((state, step_path(folder, step)), (state["ema"], os.path.join(folder, "model.pth"))):
            save(what, path, lambda: drop_oldest(folder, step, log, sound_before))
    except OSError as error:
        return f"{error}"
    try:
        for path in checkpoints(folder)[keep_last:]:
            if path != step_path(folder, sound):
                os.remove(path)
        remove_rank_files(folder)
    except OSError as error:  # saved it is
        log(f"warning: older checkpoints are not removed: {error}")
    return ""


def save_rank(folder, step, rank, state):
    """Save what one rank alone holds (its replayed samples), beside the step file and before it: step_00001000.rank3.
    Nothing is written for None. Returns the OSError that prevents it, or None."""
    if state is not None:
        try:
            save(state, os.path.join(folder, f"step_{step:08d}.rank{rank}"))
        except OSError as error:
            return error
    return None


def read_rank(path, rank):
    """(what `save_rank` left beside the step file `path`, or None; what is wrong with it, or "")."""
    path = f"{path.removesuffix('.pt')}.rank{rank}"
    try:
        return read(path) if os.path.exists(path) else None, ""
    except CheckpointError as error:
        return None, str(error)


def save_best(folder, state, log=print, sound=None):
    """Save the weights that validated best, on a full disk in the place of older checkpoints (`sound` as in
    `drop_oldest`); returns why they could not be saved, or ""."""
    if name := not_finite(state["ema"]):
        return f"its weights are not finite ({name})"
    try:
        save(state, os.path.join(folder, "best.pt"), lambda: drop_oldest(folder, state["step"], log, sound))
    except OSError as error:
        return f"{error}"
    return ""


# ---- random states -----------------------------------------------------------------------------------------------


def random_state(device):
    """PyTorch's generators; nothing here draws from Python's or NumPy's global ones."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), **cuda}


def restore_random_state(state, device):
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
