"""A teacher over one video, to be set beside ours: its frames, latents, seconds and memory.

Needs teachers.py, data.py and device.py.
"""
import itertools
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from device import peak_memory, reset_peak_memory, synchronize


class TeacherPass:
    """What a teacher makes of the first `frames` frames of a video.

    `frame(i)`: H W 3 uint8, its reconstruction of frame i, or None where it gave none. `latents`: T C h w, float32,
    of the first chunk. Also `count` (frames that came back), `encode_seconds`, `decode_seconds`, `encoded` (frames that
    went in, with padding), `peak_memory` (bytes), `notes`.

    It is run whole, or, with `chunk` > 0, on that many frames at a time, each chunk by itself. A chunk is filled up by
    repeating its last frame to a number that the teacher takes (`Teacher.filled`); the first frames that come back
    stand for the first that went in.
    """

    def __init__(self, teacher, source, frames, time_factor, space_factor, chunk=0):
        self.teacher, self.factors = teacher, (time_factor, space_factor)
        self.encode_seconds, self.decode_seconds, self.encoded, self.count = 0.0, 0.0, 0, 0
        self.latents, self.notes = None, []
        reader = iter(data.VideoReader(source.path))
        self.file, self.shape, self.given = tempfile.TemporaryFile(), None, []
        if isinstance(teacher.source, torch.nn.Module):
            teacher.source.to(teacher.device)
        reset_peak_memory(teacher.device)
        left = frames
        while left > 0 and (clip := list(itertools.islice(reader, min(chunk or frames, left)))):
            self.run(clip)
            left -= len(clip)
        self.peak_memory = peak_memory(teacher.device)
        if teacher.device.type == "cuda" and isinstance(teacher.source, torch.nn.Module):
            teacher.source.to("cpu")  # its weights are not ours to count
        if chunk and frames > chunk:
            self.notes.append(f"teacher: {chunk} frames at a time, each chunk by itself; the latents are compared over "
                              "the first")

    def run(self, clip):
        """One chunk: a list of H W 3 uint8."""
        time_factor, space_factor = self.factors
        height, width = clip[0].shape[:2]
        video = torch.from_numpy(np.stack(clip)).to(self.teacher.device).permute(0, 3, 1, 2)[None].float().div_(255)
        missing = self.teacher.filled(len(clip), time_factor) - len(clip)
        if missing and self.teacher.pools_pairs:
            self.notes.append(f"teacher: the last of {len(clip)} frames was repeated ({missing} x): it takes 8k or "
                              "8k + 1")
        video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
        pad = (0, -width % space_factor, 0, -height % space_factor)
        video = F.pad(video.flatten(0, 1), pad, mode="replicate")[None]
        latents, seconds = self.timed(self.teacher.encode, video)
        self.encode_seconds += seconds
        output, seconds = self.timed(self.teacher.decode, latents)
        self.decode_seconds += seconds
        self.encoded += video.shape[1]
        if self.latents is None:
            self.latents = latents[0].cpu().numpy()
        output = output[0, :len(clip), :, :height, :width]
        if output.shape[-2:] != (height, width) or len(output) < len(clip):
            self.notes.append(f"teacher: {len(output)} frames of {output.shape[-2]}x{output.shape[-1]} came back for "
                              f"{len(clip)} of {height}x{width}")
        if output.shape[-2:] == (height, width):
            self.shape = (height, width, 3)
            self.file.write((output * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            self.given += [k < len(output) for k in range(len(clip))]
            self.count += len(output)

    def timed(self, call, argument):
        synchronize(self.teacher.device)
        start = time.perf_counter()
        result = call(argument)
        synchronize(self.teacher.device)
        return result, time.perf_counter() - start

    def frame(self, i):
        if i >= len(self.given) or not self.given[i]:
            return None
        size = int(np.prod(self.shape))
        self.file.seek(sum(self.given[:i]) * size)
        return np.frombuffer(bytearray(self.file.read(size)), np.uint8).reshape(self.shape)


def teacher_row(beside, quality):
    """The teacher's part of a report row."""
    return dict(
        metrics=quality.means(), encode_seconds=beside.encode_seconds, decode_seconds=beside.decode_seconds,
        seconds=beside.encode_seconds + beside.decode_seconds,
        encode_fps=beside.encoded / beside.encode_seconds, decode_fps=beside.count / beside.decode_seconds,
        peak_memory_mb=beside.peak_memory / 1e6, latent_shape=list(beside.latents.shape))


def compare_latents(beside, errors, shape):
    """{"latent_error": mean squared difference to the teacher's latents or None, "relative_latent_error": the same over
    the teacher's variance}"""
    if not errors:
        beside.notes.append(f"teacher: latents of {beside.latents.shape[1:]} do not compare with ours of {shape}")
        return {"latent_error": None, "relative_latent_error": None}
    error = float(np.mean(errors))
    relative = error / float(max(beside.latents.var(), 1e-12))
    beside.notes.append(f"latents: mean squared difference {error:.4g} to the teacher's, {100 * relative:.1f} % of "
                        f"their variance, over {len(errors)}")
    return {"latent_error": error, "relative_latent_error": relative}
