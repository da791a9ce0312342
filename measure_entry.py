"""One entry of a leaderboard over all its clips: a row of leaderboard.json.

    judges = Judges(options, device)                     # LPIPS, FID and rFVD, where they can be had
    row = measure(entry, clips, entry.returned(17), judged, judges, device, 0, "results/videos/clip.webm")

The metrics of frames are those of evaluate.py and metrics.py: all of `metrics.MEASURES` are in the row.
"""
import hashlib
import math
import os
import zipfile

import torch

import metrics
import report
from checkpoint import MISSHAPEN, first_line
from codec import InputError
from device import held_memory, reset_peak_memory
from evaluate import TIMED_CLIPS, Quality
from measure import memory_of
from screen import progress_bar
from untrusted import check_archive, open_regular
from video_writer import VideoWriter


class Judges:
    """The networks to judge with: `lpips`, `make_fid` and `make_fvd` are functions, or None. `notes`: why one is
    missing. `about`: a dict of the metrics and networks, which is part of a row's key."""

    def __init__(self, options, device):
        self.lpips, self.make_fid, self.make_fvd, self.notes = None, None, None, []
        if options.i3d:
            self.make_fvd = load_i3d(options.i3d, device)
        else:
            self.notes.append("rFVD is left out: --i3d FILE, a TorchScript file of the I3D network, gives it")
        if options.lpips == "none":
            self.notes.append("LPIPS was not asked for")
        else:
            self.lpips, problem = metrics.load_lpips(options.lpips, device)
            self.notes += [problem] * bool(problem)
        if options.fid:
            self.make_fid, problem = metrics.load_fid(device)
            self.notes += [problem] * bool(problem)
        self.about = dict(metrics=[*metrics.MEASURES], lpips=options.lpips if self.lpips else "",
                          fid=bool(self.make_fid), i3d=file_hash(options.i3d) if options.i3d else "")


def load_i3d(path, device):
    """metrics.load_i3d, but InputError, of one line, for any other file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            check_archive(archive, os.path.getsize(path))
        return metrics.load_i3d(path, device)
    except (*MISSHAPEN, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"--i3d {path}: no TorchScript file that gives features of clips 1 3 T 224 224 "
                         f"({first_line(error)})") from None


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


@torch.no_grad()
def measure(entry, clips, returned, judged, judges, device, shown, path):
    """Measure an entry over all clips; returns its row. returned: numbers of the frames that it returns. judged: those
    among them that count. shown: number of the clip whose reconstruction is written to `path`, a .webm file."""
    fid, fvd = (make and make() for make in (judges.make_fid, judges.make_fvd))
    size, first = entry.group(len(returned))
    quality, tokens, rows = Quality(judges.lpips, fid, group=(size, (first + judged[0]) % size)), None, []
    seconds, timed, numbers, index = {"encode": 0.0, "decode": 0.0}, 0, None, [returned.index(n) for n in judged]
    getattr(entry, "bases", None)  # principal components are fitted before anything is timed
    memory = peak_of(entry, clips, device)
    for i in progress_bar(range(len(clips)), desc=entry.name[-30:], unit="clip"):
        video = clips.video(i, device)
        result = entry.run(video, clips.fps[i], i, timed=i < TIMED_CLIPS)
        if result.frames.shape[1] != len(returned):
            raise InputError(f"{entry.name}: {result.frames.shape[1]} frames came back, not {len(returned)}")
        output, target = result.frames[:, index].mul(255).round().div(255), video[:, judged]
        quality.add(output, target)
        if fvd:
            fvd.add(output, target)
        frame_psnrs = metrics.MEASURES["psnr"].function(output, target)[0].tolist()
        if result.seconds:
            timed += 1
            seconds = {half: seconds[half] + result.seconds[half] for half in seconds}
        pixels, bits, numbers = video[:, :, 0].numel(), result.bits, result.numbers
        if result.codes:
            tokens = tokens or metrics.CodeStatistics(entry.codebook_sizes)
            tokens.add(result.codes, pixels)
            bits = sum(codes.numel() * math.log2(size) for codes, size in zip(result.codes, entry.codebook_sizes))
        rows.append(dict(name=clips.names[i], psnr=sum(frame_psnrs) / len(frame_psnrs),
                         bits_per_pixel=bits / pixels if bits is not None else None))
        if i == shown:
            write_video(path, output, clips.fps[i])
    coded = [row["bits_per_pixel"] for row in rows if row["bits_per_pixel"] is not None]
    code_facts = tokens.reduce() if tokens else {}
    found = quality.reduce()
    del found["count"]
    by_position = {f"place_{position}": -10 * math.log10(found.pop(f"mse_{position}", None) or math.nan)
                   for position in ("first", "inner", "last")}
    row = dict(name=entry.name, words=entry.words, metrics=found, fid=fid.reduce() if fid else None,
               rfvd=fvd.reduce() if fvd else None, **by_position,
               numbers_per_pixel=numbers / pixels if numbers else None,
               bits_per_pixel=sum(coded) / len(coded) if coded else None,
               entropy_bits_per_pixel=code_facts.get("entropy_bits_per_pixel"),
               codebook_use=code_facts.get("codebook_use"), parameters=entry.parameters,
               encode_fps=timed * clips.frames / seconds["encode"] if timed else None,
               decode_fps=timed * clips.frames / seconds["decode"] if timed else None, peak_memory_mb=memory,
               clips=rows)
    return report.strict(row)


def peak_of(entry, clips, device):
    """Megabytes at the peak of running the first clip, including the weights; None if the system cannot tell. This run
    is also the warm-up."""
    held_memory(device)  # returns freed memory to the system, which would else hide what the run takes
    video = clips.video(0, device)
    taken = memory_of(lambda: entry.run(video, clips.fps[0], 0), device)
    return (taken + entry.weight_bytes) / 1e6 if reset_peak_memory(device) else None


def write_video(path, video, fps):
    """Write video, 1 T 3 H W in [0, 1], to `path`, a .webm file."""
    frames = video[0].mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with VideoWriter(path, fps, frames.shape[2], frames.shape[1]) as writer:
        for frame in frames:
            writer.write(frame)
