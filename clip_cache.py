"""Training and validation clips from a clip cache. Each reading cuts them anew, as fast as memory is copied.

    cache = LatentCache("clips/", clips_only=True)              # of latent_cache.py, with --teacher none or another
    train_clips, val_clips, held_out = cache.split_by_file(val_fraction=0.05)
    train = TrainCuts(cache, train_clips, seed=0)
    batches = train.batches(TrainSchedule(train, buckets, seed=0), workers=2)

A training clip is a random part of a stored clip: `frames` consecutive frames, and a square of `size` pixels, which is
copied without resizing. So the stored clips should be larger than the training clips. What is cut depends only on
(seed, epoch, index), as in data.py.
"""
import cv2
import numpy as np
import torch

import data
from cache_files import read_ahead
from video_files import DataError


class TrainCuts:
    """Training clips with the methods of `data.TrainClips`. indices: numbers of the cache's clips that are used. The
    min_crop of `augment` has no effect: the stored clips were already cut at random scales."""

    clips_per_open = 1  # see data.TrainSchedule

    def __init__(self, cache, indices, seed=0, augment=data.Augment()):
        self.cache, self.indices, self.seed, self.augment = cache, np.asarray(indices, np.int64), seed, augment

    def __len__(self):
        return len(self.indices)

    def pool(self, _):
        return self.indices

    def check(self, bucket):
        """DataError for a shape that cannot be cut from the cache's clips."""
        check_shape(self.cache, "size", bucket.size, bucket.frames)

    def batches(self, schedule, workers, pin_memory=False):
        """Endless batches for a TrainSchedule: {"video": uint8 N T 3 H W (memory order N T H W 3), "notes": []}.
        `workers` threads (at least one) make one batch each: copies, flips and colours do not hold the GIL."""
        def make(keys):
            size, frames = keys[0].size, keys[0].frames
            video = torch.empty(len(keys), frames, size, size, 3, dtype=torch.uint8, pin_memory=pin_memory)
            for key, clip in zip(keys, video.numpy()):
                self.read(key, clip)
            return {"video": video.permute(0, 1, 4, 2, 3), "notes": []}
        return read_ahead(make, schedule, threads=max(1, workers))

    def read(self, key, clip):
        """Cut the clip of a Key into `clip`, uint8 T H W 3."""
        rng, augment = np.random.default_rng((self.seed, key.epoch, key.index)), self.augment
        order = data.epoch_order(self.seed, key.epoch, len(self))
        stored = self.cache.clip(self.indices[order[key.index]])
        first, top, left = (int(rng.integers(most + 1)) for most in
                            (len(stored) - key.frames, *(side - key.size for side in stored.shape[1:3])))
        flip = augment.flip and rng.random() < 0.5
        stored = stored[first:first + key.frames]
        if augment.random_crop:
            np.copyto(clip, stored[:, top:top + key.size, left:left + key.size])
        else:
            shrink(stored, clip)
        if flip:
            rows = clip.reshape(-1, *clip.shape[2:])  # of all frames, as one image
            cv2.flip(rows, 1, dst=rows)
        if augment.color_jitter > 0 or augment.blur > 0:
            clip[:] = data.colour_and_blur(clip, augment, rng)


class ValCuts:
    """Validation clips, always the same, with the methods of `data.ValClips`: the first frames of up to `limit` stored
    clips, evenly spaced, resized without cropping. setting: name of the setting that holds `size`, for messages.
    DataError for a shape larger than the stored one."""

    def __init__(self, cache, indices, size, frames, limit, setting="val_size"):
        check_shape(cache, setting, size, frames)
        self.cache, self.size, self.frames = cache, size, frames
        self.indices = np.asarray(indices, np.int64)[data.evenly_spread(len(indices), limit)]

    def __len__(self):
        return len(self.indices)

    def share(self, rank, world, _):
        """This rank's clips: [{"video": uint8 T 3 H W}, ...]."""
        return [{"video": self.read(i)} for i in self.indices[rank::world]]

    def read(self, i):
        clip = np.empty((self.frames, self.size, self.size, 3), np.uint8)
        shrink(self.cache.clip(i)[:self.frames], clip)
        return torch.from_numpy(clip).permute(0, 3, 1, 2)


def shrink(stored, clip):
    """Resize a stored clip, uint8 T H W 3, into `clip`, as data.py does."""
    for frame, out in zip(stored, clip):
        if frame.shape == out.shape:
            out[:] = frame
        else:
            cv2.resize(frame, out.shape[1::-1], dst=out, interpolation=cv2.INTER_AREA)


def check_shape(cache, key, size, frames):
    too_large = [f"{key}={size}"] * (size > cache.size) + [f"frames={frames}"] * (frames > cache.frames)
    if too_large:
        raise DataError(f"{' '.join(too_large)}, but the clip cache {cache.path} holds clips of "
                        f"size={cache.size} frames={cache.frames}: set at most these, or build another")
