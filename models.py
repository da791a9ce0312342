"""Builds models from settings, recognises them by their weights, and loads them from files, our own and others'.

To add a model: its own file, one line in `MODELS`, and a preset in config.py. If it shall be recognised by the names
of its weights, add it to `load_foreign`. Loading runs no code from a file: it is weights_only everywhere.
"""
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import pickle
from types import SimpleNamespace

import torch
from torch.nn.modules import module as registration

import fast_dcae
import fast_taehv
import fast_vqgan
import init_taehv
import model_vqgan
from check_config import ConfigError, check_net, may_be_large, parse_buckets
from checkpoint import MISSHAPEN, UNREADABLE, CheckpointError, check_finite, first_line, newest_checkpoint, read
from config import load_config, tuples
from data import Bucket
from device import host_memory
from diffusers_names import from_diffusers, is_diffusers
from model_dcae import DCAE, load_dcae
from model_taehv import (TAEHV, VARIANTS, adapt_state_dict, arguments_of, find_weights, look_alikes, put_weights,
                         read_about, read_weights)
from model_vq_latents import VQLatents
from model_vqgan import VQGAN, load_vqgan
from model_vqvae import VQVAE2, VqVae2, load_vqvae
from token_file import MAX_VOCABULARY
from untrusted import SETTINGS, check_weights, read_json


MODELS = {"taehv": TAEHV, "vqgan": VQGAN, "vqvae2": VQVAE2, "vqvae_video": VqVae2, "vq_latents": VQLatents,
          "dcae": DCAE}


def build_model(name, config):
    """A model from its name and its arguments (its `config` attribute). ValueError for arguments that do not fit."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    try:
        check_net({key: tuples(value) for key, value in config.items()})
    except ConfigError as error:
        raise ValueError(f"model {name}: {error}") from None
    for part in (config, config.get("taehv") or {}):  # TAEHV's constructor would read a file of that name
        variant = part.get("variant")
        if part.get("checkpoint_path") is not None or variant not in VARIANTS and os.path.isfile(variant or ""):
            raise ValueError(f"model {name}: settings that name another file of weights, which is not read")
    takes = inspect.signature(MODELS[name]).parameters
    config = {key: (value,) if type(value) is int and key in takes and isinstance(takes[key].default, tuple) else value
              for key, value in config.items()}  # net.attn_resolutions=64
    try:
        return MODELS[name](**config)
    except TypeError as error:
        raise ValueError(f"model {name}: {first_line(error)}; it takes "
                         f"{', '.join(takes)}") from None


def model_config(config):
    """The arguments of `build_model` that a training Config asks for."""
    taehv = dict(variant=config.variant or "taehv", patch_size=config.patch_size or None,
                 latent_channels=config.latent_channels or None)
    if config.model == "vq_latents":
        return {**config.net, "taehv": {**taehv, **config.net.get("taehv", {})}}
    return {**taehv, **config.net} if config.model == "taehv" else dict(config.net)


def with_shape(config, source):
    """A copy of a training Config whose unset variant, patch_size, latent_channels and net are those of `source`, a
    model of the same kind (for vq_latents also a TAEHV). ValueError names a setting of the first three that `source`
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
        usual = dict(encoder_time_downscale=list(standard.pooling), decoder_time_upscale=list(standard.growth),
                     decoder_space_upscale=[True] * 3, arch_variant=standard.arch_variant)
        own = {key: value for key, value in shape.items() if usual.get(key) != value}
        if config.model == "taehv":
            net = {**own, **net}
        elif own:
            net["taehv"] = {**own, **net.get("taehv", {})}
        config = dataclasses.replace(
            config, variant=config.variant or variant,
            patch_size=0 if patch_size == standard.patch_size else patch_size,
            latent_channels=0 if channels == standard.latent_channels else channels)
    if config.init_from and config.model != "taehv" and isinstance(source, MODELS[config.model]):
        takes = inspect.signature(MODELS[config.model]).parameters
        same = net.get("quantizer") in (None, source.config.get("quantizer"))  # another one has other options
        own = {key: value for key, value in source.config.items() if key != "taehv" and (same or key in takes)}
        net = {**own, **net}
    return dataclasses.replace(config, net=net)


def fast(model):
    """A copy of a model in eval mode for inference on a CPU: the same results in less time and memory. Returns the
    model itself if its class has no such copy, and on a GPU, as fast_cuda.py has not run on a GPU yet."""
    quick = {TAEHV: fast_taehv.fast, VQLatents: fast_taehv.fast, VQGAN: fast_vqgan.fast, DCAE: fast_dcae.fast}
    has_one = type(model) in quick and next(model.parameters()).device.type == "cpu"
    return quick[type(model)](model) if has_one else model


def fingerprint(model, about=""):
    """A hash, 16 hexadecimal digits, of the text `about` and of the model's weights, if it is a module."""
    digest = hashlib.sha256(about.encode())
    if isinstance(model, torch.nn.Module):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- from the settings of a run ----------------------------------------------------------------------------------


def make_model(cfg, buckets):
    """(model on the CPU, where its weights come from); ConfigError if settings, buckets and weights do not fit."""
    if cfg.init_from:
        source, words = load_model(cfg.init_from)
        try:
            cfg = with_shape(cfg, source)
        except ValueError as error:
            raise ConfigError(f"init_from={cfg.init_from} is {words}, {source.config}, which does not fit {error}: set "
                              "variant, patch_size and latent_channels to match, or leave them out") from None
    model = make_fresh_model(cfg, buckets)
    if not cfg.init_from:
        if cfg.init == "pytorch":
            init_taehv.pytorch_weights(model)
        elif cfg.init == "colours":
            init_taehv.colours(model, buckets[0].frames)  # clips: `fit_taehv.start_from_clips`, once there are any
        return model, "from scratch"
    target = model.taehv if hasattr(model, "taehv") and not hasattr(source, "taehv") else model
    given, own = source.state_dict(), target.state_dict()
    different = [k for k in own.keys() | given.keys()
                 if k not in own or k not in given or own[k].shape != given[k].shape]
    if different:
        apart = [f"net.{key} is {value}, and {source.config[key]} there" for key, value in target.config.items()
                 if key in source.config and json.dumps(value) != json.dumps(source.config[key])]
        raise ConfigError(f"init_from={cfg.init_from} is {words}, which does not fit model={cfg.model} {target.config} "
                          f"({', '.join(apart) or min(different) + ' differs'}): leave out what differs")
    target.load_state_dict(given)
    return model, f"from {cfg.init_from}"


def make_fresh_model(cfg, buckets):
    """The model of these settings, with fresh weights. ConfigError for arguments that it does not take, for frame
    sizes that it does not fit, and for what exceeds this machine's memory."""
    check_memory(cfg, buckets)
    try:
        if may_be_large(cfg):  # first build it without memory for its weights; PyTorch's imports may take 4 seconds
            with torch.device("meta"):
                check_size(cfg, build_model(cfg.model, model_config(cfg)))
        model = build_model(cfg.model, model_config(cfg))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except MISSHAPEN as error:  # net.ch=-1, net.ch_mult=2
        raise ConfigError(f"model {cfg.model} with {cfg.net} cannot be built: {first_line(error)}") from None
    check_size(cfg, model)
    if max(getattr(model, "codebook_sizes", [0])) > MAX_VOCABULARY:
        raise ConfigError(f"model {cfg.model} with {cfg.net}: {max(model.codebook_sizes)} codes; at most "
                          f"{MAX_VOCABULARY} are wanted, as files of tokens hold them")
    for name, size in (*(("size", bucket.size) for bucket in buckets), ("val_size", cfg.val_size)):
        if size % model.space_factor:
            raise ConfigError(f"{name}={size}: {model.config.get('variant') or cfg.model} takes multiples of "
                              f"{model.space_factor}")
    normalised = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    for bucket in buckets:
        if normalised and bucket.batch * bucket.frames * (bucket.size // model.space_factor) ** 2 == 1:
            raise ConfigError(f"one frame of {bucket.size} pixels leaves {cfg.model}'s BatchNorm a single value: set "
                              "batch_size=2, or a larger size")
    if cfg.model == "taehv" and not cfg.latent_cache:  # with a cache, clips.from_latent_cache looks
        for bucket in buckets:
            try:
                model.check_frames(bucket.frames)
            except ValueError as error:
                raise ConfigError(f"frames={bucket.frames} with variant={cfg.variant}: {error}") from None
    return model


def check_memory(cfg, buckets):
    """ConfigError if the batches exceed this machine's memory. Counted are the uint8 batches that the data processes
    and a step hold, and, in float32, one clip, its reconstruction and the reconstruction's gradient."""
    for bucket in buckets:
        clip = bucket.size ** 2 * bucket.frames * 3
        needed = clip * bucket.batch * cfg.clips_per_open * (cfg.accumulation + max(0, cfg.workers)) + 12 * clip
        if needed > (there := host_memory()):
            raise ConfigError(f"size={bucket.size} frames={bucket.frames} batch_size={bucket.batch} accumulation="
                              f"{cfg.accumulation} workers={cfg.workers}: the batches alone take {needed / 1e9:,.0f} "
                              f"GB, and this machine has {there / 1e9:,.0f}: set one of these lower")


def check_size(cfg, model):
    """ConfigError if training the model's weights exceeds this machine's memory. Counted are the weights, their moving
    average and, if all parts learn, gradients and AdamW's two moments; with a GPU, the weights alone, which are
    made on the host."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    copies = 1 if torch.cuda.is_available() else 5 if cfg.train_encoder and cfg.train_decoder else 2
    if size * copies > (there := host_memory()):
        raise ConfigError(f"model {cfg.model} with {cfg.net}: training it takes {size * copies / 1e9:,.0f} GB for its "
                          f"weights alone, and this machine has {there / 1e9:,.0f}: make it narrower")


def problem_of(arguments):
    """The error message of the model that these command-line arguments ask for, or "". The model is built without
    memory for its weights, and init_from is not read."""
    try:
        cfg = load_config(arguments)
        with torch.device("meta"):
            make_fresh_model(cfg, [Bucket(*b) for b in parse_buckets(cfg)])
    except ConfigError as error:
        return str(error)
    return ""


# ---- from files --------------------------------------------------------------------------------------------------


def load_model(path, variant=None, **overrides):
    """(model in eval mode, a description of it) from a run folder, a checkpoint of ours, or published weights.

    `variant` and `overrides` as in `load_taehv` (or, for another family, in its own function). CheckpointError if it
    cannot be loaded, or if weights are not finite.
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
    """`load_model` for one file of any kind; its contents tell the kind."""
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


def load_own(path, state, variant, overrides):
    """`load_model` for a checkpoint of ours (its averaged weights), or a file that export.py wrote."""
    try:
        arguments = {**state["model_config"], **overrides}
        if variant and state["model_name"] not in ("taehv", "vq_latents"):
            raise CheckpointError(f"checkpoint: {path!r} is a {state['model_name']}, which has no variants")
        if variant:
            about = arguments if state["model_name"] == "taehv" else arguments["taehv"]
            if variant not in VARIANTS:
                raise CheckpointError(f"variant {variant!r} is none of {', '.join(VARIANTS)}")
            if variant != (own := about.get("variant", "taehv")):
                raise CheckpointError(f"checkpoint: {path!r} is of variant {own}, as it says: leave out {variant}")
        model = build_model(state["model_name"], arguments)
        weights = state["ema"]
        model.load_state_dict(adapt_state_dict(weights, model) if overrides else weights)
        words = f"{state['model_name']}{' (' + arguments['variant'] + ')' if 'variant' in arguments else ''}"
        exported = path.endswith(".safetensors")  # by export.py
        return model.eval(), f"{words}, exported" if exported else f"{words}, step {int(state['step'])}"
    except MISSHAPEN as error:
        raise CheckpointError(f"checkpoint: {path!r} does not fit its own model: {first_line(error)}") from None


def load_foreign(path, state, variant, overrides):
    """`load_model` for plain weights: their names tell the family, but a .ckpt is always taming's VQGAN or OptVQ."""
    about = settings_beside(path)
    if about.get("model") in ("vq_latents", "taehv"):  # shapes may differ from the variant's
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
        return load_vqvae(inner, **{**about.get("net", {}), **overrides})
    if "encoder.project_out." in names:
        return load_dcae(state), "Video DC-AE"
    model = build_model("taehv", {**arguments_of(state, path, variant or about.get("variant")), **overrides})
    put_weights(model, state, path)
    others = look_alikes(model.variant)
    doubt = f" (by name or default: {', '.join(others)} look alike)" if others and not variant else ""
    return model.eval(), f"weights of variant {model.variant}{doubt}"


def read_foreign(path):
    """The dict in a file of weights of any kind; a .ckpt may also hold objects of the program that wrote it.
    CheckpointError if it is damaged, or what safetensors raises."""
    if path.endswith(".safetensors"):
        about, weights = read_about(path), read_weights(path)
        weights = from_diffusers(weights) if is_diffusers(weights) else weights
        return {**about, "ema": weights} if about.get("model_name") in MODELS else weights
    if not path.endswith(".ckpt"):
        return read(path)
    try:
        check_weights(path)
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint: {path!r} is damaged or no file of weights ({first_line(error)})") from None
    return model_vqgan.read_weights(path)


def settings_beside(path):
    """The settings in the config.json beside a run's model.pth; {} for other files. ValueError if they are damaged."""
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


@contextlib.contextmanager
def no_larger_than(path):
    """Context that protects memory from what a file asks for. A model built in it may have at most about twice as many
    numbers as the file has bytes, and as many layers as the file has room to name. The first parameter, buffer or layer
    beyond that raises ValueError when it is registered."""
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


def safetensors_errors():
    """What safetensors raises for a damaged file; nothing where the package is absent."""
    try:
        from safetensors import SafetensorError
    except ImportError:
        return ()
    return SafetensorError


def newest_weights(folder):
    """best.pt of a run folder, else its newest intact checkpoint, else its model.pth; or the weights of a diffusers
    folder. CheckpointError if there is none."""
    best = os.path.join(folder, "best.pt")
    if os.path.isfile(best):
        return best
    path, _ = newest_checkpoint(folder)
    path, other = path or os.path.join(folder, "model.pth"), os.path.join(folder, "diffusion_pytorch_model.safetensors")
    if os.path.isfile(other) and not os.path.isfile(path):
        return other
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint: the folder {folder!r} holds no best.pt, step_*.pt or model.pth")
    return path
