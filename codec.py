"""Runs a model on uint8 frames of any size: encodes, decodes, and decodes files of latents or tokens.

Used by infer.py.
"""
import argparse
import contextlib
import io
import itertools
import os
import tempfile
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from device import free_memory, keep_freed_blocks, stream_limit, synchronize
from fast_taehv import FastTAEHV
from latent_file import LatentReader
from model_dcae import DCAE
from pipeline import Pipeline
from screen import progress_bar
from quantize import levels_of
from tiling import Tiled
from token_file import TokenReader
from video_writer import VideoWriter, check_video_size

TOKENS = ".tokens"
LARGE = 1280 * 720  # pixels of a frame above which memory is saved, at some cost
MAX_FRAMES = 10 ** 7  # most frames that a file of latents or tokens may claim


class InputError(Exception):
    """An input that cannot be used; the message names it."""


class Job(NamedTuple):
    """What all inputs of a command need. model_hash: of the weights as loaded, independent of the precision."""
    model: torch.nn.Module
    tiled: object  # a Tiled of the model, or None
    model_hash: str
    device: torch.device
    dtype: torch.dtype
    memory: object  # a compare.PeakMemory
    lpips: object
    teacher: object
    options: argparse.Namespace
    fid: object = None   # a metrics.FID, or None
    fid_frames: int = 0  # how many frames of each input the FID gets
    teacher_factors: object = None  # (time factor, space factor) if a teacher reconstructs instead of the model
    busy: object = None  # a Counter: seconds that "reading", "model", "metrics" and "writing" took
    # A lock for all that computes on a GPU, since metrics switch TF32 off for the whole process while they run.
    turn: object = contextlib.nullcontext()


class Codec:
    """Encodes and decodes uint8 frames of any size with a model on its device, and measures the time.

    A `piece` goes from encoder to decoder: latents 1 t C h w, or a tokenizer's codes, [int64 1 t h w].
    """

    def __init__(self, job, total_latents, reader):
        """reader: of the video or latents; its height and width are used. `note`: a note for the report, or ""."""
        self.model, self.device, self.dtype, self.note, self.large = job.model, job.device, job.dtype, "", False
        quick = getattr(job.model, "taehv", job.model)
        if isinstance(quick, FastTAEHV):
            self.large = reader.height * reader.width > LARGE and not job.tiled
            keep_freed_blocks(1 << 24 if self.large else 1 << 30)
            quick.kept = torch.float16 if self.large and job.dtype == torch.float32 else None
            if quick.kept:
                self.note = ("it is large: memory blocks keep the frame before in float16, to save memory; that costs "
                             "an error of about 0.0001")
        self.tokens = hasattr(job.model, "tokenize")
        limit = stream_limit(job.device)
        self.at_once = 16 if limit else 1  # frames that are moved to the device together
        self.turn, self.busy = job.turn, job.busy
        self.stream = (job.tiled or job.model).stream(memory_limit=limit, total_latents=total_latents)
        self.seconds = {"encode": 0.0, "decode": 0.0}

    def timed(self, kind, call, *arguments):
        with self.turn:
            start = time.perf_counter()
            result = call(*arguments)
            synchronize(self.device)
            if self.large:  # large maps of many sizes fragment the heap: 0.3 GB at 1080p
                keep_freed_blocks(1 << 24)
            seconds = time.perf_counter() - start
        self.seconds[kind] += seconds
        self.busy["model"] += seconds
        return result

    def encode(self, frames):
        """T H W 3 uint8 -> a piece. Frames are padded at the right and bottom by repeating their edges."""
        x = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).to(self.dtype).div_(255)
        factor = self.model.space_factor
        x = F.pad(x, (0, -x.shape[-1] % factor, 0, -x.shape[-2] % factor), mode="replicate")
        return self.timed("encode", self.stream.tokenize if self.tokens else self.stream.encode, x[None])

    def flush_encoder(self):
        return self.timed("encode", self.stream.flush_encoder)

    def decode(self, pieces):
        """All frames of all pieces, 3 H W in [0, 1], one by one."""
        for piece in pieces:
            if hasattr(self.stream, "frames"):
                frames = self.stream.frames(piece)
                while (frame := self.timed("decode", next, frames, None)) is not None:
                    yield frame[0, 0]
                    del frame  # free it before the next one is made
            else:
                yield from self.timed("decode", self.stream.detokenize if self.tokens else self.stream.decode, piece)[0]
        yield from self.timed("decode", self.stream.flush_decoder)[0]


class Spill:
    """A temporary file in a folder for pieces: first all are written, then all are read. A context manager."""

    def __init__(self, folder):
        self.file = tempfile.TemporaryFile(dir=folder)

    def write(self, piece):
        torch.save(piece, buffer := io.BytesIO())
        self.file.write(len(buffer.getbuffer()).to_bytes(8, "little") + buffer.getbuffer())

    def __iter__(self):
        self.file.seek(0)
        while size := self.file.read(8):
            yield torch.load(io.BytesIO(self.file.read(int.from_bytes(size, "little"))), weights_only=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def tile(model, options):
    """A Tiled of the model by --tile, --tile-frames and --tile-overlap; None without tiles. By default a DCAE has the
    published tiles, and other models have none. InputError for a model or sizes that cannot be tiled."""
    size, frames = (default if given is None and isinstance(model, DCAE) else given or 0
                    for given, default in ((options.tile, 256), (options.tile_frames, 32)))
    if not size and not frames:
        return None
    try:
        return Tiled(model, bool(size), bool(frames), size, frames, options.tile_overlap)
    except ValueError as error:
        raise InputError(f"--tile {size} --tile-frames {frames} --tile-overlap {options.tile_overlap}: {error}"
                         ) from None


def queue_depth(reader):
    """How many frames may wait between two stages: up to 8 that fit into a hundredth of the free memory, at least 2."""
    return max(2, min(8, free_memory(torch.device("cpu")) // 100 // (6 * reader.height * reader.width)))


def padded_length(model, frames):
    """The smallest number of input frames, at least `frames`, for which the first `frames` frames all come back."""
    length = frames
    while not model.frame_index(length) or model.frame_index(length)[-1] < frames - 1:
        length += 1
    return length


def to_uint8(frame, height, width):
    """3 H W in [0, 1] -> height width 3 uint8: the padding is cropped away."""
    return (frame[:, :height, :width].float() * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


class TokenSource:
    """A token file, for decode_file. levels: number of levels of nested codes to decode, None for all. InputError if
    the file is another model's, or holds fewer levels."""

    def __init__(self, path, model, model_hash, levels=None):
        reader = TokenReader(path)
        if reader.about.get("model") != model_hash:
            raise InputError(f"{path}: its tokens are of another model ({reader.about.get('model')}); this one is "
                             f"{model_hash}")
        try:
            self.fps = float(reader.about["fps"])
            self.height, self.width, self.frames = (int(reader.about[k]) for k in ("height", "width", "frames"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: no tokens of a video ({error} in its header)") from None
        padded = [side + -side % model.space_factor for side in (self.height, self.width)]
        sizes, strides, held = model.codebook_sizes, model.code_strides, len(reader.maps)
        if held <= levels_of(model):
            sizes, strides = sizes[:1] * held, strides[:1] * held  # the file may have been cut after any level
        maps = [(size, padded[0] // stride, padded[1] // stride) for size, stride in zip(sizes, strides)]
        if min(self.height, self.width) < 1 or reader.maps != maps:
            raise InputError(f"{path}: code maps (codes, height, width) {str(reader.maps)[:80]} are not those of a "
                             f"{self.height}x{self.width} video ({str(maps)[:80]})")
        self.total = check_frames(path, model, self.frames, min(reader.frames))
        if max(reader.frames) != self.total:
            raise InputError(f"{path}: {self.frames} frames take {self.total} latents, and it holds "
                             f"{max(reader.frames)}")
        if levels and levels > held:
            raise InputError(f"{path}: holds {held} level{'s' * (held > 1)} of codes; --levels {levels} asks for more")
        self.reader, self.levels, self.note = reader, levels, ""

    def __iter__(self):
        for piece in self.reader:
            yield [torch.from_numpy(codes)[None] for codes in piece[:self.levels]]


def check_frames(path, model, frames, held):
    """The number of latents that `frames` frames take. InputError, naming `path`, if the file holds (`held`) fewer."""
    if not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"{path}: says it has {frames} frames; 1 to {MAX_FRAMES} are possible")
    needed = None if frames > held * model.time_factor else model.latent_frames(padded_length(model, frames))
    if needed is None or needed > held:
        raise InputError(f"{path}: says it has {frames} frames, and holds {held} latents, which are too few for them")
    return needed


def open_codes(path, model, model_hash, tiles, levels=None):
    """The reader of a latent or token file for decode_file: has fps, height, width, frames, total (number of latents)
    and note; iterating over it gives pieces. levels: see TokenSource."""
    if path.endswith(TOKENS):
        reader = TokenSource(path, model, model_hash, levels)
    else:
        reader = LatentReader(path, model, tiles)
        check_frames(path, model, reader.frames, reader.total)
    check_video_size(reader.width, reader.height, path)
    return reader


def decode_file(reader, name, job):
    """Write comparison_videos/NAME_reconstructed.webm from a file of latents or tokens; returns its path."""
    codec = Codec(job, reader.total, reader)
    path = os.path.join(job.options.out, "comparison_videos", f"{name}_reconstructed.webm")
    os.makedirs(os.path.dirname(path), exist_ok=True)

    frames = codec.decode([c.to(job.device) for c in piece] if codec.tokens else piece.to(job.device, job.dtype)
                          for piece in reader)
    def write_all(frames):
        for frame in frames:
            writer.write(frame)

    with VideoWriter(path, reader.fps, reader.width, reader.height) as writer:
        with Pipeline(queue_depth(reader), job.busy) as pipeline:
            write = pipeline.beside("writing", write_all)
            for frame in progress_bar(itertools.islice(frames, reader.frames), total=reader.frames, desc=name[:30],
                                      unit="frame"):
                write(to_uint8(frame, reader.height, reader.width))
        if writer.frames < reader.frames:
            raise InputError(f"{name}: only {writer.frames} of {reader.frames} frames came out")
    if writer.note:
        tqdm.write(f"{name}: {writer.note}")
    return path
