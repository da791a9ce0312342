"""Reconstruct videos with a trained or published autoencoder, and report how well and how fast.

    python infer.py runs/mine videos/                      # a run folder, a checkpoint, or published weights (.pth)
    python infer.py taew2_1 a.mp4 b.mkv --out results      # published weights by name: downloaded once
    python infer.py runs/mine a.mp4 --save-latents         # writes results/latents/a.latents.npz ...
    python infer.py runs/mine a.latents.npz                # ... and decodes it
    python infer.py runs/vqgan a.mp4 --save-tokens         # compresses: writes results/tokens/a.tokens ...
    python infer.py runs/vqgan a.tokens                    # ... and restores it
    python infer.py runs/mine a.mp4 --max-frames 48 --teacher taehv:taew2_1.pth    # beside its teacher

Videos of any length and size are streamed: memory does not grow with the length. All of a video is encoded, to a
temporary file under --out, before any of it is decoded, so it is read twice. Writes under --out: metrics.json,
summary_report.html, comparison_videos/, latent_visualizations/. Audio is not carried.
"""
import argparse
import collections
import contextlib
import itertools
import os
import shlex
import sys
import time
import traceback

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import judge
import metrics
import report
from codec import TOKENS, Codec, InputError, Job, Spill, decode_file, open_codes, padded_length, tile, to_uint8
from compare import PeakMemory, TeacherPass, compare_latents, teacher_row
from device import DeviceError, describe, pick_device, pick_precision, place, tune
from latent_file import LATENTS, LatentFileError, LatentWriter
from teachers import KINDS, TeacherError, load_teacher
from token_file import TokenError, TokenWriter


# Errors of one line, with code 2.
MISTAKES = (InputError, LatentFileError, TokenError, TeacherError, DeviceError, data.DataError,
            checkpoint.CheckpointError, OSError)


# ---- one video ---------------------------------------------------------------------------------------------------


def encoded(codec, frames, length):
    """Pieces (see Codec) of some frames, H W 3 uint8; the last one is repeated until `length` have gone in."""
    for number, frame in enumerate(frames):
        yield codec.encode(frame)
    for _ in range(number + 1, length):
        yield codec.encode(frame)
    yield codec.flush_encoder()


def paired_frames(codec, pieces, reader, frames, length):
    """(number, original, reconstruction), both H W 3 uint8, of the first `frames` frames, as the model gives them.
    reader: of the originals."""
    outputs = (to_uint8(frame, reader.height, reader.width) for frame in codec.decode(pieces))
    originals, number = iter(reader), -1
    for wanted, output in zip(codec.model.frame_index(length), outputs):
        while number < min(wanted, frames - 1):
            original, number = next(originals, None), number + 1
            if original is None:
                raise data.DataError(f"only {number} of {frames} frames could be read a second time")
        if number == wanted:
            yield number, original, output


def plan(source, reader, model, options):
    """(frames to take, frames to feed, [what is odd about it])."""
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
    if min(reader.height, reader.width) < 11:
        notes.append("no SSIM: it needs 11x11 pixels")
    return frames, length, notes


class Quality:
    """Sums of each frame's MSE, PSNR, SSIM, LPIPS and detail (variance of the Laplacian; all frames' over the
    originals' is "sharpness"), of frames H W 3 uint8: what is measured is what is written. `fid`, a metrics.FID of all
    inputs or None, gets each `every`-th frame."""

    def __init__(self, device, lpips, fid=None, every=1):
        self.device, self.lpips, self.fid, self.every = device, lpips, fid, every
        self.sums, self.counts = collections.Counter(), collections.Counter()

    def add(self, original, output):
        a, b = (torch.from_numpy(frame).to(self.device).permute(2, 0, 1)[None].float().div_(255)
                for frame in (output, original))
        if self.fid and self.counts["mse"] % self.every == 0:
            self.fid.add(a, b)
        values = {"mse": metrics.mse(a, b), "psnr": metrics.psnr(a, b).clamp(max=100),
                  "detail": metrics.laplacian_variance(a), "original_detail": metrics.laplacian_variance(b)}
        if min(original.shape[:2]) >= 11:
            values["ssim"] = metrics.ssim(a, b)
        if self.lpips is not None and min(original.shape[:2]) >= 32:
            values["lpips"] = self.lpips(a, b)
        for key, value in values.items():
            self.sums[key] += value.item()
            self.counts[key] += 1

    def means(self):
        means = {key: self.sums[key] / self.counts[key] if self.counts[key] else None
                 for key in ("mse", "psnr", "ssim", "lpips")}
        detail, original = (self.sums[key] / max(1, self.counts[key]) for key in ("detail", "original_detail"))
        return {**means, "sharpness": metrics.sharpness(detail, original)}


def reconstruct(source, name, job):
    """Stream one video through the model; write its videos, latent picture and latents. Returns its report row."""
    model, device, options = job.model, job.device, job.options
    reader = data.VideoReader(source.path)
    frames, length, notes = plan(source, reader, model, options)
    total_latents = model.latent_frames(length)
    codec = Codec(job, total_latents, reader)
    notes += [codec.note] if codec.note else []
    if options.verbose:
        for note in notes:
            tqdm.write(f"{source.path}: {note}")
    beside = TeacherPass(job.teacher, source, frames, model.time_factor, model.space_factor,
                         options.teacher_frames, job.memory, options.out) if job.teacher else None
    pictured = sorted({round(k) for k in np.linspace(0, total_latents - 1, min(8, total_latents))})
    picture, latents_done, latent_errors = [], 0, []
    statistics = metrics.CodeStatistics(model.codebook_sizes) if codec.tokens else None
    quality = Quality(device, job.lpips, job.fid, max(1, frames // max(1, job.fid_frames)))
    teacher_quality = Quality(device, job.lpips)
    videos = {kind: f"comparison_videos/{name}_{kind}.webm" for kind in ("original", "reconstructed", "comparison")}
    latents_path = os.path.join(options.out, "latents", name + LATENTS) if options.save_latents else ""
    tokens_path = os.path.join(options.out, "tokens", name + TOKENS) if options.save_tokens else ""
    about = dict(model=job.model_hash, fps=reader.fps, height=reader.height, width=reader.width, frames=frames)
    with job.memory.of("ours"), Outputs(options.out, videos, reader, source.is_image) as outputs, \
            Spill(options.out) as spill, \
            LatentWriter(latents_path, model, reader, frames, total_latents, str(job.tiled or "")) as latent_file, \
            open_tokens(tokens_path, model, about) as token_file:

        def see(piece):
            nonlocal latents_done
            if codec.tokens:
                statistics.add(piece, 0)
                if token_file and len(piece[0][0]):
                    token_file.write([codes[0].cpu().numpy() for codes in piece])
            else:
                latent_file.write(piece)
            for latent in (piece[0][0, :, None] if codec.tokens else piece[0]).float().cpu().numpy():
                if latents_done in pictured:
                    picture.append(latent)
                if beside and latents_done < len(beside.latents) and latent.shape == beside.latents.shape[1:]:
                    latent_errors.append(np.square(latent - beside.latents[latents_done]).mean())
                latents_done += 1

        # All is encoded before anything is decoded: only one of the two holds maps of past frames at a time.
        for piece in encoded(codec, progress(reader, frames, f"{name[:30]} encode"), length):
            see(piece)
            spill.write(piece)
        pairs = paired_frames(codec, spill, reader, frames, length)
        for number, original, output in progress(pairs, frames, f"{name[:30]} decode"):
            theirs = beside.frame(number) if beside else None
            quality.add(original, output)
            if theirs is not None:
                teacher_quality.add(original, theirs)
            outputs.write(original, output, theirs, bool(beside))
    os.makedirs(os.path.join(options.out, "latent_visualizations"), exist_ok=True)
    latent_picture = f"latent_visualizations/{name}_latents.png"
    data.cv2.imwrite(os.path.join(options.out, latent_picture), report.latent_picture(
        np.stack(picture), numbers=pictured, total=total_latents)[..., ::-1])
    count = quality.counts["mse"]
    notes += sorted({writer.note for writer in outputs.writers.values() if writer.note})
    row = dict(name=name, source=source.path, frames=count, fps=reader.fps, height=reader.height, width=reader.width,
               latent_shape=[total_latents, *picture[0].shape], notes=notes, videos=outputs.paths,
               latent_picture=latent_picture, metrics=quality.means(),
               encode_seconds=codec.seconds["encode"], decode_seconds=codec.seconds["decode"],
               seconds=sum(codec.seconds.values()),
               encode_fps=length / codec.seconds["encode"], decode_fps=count / codec.seconds["decode"],
               peak_memory_mb=job.memory.megabytes())
    if codec.tokens:
        row["metrics"].update(describe_codes(statistics, row, tokens_path, options.out))
    if beside:
        row.update(compare_latents(beside, latent_errors, picture[0].shape))
        row["teacher"] = teacher_row(beside, teacher_quality)
        notes += beside.notes
        if row["peak_memory_mb"] is None:
            notes.append("peak memory: this system cannot tell ours from the teacher's")
    return row


def progress(frames, total, name):
    """The first `total` frames, with a bar."""
    return tqdm(itertools.islice(frames, total), total=total, desc=name, unit="frame", dynamic_ncols=True)


def open_tokens(path, model, about):
    """A TokenWriter for the path; a context without one for an empty path."""
    if not path:
        return contextlib.nullcontext()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return TokenWriter(path, about, model.codebook_sizes)


def describe_codes(statistics, row, tokens_path, out):
    """{"codebook_use", "bits_per_pixel", "kbit_per_s"} of a row: as the token file has them, or by the entropy."""
    pixels = row["frames"] * row["height"] * row["width"]
    statistics.pixels += pixels
    found = statistics.reduce()
    bits, what = found["entropy_bits_per_pixel"] * pixels, "by the entropy of its codes"
    if tokens_path:
        bits, what = 8 * os.path.getsize(tokens_path), os.path.relpath(tokens_path, out)
    rate = bits / row["frames"] * row["fps"] / 1000
    row["notes"].append(f"tokens: {bits / 8:,.0f} bytes, {rate:.1f} kbit/s, {bits / pixels:.4f} bits per pixel "
                        f"({what}); written plainly {found['bits_per_pixel']:.4f}")
    return {"codebook_use": found["codebook_use"], "bits_per_pixel": bits / pixels, "kbit_per_s": rate}


class Outputs:
    """The three videos of one input; for an image, three one-frame videos and no less."""

    def __init__(self, out, videos, reader, is_image):
        os.makedirs(os.path.join(out, "comparison_videos"), exist_ok=True)
        self.paths, self.out, self.fps, self.writers = videos, out, 1.0 if is_image else reader.fps, {}
        self.open = contextlib.ExitStack()  # where one cannot be finished, the others are closed all the same

    def write(self, original, output, teacher, with_teacher):
        """H W 3 uint8 each; a teacher that gave no such frame leaves its panel black."""
        panels, labels = [original, output], ["original", "reconstruction"]
        if with_teacher:
            panels.append(np.zeros_like(original) if teacher is None else teacher)
            labels.append("teacher")
        pair = report.side_by_side(panels, labels, max_width=1920)
        for kind, frame in zip(self.paths, (original, output, pair)):
            if kind not in self.writers:
                path = os.path.join(self.out, self.paths[kind])
                writer = report.VideoWriter(path, self.fps, frame.shape[1], frame.shape[0])
                self.writers[kind] = self.open.enter_context(writer)
            self.writers[kind].write(frame)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.open.__exit__(*error)


# ---- the command -------------------------------------------------------------------------------------------------


class Failures:
    """What befell single inputs: a report row for each; the traceback of an error that is no mistake of the user's goes
    to OUT/errors.log. `unexpected` counts those, `code` is the exit code for some that failed among others."""

    def __init__(self, out):
        self.path, self.unexpected, self.code = os.path.join(out, "errors.log"), 0, 0
        if os.path.exists(self.path):
            os.remove(self.path)  # an earlier command's

    def row(self, name, path, error):
        """The row of an input that this error ended."""
        reason = checkpoint.first_line(error)
        if not isinstance(error, MISTAKES):
            reason = reason if reason == type(error).__name__ else f"{type(error).__name__}: {reason}"
            self.unexpected += 1
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{path}\n{''.join(traceback.format_exception(error))}\n")
        if not isinstance(error, (OSError, data.DataError)):  # not merely a file that cannot be read or written
            self.code = 1
        return dict(name=name, source=path, failed=reason)


def find_inputs(inputs):
    """([video and image sources], [latent and token files], [(path, reason)] refused in folders). InputError for a bad
    file."""
    sources, latents, refused = [], [], []
    for path in inputs:
        if path.endswith((LATENTS, TOKENS)):
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
    """Check everything, then reconstruct or decode each input and write the report. Returns the exit code; errors as in
    `main`."""
    device = pick_device(options.device)
    tune(device)
    dtype = pick_precision(options.precision, device)
    sources, latent_files, refused = find_inputs(options.inputs)
    memory = PeakMemory(device, alone=not options.teacher)
    with memory.of("ours"):
        model, words = checkpoint.load_model(options.checkpoint, options.variant)
        model_hash = checkpoint.fingerprint(model)
        place(model, device, dtype).requires_grad_(False)
        if device.type == "cpu" and hasattr(model, "fast"):
            model = model.fast()
    tiled = tile(model, options)
    if tiled:
        words += f", tiles of {tiled}"
    with memory.of("teacher"):
        teacher = load_teacher(options.teacher, device, dtype) if options.teacher else None
    readers = [open_codes(path, model, model_hash, str(tiled or "")) for path in latent_files]
    if options.save_tokens and not hasattr(model, "tokenize"):
        raise InputError(f"--save-tokens: {options.checkpoint} is {words}, which has no tokens; try --save-latents")
    if options.save_latents and hasattr(model, "tokenize"):
        raise InputError(f"--save-latents: {options.checkpoint} is a tokenizer; try --save-tokens")
    os.makedirs(options.out, exist_ok=True)
    print(f"{options.checkpoint}: {words}; {describe(device)}, {str(dtype).removeprefix('torch.')}")
    lpips, lpips_note = None, "LPIPS was not asked for"
    if options.lpips != "none" and sources:
        lpips, lpips_note = metrics.load_lpips(options.lpips, device)
    fid = None
    if options.fid and sources:
        make_fid, problem = metrics.load_fid(device)
        if problem:
            raise InputError(f"--fid: {problem.removeprefix('FID is left out: ')}")
        fid = make_fid()
    job = Job(model, tiled, model_hash, device, dtype, memory, lpips, teacher, options, fid,
              max(1, options.fid // max(1, len(sources))))
    names, failures, rows, decoded = set(), Failures(options.out), [], 0
    # Whatever befalls one input, the others get their turn and their report.
    for path, reader in zip(latent_files, readers):
        if reader.note:
            print(reader.note)
        name = report.safe_name(path.removesuffix(".npz").removesuffix(TOKENS), names)
        try:
            print("wrote", decode_file(reader, name, job))
            decoded += 1
        except Exception as error:
            rows.append(failures.row(name, path, error))
            failures.code = 1
    for source in sources:
        name = report.safe_name(source.path, names)
        try:
            rows.append(reconstruct(source, name, job))
        except Exception as error:
            rows.append(failures.row(name, source.path, error))
    if not decoded and not failures.unexpected and all("failed" in row for row in rows):
        what = f"none of the {len(rows)} inputs could be reconstructed; the first: " if len(rows) > 1 else ""
        raise InputError(f"{what}{rows[0]['failed']}")
    if failures.unexpected:
        print(f"infer.py: {failures.unexpected} of {len(rows) + decoded} inputs failed by an unexpected error; "
              f"tracebacks: {failures.path}", file=sys.stderr)
    if not sources:
        if rows:
            print(*judge.table(rows, {}), sep="\n")
        return failures.code
    for row in rows:
        if "failed" not in row:
            row["targets"] = judge.judge(options.targets, row["metrics"])
    rows += [dict(name=os.path.basename(path), source=path, failed=reason) for path, reason in refused]
    distance = fid.reduce() if fid else None
    page = report.write_report(options.out, rows, dict(
        checkpoint=options.checkpoint, model=words, settings=", ".join(f"{k} {v}" for k, v in model.config.items()),
        device=str(device), machine=describe(device),
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        precision=str(dtype).removeprefix("torch."), command="python infer.py " + shlex.join(sys.argv[1:]),
        **({"teacher": f"{teacher.name} ({teacher.spec})"} if teacher else {}),
        **({"FID": f"{distance:.3f} (over {fid.count} frames)"} if fid else {}),
        **({"targets": judge.in_words(options.targets)} if options.targets else {}),
        created=time.strftime("%Y-%m-%d %H:%M"), lpips_note=lpips_note), options.targets)
    print(*judge.table(rows, options.targets), sep="\n")
    if options.targets:
        print(f"targets: {judge.in_words(options.targets)}")
    if fid:
        print(f"FID {distance:.3f} over {fid.count} frames")
    if lpips_note:
        print(lpips_note)
    print(f"report: {page}")
    return failures.code


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"infer.py: {message}\n")  # without lines of usage before it
    parser.add_argument("checkpoint", help="run folder, checkpoint (.pt), weights (.pth, .safetensors), or the name "
                        "of published ones (say taew2_1)")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help=f"videos, images, folders of them, *{LATENTS}, *{TOKENS}")
    parser.add_argument("--out", default="inference_results", help="folder to write to (default: %(default)s)")
    parser.add_argument("--variant", help="what the weights are, where their shapes do not tell (say taecvx)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--max-frames", type=int, default=0, metavar="N", help="only the first N frames of each input")
    parser.add_argument("--save-latents", action="store_true", help="write OUT/latents/NAME.latents.npz too")
    parser.add_argument("--save-tokens", action="store_true", help=f"write OUT/tokens/NAME{TOKENS} too (tokenizers)")
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "none"), help="its backbone (%(default)s)")
    parser.add_argument("--targets", default=judge.TARGETS, metavar="LIST",
                        help="marks each input and the mean as having met or missed them; mse, psnr, ssim, lpips, or "
                             "'none' (default: %(default)s)")
    parser.add_argument("--fid", type=int, default=0, metavar="N",
                        help="FID of about N frames, spread over the inputs (needs pytorch-fid; biased under 2048)")
    parser.add_argument("--teacher", metavar="SPEC", help=f"set it beside the model: {KINDS}")
    parser.add_argument("--teacher-frames", type=int, metavar="N",
                        help="give it N frames at a time, 0 for a whole video (default: 33, 17 or 9, by their size)")
    parser.add_argument("--tile", type=int, metavar="SIZE",
                        help="spatial tiles of SIZE x SIZE pixels, 0 for none (default: 256 for a DCAE, else 0)")
    parser.add_argument("--tile-frames", type=int, metavar="N",
                        help="temporal tiles of N frames, 0 for none (default: 32 for a DCAE, else 0)")
    parser.add_argument("--tile-overlap", type=float, default=0.25, metavar="PART",
                        help="how much of a tile its neighbour covers too, up to 0.5 (default: %(default)s)")
    parser.add_argument("--quiet", dest="verbose", action="store_false", help="no notes on padding and frame counts")
    options = parser.parse_args(arguments)
    for name in ("max_frames", "teacher_frames", "fid"):
        if (getattr(options, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: a positive number, or 0 for all, is "
                         "wanted")
    try:
        options.targets = judge.parse_targets(options.targets)
    except ValueError as error:
        parser.error(f"--targets: {error}")
    return options


def main():
    options = parse()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        code = run(options)
    except MISTAKES as error:
        print(f"infer.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
