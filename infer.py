"""Reconstruct videos with a trained or published autoencoder, and report how well and how fast.

    python infer.py runs/mine videos/                      # a run folder, a checkpoint, or published weights (.pth)
    python infer.py taew2_1.pth a.mp4 b.mkv --out results
    python infer.py runs/mine a.mp4 --save-latents         # writes results/latents/a.latents.npz ...
    python infer.py runs/mine a.latents.npz                # ... and decodes it

Videos of any length and size are streamed: memory does not grow with the length. Writes under --out: metrics.json,
summary_report.html, comparison_videos/, latent_visualizations/. Audio is not carried.
"""
import argparse
import collections
import json
import os
import shlex
import sys
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import data
import metrics
import report
from device import (DeviceError, describe, peak_memory, pick_device, pick_precision, reset_peak_memory, synchronize,
                    tune)

LATENTS = ".latents.npz"


class InputError(Exception):
    """An input that cannot be used; the message names it."""


# ---- one video ---------------------------------------------------------------------------------------------------


class Codec:
    """A model on its device, fed with uint8 frames of any size, with the time it takes."""

    def __init__(self, model, device, dtype, total_latents):
        self.model, self.device, self.dtype = model, device, dtype
        # A GPU wants several latents at a time; a CPU is fastest with one.
        self.stream = model.stream(memory_limit=1 << 31 if device.type == "cuda" else None, total_latents=total_latents)
        self.seconds = {"encode": 0.0, "decode": 0.0}

    def timed(self, kind, call, *arguments):
        start = time.perf_counter()
        result = call(*arguments)
        synchronize(self.device)
        self.seconds[kind] += time.perf_counter() - start
        return result

    def encode(self, frame):
        """H W 3 uint8 -> latents 1 t C h w. The frame is padded at the right and bottom by repeating its edge."""
        x = torch.from_numpy(frame).permute(2, 0, 1)[None].to(self.device).to(self.dtype).div_(255)
        factor = self.model.space_factor
        x = F.pad(x, (0, -x.shape[-1] % factor, 0, -x.shape[-2] % factor), mode="replicate")
        return self.timed("encode", self.stream.encode, x[None])

    def decode(self, latents):
        return self.timed("decode", self.stream.decode, latents)

    def flush_encoder(self):
        return self.timed("encode", self.stream.flush_encoder)

    def flush_decoder(self):
        return self.timed("decode", self.stream.flush_decoder)


def padded_length(model, frames):
    """The least number of input frames, at least `frames`, from which all of the first `frames` come back."""
    length = frames
    while not model.frame_index(length) or model.frame_index(length)[-1] < frames - 1:
        length += 1
    return length


def to_uint8(frame, height, width):
    """3 H W in [0, 1] -> height width 3 uint8: the padding is cropped away."""
    return (frame[:, :height, :width].float() * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def reconstruct(source, name, model, device, dtype, lpips, options):
    """Stream one video through the model; write its videos, latent picture and latents. Returns its report row."""
    reader = data.VideoReader(source.path)
    frames = 1 if source.is_image else data.count_frames(source.path)
    notes = [] if frames == reader.frames else [f"the container says {reader.frames} frames, {frames} can be read"]
    if options.max_frames and frames > options.max_frames:
        notes.append(f"the first {options.max_frames} of {frames} frames")
        frames = options.max_frames
    length = padded_length(model, frames)
    if length > frames:
        notes.append(f"the last frame was repeated at the end ({length - frames} x), so that all {frames} come back")
    factor = model.space_factor
    if reader.height % factor or reader.width % factor:
        notes.append(f"padded from {reader.height}x{reader.width} to {reader.height + -reader.height % factor}x"
                     f"{reader.width + -reader.width % factor} for the model, and cropped back")
    if options.verbose:
        for note in notes:
            tqdm.write(f"{source.path}: {note}")
    reset_peak_memory(device)
    total_latents = model.latent_frames(length)
    codec = Codec(model, device, dtype, total_latents)
    index = model.frame_index(length)
    kept = {round(k) for k in np.linspace(0, total_latents - 1, min(8, total_latents))}  # latents for the picture
    picture, sums, counts = [], collections.Counter(), collections.Counter()
    waiting = collections.deque()  # original frames that have no reconstruction yet
    done, seen, latents_done = 0, 0, 0
    videos = {kind: f"comparison_videos/{name}_{kind}.webm" for kind in ("original", "reconstructed", "comparison")}
    with Outputs(options.out, videos, reader, source.is_image) as outputs, \
            LatentWriter(options, name, model, reader, frames, total_latents) as latent_file, \
            tqdm(total=frames, desc=name[:30], unit="frame", dynamic_ncols=True) as bar:

        def take_latents(latents):
            nonlocal latents_done
            latent_file.write(latents)
            for latent in latents[0].float().cpu().numpy():
                if latents_done in kept:
                    picture.append(latent)
                latents_done += 1
            return codec.decode(latents)

        def take_frames(video):
            nonlocal done
            for frame in video[0]:
                while waiting and done < len(index) and waiting[0][0] < index[done]:
                    waiting.popleft()
                if waiting and waiting[0][0] == index[done]:
                    original = waiting.popleft()[1]
                    output = to_uint8(frame, reader.height, reader.width)
                    measure(original, output, device, lpips, sums, counts)
                    outputs.write(original, output)
                    bar.update()
                done += 1

        for frame in reader:
            if seen == frames:
                break
            waiting.append((seen, frame))
            seen += 1
            take_frames(take_latents(codec.encode(frame)))
        for _ in range(length - seen):
            take_frames(take_latents(codec.encode(frame)))
        take_frames(take_latents(codec.flush_encoder()))
        take_frames(codec.flush_decoder())
    os.makedirs(os.path.join(options.out, "latent_visualizations"), exist_ok=True)
    latent_picture = f"latent_visualizations/{name}_latents.png"
    data.cv2.imwrite(os.path.join(options.out, latent_picture), report.latent_picture(np.stack(picture))[..., ::-1])
    count = counts["mse"]
    notes += sorted({writer.note for writer in outputs.writers.values() if writer.note})
    if min(reader.height, reader.width) < 11:
        notes.append("no SSIM: it needs 11x11 pixels")
    return dict(name=name, source=source.path, frames=count, fps=reader.fps, height=reader.height, width=reader.width,
                latent_shape=[total_latents, *picture[0].shape], notes=notes, videos=outputs.paths,
                latent_picture=latent_picture, metrics={key: sums[key] / counts[key] if counts[key] else None
                                                        for key in ("mse", "psnr", "ssim", "lpips")},
                encode_seconds=codec.seconds["encode"], decode_seconds=codec.seconds["decode"],
                encode_fps=length / codec.seconds["encode"], decode_fps=count / codec.seconds["decode"],
                peak_memory_mb=peak_memory(device) / 1e6)


def measure(original, output, device, lpips, sums, counts):
    """Add one frame's quality, both H W 3 uint8, to the sums: what is measured is what is written."""
    a, b = (torch.from_numpy(x).to(device).permute(2, 0, 1)[None].float() / 255 for x in (output, original))
    values = {"mse": metrics.mse(a, b), "psnr": metrics.psnr(a, b).clamp(max=100)}
    if min(original.shape[:2]) >= 11:
        values["ssim"] = metrics.ssim(a, b)
    if lpips is not None and min(original.shape[:2]) >= 32:
        values["lpips"] = lpips(a, b)
    for key, value in values.items():
        sums[key] += value.item()
        counts[key] += 1


class Outputs:
    """The three videos of one input; for an image, three one-frame videos and no less."""

    def __init__(self, out, videos, reader, is_image):
        os.makedirs(os.path.join(out, "comparison_videos"), exist_ok=True)
        self.paths, self.out, self.fps, self.writers = videos, out, 1.0 if is_image else reader.fps, {}

    def write(self, original, output):
        pair = report.side_by_side([original, output], ["original", "reconstruction"], max_width=1920)
        for kind, frame in zip(self.paths, (original, output, pair)):
            if kind not in self.writers:
                path = os.path.join(self.out, self.paths[kind])
                self.writers[kind] = report.VideoWriter(path, self.fps, frame.shape[1], frame.shape[0]).__enter__()
            self.writers[kind].write(frame)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for writer in self.writers.values():
            writer.__exit__(*error)


# ---- latents in files --------------------------------------------------------------------------------------------


class LatentWriter:
    """NAME.latents.npz, written latent by latent: `latents` float32 T C h w, and `about`, a JSON text with what
    decoding needs. NumPy's ordinary np.load reads it."""

    def __init__(self, options, name, model, reader, frames, total):
        self.path = os.path.join(options.out, "latents", name + LATENTS) if options.save_latents else None
        self.total, self.file = total, None
        self.about = dict(model_config=model.config, fps=reader.fps, height=reader.height, width=reader.width,
                          frames=frames)

    def __enter__(self):
        if self.path:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.archive = zipfile.ZipFile(self.path + ".tmp", "w")
        return self

    def write(self, latents):
        if not self.path or not latents.shape[1]:
            return
        array = latents[0].float().cpu().numpy()
        if self.file is None:
            self.file = self.archive.open("latents.npy", "w", force_zip64=True)
            header = dict(descr="<f4", fortran_order=False, shape=(self.total, *array.shape[1:]))
            np.lib.format.write_array_header_1_0(self.file, header)
        self.file.write(np.ascontiguousarray(array).tobytes())

    def __exit__(self, error_type, *_):
        if not self.path:
            return
        if self.file is not None:
            self.file.close()
        if error_type is None:
            with self.archive.open("about.npy", "w") as file:
                np.lib.format.write_array(file, np.array(json.dumps(self.about)))
        self.archive.close()
        if error_type is None:
            os.replace(self.path + ".tmp", self.path)
        else:
            os.remove(self.path + ".tmp")


class LatentReader:
    """Reads such a file latent by latent; InputError if it is damaged, foreign, or does not belong to the model."""

    def __init__(self, path, model):
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
            if self.archive.testzip() is not None:
                raise InputError(f"{path}: damaged (a checksum does not match)")
            with self.archive.open("about.npy") as file:
                about = json.loads(str(np.lib.format.read_array(file, allow_pickle=False)))
            with self.archive.open("latents.npy") as file:
                self.shape, dtype = self.header(file)
            self.fps, self.height, self.width = float(about["fps"]), int(about["height"]), int(about["width"])
            self.frames, made_by = int(about["frames"]), about["model_config"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, RuntimeError,
                NotImplementedError) as error:
            raise InputError(f"{path}: no file of latents, or damaged ({checkpoint.first_line(error)})") from None
        factor = model.space_factor
        needed = (-(-self.height // factor), -(-self.width // factor))
        made_by = made_by if isinstance(made_by, dict) else {}
        if dtype != np.float32 or len(self.shape) != 4 or self.shape[1:] != (model.latent_channels, *needed) \
                or made_by.get("encoder_time_downscale") != model.config["encoder_time_downscale"]:
            raise InputError(f"{path}: latents {self.shape} of a {self.height}x{self.width} video by {made_by} are not "
                             f"this model's ({model.config})")
        self.note = ""
        if made_by.get("variant") != model.variant:
            self.note = f"{path}: made by variant {made_by.get('variant')}, decoded by {model.variant}"

    @staticmethod
    def header(file):
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject:
            raise ValueError("unexpected array layout")
        return shape, dtype

    def __iter__(self):
        """float32 arrays C h w."""
        size = 4 * int(np.prod(self.shape[1:]))
        with self.archive.open("latents.npy") as file:
            self.header(file)
            for _ in range(self.shape[0]):
                chunk = file.read(size)
                if len(chunk) != size:
                    raise InputError(f"{self.path}: ends too early")
                yield np.frombuffer(chunk, np.float32).reshape(self.shape[1:])


def decode_file(reader, name, model, device, dtype, options):
    """Write comparison_videos/NAME_reconstructed.webm from a file of latents; returns its path."""
    codec = Codec(model, device, dtype, reader.shape[0])
    path = os.path.join(options.out, "comparison_videos", f"{name}_reconstructed.webm")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    left = reader.frames
    with report.VideoWriter(path, reader.fps, reader.width, reader.height) as writer, \
            tqdm(total=reader.frames, desc=name[:30], unit="frame", dynamic_ncols=True) as bar:
        def take(video):
            nonlocal left
            for frame in video[0][:left]:
                writer.write(to_uint8(frame, reader.height, reader.width))
                bar.update()
                left -= 1
        for latent in reader:
            take(codec.decode(torch.from_numpy(latent.copy()).to(device, dtype)[None, None]))
        take(codec.flush_decoder())
    return path


# ---- the command -------------------------------------------------------------------------------------------------


def find_inputs(inputs):
    """([video and image sources], [latent files], [(path, reason)] refused in folders). InputError for a bad file."""
    sources, latents, refused = [], [], []
    for path in inputs:
        if path.endswith(LATENTS):
            if not os.path.isfile(path):
                raise InputError(f"{path!r} does not exist")
            latents.append(path)
            continue
        found, bad = data.probe(data.find_sources(path))
        if bad and not os.path.isdir(path):
            raise InputError(f"{bad[0][0]}: {bad[0][1]}")
        sources += found
        refused += bad
    if not sources and not latents:
        raise InputError(f"none of the {len(refused)} files can be read; the first: {refused[0][0]}: {refused[0][1]}")
    return sources, latents, refused


def run(options):
    """Check everything, then reconstruct or decode each input and write the report. Errors as in `main`."""
    device = pick_device(options.device)
    tune(device)
    dtype = pick_precision(options.precision, device)
    sources, latent_files, refused = find_inputs(options.inputs)
    model, words = checkpoint.load_model(options.checkpoint, options.variant)
    readers = [LatentReader(path, model) for path in latent_files]
    os.makedirs(options.out, exist_ok=True)
    model.to(device, dtype, memory_format=torch.channels_last).requires_grad_(False)
    print(f"{options.checkpoint}: {words}; {describe(device)}, {str(dtype).removeprefix('torch.')}")
    names = set()
    for path, reader in zip(latent_files, readers):
        if reader.note:
            print(reader.note)
        name = report.safe_name(path.removesuffix(".npz"), names)
        print("wrote", decode_file(reader, name, model, device, dtype, options))
    if not sources:
        return
    lpips, lpips_note = None, "LPIPS was not asked for"
    if options.lpips != "none":
        lpips, lpips_note = metrics.load_lpips(options.lpips, device)
    rows = []
    for source in sources:
        name = report.safe_name(source.path, names)
        try:
            rows.append(reconstruct(source, name, model, device, dtype, lpips, options))
        except (OSError, data.DataError, torch.cuda.OutOfMemoryError) as error:  # the others still get their turn
            rows.append(dict(name=name, source=source.path, failed=checkpoint.first_line(error)))
    if all("failed" in row for row in rows):
        raise InputError(f"none of the {len(rows)} inputs could be reconstructed; the first: {rows[0]['failed']}")
    rows += [dict(name=os.path.basename(path), source=path, failed=reason) for path, reason in refused]
    page = report.write_report(options.out, rows, dict(
        checkpoint=options.checkpoint, model=words, settings=", ".join(f"{k} {v}" for k, v in model.config.items()),
        device=str(device), machine=describe(device),
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        precision=str(dtype).removeprefix("torch."), command="python infer.py " + shlex.join(sys.argv[1:]),
        created=time.strftime("%Y-%m-%d %H:%M"), lpips_note=lpips_note))
    print(f"{'':30} {'frames':>6} {'PSNR dB':>8} {'SSIM':>7} {'LPIPS':>7} {'encode f/s':>11} {'decode f/s':>11} "
          f"{'peak MB':>8}")
    for row in rows:
        if "failed" in row:
            print(f"{row['name'][:30]:30} failed: {row['failed']}")
            continue
        ssim, distance = ("-" if row["metrics"][k] is None else f"{row['metrics'][k]:.4f}" for k in ("ssim", "lpips"))
        print(f"{row['name'][:30]:30} {row['frames']:6} {row['metrics']['psnr']:8.2f} {ssim:>7} {distance:>7} "
              f"{row['encode_fps']:11.1f} {row['decode_fps']:11.1f} {row['peak_memory_mb']:8.0f}")
    if lpips_note:
        print(lpips_note)
    print(f"report: {page}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder, checkpoint (.pt), or published weights (.pth, .safetensors)")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=f"videos, images, folders of them, or *{LATENTS}")
    parser.add_argument("--out", default="inference_results", help="folder to write to (default: %(default)s)")
    parser.add_argument("--variant", help="what the weights are, where their shapes do not tell (say taecvx)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="only the first N frames of each input")
    parser.add_argument("--save-latents", action="store_true", help="write OUT/latents/NAME.latents.npz too")
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "none"), help="its backbone (%(default)s)")
    parser.add_argument("--quiet", dest="verbose", action="store_false", help="no notes on padding and frame counts")
    options = parser.parse_args()
    if options.max_frames < 0:
        parser.error(f"--max-frames {options.max_frames}: a positive number, or 0 for all, is wanted")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        run(options)
    except (InputError, DeviceError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
