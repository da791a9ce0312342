"""Teachers: the video autoencoders whose latents a small one learns to produce and to decode.

    taehv:FILE                 weights of the TAEHV family (a file, or a published name), a checkpoint or run folder of
                               ours
    torchscript:FILE           a torch.jit file whose module has encode(video) and decode(latents)
    python:FILE.py:FUNCTION    FUNCTION() returns an object with encode(video) and decode(latents)
    diffusers:CLASS:FOLDER     say diffusers:AutoencoderKLWan:Wan2.1-T2V-1.3B-Diffusers (needs the package diffusers)

    teacher = load_teacher("taehv:taew2_1.pth", device, dtype)
    latents = teacher.encode(video)                        # N T 3 H W in [0, 1] -> N T' C h w, float32
    video = teacher.decode(latents)                        # -> N T" 3 H W in [0, 1], float32

Latents are what the diffusion model consumes: a diffusers class's own scale and shift are applied here.

A teacher whose `pools_pairs` is True halves time as CogVideoX's VAE does, and takes 8k or 8k + 1 frames (see
check_cogvideox_frames in model_taehv.py). It is set for diffusers classes and TAEHVs; the object that python: or
torchscript: gives may have an attribute of that name.
"""
import difflib
import importlib.util
import json
import os
import warnings
import zipfile

import torch
import torch.nn.functional as F

import checkpoint
import models
from model_taehv import check_cogvideox_frames
from untrusted import check_archive, open_regular

KINDS = "taehv:FILE, torchscript:FILE, python:FILE.py:FUNCTION or diffusers:CLASS:FOLDER"


class TeacherError(Exception):
    """A teacher that cannot be used; the message says why, and what to do. `clip`: which clip of a batch it is about.
    """

    clip = 0


class Teacher:
    """An autoencoder behind two methods that check its outputs. `spec`: its specification. `name`: a description.
    `fingerprint`: a hash of its weights, or of its source code if it has no weights. `pools_pairs`: True, False, or
    None for unknown (see above)."""

    def __init__(self, spec, name, source, encode, decode, fingerprint, device, dtype):
        self.spec, self.name, self.fingerprint = spec, name, fingerprint
        self.source, self._encode, self._decode, self.device, self.dtype = source, encode, decode, device, dtype
        self.pools_pairs = getattr(source, "pools_pairs", None)
        self.can_decode = decode is not None

    def check_frames(self, frames):
        """TeacherError if the teacher does not take clips of `frames` frames."""
        try:
            if self.pools_pairs:
                check_cogvideox_frames(frames)
        except ValueError as error:
            raise TeacherError(f"teacher {self.spec}: {error}") from None

    def filled(self, frames, time_factor):
        """The smallest number of frames, at least `frames`, that the teacher takes: 1 + n * time_factor, as causal
        video VAEs need, or 8k or 8k + 1 if it pools pairs."""
        if self.pools_pairs:
            return frames if frames % 8 <= 1 else frames + -frames % 8
        return frames + (1 - frames) % time_factor

    @torch.no_grad()
    def encode(self, video, shape=None):
        """N T 3 H W in [0, 1] -> latents N T' C h w, float32, finite. shape: the expected T' C h w, if known.
        TeacherError if the teacher returns anything else."""
        latents = self._encode(video.to(self.device, self.dtype))
        return self.checked(latents, f"encode, given a video of shape {tuple(video.shape)},",
                            f"floating-point latents {(len(video), *shape)} are" if shape else
                            "floating-point latents N T C h w are",
                            lambda got: len(got) == 5 and got[0] == len(video) and shape in (None, got[1:]))

    @torch.no_grad()
    def decode(self, latents):
        """Latents as `encode` gives them -> video N T 3 H W in [0, 1], float32. TeacherError as above."""
        if self._decode is None:
            raise TeacherError(f"teacher {self.spec} has no decode")
        video = self._decode(latents.to(self.device, self.dtype, copy=True))  # a teacher may work in place
        return self.checked(video, f"decode, given latents of shape {tuple(latents.shape)},",
                            "a floating-point video N T 3 H W is",
                            lambda got: len(got) == 5 and got[0] == len(latents) and got[2] == 3).clamp_(0, 1)

    def checked(self, output, call, wanted, fits):
        """The output of a call as a float32 copy (a teacher may write to the same buffer again). TeacherError unless
        fits(shape) is true and all numbers are real and finite. call, wanted: for the message."""
        shape = tuple(output.shape) if torch.is_tensor(output) else ()
        if not torch.is_tensor(output) or not output.is_floating_point() or not fits(shape) or 0 in shape:
            kind = str(output.dtype).removeprefix("torch.") if torch.is_tensor(output) else type(output).__name__
            raise TeacherError(f"teacher {self.spec}: {call} gave {kind} {shape or ''}".rstrip() + f"; {wanted} wanted")
        output = output.detach().to(self.device, torch.float32, copy=True)
        if not all(extreme.isfinite() for extreme in output.aminmax()):  # needs no mask as large as the output
            error = TeacherError(f"teacher {self.spec}: {call} gave numbers that are not finite"
                                 + ": try --precision fp32" * (self.dtype != torch.float32))
            error.clip = next(n for n, one in enumerate(output) if not one.isfinite().all())
            raise error
        return output


def is_spec(text):
    """Whether the text begins like a teacher's specification."""
    return text.startswith(("taehv:", "torchscript:", "python:", "diffusers:"))


def load_teacher(spec, device="cpu", dtype=torch.float32):
    """The Teacher of a specification (see above). TeacherError or CheckpointError, of one line, if it cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    loaders = {"taehv": load_taehv, "torchscript": load_torchscript, "python": load_python,
               "diffusers": load_diffusers}
    if not is_spec(spec) or not rest:
        raise TeacherError(f"teacher {spec!r}: {KINDS} is wanted")
    name, model, encode, decode, source = loaders[kind](spec, rest)
    digest = models.fingerprint(model, source)
    if isinstance(model, torch.nn.Module):
        model.to(device, dtype).eval()
    return Teacher(spec, name, model, encode, decode, digest, torch.device(device), dtype)


def load_taehv(_, path):
    """FILE: anything that `models.load_model` takes. Returns (name, model, encode, decode, text for the fingerprint),
    as the loaders below do."""
    model, words = models.load_model(path)
    model.pools_pairs = getattr(getattr(model, "taehv", model), "is_cogvideox", False)
    return words, model, model.encode, model.decode, str(model.config)


def load_torchscript(spec, path):
    """FILE: a TorchScript module with `encode` and, for comparisons, `decode`."""
    if not os.path.isfile(path):
        raise TeacherError(f"teacher {spec}: {path!r} does not exist")
    try:
        with warnings.catch_warnings():  # that torch.jit is deprecated
            warnings.simplefilter("ignore")
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                check_archive(archive, os.path.getsize(path))
            model = torch.jit.load(path, map_location="cpu")
    except (*checkpoint.MISSHAPEN, OSError, zipfile.BadZipFile) as error:
        raise TeacherError(f"teacher {spec}: no TorchScript file ({checkpoint.first_line(error)})") from None
    if not hasattr(model, "encode"):
        raise TeacherError(f"teacher {spec}: its module has no encode: export it with @torch.jit.export")
    return f"TorchScript {model.original_name}", model, model.encode, getattr(model, "decode", None), "torchscript"


def load_python(spec, rest):
    """FILE.py:FUNCTION. The file is the user's program, so its errors are not caught."""
    path, _, function = rest.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise TeacherError(f"teacher {spec}: python:FILE.py:FUNCTION is wanted, and {path or rest!r} is no such file")
    module_spec = importlib.util.spec_from_file_location("teacher_file", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise TeacherError(f"teacher {spec}: {path} cannot be imported ({checkpoint.first_line(error)})") from None
    if not callable(getattr(module, function, None)):
        raise TeacherError(f"teacher {spec}: {path} has no function {function!r}")
    model = getattr(module, function)()
    if not hasattr(model, "encode"):
        raise TeacherError(f"teacher {spec}: what {function}() returns has no encode")
    with open(path, encoding="utf-8") as file:
        source = file.read()
    return f"{type(model).__name__} of {os.path.basename(path)}", model, model.encode, getattr(model, "decode", None), \
        source


# Classes whose pipelines normalise latents as `latent_scale` has it.
DIFFUSERS = ("AutoencoderDC AutoencoderKL AutoencoderKLAllegro AutoencoderKLCogVideoX AutoencoderKLCosmos "
             "AutoencoderKLFlux2 AutoencoderKLHunyuanImage AutoencoderKLHunyuanImageRefiner AutoencoderKLHunyuanVideo "
             "AutoencoderKLHunyuanVideo15 AutoencoderKLLTX2Video AutoencoderKLLTXVideo AutoencoderKLMagvit "
             "AutoencoderKLMiniMaxH3 AutoencoderKLMochi AutoencoderKLQwenImage AutoencoderKLQwenImage21 "
             "AutoencoderKLWan AutoencoderTiny").split()


def load_diffusers(spec, rest):
    """CLASS:FOLDER of a video VAE, or of an image VAE, which gets each frame by itself. Latents are normalised as the
    pipelines normalise them for the diffusion model: see `latent_scale`."""
    name, _, folder = rest.partition(":")
    model = read_diffusers(spec, name, folder)
    mean, std, scale = latent_scale(name, model)
    images = not any(isinstance(module, torch.nn.Conv3d) for module in model.modules())
    patch = 2 if name == "AutoencoderKLFlux2" else 1  # its pipeline folds 2x2 positions into channels
    # LTX's later decoders are told how much noise is left in the latents: none, the default of their pipelines.
    noisy = getattr(model.config, "timestep_conditioning", False)

    def encode(video):
        posterior = model.encode((video.flatten(0, 1) if images else video.transpose(1, 2)) * 2 - 1)
        if hasattr(posterior, "latent_dist"):
            latents = posterior.latent_dist.mode()
        else:
            latents = posterior.latents if hasattr(posterior, "latents") else posterior.latent
        if images:
            latents = F.pixel_unshuffle(latents, patch).unflatten(0, video.shape[:2])
        else:
            latents = latents.transpose(1, 2)
        latents = (latents - per_channel(mean, latents)) * scale
        return latents if std is None else latents / per_channel(std, latents)

    def decode(latents):
        raw = (latents if std is None else latents * per_channel(std, latents)) / scale + per_channel(mean, latents)
        raw = F.pixel_shuffle(raw.flatten(0, 1), patch) if images else raw.transpose(1, 2)
        video = model.decode(raw, temb=raw.new_zeros(len(raw))).sample if noisy else model.decode(raw).sample
        return ((video.unflatten(0, latents.shape[:2]) if images else video.transpose(1, 2)) + 1) / 2

    return f"diffusers {name}", model, encode, decode, f"{name} {mean} {std} {scale}"


def read_diffusers(spec, name, folder):
    """The autoencoder in a folder. TeacherError if it was saved from another class, or if weights do not fit (diffusers
    itself would fill in random ones)."""
    try:
        import diffusers
    except ImportError:
        raise TeacherError(f"teacher {spec} needs a package: pip install diffusers") from None
    if not hasattr(diffusers, name):
        close = difflib.get_close_matches(name, [n for n in dir(diffusers) if n.startswith("Autoencoder")], n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise TeacherError(f"teacher {spec}: diffusers {diffusers.__version__} has no class {name!r}{meant}")
    if name not in DIFFUSERS:
        raise TeacherError(f"teacher {spec}: how the latents of {name} are scaled is not known here: give it as "
                           "python:FILE.py:FUNCTION, with an encode and a decode that scale them")
    if os.path.isfile(os.path.join(folder, "vae", "config.json")):  # a whole pipeline's folder
        folder = os.path.join(folder, "vae")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise TeacherError(f"teacher {spec}: {folder!r} holds no config.json: download the model's vae folder first")
    diffusers.utils.logging.set_verbosity_error()  # else it recommends packages that nothing here needs
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            saved_from = json.load(file).get("_class_name", name)
        if saved_from != name:
            raise TeacherError(f"teacher {spec}: {folder!r} holds an {saved_from}: ask for diffusers:{saved_from}:...")
        model, info = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False,
                                                               output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise TeacherError(f"teacher {spec}: {folder!r} cannot be loaded ({checkpoint.first_line(error)})") from None
    wrong = [f"{key if isinstance(key, str) else key[0]} is {word}"
             for word in ("missing", "unexpected", "mismatched") for key in info[f"{word}_keys"]]
    if wrong:
        raise TeacherError(f"teacher {spec}: the weights in {folder!r} are not those of its {name}: {wrong[0]}"
                           + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    model.pools_pairs = name == "AutoencoderKLCogVideoX"
    if name == "AutoencoderKLHunyuanVideo15":  # its attention mask (in diffusers 0.42) fits only one clip at a time
        model.enable_slicing()
    return model


def latent_scale(name, model):
    """(mean, deviation, scale) of a diffusers autoencoder: its pipelines give (z - mean) * scale / deviation to the
    diffusion model. Each is a number, a list with a number for each channel (Cosmos: for each channel and latent), or
    None.

    Most classes keep them in their config. LTX keeps mean and deviation as buffers, FLUX.2 as batch statistics. Not
    applied: CogVideoX's invert_scale_latents, which is for conditioning images, and the factor that Cosmos' scheduler
    applies itself (sigma_data).
    """
    config = model.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    if name in ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"):
        return model.latents_mean.tolist(), model.latents_std.tolist(), scale
    if name == "AutoencoderKLFlux2":
        return model.bn.running_mean.tolist(), (model.bn.running_var + config.batch_norm_eps).sqrt().tolist(), scale
    mean, std = (getattr(config, key, None) for key in ("latents_mean", "latents_std"))
    return mean if mean is not None else getattr(config, "shift_factor", None) or 0.0, std, scale


def per_channel(values, latents):
    """A value of `latent_scale` as a tensor that broadcasts over latents N T C h w."""
    values = torch.as_tensor(values, device=latents.device, dtype=latents.dtype)
    if values.ndim:
        values = values.reshape(1, latents.shape[2], -1, 1, 1)[:, :, :latents.shape[1]].transpose(1, 2)
    return values
