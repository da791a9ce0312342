"""Clips from videos and images: sampling, augmenting, loading.

    sources, refused = probe(find_sources("videos/"))               # of data_files.py
    train, val = split_sources(sources, val_fraction=0.1)
    clips = TrainClips(train, seed=0)
    clips[Key(epoch=0, index=5, size=128, frames=12)]["video"]      # uint8 12 3 128 128, RGB

What a training sample is depends on (seed, epoch, index) and the files alone: neither on the number of workers or ranks
nor on what was read before, so a run can be resumed exactly. A file that cannot be read at training time is replaced by
another one, chosen by the same numbers, and reported in the sample's "notes".

Works with data_files.py and video_files.py beside it.
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

# First: it sets what OpenCV reads when it is imported.
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
    part: int = 0  # which of the clips that are cut from one opening of the file


class Bucket(NamedTuple):
    """One shape of training batches: `size` x `size` pixels, `frames` frames, `batch` clips per rank and micro-step."""
    size: int
    frames: int
    probability: float
    batch: int


# ---- augmentation ------------------------------------------------------------------------------------------------


class Augment(NamedTuple):
    """How training clips are varied; every choice is drawn once per clip and is the same for all of its frames."""
    random_crop: bool = True      # a square of random side and place; off: the largest centred square
    min_crop: float = 0.0         # smallest side of that square, as a part of the frame's shorter side (never < size)
    flip: bool = True             # left-right, half of the time
    color_jitter: float = 0.0     # brightness, contrast, saturation by up to this factor; hue by a quarter of it
    blur: float = 0.0             # probability of a Gaussian blur with a deviation of 0.2 to 1.5 pixels


def finish_clip(frames, size, augment, rng):
    """Crop, resize, flip, colour, blur: list of H W 3 BGR uint8 -> (T size size 3 RGB uint8, where it was cut).

    The second is {"crop": (top, left, edge) in pixels of the first frame, "flip": bool}. Cropping comes before resizing
    and resizing before colour conversion: each step then touches fewer pixels.
    """
    side, y, x = 1.0, 0.5, 0.5  # side as a part of the shorter edge; place as a part of what is left
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
    """What an Augment says of them: T H W 3 RGB uint8 -> the same shape."""
    if augment.color_jitter > 0:
        clip = jitter_color(clip, augment.color_jitter, rng)
    if augment.blur > 0 and rng.random() < augment.blur:
        sigma = rng.uniform(0.2, 1.5)
        clip = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip])
    return clip


def jitter_color(clip, strength, rng):
    """Brightness, contrast and saturation as one 3x4 colour matrix, hue as a rotation about the grey axis."""
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
    """Training samples by Key. Images serve as clips of one frame, or, with `image_sequences`, as clips of `frames`
    images drawn at random. `clips_per_open` clips are cut from a video each time that it is opened (see `read_clips`);
    a TrainSchedule spreads them over as many steps."""

    def __init__(self, sources, seed=0, min_frame_delta=1, max_frame_delta=1, augment=Augment(), image_sequences=False,
                 max_pixels=MAX_PIXELS, clips_per_open=1):
        self.seed, self.deltas, self.augment = seed, (min_frame_delta, max_frame_delta), augment
        self.image_sequences, self.max_pixels, self.clips_per_open = image_sequences, max_pixels, clips_per_open
        self.sources = Sources(sources)
        is_image = np.array([source.is_image for source in sources], bool)
        self.images, self.videos = np.flatnonzero(is_image), np.flatnonzero(~is_image)
        self.all = np.arange(len(is_image))

    def pool(self, frames):
        """Which sources can give clips of `frames` frames: an epoch opens each of them once."""
        return self.all if frames == 1 or self.image_sequences else self.videos

    def check(self, bucket):
        if not len(self.pool(bucket.frames)):
            raise DataError(f"the data holds only images, which give no clips of {bucket.frames} frames: clips of 1 "
                            "frame are wanted, or image_sequences=true of train.py for clips of unrelated images")

    def __getitem__(self, key):
        """{"video": uint8 T 3 H W tensor (memory order T H W 3), "notes": [(path, what was odd)], "origin": {...}}

        The origin names the file (its key), the first frame, the frames' spacing, the crop and the flip.
        """
        sample, = self.samples(key, [key.part])
        return sample

    def __getitems__(self, keys):
        """The samples of several keys; a file is opened once for those that differ in `part` alone."""
        if self.clips_per_open == 1:
            return [self[key] for key in keys]
        files, found = {}, {}
        for key in keys:
            files.setdefault(key._replace(part=0), []).append(key.part)
        for key, parts in files.items():
            found.update((key._replace(part=part), sample) for part, sample in zip(parts, self.samples(key, parts)))
        return [found[key] for key in keys]

    def samples(self, key, parts):
        """Those of `parts`, of one opening."""
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
        """A sample of what was read."""
        own = rng if self.clips_per_open == 1 else np.random.default_rng((*numbers, part))
        clip, cut = finish_clip(frames, size, self.augment, own)
        return {"video": torch.from_numpy(clip).permute(0, 3, 1, 2), "notes": [(source.path, note) for note in odd],
                "origin": {"file": source.key, "first": first, "spacing": spacing, **cut}}

    def batches(self, schedule, workers, pin_memory=False):
        """Batches for a TrainSchedule, without end (see `collate`)."""
        ahead = max(1, 4 // self.clips_per_open)
        return schedule.cut(endless(make_loader(self, workers, pin_memory, ahead, batch_sampler=schedule)))

    def read_parts(self, source, frames, rng, parts):
        """Yields (part, *what `read` gives) for each of `parts`."""
        if self.clips_per_open == 1 or source.is_image:  # of an image: other crops
            clip = self.read(source, frames, rng)
            return ((part, *clip) for part in parts)
        deltas = rng.integers(self.deltas[0], self.deltas[1] + 1, self.clips_per_open)
        return read_clips(source.path, rng.random(), rng.random(self.clips_per_open), frames, deltas, parts,
                          self.max_pixels)

    def read(self, source, frames, rng):
        """(frames, first frame number, spacing, [what was odd])"""
        delta, position = int(rng.integers(self.deltas[0], self.deltas[1] + 1)), rng.random()
        if not source.is_image:
            return read_frames(source.path, position, frames, delta, self.max_pixels)
        more = rng.choice(len(self.images), frames - 1, replace=len(self.images) < frames) if frames > 1 else []
        images = [source, *(self.sources[self.images[i]] for i in more)]
        return [read_image(image.path, self.max_pixels) for image in images], 0, 1, []


def evenly_spread(count, limit):
    """Up to `limit` of the numbers 0 ... count - 1, from the first to the last."""
    return np.linspace(0, count - 1, min(limit, count)).round().astype(int)


class ValClips(Dataset):
    """Fixed clips: of each video `per_video`, evenly spread, consecutive frames, the largest centred square. With a
    limit, of as many of the files, evenly spread over the list. Images as in TrainClips; their sequences are of
    neighbours in the list."""

    def __init__(self, sources, size, frames, per_video=1, limit=0, image_sequences=False,
                 max_pixels=MAX_PIXELS):
        usable = [s for s in sources if frames == 1 or image_sequences or not s.is_image]
        usable = [usable[i] for i in evenly_spread(len(usable), limit or len(usable))]
        items = ((s, (k + 0.5) / per_video) for k in range(per_video) for s in usable if k == 0 or not s.is_image)
        self.items = list(itertools.islice(items, limit or None))
        images = [s.path for s in sources if s.is_image]
        self.sequences = {}  # of an item that is an image: its files
        for i, (source, _) in enumerate(self.items):
            if source.is_image:
                first = len(self.sequences)
                self.sequences[i] = [images[(first + k) % len(images)] for k in range(frames)]
        self.size, self.frames, self.max_pixels = size, frames, max_pixels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        """{"video": uint8 T 3 H W, "notes": [...]}; an unreadable file gives a video of 0 frames and a note."""
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
        """This rank's part, decoded once and kept: [{"video": uint8 T 3 H W}, ...].

        `take_notes` gets each clip's [(path, what was odd)].
        """
        with ThreadPoolExecutor(4) as pool:
            samples = list(pool.map(self.__getitem__, range(rank, len(self), world)))
        for sample in samples:
            take_notes(sample["notes"])
        return [{"video": sample["video"]} for sample in samples if len(sample["video"])]


class TrainSchedule(Sampler):
    """Which samples each micro-batch of this rank holds, without end, from optimizer step `step`, sample `sample` on.

    A step draws one bucket for all ranks, by (seed, step), and takes the next `world * accumulation * batch` samples:
    the same ones however they are spread over ranks and micro-steps. `passed`: what the iteration has given already,
    which the next one leaves out.

    With clips that take several from one opening, so many steps are a block: all take the same bucket and the same
    files, each another clip of a file, so that the clips of a micro-batch are of different files. The iteration then
    gives this rank's samples of a block at once, to one data process, and `cut` makes micro-batches of them.
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
        """Micro-batches of what a loader of this schedule gives."""
        if self.block == 1:
            yield from batches
            return
        begin = self.step - self.step % self.block
        for n, block in enumerate(batches):
            size = self.bucket(begin + n * self.block).batch
            for start in range(0, len(block["video"]), size):
                yield {"video": block["video"][start:start + size], "notes": [] if start else block["notes"]}


def collate(samples):
    """-> {"video": uint8 N T 3 H W (memory order N T H W 3), "notes": [...]}"""
    clips = [s["video"].permute(0, 2, 3, 1) for s in samples]
    video = torch.empty(len(clips), *clips[0].shape, dtype=torch.uint8)
    if get_worker_info():  # here, where an error is told: as a batch is sent, it would be lost, and waited for for ever
        try:
            video.share_memory_()
        except RuntimeError as error:
            raise DataError(f"no shared memory for a batch of {video.nbytes / 1e6:.1f} MB ({error}): set workers "
                            "lower, or give the container more (docker run --shm-size=8g, or --ipc=host)") from None
    torch.stack(clips, out=video)
    return {"video": video.permute(0, 1, 4, 2, 3), "notes": [note for s in samples for note in s["notes"]]}


def endless(loader):
    """The batches of a loader. Its processes take no part in signals that end the run (a terminal or a scheduler sends
    them to all processes at once): only this process acts on them, and the batches go on until it is done.

    With a TrainSchedule, processes that were killed (by a system short of memory, say) are replaced, and no batch is
    lost; DataError if that happens three times without a batch between."""
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
        except DataError as error:  # from a worker it comes with a traceback in its text
            raise DataError(str(error).strip().splitlines()[-1].removeprefix("video_files.DataError: ")) from None
        except (RuntimeError, OSError, EOFError) as error:  # the last two: of a batch whose sender is gone
            if not isinstance(schedule, TrainSchedule) or type(error) is RuntimeError and "exited" not in str(error):
                raise
            killed += 1
    raise DataError("the data processes died three times in a row (is memory short?): set workers lower")


def start_loader(loader):
    """iter(loader); its processes leave signals to this one, which tells them when to end."""
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # inherited by the processes that iter() starts
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_):
    cv2.setNumThreads(0)  # the workers are the parallelism
    torch.set_num_threads(1)
    # PyTorch looks at the parent's id, which is the helper's (see below): this would outlive a killed run, for good.
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(process):
    process.join()
    os._exit(1)


def worker_context():
    """Workers fork from a clean helper process: forking this one, with its threads, can hang them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "cv2"])  # imported once, not once per worker
    return context


def make_loader(clips, workers, pin_memory=False, ahead=4, **kwargs):
    """A DataLoader over `clips` whose processes are clean ones, `ahead` batches each in advance."""
    with warnings.catch_warnings():  # "may create too many workers": the user's number stands
        warnings.simplefilter("ignore", UserWarning)
        return DataLoader(clips, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
                          worker_init_fn=start_worker, persistent_workers=False,
                          generator=torch.Generator(),  # not the global one: each start, a resume's too, draws a seed
                          multiprocessing_context=worker_context() if workers else None,
                          prefetch_factor=ahead if workers else None, **kwargs)
