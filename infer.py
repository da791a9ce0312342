"""Reconstruct videos with a trained or published autoencoder, and report how well and how fast.

    python infer.py runs/mine videos/                      # a run folder, a checkpoint, or published weights (.pth)
    python infer.py taew2_1 a.mp4 b.mkv --out results      # published weights by name: downloaded once
    python infer.py runs/mine a.mp4 --save-latents         # writes inference_results/latents/a.latents.npz ...
    python infer.py runs/mine inference_results/latents/a.latents.npz              # ... and decodes it
    python infer.py runs/vqgan a.mp4 --save-tokens         # compresses: writes inference_results/tokens/a.tokens ...
    python infer.py runs/vqgan inference_results/tokens/a.tokens                   # ... and restores it
    python infer.py runs/rvq a.tokens --levels 2           # from the first two levels of a residual quantizer: coarser
    python infer.py runs/mine a.mp4 --max-frames 48 --teacher taehv:taew2_1.pth    # beside its teacher
    python infer.py diffusers:AutoencoderKLWan:FOLDER a.mp4          # a teacher itself, a few frames at a time

Videos of any length and size are streamed: memory does not grow with the length. Reading, the model, metrics and each
written video run in parallel; the last line but one says how long each took. The whole video is encoded, to a temporary
file under --out, before it is decoded, so it is read twice. Writes under --out: metrics.json, summary_report.html,
comparison_videos/, latent_visualizations/. Audio is not copied. `pip install av` makes writing videos four times
faster.

Exit code: 0, even if one of several files could not be read or written; 1 if an input failed for another reason (the
others are reported, and errors.log has the traceback if the error is the program's own); 2 for a user's mistake, in one
line; 130 after Ctrl-C and 143 after SIGTERM, which leave no partial files.
"""
from screen import end_at_ctrl_c, ending_in_one_line, guard_screen, one_line

end_at_ctrl_c(__name__)
import argparse
import collections
import contextlib
import os
import shlex
import sys
import threading
import time

import torch

import judge
import metrics
import models
import report
from codec import TOKENS, InputError, Job, decode_file, open_codes, tile
from compare import PeakMemory, factors
from device import describe, pick_device, pick_precision, to_device, share_freed_blocks, tune
from evaluate import PHASES, describe_phases
from inputs import MISTAKES, Failures, find_inputs, remove_leftovers
from latent_file import LATENTS
from lock import locked
from quantize import use_levels
from reconstruct import reconstruct, reconstruct_by_teacher
from teachers import KINDS, TeacherError, is_spec, load_teacher
from token_file import keep_maps
from video_files import MAX_PIXELS


def load_own(options, device, dtype, memory):
    """(the model on its device, a Tiled of it or None, a hash of its weights, a description). InputError for options
    that do not fit the model."""
    with memory.of("ours"):
        model, words = models.load_model(options.checkpoint, options.variant)
        model_hash = models.fingerprint(model)
        model = models.fast(to_device(model, device, dtype).requires_grad_(False))
    if options.levels:
        try:
            use_levels(model, options.levels)
        except ValueError as error:
            raise InputError(f"--levels {options.levels}: {options.checkpoint} is {words}; {error}") from None
    tiled = tile(model, options)
    if tiled:
        words += f", tiles of {tiled}"
    if options.save_tokens and not hasattr(model, "tokenize"):
        raise InputError(f"--save-tokens: {options.checkpoint} is {words}, which has no tokens; try --save-latents")
    if options.save_latents and hasattr(model, "tokenize"):
        raise InputError(f"--save-latents: {options.checkpoint} is a tokenizer; try --save-tokens")
    return model, tiled, model_hash, words


def describe_model(model):
    """A model's settings and size, as texts for the report; {} for a teacher that is no module."""
    if not isinstance(model, torch.nn.Module):
        return {}
    about = getattr(model, "config", {})
    settings = ", ".join(f"{k} {v}" for k, v in about.items()) if isinstance(about, dict) else ""
    parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    return {"settings": settings, "parameters": parameters} if settings else {"parameters": parameters}


def cut_file_path(path, name, options):
    """The path to write a token file cut to --levels to; "" if `path` is not to be cut."""
    if not (options.save_tokens and options.levels and path.endswith(TOKENS)):
        return ""
    return os.path.join(options.out, "tokens", name + TOKENS)


STAGES = "reading", "model", "metrics", "writing"


def describe_times(busy, seconds):
    """One line on where the time went. busy: {stage: seconds}; seconds: of the whole run."""
    stages = ", ".join(f"{stage} {busy[stage]:.1f} s" for stage in STAGES if busy[stage])
    return f"time: {seconds:.1f} s in all; at work, beside each other: {stages}"


def prepare(options, sources, latent_files, device, dtype):
    """Load and check everything that all inputs need: (the Job, [a reader of each latent or token file], a description
    of the model, a note on LPIPS or None). One of inputs.MISTAKES if options do not fit."""
    memory = PeakMemory(device, alone=options.by_teacher or not options.teacher)
    model = tiled = teacher = teacher_factors = None
    model_hash, readers = "", []
    if options.by_teacher and latent_files:
        raise InputError(f"{latent_files[0]}: {options.checkpoint} decodes no files; give it videos or images")
    if options.videos == "none" and latent_files:
        raise InputError(f"{latent_files[0]}: a video is all that is made of it, and none is to be written")
    for name in ("teacher", "fid", "save_latents", "max_frames"):
        if latent_files and not sources and getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is for videos and images, and {latent_files[0]} is decoded "
                             "as it is: leave it out")
    if not options.by_teacher:
        model, tiled, model_hash, words = load_own(options, device, dtype, memory)
        for path in latent_files:
            if (target := cut_file_path(path, report.safe_name(path.removesuffix(TOKENS), set()), options)) \
                    and os.path.realpath(target) == os.path.realpath(path):
                raise InputError(f"{path}: --save-tokens --levels would write over it; choose another --out")
        readers = [open_codes(path, model, model_hash, str(tiled or ""), options.levels) for path in latent_files]
    if spec := options.checkpoint if options.by_teacher else options.teacher:
        with memory.of("teacher"):
            teacher = load_teacher(spec, device, dtype)
        if not teacher.can_decode:
            raise TeacherError(f"teacher {spec} has no decode")
    if options.by_teacher:
        words, teacher_factors = teacher.name, factors(teacher)
    remove_leftovers(options.out)
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
              max(1, options.fid // max(1, len(sources))), teacher_factors, collections.Counter(),
              contextlib.nullcontext() if device.type == "cpu" else threading.Lock())
    return job, readers, words, lpips_note


def work_through(job, latent_files, readers, sources):
    """Decode the latent and token files, and reconstruct the videos. An input that fails does not stop the others.
    Returns ([a report row for each video and each failed input], the Failures). InputError if every input failed by a
    user's mistake."""
    options, names, rows, decoded = job.options, set(), [], 0
    failures = Failures(options.out)
    for path, reader in zip(latent_files, readers):
        if reader.note:
            print(reader.note)
        name = report.safe_name(path.removesuffix(".npz").removesuffix(TOKENS), names)
        try:
            print("wrote", decode_file(reader, name + f"_{options.levels}_levels" * bool(options.levels), job))
            decoded += 1
            if target := cut_file_path(path, name, options):
                keep_maps(path, target, options.levels)
                print(f"wrote {target}, of {options.levels} level{'s' * (options.levels > 1)}")
        except Exception as error:
            rows.append(failures.row(name, path, error))
    for source in sources:
        name = report.safe_name(source.path, names)
        try:
            rows.append((reconstruct_by_teacher if options.by_teacher else reconstruct)(source, name, job))
        except Exception as error:
            rows.append(failures.row(name, source.path, error))
    if not decoded and not failures.unexpected and all("failed" in row for row in rows):
        what = f"none of the {len(rows)} inputs could be reconstructed; the first: " if len(rows) > 1 else ""
        raise InputError(f"{what}{rows[0]['failed']}")
    if failures.unexpected:
        print(f"infer.py: {failures.unexpected} of {len(rows) + decoded} inputs failed by an unexpected error; "
              f"tracebacks: {failures.path}", file=sys.stderr)
    return rows, failures


def write_page(job, rows, words, lpips_note, distance):
    """Write metrics.json and the report; returns the report's path. distance: FID, or None."""
    options, teacher = job.options, job.teacher
    return report.write_report(options.out, rows, dict(
        checkpoint=options.checkpoint, model=words, **describe_model(job.model or teacher.source),
        device=str(job.device), machine=describe(job.device), precision=str(job.dtype).removeprefix("torch."),
        command="python infer.py " + shlex.join(sys.argv[1:]),
        **({"teacher": f"{teacher.name} ({teacher.spec})"} if job.model and teacher else {}),
        **({"FID": f"{distance:.3f} (over {job.fid.count} frames)"} if job.fid else {}),
        **({"targets": report.in_words(options.targets)} if options.targets else {}),
        created=time.strftime("%Y-%m-%d %H:%M"), lpips_note=lpips_note), options.targets,
        {**{name: measure.heading for name, measure in metrics.MEASURES.items()}, **dict.fromkeys(PHASES)})


def run(options):
    """Check everything, then reconstruct or decode each input and write the report. Returns the exit code; raises one
    of inputs.MISTAKES."""
    device = pick_device(options.device)
    tune(device)
    share_freed_blocks()
    dtype = pick_precision(options.precision, device)
    if dtype == torch.float16 and device.type == "cpu":
        print("--precision fp16: a CPU emulates it; bf16 or fp32 take less time")
    sources, latent_files, refused, notes = find_inputs(options.inputs, options.num_samples, options.seed,
                                                         options.max_pixels, options.out)
    for note in notes:
        print(note)
    job, readers, words, lpips_note = prepare(options, sources, latent_files, device, dtype)
    start = time.perf_counter()
    rows, failures = work_through(job, latent_files, readers, sources)
    if not sources:
        if rows:
            print(*judge.table(rows, {}), sep="\n")
        print(describe_times(job.busy, time.perf_counter() - start))
        return failures.code
    for row in rows:
        if "failed" not in row:
            row["targets"] = report.judge(options.targets, row["metrics"])
    rows += [dict(name=os.path.basename(path), source=path, failed=reason) for path, reason in refused]
    distance = job.fid.reduce() if job.fid else None
    page = write_page(job, rows, words, lpips_note, distance)
    print(*judge.table(rows, options.targets), sep="\n")
    if options.targets:
        print(f"targets: {report.in_words(options.targets)}")
    if job.fid:
        print(f"FID {distance:.3f} over {job.fid.count} frames")
    if lpips_note:
        print(lpips_note)
    done = [row["metrics"] for row in rows if "failed" not in row]
    if phases := describe_phases({name: sum(found) / len(found) for name in PHASES
                                  if (found := [means[name] for means in done if name in means])}):
        print(phases)
    print(describe_times(job.busy, time.perf_counter() - start))
    print(f"report: {page}")
    return failures.code


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"infer.py: {one_line(message)}\n")  # without lines of usage
    parser.add_argument("checkpoint", help="run folder, checkpoint (.pt), weights (.pth, .safetensors), the name of "
                        "published ones (say taew2_1), or a teacher, as for --teacher")
    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help=f"videos, images, folders of them, *{LATENTS}, *{TOKENS}")
    parser.add_argument("--out", default="inference_results", help="folder to write to, by one command at a "
                        "time (default: %(default)s); its videos and pictures are left out of an INPUT folder")
    parser.add_argument("--variant", help="what the weights are, where their shapes do not tell (say taecvx)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"),
                        help="auto: bf16 where the hardware has it; fp16: as published TAEHVs are often run, for GPUs")
    parser.add_argument("--max-frames", type=int, default=0, metavar="N",
                        help="only the first N frames of each input; 0: all")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
                        help="inputs whose frames have more are refused (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=0, metavar="N",
                        help="only N files of each folder, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, metavar="K",
                        help="what --num-samples draws by (default: %(default)s)")
    parser.add_argument("--save-latents", action="store_true", help="write OUT/latents/NAME.latents.npz too")
    parser.add_argument("--save-tokens", action="store_true", help=f"write OUT/tokens/NAME{TOKENS} too (tokenizers)")
    parser.add_argument("--levels", type=int, metavar="K",
                        help="only the first K levels of a residual quantizer's codes, in making tokens or in decoding "
                             f"them: fewer bits, coarser; with --save-tokens also cuts *{TOKENS} to K levels")
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "none"),
                        help="network that LPIPS looks through, none: no LPIPS (%(default)s)")
    parser.add_argument("--targets", nargs="?", default=judge.TARGETS, const=judge.TARGETS, metavar="LIST",
                        help="marks each input and the mean as having met or missed them; mse, psnr, ssim, lpips, "
                             "flicker, or 'none' (default: %(default)s)")
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
    parser.add_argument("--videos", default="all", choices=("all", "comparison", "none"),
                        help="what is written of each input: three videos; the one that shows all side by side; none "
                             "(default: %(default)s)")
    parser.add_argument("--no-videos", dest="videos", action="store_const", const="none", help="as --videos none")
    parser.add_argument("--quiet", dest="verbose", action="store_false", help="no notes on padding and frame counts")
    options = parser.parse_args(arguments)
    for name in ("max_frames", "num_samples", "teacher_frames", "fid"):
        if (getattr(options, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: a positive number, or 0 for all, is "
                         "wanted")
    if options.max_pixels < 1:
        parser.error(f"--max-pixels {options.max_pixels}: at least 1 is wanted")
    if options.levels is not None and options.levels < 1:
        parser.error(f"--levels {options.levels}: 1 or more is wanted")
    for name, most in (("tile", 2 ** 14), ("tile_frames", 2 ** 14)):
        if not 0 <= (value := getattr(options, name) or 0) <= most:
            parser.error(f"--{name.replace('_', '-')} {value}: 0 to {most} is wanted")
    if not 0 <= options.tile_overlap <= 0.5:
        parser.error(f"--tile-overlap {options.tile_overlap}: 0 to 0.5 is wanted")
    options.by_teacher = is_spec(options.checkpoint)
    if options.teacher_frames is not None and not (options.teacher or options.by_teacher):
        parser.error(f"--teacher-frames {options.teacher_frames} wants --teacher")
    for name in ("variant", "save_latents", "save_tokens", "levels", "tile", "tile_frames", "teacher"):
        if options.by_teacher and getattr(options, name) is not None and getattr(options, name) is not False:
            parser.error(f"--{name.replace('_', '-')} is for models of ours, and {options.checkpoint} is a teacher")
    try:
        options.targets = judge.parse_targets(options.targets)
    except ValueError as error:
        parser.error(f"--targets: {error}")
    return options


def main():
    guard_screen()
    options = parse()
    with (ending_in_one_line("infer.py", MISTAKES, "what was not finished is removed"),
          locked(options.out, "choose another --out") as unlocked):
        if unlocked:
            print(unlocked)
        code = run(options)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
