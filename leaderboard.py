"""Many models over the same clips: one table, one page.

    python leaderboard.py runs/mine taew2_1 bicubic --data videos/         # runs, checkpoints, published weights
    python leaderboard.py runs/mine python:vae.py:make diffusers:AutoencoderKLWan:FOLDER --data videos/    # teachers
    python leaderboard.py runs/mine pca16 bicubic --data videos/ --fit train_videos/     # the best linear code
    python leaderboard.py runs/tok h264@crf24 h264@crf32 h264@crf40 av1@200 av1@400 --data videos/         # codecs
    python leaderboard.py runs/mine taew2_1 --data MCL-JCV/ --protocol mcl-jcv           # as papers choose their clips

Writes under --out: leaderboard.html, a page in one file, which needs no other; leaderboard.json, the same numbers;
videos/. A model that was measured before with the same weights, clips and settings is not measured again, except with
--again.

All models get the same frames, and are judged on the frames that all of them return (a model's `targets` says which; a
teacher returns the first ones). Reconstructions are first rounded to 8 bits. The metrics are those of validation and
infer.py (metrics.py, `MEASURES`), and:
- first, inner, last: PSNR of the mean squared error, by a frame's position among the frames that one latent stands for;
- latents per pixel; or bits per pixel, of a codec as written, of a tokenizer with each code written plainly;
- frames per second for whole clips, and the memory that a clip takes, including the weights.

Exit code: 0; 1 if some models could not be measured (the page and the terminal say why); 2 for a user's mistake, in one
line; 130 after Ctrl-C and 143 after SIGTERM, which keep what was measured until then.
"""
from screen import end_at_ctrl_c, ending_in_one_line, guard_screen, one_line

end_at_ctrl_c(__name__)
import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import time

import entries
import report
from codec import InputError
from device import describe, pick_device, pick_precision, tune
from inputs import MISTAKES, Failures
from leaderboard_page import table, write_page
from lock import locked
from measure_entry import Judges, measure, write_video
from protocols import PROTOCOLS, Clips
from rate import compare_rates
from teachers import KINDS
from untrusted import read_json
from video_files import MAX_PIXELS

FORMAT = 2  # version of the rows; rows of another version are measured again
SETTINGS = dict(height=256, width=256, frames=17)  # without a protocol; causal video VAEs take 17 frames
MOST = 1 << 26  # most bytes of a leaderboard.json


# ---- one model -------------------------------------------------------------------------------------------------------


def short(name):
    """The last part of a path or a specification: "taef2" of "python:../teachers/taef2.py:taef2"."""
    parts = [part for part in re.split(r"[/:\\]", name) if part]
    return "/".join(parts[-2:]) if parts[-1:] and parts[-1].endswith((".pt", ".pth")) else parts[-1] if parts else name


def read_rows(path):
    """({key: row} of an earlier command's leaderboard.json, [a note if it cannot be read])."""
    try:
        rows = read_json(path, MOST)
        rows = rows["rows"] + rows["earlier"]
        return {row["key"]: row for row in rows if not row.get("failed")}, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{path} cannot be read ({one_line(str(error), 100)}): all is measured"]


def describe_entry(name, context, frames, levels=0):
    """What is needed of an entry before any is measured: {"spec", "name", "levels", "returned", "fingerprint",
    "most_levels"}. Loads the entry; errors as in `entries.load`."""
    entry = entries.load(name, context, levels)
    return dict(spec=name, name=entry.name, levels=levels, returned=entry.returned(frames),
                fingerprint=entry.fingerprint, most_levels=getattr(entry, "most_levels", 0))


def describe_entries(names, options, context, failures):
    """{name: its description in a list (of a residual tokenizer, one for each of --levels), or the row of an entry that
    failed}."""
    found = {}
    for name in names:
        try:
            one = describe_entry(name, context, options.shape["frames"])
            counts = [count for count in options.levels or [] if count <= one["most_levels"]]
            for count in sorted({*(options.levels or [])} - {*counts}) if one["most_levels"] else []:
                print(f"{one['name']}: --levels {count} is left out: it has {one['most_levels']}")
            found[name] = [describe_entry(name, context, options.shape["frames"], count) for count in counts] or [one]
        except Exception as error:  # one entry that fails does not stop the others
            found[name] = failures.row(name, name, error)
            print(f"{name}: {one_line(found[name]['failed'])}")
    return found


def check_some_are_left(found):
    """InputError if all entries have failed. found: as `describe_entries` returns it."""
    rows = [one for one in found.values() if isinstance(one, dict)]
    if len(rows) == len(found):
        what = f"none of the {len(rows)} can be measured; the first: " if len(rows) > 1 else ""
        raise InputError(f"{what}{rows[0]['failed']}")


def judged_frames(found, frames):
    """The frames that all entries return; InputError if there are none."""
    common = sorted(set(range(frames)).intersection(*(one["returned"] for one in found)))
    if not common:
        least = min(found, key=lambda one: len(one["returned"]))
        raise InputError(f"no frame comes back from all models: of {frames}, {least['name']} returns "
                         f"{least['returned']}: leave it out, or give more --frames")
    return common


def prepare(options, judges, failures, context):
    """Check everything before anything is measured: ([description of each entry that can be measured], {name: row} of
    the others, the context with its clips). Entries that are fitted to clips are loaded after the clips."""
    fitted = [name for name in options.entries if entries.is_fitted(name)]
    found = describe_entries([name for name in options.entries if name not in fitted], options, context, failures)
    if options.levels and not any(one[0]["most_levels"] for one in found.values() if isinstance(one, list)):
        raise InputError("--levels: none of the models has codes of several levels: they are of residual "
                         "quantizers (net.quantizer=rvq)")
    if not fitted:
        check_some_are_left(found)
    clips = Clips(options.data, options.out, **options.shape, clips=options.clips, max_pixels=options.max_pixels)
    fit = Clips(options.fit, options.out, **{**options.shape, "protocol": ""}, clips=options.fit_clips,
                max_pixels=options.max_pixels, what="--fit") if options.fit else None
    for note in clips.notes + judges.notes:
        print(note)
    if options.show >= len(clips):
        raise InputError(f"--show {options.show}: there are clips 0 to {len(clips) - 1}")
    context = context._replace(clips=clips, fit=fit)
    found.update(describe_entries(fitted, options, context, failures))
    check_some_are_left(found)
    failed = {name: found[name] for name in options.entries if isinstance(found[name], dict)}
    return [one for name in options.entries if name not in failed for one in found[name]], failed, context


class Board:
    """Writes leaderboard.json and the page, again after each model. rows: {name: its row, None until it is measured};
    failed: {name: row} of entries that could not be measured; known: {key: row} of an earlier command."""

    def __init__(self, options, found, failed, clips, judges, settings):
        self.out, self.failed, self.path = options.out, failed, os.path.join(options.out, "leaderboard.json")
        self.known, notes = read_rows(self.path)
        print(*notes, sep="\n", end="\n" * bool(notes))
        judged, show = settings["judged"], options.show
        original = f"videos/{clips.fingerprint}_{show}.webm"
        write_video(os.path.join(self.out, original), clips.video(show)[:, judged], clips.fps[show])
        self.info = dict(
            data=options.data, clips=len(clips), frames=clips.frames, height=clips.height, width=clips.width,
            judged=judged, judged_words=in_words(judged), show=show, notes=clips.notes + judges.notes,
            fewest=short(min(found, key=lambda one: len(one["returned"]))["name"]),
            returned={one["name"]: one["returned"] for one in found},
            protocol=options.shape["protocol"], changed=options.changed, shown=clips.names[show],
            original=original, fps=clips.fps[show], machine=settings["machine"],
            precision=settings["precision"], created=time.strftime("%Y-%m-%d %H:%M"),
            command="python leaderboard.py " + shlex.join(sys.argv[1:]))
        self.rows = dict.fromkeys(one["name"] for one in found)

    def take_known(self, found, settings, again):
        """Fill in the rows that an earlier command measured; returns the entries still to be measured."""
        waiting = []
        for one in found:
            about = json.dumps([one["name"], one["fingerprint"], settings])
            one["key"] = hashlib.sha256(about.encode()).hexdigest()[:24]
            row = self.known.get(one["key"])
            if row and not again and os.path.exists(os.path.join(self.out, row["video"])):
                self.rows[one["name"]] = row
            else:
                waiting.append(one)
        if len(waiting) < len(found):
            print(f"measured before, with the same weights, clips and settings: {len(found) - len(waiting)} of "
                  f"{len(found)} (--again measures them anew)")
        return waiting

    def save(self):
        """Write both files. Returns (the rows so far, including failed ones, the result of `compare_rates`)."""
        ready = [row for row in self.rows.values() if row] + list(self.failed.values())
        keys, rates = {row.get("key") for row in ready}, compare_rates(ready)
        report.write_whole(self.path, json.dumps(dict(
            info=self.info, rates=rates, rows=ready,
            earlier=[row for key, row in self.known.items() if key not in keys]), indent=1, allow_nan=False) + "\n")
        write_page(self.out, ready, self.info, rates, short)
        return ready, rates


def run(options):
    """Returns the exit code; raises one of inputs.MISTAKES."""
    for name in options.entries:
        entries.check_name(name)
    device = pick_device(options.device)
    tune(device)
    dtype = pick_precision(options.precision, device)
    os.makedirs(os.path.join(options.out, "videos"), exist_ok=True)
    judges, failures = Judges(options, device), Failures(options.out)
    found, failed, context = prepare(options, judges, failures, entries.Context(device, dtype, None))
    clips = context.clips
    judged = judged_frames(found, clips.frames)
    settings = dict(format=FORMAT, clips=clips.fingerprint, judged=judged, machine=describe(device),
                    precision=str(dtype).removeprefix("torch."), shown=options.show, **judges.about)
    board = Board(options, found, failed, clips, judges, settings)
    waiting = board.take_known(found, settings, options.again)
    ready, rates = board.save()
    for one in waiting:
        try:
            entry = entries.load(one["spec"], context, one["levels"])
            video = f"videos/{one['key']}.webm"
            board.rows[one["name"]] = {"key": one["key"], "video": video, **measure(
                entry, clips, one["returned"], judged, judges, device, options.show, os.path.join(options.out, video))}
        except Exception as error:
            row = board.failed[one["name"]] = failures.row(one["name"], one["name"], error)
            print(f"{one['name']}: {one_line(row['failed'])}")
        entry = None  # frees its memory for the next one
        ready, rates = board.save()
    if all(row.get("failed") for row in ready):
        raise InputError(f"none of the {len(ready)} could be measured; the first: {ready[0]['failed']}")
    print(*table(ready, short), sep="\n")
    for name, one in rates.get("curves", {}).items():
        mean = "no PSNR in common" if one["mean"] is None else f"{one['mean']:+.1f} % bits"
        print(f"BD-rate of {short(name)} against {short(rates['against'])}: {mean}")
    print(f"judged on frames {in_words(judged)} of {clips.frames}, of {len(clips)} clips of "
          f"{clips.height}x{clips.width}")
    print(f"page: {os.path.join(options.out, 'leaderboard.html')}")
    return int(bool(board.failed))


def in_words(numbers):
    """[0, 1, 2, 5] -> "0-2, 5"."""
    pieces = []
    for number in numbers:
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in pieces)


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"leaderboard.py: {one_line(message)}\n")  # without lines of usage
    parser.add_argument("entries", nargs="+", metavar="CKPT", help=f"what infer.py takes: run folders, checkpoints, "
                        f"published weights, {KINDS}; or bicubic, pca16, "
                        "h264@200 (kbit/s) or h264@crf30; h265 and av1 likewise")
    parser.add_argument("--data", required=True, metavar="DIR",
                        help="videos: a folder, a list or a file; a folder of images is a video")
    parser.add_argument("--out", default="leaderboard_results", help="folder to write to (default: %(default)s)")
    parser.add_argument("--protocol", default="", choices=("", *PROTOCOLS), metavar="NAME",
                        help=f"{', '.join(PROTOCOLS)}: size, frames and clips as papers have them (protocols.py)")
    parser.add_argument("--clips", type=int, default=0, metavar="N",
                        help="N clips in all, evenly spread (default: one of each video, or as the protocol has it)")
    parser.add_argument("--frames", type=int, metavar="T", help="frames of a clip (default: 17)")
    parser.add_argument("--size", metavar="HxW", help="height and width of a clip (default: 256x256)")
    parser.add_argument("--fit", metavar="DIR", help="videos that pca16 is fitted to (default: to the other half)")
    parser.add_argument("--fit-clips", type=int, default=0, metavar="N", help="N clips of --fit (default: one a video)")
    parser.add_argument("--levels", metavar="LIST",
                        help="say 1,2,4: residual tokenizers are also decoded from their first levels alone")
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "none"),
                        help="network that LPIPS looks through, none: no LPIPS (%(default)s)")
    parser.add_argument("--no-fid", dest="fid", action="store_false", help="no FID, though pytorch-fid is installed")
    parser.add_argument("--i3d", metavar="FILE", help="TorchScript of the I3D network, for rFVD")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="the clip that the page plays (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"),
                        help="auto: bf16 where the hardware has it")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N",
                        help="videos whose frames have more are refused (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name, least, most in (("clips", 0, 10 ** 6), ("frames", 1, 1000), ("show", 0, 10 ** 6),
                              ("fit_clips", 0, 10 ** 6), ("max_pixels", 1, 2 ** 40)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value}: {least} to {most} is wanted")
    options.entries = list(dict.fromkeys(options.entries))
    shape = PROTOCOLS[options.protocol]._asdict() if options.protocol else dict(SETTINGS)
    shape.pop("videos", None)
    before = dict(shape)
    if options.size:
        sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", options.size)
        if not sides or not all(16 <= int(side) <= 2 ** 13 for side in sides.groups()):
            parser.error(f"--size {options.size}: height x width of 16 to {2 ** 13} are wanted, like 256x256")
        shape["height"], shape["width"] = map(int, sides.groups())
    shape["frames"] = options.frames or shape["frames"]
    options.shape = {**shape, "protocol": options.protocol}
    options.changed = bool(options.protocol) and (shape != before or bool(options.clips))
    if options.levels:
        try:
            options.levels = [int(count) for count in options.levels.split(",")]
            if min(options.levels) < 1:
                raise ValueError
        except ValueError:
            parser.error(f"--levels {options.levels}: numbers of 1 or more are wanted, like 1,2,4")
    return options


def main():
    guard_screen()
    options = parse()
    with (ending_in_one_line("leaderboard.py", MISTAKES, "what was measured is kept: the same command goes on"),
          locked(options.out, "choose another --out") as unlocked):
        if unlocked:
            print(unlocked)
        code = run(options)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
