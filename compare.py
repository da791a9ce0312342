"""Runs a teacher over one video, to compare our model with it: its frames, latents, seconds and memory.

Needs teachers.py, video_files.py and device.py.
"""
import contextlib
import itertools
import os
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

from device import held_memory, peak_memory, reset_peak_memory, time_call
from screen import progress_bar
from teachers import TeacherError
from video_files import MAX_PIXELS, DataError, VideoReader


class PeakMemory:
    """The peak memory of two models, "ours" and "teacher", in one process: of each without what the other holds.

    with memory.of("teacher"): ...     # all code that loads or runs the teacher
    memory.peak                        # bytes at the peak of that block; None if the system cannot reset its peak
    """

    def __init__(self, device, alone):
        """alone: whether there is only one model, so that any peak is its own."""
        self.device, self.alone, self.peak, self.held = device, alone, None, {"ours": 0, "teacher": 0}

    @contextlib.contextmanager
    def of(self, who):
        before, anew = held_memory(self.device), reset_peak_memory(self.device)
        yield
        of_other = self.held["teacher" if who == "ours" else "ours"]
        self.peak = peak_memory(self.device) - of_other if anew or self.alone else None
        self.held[who] += held_memory(self.device) - before

    def megabytes(self):
        return None if self.peak is None else self.peak / 1e6


def frames_at_a_time(pixels):
    """The default number of frames, of `pixels` pixels, that a teacher gets at a time: 33, 17 or 9, which all causal
    video VAEs take. A big VAE needs about 0.4 GB for a frame of 480x832, so it gets at most 17 of these."""
    return next((frames for frames in (33, 17) if frames * pixels <= 17 * 480 * 832), 9)


class TeacherPass:
    """A teacher's reconstruction and latents of the first `frames` frames of a video.

    `frame(i)`: H W 3 uint8, the reconstruction of frame i, or None if the teacher gave none. `latents`: T C h w,
    float32, of the first chunk. Also `count` (frames that came back), `encode_seconds`, `decode_seconds`, `encoded`
    (frames that went in, with padding), `latent_count` (of all chunks), `peak_memory_mb`, `notes`.

    chunk: number of frames that the teacher gets at a time, each chunk by itself. 0: the whole video; None: as
    `frames_at_a_time` says. The last frame is repeated until the teacher takes the number of frames (`Teacher.filled`).
    The first frames that come back stand for the first frames that went in.
    """

    def __init__(self, teacher, source, frames, time_factor, space_factor, chunk=0, memory=None, folder=None,
                 max_pixels=MAX_PIXELS):
        """memory: a PeakMemory. folder: where to put the temporary file that holds the reconstruction."""
        self.teacher, self.factors = teacher, (time_factor, space_factor)
        self.encode_seconds, self.decode_seconds, self.encoded, self.count = 0.0, 0.0, 0, 0
        self.latents, self.latent_count, self.notes = None, 0, []
        reader = VideoReader(source.path, max_pixels)
        chosen = " (--teacher-frames N sets another number, 0 the whole video)" if chunk is None else ""
        if chunk is None:
            chunk = frames_at_a_time(reader.height * reader.width)
            # A teacher that pools pairs treats even and odd numbers of frames differently. Take chunks of an even
            # number if the whole video, which our model gets, has one.
            chunk -= int(bool(teacher.pools_pairs) and teacher.filled(frames, time_factor) % 2 == 0)
        self.file, self.shape, self.given = tempfile.TemporaryFile(dir=folder), None, []
        left, reader = frames, iter(reader)
        memory, name = memory or PeakMemory(teacher.device, alone=False), os.path.basename(source.path)
        with memory.of("teacher"), progress_bar(total=frames, desc=f"{name[:30]} teacher", unit="frame") as bar:
            module = teacher.source if isinstance(teacher.source, torch.nn.Module) else None
            if module is not None:
                module.to(teacher.device)
            while left > 0 and (clip := list(itertools.islice(reader, min(chunk or frames, left)))):
                self.run(clip)
                left -= len(clip)
                bar.update(len(clip))
            if self.latents is None:
                raise DataError("no frame could be read")
            del reader, clip
            if module is not None and teacher.device.type == "cuda":
                module.to("cpu")  # makes room for our model
        self.peak_memory_mb = memory.megabytes()
        if chunk and frames > chunk:
            self.notes.append(f"teacher: {chunk} frames at a time{chosen}, each chunk by itself; of its latents "
                              "the first chunk's are looked at")
        self.notes = list(dict.fromkeys(self.notes))  # chunks often give the same notes

    def run(self, clip):
        """One chunk: a list of H W 3 uint8."""
        time_factor, space_factor = self.factors
        height, width = clip[0].shape[:2]
        video = torch.from_numpy(np.stack(clip)).to(self.teacher.device).permute(0, 3, 1, 2)[None].float().div_(255)
        filled = self.teacher.filled(len(clip), time_factor)
        missing = filled - len(clip)
        if missing and self.teacher.pools_pairs:
            self.notes.append(f"teacher: the last of {len(clip)} frames was repeated ({missing} x): it takes 8k or "
                              "8k + 1")
        video = padded(video, space_factor, filled)
        latents, seconds = time_call(self.teacher.encode, video, self.teacher.device)
        self.encode_seconds += seconds
        output, seconds = time_call(self.teacher.decode, latents, self.teacher.device)
        self.decode_seconds += seconds
        self.encoded += video.shape[1]
        self.latent_count += latents.shape[1]
        if self.latents is None:
            self.latents = latents[0].cpu().numpy()
        output = output[0, :len(clip), :, :height, :width]
        if output.shape[-2:] != (height, width) or len(output) < len(clip):
            self.notes.append(f"teacher: {len(output)} frames of {output.shape[-2]}x{output.shape[-1]} came back for "
                              f"{len(clip)} of {height}x{width}")
        if output.shape[-2:] == (height, width):
            self.shape = (height, width, 3)
            self.file.write((output * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            self.given += [self.count + k if k < len(output) else None for k in range(len(clip))]
            self.count += len(output)

    def frame(self, i):
        if i >= len(self.given) or self.given[i] is None:
            return None
        size = int(np.prod(self.shape))
        self.file.seek(self.given[i] * size)
        return np.frombuffer(bytearray(self.file.read(size)), np.uint8).reshape(self.shape)


def padded(video, factor, frames=0):
    """A clip 1 T 3 H W, padded: edges are repeated until `factor` divides height and width, the last frame until there
    are `frames` frames."""
    missing = max(0, frames - video.shape[1])
    video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1) if missing else video
    pad = (0, -video.shape[-1] % factor, 0, -video.shape[-2] % factor)
    return F.pad(video.flatten(0, 1), pad, mode="replicate")[None] if any(pad) else video


def factors(teacher):
    """(time factor, space factor) of a teacher, found by encoding nine black frames of 64x64. TeacherError if it does
    not take these."""
    latents = teacher.encode(torch.zeros(1, 9, 3, 64, 64))
    frames, height = latents.shape[1], latents.shape[3]
    if not 1 <= frames <= 9 or not 1 <= height <= 64:
        raise TeacherError(f"teacher {teacher.spec}: encode gave latents {tuple(latents.shape)} for 9 frames of 64x64")
    return round(8 / (frames - 1)) if frames > 1 else 8, 64 // height


def teacher_row(theirs, metrics):
    """A teacher's metrics, seconds, speed and memory, for a report row. theirs: its TeacherPass."""
    return dict(
        metrics=metrics, encode_seconds=theirs.encode_seconds, decode_seconds=theirs.decode_seconds,
        seconds=theirs.encode_seconds + theirs.decode_seconds,
        encode_fps=theirs.encoded / theirs.encode_seconds, decode_fps=theirs.count / theirs.decode_seconds,
        peak_memory_mb=theirs.peak_memory_mb, latent_shape=[theirs.latent_count, *theirs.latents.shape[1:]])


def compare_latents(theirs, errors, shape):
    """{"latent_error": mean squared difference from the teacher's latents or None, "relative_latent_error": the same,
    divided by the variance of the teacher's latents}. theirs: a TeacherPass, which gets a note. errors: of single
    latents. shape: of one of our latents."""
    if not errors:
        theirs.notes.append(f"teacher: latents of {theirs.latents.shape[1:]} do not compare with ours of {shape}")
        return {"latent_error": None, "relative_latent_error": None}
    error = float(np.mean(errors))
    relative = error / float(max(theirs.latents.var(), 1e-12))
    theirs.notes.append(f"latents: mean squared difference {error:.4g} to the teacher's, {100 * relative:.1f} % of "
                        f"their variance, over {len(errors)}")
    return {"latent_error": error, "relative_latent_error": relative}
