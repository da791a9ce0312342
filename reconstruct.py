"""One video through a model, or through a teacher in its place: its videos, latent picture, files and report row.

Used by infer.py.
"""
import contextlib
import itertools
import os

import numpy as np
import torch
from tqdm import tqdm

import data
import report
from codec import TOKENS, Codec, InputError, Spill, padded_length, to_uint8
from compare import TeacherPass, compare_latents, teacher_row
from evaluate import Quality
from latent_file import LATENTS, LatentWriter
from metrics import MEASURES, CodeStatistics
from token_file import TokenWriter


def encoded(codec, frames, length):
    """Pieces (see Codec) of some frames, H W 3 uint8; the last one is repeated until `length` have gone in."""
    number = -1
    for number, frame in enumerate(frames):
        yield codec.encode(frame)
    if number < 0:
        raise data.DataError("no frame could be read")
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


def frames_to_take(source, reader, options):
    """(how many, [what is odd about it]). OSError for a size that no video can be written in."""
    report.check_video_size(reader.width, reader.height, source.path)
    frames = 1 if source.is_image else data.count_frames(source.path, options.max_pixels)
    notes = [] if frames == reader.frames else [f"the container says {reader.frames} frames, {frames} can be read"]
    if options.max_frames and frames > options.max_frames:
        notes.append(f"the first {options.max_frames} of {frames} frames")
        frames = options.max_frames
    if min(reader.height, reader.width) < 11:
        notes.append("no SSIM: it needs 11x11 pixels")
    return frames, notes


def plan(source, reader, model, options):
    """(frames to take, frames to feed, [what is odd about it])."""
    frames, notes = frames_to_take(source, reader, options)
    length = padded_length(model, frames)
    if length > frames:
        notes.append(f"the last frame was repeated at the end ({length - frames} x), so that all {frames} come back")
    factor = model.space_factor
    if reader.height % factor or reader.width % factor:
        notes.append(f"padded from {reader.height}x{reader.width} to {reader.height + -reader.height % factor}x"
                     f"{reader.width + -reader.width % factor} for the model, and cropped back")
    return frames, length, notes


def reconstruct(source, name, job):
    """Stream one video through the model; write its videos, latent picture and latents. Returns its report row."""
    model, device, options = job.model, job.device, job.options
    reader = data.VideoReader(source.path, options.max_pixels)
    frames, length, notes = plan(source, reader, model, options)
    total_latents = model.latent_frames(length)
    codec = Codec(job, total_latents, reader)
    notes += [codec.note] if codec.note else []
    if options.verbose:
        for note in notes:
            tqdm.write(f"{source.path}: {note}")
    beside = TeacherPass(job.teacher, source, frames, model.time_factor, model.space_factor,
                         options.teacher_frames, job.memory, options.out, options.max_pixels) if job.teacher else None
    if beside and options.verbose:
        for note in beside.notes:
            tqdm.write(f"{source.path}: {note}")
    pictured = sorted({round(k) for k in np.linspace(0, total_latents - 1, min(8, total_latents))})
    picture, latents_done, latent_errors = [], 0, []
    statistics = CodeStatistics(model.codebook_sizes) if codec.tokens else None
    quality = Quality(job.lpips, job.fid, max(1, frames // max(1, job.fid_frames)))
    teacher_quality = Quality(job.lpips)
    latents_path = os.path.join(options.out, "latents", name + LATENTS) if options.save_latents else ""
    tokens_path = os.path.join(options.out, "tokens", name + TOKENS) if options.save_tokens else ""
    about = dict(model=job.model_hash, fps=reader.fps, height=reader.height, width=reader.width, frames=frames)
    with job.memory.of("ours"), Outputs(options.out, name, reader, source.is_image) as outputs, \
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
            quality.add(as_video(output, device), as_video(original, device))
            if theirs is not None:
                teacher_quality.add(as_video(theirs, device), as_video(original, device))
            outputs.write(original, output, theirs, bool(beside))
        notes += reader.changes()
    count = quality.frames
    notes += sorted({writer.note for writer in outputs.writers.values() if writer.note})
    row = dict(name=name, source=source.path, frames=count, fps=reader.fps, height=reader.height, width=reader.width,
               latent_shape=[total_latents, *picture[0].shape], notes=notes, videos=outputs.paths,
               latent_picture=draw_latents(name, np.stack(picture), pictured, total_latents, options),
               metrics=measured(quality),
               encode_seconds=codec.seconds["encode"], decode_seconds=codec.seconds["decode"],
               seconds=sum(codec.seconds.values()),
               encode_fps=length / codec.seconds["encode"], decode_fps=count / codec.seconds["decode"],
               peak_memory_mb=job.memory.megabytes())
    if codec.tokens:
        row["metrics"].update(describe_codes(statistics, row, tokens_path, options.out))
    if beside:
        row.update(compare_latents(beside, latent_errors, picture[0].shape))
        row["teacher"] = teacher_row(beside, measured(teacher_quality))
        notes += beside.notes
        if row["peak_memory_mb"] is None:
            notes.append("peak memory: this system cannot tell ours from the teacher's")
    return row


def reconstruct_by_teacher(source, name, job):
    """The same by a teacher in the model's place, in pieces as TeacherPass takes them."""
    options = job.options
    reader = data.VideoReader(source.path, options.max_pixels)
    frames, notes = frames_to_take(source, reader, options)
    if options.verbose:
        for note in notes:
            tqdm.write(f"{source.path}: {note}")
    by = TeacherPass(job.teacher, source, frames, *job.teacher_factors, options.teacher_frames, job.memory,
                     options.out, options.max_pixels)
    if not by.count:
        raise InputError(f"{source.path}: {'; '.join(by.notes)}")
    if options.verbose:
        for note in by.notes:
            tqdm.write(f"{source.path}: {note}")
    quality = Quality(job.lpips, job.fid, max(1, frames // max(1, job.fid_frames)))
    with Outputs(options.out, name, reader, source.is_image) as outputs:
        for number, original in enumerate(progress(reader, frames, f"{name[:30]} compare")):
            if (output := by.frame(number)) is not None:
                quality.add(as_video(output, job.device), as_video(original, job.device))
                outputs.write(original, output, None, False)
        notes += reader.changes()
    notes += by.notes + sorted({writer.note for writer in outputs.writers.values() if writer.note})
    first = by.latents[:64]  # a picture of more would take memory that grows with the video
    return dict(name=name, source=source.path, frames=by.count, fps=reader.fps, height=reader.height,
                width=reader.width, notes=notes, videos=outputs.paths,
                latent_picture=draw_latents(name, first, range(len(first)), by.latent_count, options),
                **teacher_row(by, measured(quality)))


def as_video(frame, device):
    """H W 3 uint8 -> 1 3 H W in [0, 1]: what is measured is what is written."""
    return torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float().div_(255)


def measured(quality):
    """A row's metrics, None for what was not measured."""
    found = quality.reduce()
    del found["count"]
    return {**dict.fromkeys(MEASURES), **found}


def draw_latents(name, latents, numbers, total, options):
    """Writes the picture of some latents, T C h w, whose places among all `total` are `numbers`; returns its path under
    --out."""
    path = f"latent_visualizations/{name}_latents.png"
    os.makedirs(os.path.join(options.out, "latent_visualizations"), exist_ok=True)
    picture = report.latent_picture(latents, numbers=numbers, total=total)
    written, content = data.cv2.imencode(".png", picture[..., ::-1])
    assert written
    report.write_whole(os.path.join(options.out, path), content)  # OpenCV itself says nothing when the disk is full
    return path


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

    def __init__(self, out, name, reader, is_image):
        os.makedirs(os.path.join(out, "comparison_videos"), exist_ok=True)
        self.paths = {kind: f"comparison_videos/{name}_{kind}.webm"
                      for kind in ("original", "reconstructed", "comparison")}
        self.out, self.fps, self.writers = out, 1.0 if is_image else reader.fps, {}
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
