"""Write a model's weights as another program needs them: file name, keys, dtype, settings.

    python export.py runs/tiny --to comfyui     # of variant taew2_1: lighttaew2_1.safetensors, for models/vae_approx/
    python export.py runs/tiny --to diffusers --out folder      # for AutoencoderTinyVideo.from_pretrained
    python export.py runs/tiny --to sdcpp --dtype fp16          # for sd-cli --tae FILE
    python export.py runs/tok --to safetensors                  # any model here, with its settings inside
    python export.py runs/mine --to onnx                        # one step of the decoder and of the encoder, with state

A model that the program would decode wrongly is refused, with the reason: exit code 2, nothing written. Otherwise the
last lines say where the file is, where to put it, and what uses it. infer.py can load all of these files again, except
.onnx and .pt2. docs/export.md says for each program which of its code was read, and what was run.
"""
from screen import end_at_ctrl_c, ending_in_one_line, guard_screen, one_line

end_at_ctrl_c(__name__)
import argparse
import json
import os

import torch
from tqdm import tqdm

import export_step
import models
from checkpoint import CheckpointError, first_line, not_finite, write_all
from diffusers_names import to_diffusers
from model_taehv import RELATIVES, TAEHV, config_of, settle
from untrusted import SETTINGS, read_json
from weights_file import ExportError, as_pth, as_safetensors, folder_for, name_of

STEPS = (export_step.DecoderStep, export_step.EncoderStep)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# ---- what each program takes, {variant: ...}; why it does not take others, {variant or kind of decoder: reason} -----

PREVIEWS = "right in sampler previews (--preview-method taesd); VAE Decode gives it latents of another scale"
NODES = "right for Load VAE and VAE Decode; sampler previews give it latents of another scale"
COMFYUI = {  # {variant: (stem of the file's name, remark)}
    "taehv": ("taehv", NODES),
    "taew2_1": ("lighttaew2_1", PREVIEWS),
    "lighttaew2_1": ("lighttaew2_1", NODES),
    "taew2_2": ("lighttaew2_2", PREVIEWS),
    "lighttaew2_2": ("lighttaew2_2", NODES),
    "lighttaehy1_5": ("lighttaehy1_5", "for VAE Decode, with latents 1.0368 times as large as its authors'"),
    "taeltx_2": ("taeltx_2", "for Load VAE, VAE Decode and sampler previews"),
    "taeltx2_3": ("taeltx_2", "for Load VAE, VAE Decode and sampler previews"),
    "taeh3": ("taeh3", "for Load VAE, VAE Decode and sampler previews"),
}
NOT_COMFYUI = {
    "taecvx": "16 channels are Hunyuan's or Wan's latents to it",
    "taeos1_3": "16 channels are Hunyuan's or Wan's latents to it",
    "taehv1_5": "32 channels have LeakyReLU and pixels in [-1, 1] to it, as in lighttaehy1_5",
    "super": "it looks for decoder.1.weight, which a super decoder does not have",
    "wide": "its decoder has 256 channels at most",
}
BIG_VAE_LATENTS = "it gives the diffusion model's latents, and LightX2V's weights work on the big VAE's own"
NO_LEAKY = "it has ReLU and pixels in [0, 1] alone"
NOT_DIFFUSERS = {
    "taecvx": "it drops the first frames of an even number of latents too",
    "taeh3": "it knows no chunks of 17 frames",
    "lighttaew2_1": BIG_VAE_LATENTS, "lighttaew2_2": BIG_VAE_LATENTS, "lighttaehy1_5": NO_LEAKY,
    "super": "it has no super decoder", "wide": "it has no wide decoder",
}
LIGHTX2V = {"taew2_1": "wan2.1", "lighttaew2_1": "wan2.1", "taew2_2": "wan2.2 (TI2V 5B)",
            "lighttaew2_2": "wan2.2 (TI2V 5B)", "lighttaehy1_5": "hunyuan_video_1.5"}
NOT_LIGHTX2V = {
    "taehv1_5": "32 channels have LeakyReLU and pixels in [-1, 1] to it, as in lighttaehy1_5",
    "super": "it has no super decoder", "wide": "it has no wide decoder",
}
SDCPP = {"taew2_1": "Wan 2.1, Wan 2.2 A14B and Qwen Image", "taew2_2": "Wan 2.2 TI2V 5B",
         "taehv1_5": "Hunyuan Video 1.5", "taeltx_2": "LTX-2", "taeltx2_3": "LTX-2.3", "taeltx2_3_wide": "LTX-2.3",
         "taeh3": "MiniMax H3"}
NOT_SDCPP = {
    "taehv": "it has 32 channels for Hunyuan Video, and would read 16 as Wan's",
    "taecvx": "16 channels are Wan's latents to it", "taeos1_3": "16 channels are Wan's latents to it",
    "lighttaew2_1": BIG_VAE_LATENTS, "lighttaew2_2": BIG_VAE_LATENTS, "lighttaehy1_5": NO_LEAKY,
    "super": "it has no super decoder",
}
NOT_TAEHV = {"wide": "its decoders are the plain and the super one"}
MARKS = ("taecvx", "taeh3", "taew2_2", "taehv1_5", "taeltx", "_super")  # taehv.py finds the architecture by these


# ---- checks --------------------------------------------------------------------------------------------------------


def need_taehv(model, target):
    """ExportError if the model is no TAEHV."""
    if not isinstance(model, TAEHV):
        raise ExportError(f"--to {target} takes a TAEHV, and this is a {name_of(model)}: --to safetensors takes it")


def refuse(model, target, known, reasons, own_shape=True):
    """ExportError for a TAEHV that a program does not know, or would decode wrongly. known: variants that it takes
    (None: all), reasons: {variant or kind of decoder: why not}. own_shape: refuse layers that differ from the variant's
    too."""
    need_taehv(model, target)
    why = reasons.get(model.variant) or reasons.get(model.arch_variant)
    if why is None and known is not None and model.variant not in known:
        why = f"it takes {', '.join(known)}"
    if why:
        raise ExportError(f"{target} would not decode {model.variant} rightly: {why}")
    standard = config_of(settle(model.variant, *[None] * 10))
    own = [f"{key} {value}" for key, value in model.config.items() if standard.get(key) != value]
    if own and own_shape:
        raise ExportError(f"{target} knows {model.variant} in its published shape alone, and this one has "
                          f"{', '.join(own)}")


def check_latents(options):
    """A warning, or "", if the config.json of a run says that its latents may not be those of a diffusion model.
    ExportError if they are not, and the program decodes only a diffusion model's latents."""
    path = options.checkpoint
    if not os.path.exists(path):  # a name of published weights
        return ""
    try:
        settings = read_json(os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json"),
                             SETTINGS)
    except (OSError, ValueError):
        return ""
    if not isinstance(settings, dict) or settings.get("model") != "taehv" or not settings.get("train_encoder") \
            or settings.get("latent_cache"):
        return ""
    if settings.get("init_from"):
        return (f"warning: this run began with {settings['init_from']}, but its encoder learned on without a teacher: "
                "its latents are no longer quite those")
    if options.to in ("comfyui", "lightx2v", "sdcpp"):
        raise ExportError(f"{options.to} decodes a diffusion model's latents, and this run's encoder learned its own, "
                          "without a teacher: distil one (docs/distil.md), or go on from published weights with "
                          "train.py taehv_finetune")
    return "note: its latents are its own, no published diffusion model gives them"


def dtype_of(options, allowed, why=""):
    """The torch dtype of --dtype, else the first allowed one. ExportError, with the reason `why`, for others."""
    name = options.dtype or allowed[0]
    if name not in allowed:
        raise ExportError(f"--dtype {name}: {why}; {' or '.join(allowed)} is right")
    return DTYPES[name]


def weights_of(model, dtype):
    """The state_dict with its floating-point tensors in `dtype`. ExportError if a number is too large for it."""
    state = {key: (value.to(dtype) if value.is_floating_point() else value).detach().clone(
        memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    if key := not_finite(state):
        raise ExportError(f"--dtype {str(dtype).removeprefix('torch.')}: {key} holds numbers too large for it")
    return state


# ---- paths ---------------------------------------------------------------------------------------------------------


def file_path(options, name):
    """The path of the file to write: --out if that is a file name (ExportError unless it has the suffix of `name`),
    else `name` in the folder --out."""
    ending, out = os.path.splitext(name)[1], options.out
    if out is None:
        return name
    if out.endswith(os.sep) or os.path.isdir(out) or not os.path.splitext(out)[1]:
        return os.path.join(out, name)
    if not out.endswith(ending):
        raise ExportError(f"--out {out}: {options.to} reads {ending} files")
    return out


def folder_path(options, name):
    """The folder to write: --out, or `name`. ExportError if --out is a file."""
    out = options.out or name
    if os.path.exists(out) and not os.path.isdir(out):
        raise ExportError(f"--out {out} is a file: --to {options.to} writes a folder")
    return out


# ---- one function for each program: (function that makes the contents of its files, their paths, lines to print) ---


def comfyui(model, options):
    """One .safetensors file, which ComfyUI finds by its name."""
    refuse(model, "ComfyUI", COMFYUI, NOT_COMFYUI)
    stem, words = COMFYUI[model.variant]
    if model.latent_channels != 16:
        dtype = dtype_of(options, ("fp32", "fp16", "bf16"))
    elif model.variant == "taehv":
        dtype = dtype_of(options, ("fp16",), "of 16 channels, ComfyUI takes all files but fp16 ones for Wan's")
    else:
        dtype = dtype_of(options, ("fp32", "bf16"), "of 16 channels, ComfyUI takes fp16 files for Hunyuan's")
    path = file_path(options, f"{stem}.safetensors")
    if os.path.basename(path) != f"{stem}.safetensors":
        raise ExportError(f"--out {path}: ComfyUI finds it by its name, which has to be {stem}.safetensors")
    return lambda: [as_safetensors(model, weights_of(model, dtype))], [path], [
        f"put it into ComfyUI/models/vae_approx/ as {stem}.safetensors: {words}"]


def diffusers(model, options):
    """A folder for AutoencoderTinyVideo.from_pretrained, with widths and strides as they are."""
    refuse(model, "diffusers", None, NOT_DIFFUSERS, own_shape=False)
    if model.activation != "relu" or model.output_range != (0, 1):
        raise ExportError(f"diffusers would not decode this rightly: {NO_LEAKY}")
    if model.space_upscale != model.space_factor:
        raise ExportError("diffusers knows no decoders with decoder_space_upscale switched off")
    if model.config.get("scaled_latents"):
        raise ExportError("diffusers knows no scale of the latents, which this model has for its teacher's: "
                          "--to safetensors keeps it")
    if model.encoder_widths[0] != model.encoder_widths[1]:
        raise ExportError(f"diffusers has one width for the encoder's first two: {model.encoder_widths}")
    config = {
        "_class_name": "AutoencoderTinyVideo", "in_channels": 3, "latent_channels": model.latent_channels,
        "patch_size": model.patch_size, "encoder_block_out_channels": list(model.encoder_widths[1:]),
        "decoder_block_out_channels": list(model.decoder_widths),
        "encoder_time_downscale": [stride == 2 for stride in model.config["encoder_time_downscale"]],
        "decoder_time_upscale": [stride == 2 for stride in model.config["decoder_time_upscale"]]}
    dtype = dtype_of(options, ("fp32", "fp16", "bf16"))
    folder = folder_path(options, f"{model.variant}_diffusers")

    def make():
        weights = to_diffusers(weights_of(model, dtype))
        return [(json.dumps(config, indent=2) + "\n").encode(), as_safetensors(model, weights)]
    return make, [os.path.join(folder, name) for name in ("config.json", "diffusion_pytorch_model.safetensors")], [
        f"in Python: diffusers.AutoencoderTinyVideo.from_pretrained({folder!r}), of diffusers' git (5f7dc506; no "
        "release up to 0.42.1 has it)"]


def lightx2v(model, options):
    """One .safetensors file; LightX2V tells by its path how the latents are scaled."""
    refuse(model, "LightX2V", LIGHTX2V, NOT_LIGHTX2V)
    path = file_path(options, f"{model.variant}.safetensors")
    light = model.variant in RELATIVES
    if "taecvx" in path:
        raise ExportError(f"--out {path}: LightX2V takes what has taecvx in its path for CogVideoX's")
    if ("lighttae" in path) != light and model.variant != "lighttaehy1_5":
        raise ExportError(f"--out {path}: LightX2V scales the latents for files with lighttae in their path, and "
                          f"{model.variant} is {'' if light else 'not '}one")
    dtype = dtype_of(options, ("fp32", "fp16", "bf16"))
    scaled = ', "need_scaled": true' if light and model.variant != "lighttaehy1_5" else ""
    return lambda: [as_safetensors(model, weights_of(model, dtype))], [path], [
        f'in LightX2V\'s configuration of {LIGHTX2V[model.variant]}: "use_tae": true, "tae_path": "{path}"{scaled}']


def sdcpp(model, options):
    """One .safetensors file for stable-diffusion.cpp."""
    refuse(model, "stable-diffusion.cpp", SDCPP, NOT_SDCPP)
    dtype = dtype_of(options, ("fp32", "fp16", "bf16"))
    path = file_path(options, f"{model.variant}.safetensors")
    return lambda: [as_safetensors(model, weights_of(model, dtype))], [path], [
        f"sd-cli --tae {path} in the place of --vae, with {SDCPP[model.variant]}; it computes in fp16"]


def taehv(model, options):
    """One .pth file for the published taehv.py, which tells the architecture by the path."""
    reasons = {**{name: BIG_VAE_LATENTS for name in RELATIVES}, "lighttaehy1_5": NO_LEAKY, **NOT_TAEHV}
    refuse(model, "taehv.py", None, reasons)
    path = file_path(options, f"{model.variant}.pth")
    for mark in MARKS:
        if (mark in path) != (mark in model.variant):
            raise ExportError(f"--out {path}: taehv.py knows a model by its path, in which {mark!r} has to "
                              f"{'stand' if mark in model.variant else 'be absent'} for {model.variant}")
    dtype = dtype_of(options, ("fp32", "fp16", "bf16"))
    return lambda: [as_pth(weights_of(model, dtype))], [path], [
        f"with taehv.py: TAEHV({path!r}); the path is what it knows the model by"]


def safetensors(model, options):
    """One .safetensors file of any model, with its name and settings in the metadata."""
    dtype = dtype_of(options, ("fp32", "fp16", "bf16"))
    path = file_path(options, f"{getattr(model, 'variant', name_of(model))}.safetensors")
    return lambda: [as_safetensors(model, weights_of(model, dtype))], [path], [
        f"python infer.py {path} VIDEO; other programs find model_name and model_config in its metadata"]


def step_files(model, options, ending, default, write, read, dtype):
    """(function that makes the contents of both files, their paths, the folder): a decoder step and an encoder step.
    Each is compared with the model before it is kept; ExportError if it differs too much."""
    folder = folder_path(options, default)
    model = model.to(dtype)

    def make():
        contents = []
        for kind in tqdm(STEPS, desc="graphs", unit="step", leave=False, disable=None):
            step = kind(model)
            contents.append(write(step, model))
            found = export_step.difference(step, read(contents[-1]), model)
            if not found <= export_step.TOLERANCES[dtype]:
                raise ExportError(f"the {step.part} as written differs from the model by {found:.2g}: not kept")
            print(f"{step.part}: differs from the model's stream by {found:.1g} at most")
        return contents
    return make, [os.path.join(folder, f"{kind.part}_step{ending}") for kind in STEPS], folder


def torch_export(model, options):
    """A folder with encoder_step.pt2 and decoder_step.pt2, programs of torch.export that take and return memories."""
    need_taehv(model, "torch-export")
    *files, folder = step_files(model, options, ".pt2", f"{model.variant}_torch", export_step.as_torch,
                                export_step.open_torch, dtype_of(options, ("fp32", "fp16", "bf16")))
    return *files, [f"in Python: step = torch.export.load({os.path.join(folder, 'decoder_step.pt2')!r}).module(); "
                    "frames, *memories = step(latent, *memories)"]


def onnx(model, options):
    """The same two steps as .onnx files."""
    need_taehv(model, "onnx")
    if missing := export_step.missing_packages():
        raise ExportError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(export_step.ONNX_PACKAGES)}")
    dtype = dtype_of(options, ("fp32", "fp16"), "onnxruntime has no convolutions of that type on a CPU")
    *files, folder = step_files(model, options, ".onnx", f"{model.variant}_onnx", export_step.as_onnx,
                                export_step.open_onnx, dtype)
    return *files, [f"onnxruntime.InferenceSession({os.path.join(folder, 'decoder_step.onnx')!r}); inputs latent, "
                    "memory_0, ...: zeros at first, then new_memory_0, ... of the call before"]


TARGETS = {"comfyui": comfyui, "diffusers": diffusers, "lightx2v": lightx2v, "sdcpp": sdcpp, "taehv": taehv,
           "safetensors": safetensors, "onnx": onnx, "torch-export": torch_export}


# ---- the command ---------------------------------------------------------------------------------------------------


def run(options):
    """Do everything, from the options to the files; all are made before the first is written. ExportError,
    CheckpointError, OSError."""
    model, words = models.load_model(options.checkpoint, options.variant)
    print(f"{options.checkpoint}: {words}")
    warning = check_latents(options)
    make, paths, lines = TARGETS[options.to](model, options)
    for path in paths:
        if os.path.isdir(path) or os.path.lexists(path) and not options.force:
            raise ExportError(f"{path} exists: choose another --out{'' if os.path.isdir(path) else ', or --force'}")
    with folder_for(os.path.dirname(paths[0]) or "."):
        write_all(make(), paths)
    print("wrote", *paths)
    print(*lines, *filter(None, [warning]), sep="\n")


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"export.py: {one_line(message)}\n")  # without lines of usage
    parser.add_argument("checkpoint", help="run folder, checkpoint (.pt), weights (.pth, .safetensors), or the name of "
                        "published ones (say taew2_1)")
    parser.add_argument("--to", required=True, choices=tuple(TARGETS), help="the program that is to read it")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the numbers (default: fp32, or what the "
                        "program can tell apart)")
    parser.add_argument("--out", help="file or folder (default: a name that the program finds, in the present folder)")
    parser.add_argument("--variant", help="what the weights are, where their shapes do not tell (say taecvx)")
    parser.add_argument("--force", action="store_true", help="write over a file that exists")
    return parser.parse_args(arguments)


def main():
    guard_screen()
    options = parse()
    with ending_in_one_line("export.py", (ExportError, CheckpointError, OSError), "nothing was written", first_line):
        run(options)


if __name__ == "__main__":
    main()
