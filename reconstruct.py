"""Takes one video through a model, or through a teacher instead: writes its videos, latent picture and files, and makes
its report row.

Used by infer.py.
"""
import collections
import contextlib
import functools
import itertools
import os

import numpy as np
import torch
from tqdm import tqdm

import data
import report
from codec import TOKENS, Codec, InputError, Spill, padded_length, queue_depth, to_uint8
from compare import TeacherPass, compare_latents, teacher_row
from device import free_memory
from evaluate import Quality, group_of
from latent_file import LATENTS, LatentWriter
from metrics import MEASURES, CodeStatistics
from pictures import latent_picture, side_by_side
from pipeline import Pipeline
from screen import progress_bar
from token_file import TokenWriter
from video_files import DataError, VideoReader, count_frames
from video_writer import VideoWriter, check_video_size


def encode(reader, name, job, write):
    """Encode a video's first frames, as many as the options say, and the last one repeated as `padded_length` says.
    write(piece) is called with each piece of the result (see Codec). Returns (number of frames, whether the video has
    more, seconds, [the codec's notes])."""
    most, count, codec = job.options.max_frames or None, 0, Codec(job, None, reader)
    with Pipeline(queue_depth(reader), job.busy) as pipeline:
        frames = pipeline.ahead("reading", reader)
        with progress(frames, most, min(most or reader.frames, reader.frames), f"{name[:30]} encode") as taken:
            while stack := list(itertools.islice(taken, codec.at_once)):
                write(codec.encode(np.stack(stack)))
                count += len(stack)
                last = stack[-1:]
        if not count:
            raise DataError("no frame could be read")
        more = count == most and next(frames, None) is not None
        for _ in range(count, padded_length(codec.model, count)):
            write(codec.encode(np.stack(last)))
        write(codec.flush_encoder())
    return count, more, codec.seconds["encode"], [codec.note] if codec.note else []


def paired_frames(codec, pieces, originals, reader, frames, length):
    """Yields (number, original, reconstruction), both H W 3 uint8, for each of the first `frames` frames that the model
    returns. originals: an iterator over all originals. length: number of frames that were encoded, with padding."""
    outputs = (to_uint8(frame, reader.height, reader.width) for frame in codec.decode(pieces))
    number = -1
    for wanted, output in zip(codec.model.frame_index(length), outputs):
        while number < min(wanted, frames - 1):
            original, number = next(originals, None), number + 1
            if original is None:
                raise DataError(f"only {number} of {frames} frames could be read a second time")
        if number == wanted:
            yield number, original, output


def open_reader(source, options):
    """A VideoReader. OSError if videos are to be written, and the size is one that cannot be."""
    reader = VideoReader(source.path, options.max_pixels)
    if options.videos != "none":
        check_video_size(reader.width, reader.height, source.path)
    return reader


def frames_to_take(source, options):
    """(number of frames to take, whether the video has more). Decodes all to count them: for teachers, which need the
    number in advance."""
    frames = 1 if source.is_image else count_frames(source.path, options.max_pixels)
    most = options.max_frames or frames
    return min(frames, most), frames > most


def describe_frames(reader, frames, more):
    """[notes on what is unusual] for a video of which `frames` frames are taken. more: whether it has more."""
    notes = []
    if more:
        notes.append(f"the first {frames} of {reader.frames} frames (by the container's word)")
    elif frames != reader.frames:
        notes.append(f"the container says {reader.frames} frames, {frames} can be read")
    if min(reader.height, reader.width) < 11:
        notes.append("no SSIM: it needs 11x11 pixels")
    return notes


def frames_and_notes(reader, model, frames, more):
    """(number of frames to feed to the model, [notes on what is unusual]) for `frames` frames of a video."""
    notes = describe_frames(reader, frames, more)
    length = padded_length(model, frames)
    if length > frames:
        notes.append(f"the last frame was repeated at the end ({length - frames} x), so that all {frames} come back")
    factor = model.space_factor
    if reader.height % factor or reader.width % factor:
        notes.append(f"padded from {reader.height}x{reader.width} to {reader.height + -reader.height % factor}x"
                     f"{reader.width + -reader.width % factor} for the model, and cropped back")
    return length, notes


def reconstruct(source, name, job):
    """Stream one video through the model; write its videos, latent picture and latents. Returns its report row."""
    model, options = job.model, job.options
    reader = open_reader(source, options)
    theirs = None
    if job.teacher:
        frames, _ = frames_to_take(source, options)
        theirs = TeacherPass(job.teacher, source, frames, model.time_factor, model.space_factor, options.teacher_frames,
                             job.memory, options.out, options.max_pixels)
        job.busy["model"] += theirs.encode_seconds + theirs.decode_seconds
        print_notes(source, theirs.notes, options)
    latents_path = os.path.join(options.out, "latents", name + LATENTS) if options.save_latents else ""
    tokens_path = os.path.join(options.out, "tokens", name + TOKENS) if options.save_tokens else ""
    with job.memory.of("ours"), Spill(options.out) as spill:
        # Encode all, then decode: so encoder and decoder do not hold their maps of past frames at the same time. The
        # video is read twice. The first time also tells how many frames, and so how many latents, there are.
        frames, more, encode_seconds, codec_notes = encode(reader, name, job, spill.write)
        length, notes = frames_and_notes(reader, model, frames, more)
        notes += codec_notes
        print_notes(source, notes, options)
        total_latents = model.latent_frames(length)
        codec = Codec(job, total_latents, reader)
        pictured = sorted({round(k) for k in np.linspace(0, total_latents - 1, min(8, total_latents))})
        picture, latents_done, latent_errors = [], 0, []
        statistics = CodeStatistics(model.codebook_sizes) if codec.tokens else None
        quality = Quality(job.lpips, job.fid, max(1, frames // max(1, job.fid_frames)),
                          group=group_of(model, len(model.frame_index(length))))
        teacher_quality = Quality(job.lpips)
        about = dict(model=job.model_hash, fps=reader.fps, height=reader.height, width=reader.width, frames=frames)

        def recorded(pieces):
            """Passes on the pieces; writes them to files, and takes latents for the picture and the comparison."""
            nonlocal latents_done
            for piece in pieces:
                if codec.tokens:
                    statistics.add(piece, 0)
                    if token_file and len(piece[0][0]):
                        token_file.write([codes[0].cpu().numpy() for codes in piece])
                else:
                    latent_file.write(piece)
                for latent in (piece[0][0, :, None] if codec.tokens else piece[0]).float().cpu().numpy():
                    if latents_done in pictured:
                        picture.append(latent.copy())  # not a view, which would keep all of the piece
                    if theirs and latents_done < len(theirs.latents) and latent.shape == theirs.latents.shape[1:]:
                        latent_errors.append(np.square(latent - theirs.latents[latents_done]).mean())
                    latents_done += 1
                yield piece

        with Outputs(job, name, reader, source.is_image) as outputs, \
                LatentWriter(latents_path, model, reader, frames, total_latents, str(job.tiled or "")) as latent_file, \
                open_tokens(tokens_path, model, about) as token_file, \
                Pipeline(queue_depth(reader), job.busy) as pipeline:
            pieces = pipeline.ahead("writing" if latents_path or tokens_path else "reading", recorded(spill))
            originals = pipeline.ahead("reading", reader)
            show = outputs.start(pipeline, quality, teacher_quality if theirs else None)
            pairs = paired_frames(codec, pieces, originals, reader, frames, length)
            with progress(pairs, frames, frames, f"{name[:30]} decode") as shown:
                for number, original, output in shown:
                    show(original, output, theirs.frame(number) if theirs else None)
            collections.deque(pieces, maxlen=0)  # use up the iterator: pieces that no frame needed are written too
        notes += reader.changes()
    count = quality.frames
    notes += outputs.notes()
    row = dict(name=name, source=source.path, frames=count, fps=reader.fps, height=reader.height, width=reader.width,
               latent_shape=[total_latents, *picture[0].shape], notes=notes, videos=outputs.paths,
               latent_picture=draw_latents(name, np.stack(picture), pictured, total_latents, options),
               metrics=measured(quality), encode_seconds=encode_seconds, decode_seconds=codec.seconds["decode"],
               seconds=encode_seconds + codec.seconds["decode"],
               encode_fps=length / encode_seconds, decode_fps=count / codec.seconds["decode"],
               peak_memory_mb=job.memory.megabytes())
    if codec.tokens:
        row["metrics"].update(describe_codes(statistics, row, tokens_path, options.out))
    if theirs:
        row.update(compare_latents(theirs, latent_errors, picture[0].shape))
        row["teacher"] = teacher_row(theirs, measured(teacher_quality))
        notes += theirs.notes
        if row["peak_memory_mb"] is None:
            notes.append("peak memory: this system cannot tell ours from the teacher's")
    return row


def reconstruct_by_teacher(source, name, job):
    """Like `reconstruct`, but by a teacher instead of the model, in the chunks of TeacherPass."""
    options = job.options
    reader = open_reader(source, options)
    frames, more = frames_to_take(source, options)
    notes = describe_frames(reader, frames, more)
    print_notes(source, notes, options)
    theirs = TeacherPass(job.teacher, source, frames, *job.teacher_factors, options.teacher_frames, job.memory,
                         options.out, options.max_pixels)
    job.busy["model"] += theirs.encode_seconds + theirs.decode_seconds
    if not theirs.count:
        raise InputError(f"{source.path}: {'; '.join(theirs.notes)}")
    print_notes(source, theirs.notes, options)
    quality = Quality(job.lpips, job.fid, max(1, frames // max(1, job.fid_frames)))
    with Outputs(job, name, reader, source.is_image) as outputs:
        with Pipeline(queue_depth(reader), job.busy) as pipeline:
            originals = pipeline.ahead("reading", reader)
            show = outputs.start(pipeline, quality)
            with progress(originals, frames, frames, f"{name[:30]} compare") as shown:
                for number, original in enumerate(shown):
                    if (output := theirs.frame(number)) is not None:
                        show(original, output, None)
        notes += reader.changes()
    notes += theirs.notes + outputs.notes()
    first = theirs.latents[:64]  # a picture of all would take memory that grows with the video
    return dict(name=name, source=source.path, frames=theirs.count, fps=reader.fps, height=reader.height,
                width=reader.width, notes=notes, videos=outputs.paths,
                latent_picture=draw_latents(name, first, range(len(first)), theirs.latent_count, options),
                **teacher_row(theirs, measured(quality)))


def print_notes(source, notes, options):
    if options.verbose:
        for note in notes:
            tqdm.write(f"{source.path}: {note}")


def as_video(frames, device):
    """A list of H W 3 uint8 -> 1 T 3 H W in [0, 1]. So metrics see the 8-bit frames that are written."""
    return torch.from_numpy(np.stack(frames)).to(device).permute(0, 3, 1, 2)[None].contiguous().float().div_(255)


def measured(quality):
    """A row's metrics; None for those that were not measured."""
    found = quality.reduce()
    del found["count"]
    return {**dict.fromkeys(MEASURES), **found}


def draw_latents(name, latents, numbers, total, options):
    """Writes a picture of latents T C h w; returns its path relative to --out. numbers: their positions among all
    `total` latents of the video."""
    path = f"latent_visualizations/{name}_latents.png"
    os.makedirs(os.path.join(options.out, "latent_visualizations"), exist_ok=True)
    picture = latent_picture(latents, numbers=numbers, total=total)
    written, content = data.cv2.imencode(".png", picture[..., ::-1])
    assert written
    report.write_whole(os.path.join(options.out, path), content)  # OpenCV itself says nothing when the disk is full
    return path


def progress(frames, most, total, name):
    """A context manager that gives an iterator over the first `most` frames (None: all) with a progress bar for `total`
    frames, and ends the bar's line."""
    bar = progress_bar(itertools.islice(frames, most), total=total, desc=name, unit="frame")
    return contextlib.closing(iter(bar))


def open_tokens(path, model, about):
    """A TokenWriter for the path; an empty context manager for an empty path."""
    if not path:
        return contextlib.nullcontext()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return TokenWriter(path, about, model.codebook_sizes)


def describe_codes(statistics, row, tokens_path, out):
    """{"codebook_use", "bits_per_pixel", "kbit_per_s"} of a row: by the token file's size, else by the codes' entropy.
    """
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


KINDS = {"all": ("original", "reconstructed", "comparison"), "comparison": ("comparison",), "none": ()}


class Outputs:
    """Computes the metrics of one input's frames, and writes the videos that the options ask for, each in a pipeline
    stage of its own. A context manager: if its block ends without an error, all videos get their names, else none. An
    image gives videos of one frame."""

    def __init__(self, job, name, reader, is_image):
        self.job, self.out, self.fps = job, job.options.out, 1.0 if is_image else reader.fps
        self.paths = {kind: f"comparison_videos/{name}_{kind}.webm" for kind in KINDS[job.options.videos]}
        if self.paths:
            os.makedirs(os.path.join(self.out, "comparison_videos"), exist_ok=True)
        self.at_once = stack_size(reader, job.device)
        self.writers = []
        self.open = contextlib.ExitStack()

    def start(self, pipeline, quality, teacher_quality=None):
        """Start the stages. Returns the function to call for each frame with its original, its reconstruction, and the
        teacher's reconstruction or None, H W 3 uint8 each. teacher_quality: a Quality for the teacher, if there is one.
        """
        stages = [pipeline.beside("metrics", lambda frames: self.measure(frames, quality, teacher_quality))]
        stages += [pipeline.beside("writing", functools.partial(self.write, kind, bool(teacher_quality)))
                   for kind in self.paths]

        def show(*frames):
            for give in stages:
                give(frames)
        return show

    def measure(self, frames, quality, teacher_quality):
        while stack := list(itertools.islice(frames, self.at_once)):
            originals, outputs, theirs = zip(*stack)
            with self.job.turn:
                quality.add(as_video(outputs, self.job.device), as_video(originals, self.job.device), follows=True)
                both = [(one, original) for one, original in zip(theirs, originals) if one is not None]
                if both:
                    teacher_quality.add(*(as_video(frames, self.job.device) for frames in zip(*both)), follows=True)

    def write(self, kind, with_teacher, frames):
        """Write one video, `kind`, from (original, reconstruction, teacher's). The teacher's panel is black if it gave
        no such frame."""
        writer = None
        for original, output, theirs in frames:
            frame = dict(original=original, reconstructed=output).get(kind)
            if frame is None:
                panels, labels = [original, output], ["original", "reconstruction"]
                if with_teacher:
                    panels.append(np.zeros_like(original) if theirs is None else theirs)
                    labels.append("teacher")
                frame = side_by_side(panels, labels, max_width=1920)
            if writer is None:
                path = os.path.join(self.out, self.paths[kind])
                writer = self.open.enter_context(VideoWriter(path, self.fps, frame.shape[1], frame.shape[0]))
                self.writers.append(writer)
            writer.write(frame)

    def notes(self):
        return sorted({writer.note for writer in self.writers if writer.note})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is not None:
            self.open.__exit__(*error)
            return
        with self.open:  # if one cannot be finished, none gets its name
            for writer in self.writers:
                writer.finish()


def stack_size(reader, device):
    """How many frames to measure at once. On a CPU, small frames together take less time, large ones more memory. On a
    GPU: as many as a tenth of its free memory holds, at 300 bytes a pixel, up to 32."""
    pixels = reader.height * reader.width
    room = free_memory(device) // 10 // (300 * pixels)
    return max(1, min(32, room, room if device.type == "cuda" else (1 << 17) // pixels))
