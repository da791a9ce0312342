"""The section "loader" of bench.py: clips from videos, compared with other ways to read them, and clips from caches.

All readers read the same frames of the same videos, in one process with one thread, and return the same centred square.
Seconds are CPU time: what one core can do, whatever else the machine does meanwhile.
decord and PyAV are compared where they are installed (`pip install decord av`). Nothing else here uses decord;
video_writer.py and rate.py use PyAV.
"""
import importlib.util
import os
import statistics
import tempfile
import time

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import data
from clip_cache import TrainCuts
from cache_files import CachedClips, LatentCache, ShardWriter, write_index
from data_files import find_sources, probe
from measure import alone, alternate
from video_files import DataError, grab_frames, open_video

SIZE, FRAMES = 128, 12
SHAPE = f"{SIZE}x{SIZE}x{FRAMES}"
CPU = torch.device("cpu")


# ---- clips from videos: path, first frame -> uint8 T H W 3, RGB ------------------------------------------------------


def squares(frames):
    """The centred square of each frame, resized as in data.py."""
    if not len(frames):
        return np.empty((0, SIZE, SIZE, 3), np.uint8)
    height, width = frames[0].shape[:2]
    edge = min(height, width)
    top, left = round((height - edge) / 2), round((width - edge) / 2)
    how = cv2.INTER_AREA if edge > SIZE else cv2.INTER_CUBIC
    return np.stack([cv2.resize(f[top:top + edge, left:left + edge], (SIZE, SIZE), interpolation=how) for f in frames])


def ours(path, first):
    """FRAMES consecutive frames from number `first` on, as data.py reads and cuts them: T SIZE SIZE 3, uint8, RGB."""
    frames = grab_frames(open_video(path), first, FRAMES, 1)
    if not frames:
        return squares([])
    return data.finish_clip(frames, SIZE, data.Augment(random_crop=False, flip=False), None)[0]


def seek_per_frame(path, first):
    """Reads like many notebooks: a seek for each frame; the whole frame converted to RGB and to float, then resized."""
    capture, clip = open_video(path), []
    for t in range(first, first + FRAMES):
        capture.set(cv2.CAP_PROP_POS_FRAMES, t)
        ok, frame = capture.read()
        if not ok:
            break
        frame = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None].float() / 255
        height, width = frame.shape[-2:]
        edge = min(height, width)
        top, left = round((height - edge) / 2), round((width - edge) / 2)
        frame = F.interpolate(frame[..., top:top + edge, left:left + edge], size=(SIZE, SIZE), mode="area")
        clip.append(frame[0].permute(1, 2, 0))
    return (torch.stack(clip) * 255).round().byte().numpy() if clip else squares([])


def with_decord(path, first):
    """The same frames as one batch from decord, resized like the others."""
    import decord
    batch = decord.VideoReader(path, num_threads=1).get_batch(range(first, first + FRAMES))
    return squares(batch.asnumpy())


def with_pyav(path, first):
    """One seek by time, to the keyframe before the clip; frames before the clip are decoded but not converted."""
    import av
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        ticks = 1 / ((stream.average_rate or 25) * stream.time_base)  # per frame
        target = (stream.start_time or 0) + int(first * ticks)
        container.seek(target, stream=stream)
        clip = []
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts >= target - ticks / 2:
                clip.append(frame.to_ndarray(format="rgb24"))
            if len(clip) == FRAMES:
                break
    return squares(clip)


def readers():
    """({name: (function, exceptions that it raises for an unreadable video)}, [packages that are not installed])."""
    found, missing = {"ours": (ours, DataError)}, []
    if importlib.util.find_spec("decord"):
        import decord
        decord.logging.set_level(decord.logging.QUIET)
        found["decord, then resize"] = with_decord, (decord.DECORDError, IndexError)
    else:
        missing.append("decord")
    if importlib.util.find_spec("av"):
        import av
        av.logging.set_level(None)  # else it prints a line for each damaged block
        found["PyAV, then resize"] = with_pyav, (av.FFmpegError, IndexError)
    else:
        missing.append("av")
    return found, missing


def usable(sources, calls):
    """(the sources that all readers can read, {name: for how many of them its frames differ from ours by more than
    rounding})."""
    kept, other = [], dict.fromkeys(calls, 0)
    for source in sources:
        first, clips = (source.frames - FRAMES) // 2, {}
        try:
            for name, (read, errors) in calls.items():
                clips[name] = read(source.path, first)
        except errors:
            continue
        if len(clips["ours"]) < FRAMES:
            continue
        kept.append(source)
        for name, clip in clips.items():
            same = clip.shape == clips["ours"].shape and np.abs(clip.astype(int) - clips["ours"]).mean() < 2
            other[name] += not same
    return kept, other


def loader_rows(options, folder):
    """(rows of all readers over a folder's videos, seconds for a clip with a seek per frame)."""
    data.start_worker(0)
    sources, _ = probe([s for s in find_sources(folder) if not s.is_image])
    calls, missing = readers()
    sources, other = usable([s for s in sources if s.frames >= FRAMES], calls)
    if not sources:
        raise DataError(f"no video of {FRAMES} frames or more in {folder!r}")

    def turns(read):
        for turn in range(options.repeat + 1):  # another position each turn, not at the end, on which readers disagree
            yield [read(s.path, int((0.1 + 0.618 * turn) % 0.95 * (s.frames - FRAMES))) for s in sources]
    calls = {"a seek per frame, float, resize": turns(seek_per_frame),
             **{name: turns(read) for name, (read, _) in calls.items()}}
    calls = {name: lambda t=turn: next(t) for name, turn in calls.items()}
    seconds = alternate(calls, options.repeat, CPU, limit=120, clock=time.process_time)
    first = seconds["a seek per frame, float, resize"]
    rows = [dict(what=f"loader, {len(sources)} videos, {SHAPE}, CPU time", how=name, value=len(sources) / seconds[name],
                 unit="clips/s", ratio=first / seconds[name]) for name in calls]
    for row in rows:
        if other.get(row["how"]):
            row["note"] = f"other pictures than ours for {other[row['how']]} of these videos"
    if missing:
        rows[1]["note"] = f"not compared with: {', '.join(missing)} (pip install {' '.join(missing)})"
    return rows, first / len(sources)


def several_rows(options, folder):
    """Rows for randomly cut clips of the videos, as in training: one or several from each opening of a video."""
    data.start_worker(0)
    sources, _ = probe([s for s in find_sources(folder) if not s.is_image])
    sources = [s for s in sources if s.frames >= FRAMES]
    calls, counts = {}, {}
    for count in (1, 4, 8):
        clips = data.TrainClips(sources, 0, 1, 5, clips_per_open=count)
        epochs = iter(range(10 ** 6))

        def turn(clips=clips, epochs=epochs, count=count):
            epoch = next(epochs)
            for i in range(len(sources)):
                clips.__getitems__([data.Key(epoch, i, SIZE, FRAMES, part) for part in range(count)])
        name = f"clips_per_open={count}"
        calls[name], counts[name] = turn, count * len(sources)
    seconds = alternate(calls, options.repeat, CPU, limit=120, clock=time.process_time)
    first = seconds["clips_per_open=1"] / counts["clips_per_open=1"]
    return [dict(what=f"training clips, {len(sources)} videos, {SHAPE}, spacing 1 to 5, CPU time", how=name,
                 value=counts[name] / s, unit="clips/s", ratio=first / (s / counts[name]))
            for name, s in seconds.items()]


# ---- clips from caches -----------------------------------------------------------------------------------------------


def cut_rows(options):
    """Rows for batches of 16 clips of SIZE, cropped and flipped, from a clip cache of 160 pixels; and for copying as
    many bytes."""
    count = 64 if options.quick else 256
    with tempfile.TemporaryDirectory() as folder:
        write_cache(folder, count, 160)
        cuts = TrainCuts(LatentCache(folder, clips_only=True), range(count))
        batches = cuts.batches(data.TrainSchedule(cuts, [data.Bucket(SIZE, FRAMES, 1.0, 16)], 0), 1)
        memory = np.ones((count, FRAMES, SIZE, SIZE, 3), np.uint8)
        order = np.random.default_rng(0).permutation(count).reshape(-1, 16)

        def ours():
            for _ in order:
                next(batches)

        def copies():
            for indices in order:
                batch = np.empty_like(memory[:16])
                for row, i in enumerate(indices):
                    batch[row] = memory[i]
        seconds = alternate({"ours, cropped and flipped": ours, "copies, each to fresh memory": copies}, options.repeat,
                            CPU, clock=time.process_time)
        batches.close()
    first = seconds["copies, each to fresh memory"]
    return [dict(what=f"clip cache of 160x160x{FRAMES}, clips of {SHAPE}, CPU time", how=how, value=count / s,
                 unit="clips/s", ratio=first / s, rate=2 * count * memory[0].nbytes / s, type="copy")
            for how, s in seconds.items()]


def write_cache(folder, count, size=SIZE):
    """Writes a cache of noise; then drops its files from the system's page cache, if that is possible."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, 0, count) as shard:
        shard.write("clips", rng.integers(0, 256, (count, FRAMES, size, size, 3), dtype=np.uint8))
        shard.write("latents", rng.standard_normal((count, 3, 16, SIZE // 8, SIZE // 8)).astype(np.float16))
        shard.origins = [{"file": "noise"}] * count
    write_index(folder, dict(format=1, complete=True, frames=FRAMES, size=size, latents=[3, 16, SIZE // 8, SIZE // 8],
                             latent_dtype="float16", teacher=dict(name="noise", fingerprint="0"),
                             shards=[dict(clips=count, crc32=shard.crc32)]))
    for name in os.listdir(folder) if hasattr(os, "posix_fadvise") else ():
        with open(os.path.join(folder, name), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cache_rows(options, notebook):
    """Rows for batches of 16 cached clips with their latents, in the first epoch and in later ones, and for copying as
    many bytes. notebook: seconds for a clip with a seek per frame.
    """
    count = 64 if options.quick else 512
    with tempfile.TemporaryDirectory() as folder:
        write_cache(folder, count)
        clips = CachedClips(LatentCache(folder), range(count))
        batches = clips.batches(data.TrainSchedule(clips, [data.Bucket(SIZE, FRAMES, 1.0, 16)], 0), 0)
        epochs = []
        for _ in range(1 + options.repeat):
            start = time.perf_counter()
            for _ in range(count // 16):
                next(batches)
            epochs.append(time.perf_counter() - start)
        batches.close()
        memory = np.array(clips.cache.clips[0])  # a copy in memory
        order = np.random.default_rng(0).permutation(count).reshape(-1, 16)
        block = np.empty_like(memory[:16])

        def fresh():
            for indices in order:
                batch = np.empty_like(memory[:16])
                for row, i in enumerate(indices):
                    batch[row] = memory[i]

        def again():
            for indices in order:
                for row, i in enumerate(indices):
                    block[row] = memory[i]
        seconds = {"ours, first epoch, from the disk": epochs[0], "ours, later epochs": statistics.median(epochs[1:]),
                   **alternate({"copies, each to fresh memory": fresh, "copies, to the same place": again},
                               options.repeat, CPU)}
    return [dict(what=f"latent cache, {SHAPE}", how=how, value=count / s, unit="clips/s", ratio=notebook / (s / count),
                 rate=2 * count * memory[0].nbytes / s, type="copy") for how, s in seconds.items()]


def loader(options):
    """`bench.py loader`: yields what is measured next (str), and rows (dict); each part runs in a fresh process."""
    yield "loader: clips from videos"
    if options.data:
        rows, notebook = alone(loader_rows, options, options.data)
        several = alone(several_rows, options, options.data)
    else:
        from synthetic import make_demo
        with tempfile.TemporaryDirectory() as folder:
            make_demo(os.path.join(folder, "demo"))
            rows, notebook = alone(loader_rows, options, os.path.join(folder, "demo", "train"))
            several = alone(several_rows, options, os.path.join(folder, "demo", "train"))
    yield from rows
    yield "loader: several clips from each opening of a video"
    yield from several
    yield "loader: clips from a clip cache"
    yield from alone(cut_rows, options)
    yield "loader: clips from a latent cache"
    yield from alone(cache_rows, options, notebook)
