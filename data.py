"""Clips from videos and images: sampling, augmenting, loading.

    sources, refused = probe(find_sources("videos/"))               # of data_files.py
    train, val = split_sources(sources, val_fraction=0.1)
    clips = TrainClips(train, seed=0)
    clips[Key(epoch=0, index=5, size=128, frames=12)]["video"]      # uint8 12 3 128 128, RGB

A training sample depends only on (seed, epoch, index) and the files: neither on the number of workers or ranks, nor on
what was read before. So a run can be resumed exactly. A file that cannot be read during training is replaced by another
one, which is chosen by the same numbers, and reported in the sample's "notes".

This file needs data_files.py and video_files.py beside it.
"""
import functools
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

# Imported first, since it sets environment variables that OpenCV reads on import.
from video_files import MAX_PIXELS, DataError, read_clips, read_frames, read_image  # isort: skip
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data_files import Sources

MAX_REPLACEMENTS = 50  # unreadable files in a row before a sample gives up


class Key(NamedTuple):
    """Names one training sample."""
    epoch: int
    index: int
    size: int    # height and width, pixels
    frames: int
    part: int = 0  # number of the clip among those that are cut each time the file is opened


class Bucket(NamedTuple):
    """One shape of training batches: `size` x `size` pixels, `frames` frames, `batch` clips per rank and micro-step."""
    size: int
    frames: int
    probability: float
    batch: int


# ---- augmentation ------------------------------------------------------------------------------------------------


class Augment(NamedTuple):
    """Random augmentation of training clips. Each choice is drawn once per clip and applied to all of its frames."""
    random_crop: bool = True      # a square of random size and position; off: the largest centred square
    min_crop: float = 0.0         # smallest side of that square, as a fraction of the shorter side (never < size)
    flip: bool = True             # left-right, half of the time
    color_jitter: float = 0.0     # brightness, contrast, saturation by up to this factor; hue by a quarter of it
    blur: float = 0.0             # probability of a Gaussian blur with a deviation of 0.2 to 1.5 pixels


def finish_clip(frames, size, augment, rng):
    """Crop, resize, flip, colour, blur: list of H W 3 BGR uint8 -> (T size size 3 RGB uint8, cut).

    cut: {"crop": (top, left, edge) in pixels of the first frame, "flip": bool}. Cropping comes before resizing, and
    resizing before colour conversion: so each step processes fewer pixels.
    """
    side, y, x = 1.0, 0.5, 0.5  # side as a fraction of the shorter edge; position as a fraction of the free range
    if augment.random_crop:
        shorter = min(frames[0].shape[:2])
        low = min(1.0, max(augment.min_crop, size / shorter))
        side, y, x = rng.uniform(low, 1.0), rng.random(), rng.random()
    flip = augment.flip and rng.random() < 0.5
    clip, cut = np.empty((len(frames), size, size, 3), np.uint8), None
    for out, frame in zip(clip, frames):
        height, width = frame.shape[:2]
        edge = max(1, round(side * min(height, width)))
        top, left = round(y * (height - edge)), round(x * (width - edge))
        cut = cut or {"crop": (top, left, edge), "flip": bool(flip)}
        frame = frame[top:top + edge, left:left + edge]
        if edge != size:
            frame = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA if edge > size else cv2.INTER_CUBIC)
        cv2.cvtColor(frame[:, ::-1] if flip else frame, cv2.COLOR_BGR2RGB, dst=out)
    return colour_and_blur(clip, augment, rng), cut


def colour_and_blur(clip, augment, rng):
    """Apply an Augment's color_jitter and blur: T H W 3 RGB uint8 -> the same shape."""
    if augment.color_jitter > 0:
        clip = jitter_color(clip, augment.color_jitter, rng)
    if augment.blur > 0 and rng.random() < augment.blur:
        sigma = rng.uniform(0.2, 1.5)
        clip = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])
    return clip


def jitter_color(clip, strength, rng):
    """Change brightness, contrast, saturation and hue by one 3x4 colour matrix; hue is a rotation about the grey axis.
    T H W 3 RGB uint8 -> the same shape. strength: largest change of brightness, contrast and saturation."""
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    angle = 2 * np.pi * 0.25 * strength * rng.uniform(-1, 1)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * grey + np.sin(angle) * cross
    matrix = brightness * contrast * (saturation * hue + (1 - saturation) * grey)
    offset = brightness * (1 - contrast) * clip.mean()
    matrix = np.column_stack([matrix, np.full(3, offset)]).astype(np.float32)
    return np.stack([cv2.transform(frame, matrix) for frame in clip])


# ---- datasets ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def epoch_order(seed, epoch, count):
    """The order in which an epoch takes `count` items."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class TrainClips(Dataset):
    """Training samples by Key. An image is a clip of one frame; with `image_sequences`, a clip of several frames can
    consist of images drawn at random. `clips_per_open` clips are cut from a video each time it is opened (see
    `read_clips`); a TrainSchedule distributes them over as many steps."""

    def __init__(self, sources, seed=0, min_frame_delta=1, max_frame_delta=1, augment=Augment(), image_sequences=False,
                 max_pixels=MAX_PIXELS, clips_per_open=1):
        self.seed, self.deltas, self.augment = seed, (min_frame_delta, max_frame_delta), augment
        self.image_sequences, self.max_pixels, self.clips_per_open = image_sequences, max_pixels, clips_per_open
        self.sources = Sources(sources)
        is_image = np.array([source.is_image for source in sources], bool)
        self.images, self.videos = np.flatnonzero(is_image), np.flatnonzero(~is_image)
        self.all = np.arange(len(is_image))

    def pool(self, frames):
        """The numbers of the sources that can give clips of `frames` frames. An epoch opens each of them once."""
        return self.all if frames == 1 or self.image_sequences else self.videos

    def check(self, bucket):
        if not len(self.pool(bucket.frames)):
            raise DataError(f"the data holds only images, which give no clips of {bucket.frames} frames: clips of 1 "
                            "frame are wanted, or image_sequences=true of train.py for clips of unrelated images")

    def __getitem__(self, key):
        """{"video": uint8 T 3 H W tensor (memory order T H W 3), "notes": [(path, what was odd)], "origin": {...}}

        The origin holds the file's key, the first frame number, the spacing of the frames, the crop and the flip.
        DataError if too many files in a row cannot be read.
        """
        sample, = self.samples(key, [key.part])
        return sample

    def __getitems__(self, keys):
        """The samples of several keys. Keys that differ only in `part` share one opening of the file."""
        if self.clips_per_open == 1:
            return [self[key] for key in keys]
        files, found = {}, {}
        for key in keys:
            files.setdefault(key._replace(part=0), []).append(key.part)
        for key, parts in files.items():
            found.update((key._replace(part=part), sample) for part, sample in zip(parts, self.samples(key, parts)))
        return [found[key] for key in keys]

    def samples(self, key, parts):
        """The samples with the given `parts`, cut from one opening of a file: [sample, ...] in their order."""
        pool, notes = self.pool(key.frames), []
        order = epoch_order(self.seed, key.epoch, len(pool))
        for attempt in range(MAX_REPLACEMENTS):
            numbers = self.seed, key.epoch, key.index, attempt
            rng = np.random.default_rng(numbers)
            source = self.sources[pool[order[key.index] if attempt == 0 else rng.integers(len(pool))]]
            try:
                found = {part: self.finish(key.size, source, numbers, rng, part, *clip)
                         for part, *clip in self.read_parts(source, key.frames, rng, parts)}
            except DataError as error:
                notes.append((source.path, f"{error}; another file took its place"))
                continue
            found[parts[0]]["notes"][:0] = notes
            return [found[part] for part in parts]
        raise DataError(f"{MAX_REPLACEMENTS} files in a row could not be read, the last {notes[-1][0]!r}: "
                        f"{notes[-1][1]}")

    def finish(self, size, source, numbers, rng, part, frames, first, spacing, odd):
        """Augment the frames that were read, and make them a sample."""
        part_rng = rng if self.clips_per_open == 1 else np.random.default_rng((*numbers, part))
        clip, cut = finish_clip(frames, size, self.augment, part_rng)
        return {"video": torch.from_numpy(clip).permute(0, 3, 1, 2), "notes": [(source.path, note) for note in odd],
                "origin": {"file": source.key, "first": first, "spacing": spacing, **cut}}

    def batches(self, schedule, workers, pin_memory=False):
        """Endless batches in the order of a TrainSchedule (see `collate`)."""
        ahead = max(1, 4 // self.clips_per_open)
        return schedule.cut(endless(make_loader(self, workers, pin_memory, ahead, batch_sampler=schedule)))

    def read_parts(self, source, frames, rng, parts):
        """Yields (part, frames, first frame number, spacing, [what was odd]) for each of `parts`."""
        if self.clips_per_open == 1 or source.is_image:  # the parts of an image differ in their crops
            clip = self.read(source, frames, rng)
            return ((part, *clip) for part in parts)
        deltas = rng.integers(self.deltas[0], self.deltas[1] + 1, self.clips_per_open)
        return read_clips(source.path, rng.random(), rng.random(self.clips_per_open), frames, deltas, parts,
                          self.max_pixels)

    def read(self, source, frames, rng):
        """Read a clip: ([H W 3 BGR uint8], first frame number, spacing, [what was odd])."""
        delta, position = int(rng.integers(self.deltas[0], self.deltas[1] + 1)), rng.random()
        if not source.is_image:
            return read_frames(source.path, position, frames, delta, self.max_pixels)
        more = rng.choice(len(self.images), frames - 1, replace=len(self.images) < frames) if frames > 1 else []
        images = [source, *(self.sources[self.images[i]] for i in more)]
        return [read_image(image.path, self.max_pixels) for image in images], 0, 1, []


def evenly_spread(count, limit):
    """Up to `limit` of the numbers 0 ... count - 1, evenly spaced, with the first and the last."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int)


class ValClips(Dataset):
    """Validation clips, always the same: `per_video` clips from each video, evenly spaced, of consecutive frames,
    cropped to the largest centred square. limit: number of clips at most; 0: all. With fewer clips than files, the
    files are evenly spaced in the list. Images are used as in TrainClips, but those of a sequence are neighbours in the
    list."""

    def __init__(self, sources, size, frames, per_video=1, limit=0, image_sequences=False,
                 max_pixels=MAX_PIXELS):
        usable = [s for s in sources if frames == 1 or image_sequences or not s.is_image]
        usable = [usable[i] for i in evenly_spread(len(usable), limit or len(usable))]
        items = ((s, (k + 0.5) / per_video) for k in range(per_video) for s in usable if k == 0 or not s.is_image)
        self.items = list(itertools.islice(items, limit or None))
        images = [s.path for s in sources if s.is_image]
        self.sequences = {}  # {number of an item that is an image: paths of the images of its clip}
        for i, (source, _) in enumerate(self.items):
            if source.is_image:
                first = len(self.sequences)
                self.sequences[i] = [images[(first + k) % len(images)] for k in range(frames)]
        self.size, self.frames, self.max_pixels = size, frames, max_pixels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        """{"video": uint8 T 3 H W, "notes": [...]}. An unreadable file gives a video of 0 frames and a note."""
        source, position = self.items[i]
        try:
            if source.is_image:
                frames, notes = [read_image(path, self.max_pixels) for path in self.sequences[i]], []
            else:
                frames, _, _, notes = read_frames(source.path, position, self.frames, 1, self.max_pixels)
        except DataError as error:
            return {"video": torch.empty(0, 3, self.size, self.size, dtype=torch.uint8),
                    "notes": [(source.path, f"{error}; left out of the validation")]}
        clip, _ = finish_clip(frames, self.size, Augment(random_crop=False, flip=False), None)
        return {"video": torch.from_numpy(clip).permute(0, 3, 1, 2), "notes": [(source.path, note) for note in notes]}

    def share(self, rank, world, take_notes):
        """This rank's clips, decoded once and kept in memory: [{"video": uint8 T 3 H W}, ...].

        take_notes: function that is called with each clip's [(path, what was odd)].
        """
        with ThreadPoolExecutor(4) as pool:
            samples = list(pool.map(self.__getitem__, range(rank, len(self), world)))
        for sample in samples:
            take_notes(sample["notes"])
        return [{"video": sample["video"]} for sample in samples if len(sample["video"])]


class TrainSchedule(Sampler):
    """Yields [Key, ...] for each micro-batch of this rank, without end, from optimizer step `step`, sample `sample` on.

    A step draws one bucket for all ranks, by (seed, step), and takes the next `world * accumulation * batch` samples.
    They are the same ones, however they are distributed over ranks and micro-steps. `passed`: how many items earlier
    iterations have yielded; the next iteration skips these.

    With clips_per_open > 1, so many steps form a block. They take the same bucket and the same files, and each takes
    another clip of a file: so the clips of a micro-batch come from different files. The iteration then yields this
    rank's keys of a block at once, so that one data process reads them, and `cut` splits the block into micro-batches.
    """

    def __init__(self, clips, buckets, seed, world=1, rank=0, accumulation=1, step=0, sample=0):
        self.pool_size = {b.frames: len(clips.pool(b.frames)) for b in buckets}
        self.buckets, self.seed, self.world, self.rank = buckets, seed, world, rank
        self.accumulation, self.step, self.sample, self.passed = accumulation, step, sample, 0
        self.block = clips.clips_per_open

    def bucket(self, step):
        weights = np.array([b.probability for b in self.buckets])
        return self.buckets[np.random.default_rng((self.seed, step, 1)).choice(len(weights), p=weights / weights.sum())]

    def __iter__(self):
        return itertools.islice(self.micro_batches() if self.block == 1 else self.blocks(), self.passed, None)

    def micro_batches(self):
        step, sample = self.step, self.sample
        while True:
            bucket = self.bucket(step)
            for _ in range(self.accumulation):
                mine = range(sample + self.rank * bucket.batch, sample + (self.rank + 1) * bucket.batch)
                yield [Key(*divmod(i, self.pool_size[bucket.frames]), bucket.size, bucket.frames) for i in mine]
                sample += self.world * bucket.batch
            step += 1

    def blocks(self):
        step, sample = self.step, self.sample
        while True:
            begin = step - step % self.block  # a resumed run may begin within a block
            bucket, end = self.bucket(begin), begin + self.block
            taken = self.accumulation * self.world * bucket.batch
            opening = max(0, sample - (step - begin) * taken) // self.block
            mine = [opening + (m * self.world + self.rank) * bucket.batch + k
                    for m in range(self.accumulation) for k in range(bucket.batch)]
            yield [Key(*divmod(i, self.pool_size[bucket.frames]), bucket.size, bucket.frames, (now + i) % self.block)
                   for now in range(step, end) for i in mine]
            step, sample = end, sample + (end - step) * taken

    def cut(self, batches):
        """Micro-batches from the batches of a loader with this schedule: its blocks are split."""
        if self.block == 1:
            yield from batches
            return
        begin = self.step - self.step % self.block
        for n, block in enumerate(batches):
            size = self.bucket(begin + n * self.block).batch
            for start in range(0, len(block["video"]), size):
                yield {"video": block["video"][start:start + size], "notes": [] if start else block["notes"]}


def collate(samples):
    """[sample, ...] -> {"video": uint8 N T 3 H W (memory order N T H W 3), "notes": [...]}. DataError if a data process
    gets no shared memory."""
    clips = [s["video"].permute(0, 2, 3, 1) for s in samples]
    video = torch.empty(len(clips), *clips[0].shape, dtype=torch.uint8)
    if get_worker_info():  # here, where an error is reported. While a batch is sent it is not, and the run would hang.
        try:
            video.share_memory_()
        except RuntimeError as error:
            raise DataError(f"no shared memory for a batch of {video.nbytes / 1e6:.1f} MB ({error}): set workers "
                            "lower, or give the container more (docker run --shm-size=8g, or --ipc=host)") from None
    torch.stack(clips, out=video)
    return {"video": video.permute(0, 1, 4, 2, 3), "notes": [note for s in samples for note in s["notes"]]}


def endless(loader):
    """Yields the batches of a loader. Its processes ignore the signals that end a run, which a terminal or a scheduler
    sends to all processes at once: only this process acts on them, and it gets batches until it is done.

    With a TrainSchedule, data processes that were killed (for example because memory ran out) are replaced, and no
    batch is lost. DataError if that happens three times in a row without a batch in between."""
    schedule, killed = loader.batch_sampler, 0
    while killed < 3:
        try:
            for batch in start_loader(loader):
                if isinstance(schedule, TrainSchedule):
                    schedule.passed += 1
                    if killed:
                        batch["notes"].append(("a data process", f"killed; others read batch {schedule.passed} on"))
                killed = 0
                yield batch
            return
        except DataError as error:  # from a data process, with a traceback in its message
            raise DataError(str(error).strip().splitlines()[-1].removeprefix("video_files.DataError: ")) from None
        except (RuntimeError, OSError, EOFError) as error:  # the last two: the process that sent a batch is gone
            if not isinstance(schedule, TrainSchedule) or type(error) is RuntimeError and "exited" not in str(error):
                raise
            killed += 1
    raise DataError("the data processes died three times in a row (is memory short?): set workers lower")


def start_loader(loader):
    """iter(loader), with the signals that end a run blocked in its processes: this process tells them when to end."""
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
    multiprocessing.resource_tracker.ensure_running()  # started later, it would unblock the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # inherited by the processes that iter() starts
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_):
    cv2.setNumThreads(0)  # several workers run in parallel: one thread each
    torch.set_num_threads(1)
    # A worker ends when its parent is gone. PyTorch checks for that by the parent's id, but here the parent is the
    # helper process of `worker_context`: without this thread, workers would outlive a killed run.
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(process):
    process.join()
    os._exit(1)


def worker_context():
    """A multiprocessing context in which workers fork from a clean helper process. Forked from this process, which has
    threads, they can hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cv2"])  # imported once, not once per worker
    return context


def make_loader(clips, workers, pin_memory=False, ahead=4, **kwargs):
    """A DataLoader over `clips`. Each of its processes prepares up to `ahead` batches in advance."""
    with warnings.catch_warnings():  # "may create too many workers": the user has chosen the number
        warnings.simplefilter("ignore", UserWarning)
        return DataLoader(clips, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
                          worker_init_fn=start_worker, persistent_workers=False,
                          generator=torch.Generator(),  # not the global one, from which each start would draw a seed
                          multiprocessing_context=worker_context() if workers else None,
                          prefetch_factor=ahead if workers else None, **kwargs)
