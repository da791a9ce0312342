"""The files of a latent cache: what latent_cache.py writes and training reads.

    cache = LatentCache("cache/")                     # memory-mapped; DataError if it is not whole
    cache.read([0, 5])                                # {"video": uint8 2 T 3 H W, "latents": 2 T' C h w, ...}
    train, val, held_out = cache.split(0.1, seed=0, val_clips=64)

A cache is a folder of shards, whose arrays NumPy can open. A shard has three files: shard_00000.clips.npy (uint8
N T H W 3, RGB), shard_00000.latents.npy (N T' C h w, float16, or the 16 bits of bfloat16; absent without a teacher) and
shard_00000.json (where each clip was cut from). index.json holds the teacher, the shapes and the checksums.
"""
import collections
import contextlib
import errno
import functools
import json
import math
import os
import re
import resource
import tokenize
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data as datasets
from data_files import Source, split_sources
from model_taehv import check_cogvideox_frames
from untrusted import SETTINGS, open_regular, read_json
from video_files import DataError

FORMAT = 1
MAX_INDEX, MAX_ORIGINS = 1 << 26, 1 << 28  # bytes of JSON: an index of 300 000 shards; origins of a million clips
ARRAYS = "clips.npy", "latents.npy"
NO_TEACHER = "none"
STORED = {"float16": np.float16, "bfloat16": np.uint16}
# Recognises a teacher with CogVideoX's latents by its name, in older caches that do not store pools_pairs.
OF_COGVIDEOX = re.compile(r"AutoencoderKLCogVideoX|\(taecvx\)|variant taecvx")


class LatentCache:
    """A finished cache, memory-mapped. DataError, in one line, if it is not complete, damaged or not a cache.

    Attributes: `frames`, `size`, `latent_shape` (T', C, h, w), `teacher` (spec, name, fingerprint, precision,
    pools_pairs), `origins` (a dict for each clip: file, first, spacing, crop, flip). `problem` reads the files and
    compares their checksums. `check_alignment` checks that the latents suit a model. With `clips_only` the latents are
    not opened, and may be absent. Do not send this object to other processes: that would copy its arrays.
    """

    def __init__(self, path, clips_only=False):
        self.path, self.what = path, "clip cache" if clips_only else "latent cache"
        try:
            index = read_json(os.path.join(path, "index.json"), MAX_INDEX)
            if index["format"] != FORMAT:
                raise DataError(f"{self.what} {path}: format {index['format']}, this program reads {FORMAT}: build "
                                "it again")
            if index.pop("crc32") != index_crc(index):
                raise DataError(f"{self.what} {path}: index.json is damaged (its checksum does not match): run its "
                                "latent_cache.py command again with the shards in place")
            if not index["complete"]:
                raise DataError(f"{self.what} {path}: not finished: run its latent_cache.py command again")
            self.frames, self.size, self.teacher = int(index["frames"]), int(index["size"]), dict(index["teacher"])
            self.latent_shape = tuple(int(n) for n in index["latents"])
            self.dtype = index["latent_dtype"]
            self.made_from = dict(index.get("sampling") or {}).get("data")  # a hash of its files' names and lengths
            if self.teacher.get("spec") == NO_TEACHER and not clips_only:
                raise DataError(f"{self.what} {path}: holds clips without latents: set clip_cache={path}")
            self.checksums = [(int(s["clips"]), dict(s["crc32"])) for s in index["shards"]]
            if odd := {kind for _, crcs in self.checksums for kind in crcs} - {*ARRAYS, "json"}:
                raise ValueError(f"a shard has no part {min(odd)!r}")
            self.starts = np.cumsum([0, *(n for n, _ in self.checksums)])
            allow_open_files(2 * len(self.checksums))
            self.clips, self.latents, names, numbers = [], [], {}, []
            for i, (count, _) in enumerate(self.checksums):
                self.clips.append(self.open(i, "clips", (count, self.frames, self.size, self.size, 3), np.uint8))
                if not clips_only:
                    self.latents.append(self.open(i, "latents", (count, *self.latent_shape), STORED[self.dtype]))
                numbers += [names.setdefault(str(origin["file"]), len(names)) for origin in self.read_origins(i)]
            self.fingerprint = str(self.teacher["fingerprint"])
            self.names, self.file_of = list(names), np.array(numbers, np.int32)  # clip i comes from names[file_of[i]]
        except FileNotFoundError as error:
            raise DataError(f"{self.what} {path}: {os.path.basename(error.filename)} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if getattr(error, "errno", None) == errno.EMFILE:
                raise DataError(f"{self.what} {path}: {len(self.checksums)} shards are more files than this system "
                                "lets a process open: raise that (ulimit -n), or build it with a larger "
                                "--shard-clips") from None
            raise DataError(f"{self.what} {path}: damaged, or no cache ({type(error).__name__}: "
                            f"{checkpoint.first_line(error)})") from None
        if len(self.file_of) != len(self) or not len(self):
            raise DataError(f"{self.what} {path}: damaged ({len(self.file_of)} origins for {len(self)} clips)")

    def __len__(self):
        return int(self.starts[-1])

    def open(self, i, kind, shape, dtype):
        array = open_array(shard_path(self.path, i, kind + ".npy"))
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"shard {i}: {kind} of shape {array.shape}, {shape} expected")
        return array

    def read_origins(self, i):
        # The origins are smaller than the clips: a longer file is damaged or forged.
        most = SETTINGS + os.path.getsize(shard_path(self.path, i, "clips.npy"))
        return read_json(shard_path(self.path, i, "json"), min(most, MAX_ORIGINS))["origins"]

    @functools.cached_property
    def origins(self):  # for a million clips they take a gigabyte
        return [origin for i in range(len(self.checksums)) for origin in self.read_origins(i)]

    @functools.cached_property
    def files(self):
        return [self.names[n] for n in self.file_of]

    @property
    def clip_bytes(self):
        return sum(array.nbytes for array in self.clips)

    def locate(self, i):
        """(number of the shard, row in the shard) of clip i."""
        shard = np.searchsorted(self.starts, i, side="right") - 1
        return shard, i - self.starts[shard]

    def clip(self, i):
        """Stored clip i, uint8 T H W 3, memory-mapped."""
        shard, row = self.locate(i)
        return self.clips[shard][row]

    def problem(self, rank=0, world=1, most=math.inf):
        """Compare the checksums of this rank's part of the files. Returns one line that names a damaged file, or "". If
        the clips of the cache take more than `most` bytes, their files are left out."""
        parts = {"json"} | ({"clips.npy"} if self.clip_bytes <= most else set())
        parts |= {"latents.npy"} if self.latents else set()
        files = [(i, kind, crcs[kind]) for i, (_, crcs) in enumerate(self.checksums) for kind in sorted(crcs)
                 if kind in parts]
        size = self.clip_bytes + sum(array.nbytes for array in self.latents)
        for i, kind, crc in tqdm(files[rank::world], desc=f"checking the {self.what}", unit="file", leave=False,
                                 disable=rank > 0 or size < 4e9):
            name = shard_path(self.path, i, kind)
            if file_crc(name) != crc:
                return (f"{self.what} {self.path}: {os.path.basename(name)} is damaged (its checksum does not match): "
                        f"remove shard_{i:05d}.json and run its latent_cache.py command again")
            if kind == "latents.npy" and not is_finite(self.latents[i], self.dtype):
                return (f"{self.what} {self.path}: {os.path.basename(name)} holds latents that are not finite: build "
                        "it again")
        return ""

    def check_alignment(self, model):
        """DataError unless each latent stands for the same frames as in `model`, a TAEHV or one that holds one."""
        pairs = self.teacher.get("pools_pairs", True if OF_COGVIDEOX.search(str(self.teacher.get("name"))) else None)
        try:
            if pairs:
                check_cogvideox_frames(self.frames)
            model.aligned(self.frames, self.latent_shape[0])
        except ValueError as error:
            raise DataError(f"latent cache {self.path}: {error}: build another") from None
        taehv = getattr(model, "taehv", model)
        if pairs is not None and pairs != taehv.is_cogvideox and self.latent_shape[0] % 2 == 0:
            way_out = "variant=taecvx" if pairs else "another variant than taecvx"
            raise DataError(f"latent cache {self.path}: {self.latent_shape[0]} latents of {self.teacher['name']} stand "
                            f"for other frames than those of variant {taehv.variant}: set {way_out}")

    def read(self, indices):
        """{"video": uint8 N T 3 H W (memory order N T H W 3), "latents": N T' C h w as in read_latents, "notes": []}"""
        clips = np.empty((len(indices), *self.clips[0].shape[1:]), np.uint8)
        for n, i in enumerate(indices):
            clips[n] = self.clip(i)
        return {"video": torch.from_numpy(clips).permute(0, 1, 4, 2, 3), "notes": [],
                "latents": self.read_latents(indices)}

    def read_latents(self, indices):
        """N T' C h w, in the stored dtype: float16 or bfloat16."""
        latents = np.empty((len(indices), *self.latent_shape), STORED[self.dtype])
        for n, i in enumerate(indices):
            shard, row = self.locate(i)
            latents[n] = self.latents[shard][row]
        if self.dtype == "bfloat16":
            return torch.from_numpy(latents.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(latents)

    def all(self, seed, val_clips):
        return CachedClips(self, range(len(self)), seed, val_clips)

    def split(self, val_fraction, seed, val_clips):
        """(training CachedClips, validation CachedClips, [held-out files]), see `split_by_file`."""
        *parts, held_out = self.split_by_file(val_fraction)
        train, val = (CachedClips(self, part, seed, val_clips) for part in parts)
        return train, val, held_out

    def split_by_file(self, val_fraction):
        """(numbers of the training clips, numbers of the validation clips, [held-out files]), by `split_sources`."""
        held_out = {s.key for s in split_sources([Source(f, f) for f in self.names], val_fraction)[1]}
        is_val = np.array([name in held_out for name in self.names], bool)[self.file_of]
        return np.flatnonzero(~is_val), np.flatnonzero(is_val), sorted(held_out)


class CachedClips:
    """Some clips of a LatentCache, for training or validation, with the methods of `data.TrainClips` and
    `data.ValClips`. indices: their numbers in the cache; limit: number of validation clips at most."""

    clips_per_open = 1  # see data.TrainSchedule

    def __init__(self, cache, indices, seed=0, limit=64):
        self.cache, self.indices, self.seed, self.limit = cache, np.asarray(indices, np.int64), seed, limit

    def __len__(self):
        return len(self.indices)

    def pool(self, _):
        return self.indices

    def check(self, bucket):
        """DataError if the bucket's shape is not that of the cache."""
        if (bucket.size, bucket.frames) != (self.cache.size, self.cache.frames):
            raise DataError(f"size={bucket.size} frames={bucket.frames}, but the latent cache {self.cache.path} holds "
                            f"clips of size={self.cache.size} frames={self.cache.frames}: set these, or build another")

    def batches(self, schedule, workers, pin_memory=False):
        """Endless batches for a TrainSchedule, as `LatentCache.read` returns them. `workers` threads (1 to 8) read one
        batch each: a network file system answers several requests at once."""
        def make(keys):
            positions = [datasets.epoch_order(self.seed, key.epoch, len(self))[key.index] for key in keys]
            batch = self.cache.read(self.indices[positions])
            return {k: v.pin_memory() if pin_memory and torch.is_tensor(v) else v for k, v in batch.items()}
        return read_ahead(make, schedule, threads=min(8, max(1, workers)))

    def share(self, rank, world, _):
        """This rank's part of up to `limit` clips, evenly spaced: [{"video": uint8 T 3 H W, "latents": T' C h w}]."""
        chosen = self.indices[datasets.evenly_spread(len(self), self.limit)]
        batches = [self.cache.read([i]) for i in chosen[rank::world]]
        return [{"video": b["video"][0], "latents": b["latents"][0]} for b in batches]

    def sample(self, limit):
        """The latents of up to `limit` clips, evenly spaced: N T' C h w, float32."""
        return self.cache.read_latents(self.indices[datasets.evenly_spread(len(self), limit)]).float()


def read_ahead(make, schedule, threads=1):
    """Yields make(keys) for the keys of an endless schedule, in order. Threads call make() ahead of time; closing the
    generator ends them. DataError if a file cannot be read."""
    with ThreadPoolExecutor(threads) as pool:
        keys = iter(schedule)
        ready = collections.deque(pool.submit(make, next(keys)) for _ in range(threads + 1))
        while True:
            try:
                item = ready.popleft().result()
            except (OSError, ValueError) as error:
                raise DataError(f"the cache cannot be read: {error}") from None
            ready.append(pool.submit(make, next(keys)))
            yield item


def allow_open_files(count):
    """Raise this process's limit of open files to `count` and some more, as far as the system allows. Each
    memory-mapped array is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_finite(latents, dtype):
    """Whether a shard's stored latents are finite. A bfloat16 that is not has all bits of its exponent set."""
    return all(((one & 0x7f80) != 0x7f80 if dtype == "bfloat16" else np.isfinite(one)).all() for one in latents)


def shard_path(folder, i, kind):
    """The path of a file of shard i. kind: the end of its name, such as "clips.npy"."""
    return os.path.join(folder, f"shard_{i:05d}.{kind}")


def index_crc(index):
    """The checksum of an index that does not hold its checksum yet."""
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


def write_index(folder, index):
    """Write index.json with its checksum, atomically."""
    content = json.dumps({**index, "crc32": index_crc(index)}, indent=1)
    checkpoint.write_atomically(os.path.join(folder, "index.json"), content.encode())


def file_crc(path):
    """The CRC-32 of a file's contents."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


class ShardWriter:
    """A context manager that writes one shard, batch by batch. If its block ends without an exception, the files get
    their final names, and the .json is written last. Otherwise they are removed."""

    def __init__(self, folder, i, count):
        self.folder, self.i, self.count = folder, i, count
        self.files, self.crc32, self.origins = {}, {}, []
        self.open = contextlib.ExitStack()  # closes both files, even if closing one of them fails on a full disk

    def __enter__(self):
        return self

    def write(self, kind, array):
        """Append rows to the shard. kind: "clips" or "latents"; array: N rows of it."""
        name = kind + ".npy"
        if name not in self.files:
            temporary = f"{shard_path(self.folder, self.i, name)}.{os.getpid()}.tmp"
            self.files[name] = self.open.enter_context(open(temporary, "w+b"))
            header = dict(descr=np.lib.format.dtype_to_descr(array.dtype), fortran_order=False,
                          shape=(self.count, *array.shape[1:]))
            np.lib.format.write_array_header_1_0(self.files[name], header)
            self.files[name].flush()
            self.crc32[name] = file_crc(self.files[name].name)
        content = np.ascontiguousarray(array).tobytes()
        self.files[name].write(content)
        self.crc32[name] = zlib.crc32(content, self.crc32[name])

    def __exit__(self, error_type, *_):
        try:
            with self.open:
                for file in self.files.values():
                    file.flush()
                    os.fsync(file.fileno())
            if error_type is None:
                for name, file in self.files.items():
                    os.replace(file.name, shard_path(self.folder, self.i, name))
                about = json.dumps({"clips": self.count, "crc32": self.crc32, "origins": self.origins})
                checkpoint.write_atomically(shard_path(self.folder, self.i, "json"), about.encode())
        finally:
            for file in self.files.values():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(file.name)


def open_array(path):
    """A .npy file as a memory-mapped array, read-only. OSError or ValueError if it cannot be opened."""
    try:
        with open_regular(path) as file:
            if np.lib.format.read_magic(file) != (1, 0):  # in later versions a header may take 4 GB
                raise ValueError(f"{path}: not of version 1 of .npy files")
        return np.lib.format.open_memmap(path, mode="r")
    except tokenize.TokenError as error:  # NumPy raises it for some damaged headers
        raise ValueError(f"{path}: damaged header ({error})") from None


def shard_is_done(out, i, count, kinds=ARRAYS):
    """Whether shard i is there, complete, with `count` clips."""
    try:
        about = read_json(shard_path(out, i, "json"), MAX_ORIGINS)
        arrays = [open_array(shard_path(out, i, kind)) for kind in kinds]
        return about["clips"] == count and set(about["crc32"]) == set(kinds) and all(len(a) == count for a in arrays)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
