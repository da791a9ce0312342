"""Latents in files: NAME.latents.npz, which NumPy's ordinary np.load reads.

`latents` is float32 T C h w; `about` is a JSON text with what decoding needs: the model's config, frames per second,
height, width and number of frames of the video, and the tiles it was encoded in. This file works alone with numpy and
torch.
"""
import contextlib
import json
import math
import os
import tokenize
import zipfile

import numpy as np
import torch

LATENTS = ".latents.npz"
# Most bytes of `about`; most unpacked bytes per byte of the file (the files that we write are not compressed).
MAX_ABOUT, MAX_RATIO = 1 << 22, 100


class LatentFileError(Exception):
    """A file of latents that cannot be used; the message names it."""


def in_tiles(tiles):
    return f"in tiles of {tiles}" if tiles else "without tiles"


class LatentWriter:
    """Writes `total` latents to `path`, some at a time; an empty path writes nothing. A context manager: the file gets
    its name when the block ends without an exception. tiles: describes the tiles that the video was encoded in."""

    def __init__(self, path, model, reader, frames, total, tiles=""):
        self.path = path
        self.total, self.file = total, None
        self.about = dict(model_config=model.config, fps=reader.fps, height=reader.height, width=reader.width,
                          frames=frames, tiles=tiles)

    def __enter__(self):
        if self.path:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.temporary = f"{self.path}.{os.getpid()}.tmp"
            self.archive = zipfile.ZipFile(self.temporary, "w")
        return self

    def write(self, latents):
        if not self.path or not latents.shape[1]:
            return
        array = latents[0].float().cpu().numpy()
        if self.file is None:
            self.file = self.archive.open("latents.npy", "w", force_zip64=True)
            header = dict(descr="<f4", fortran_order=False, shape=(self.total, *array.shape[1:]))
            np.lib.format.write_array_header_1_0(self.file, header)
        self.file.write(np.ascontiguousarray(array).tobytes())

    def __exit__(self, error_type, *_):
        if not self.path:
            return
        try:
            with self.archive:  # closes it also if the disk is full
                if self.file is not None:
                    self.file.close()
                if error_type is None:
                    with self.archive.open("about.npy", "w") as file:
                        np.lib.format.write_array(file, np.array(json.dumps(self.about)))
            if error_type is None:
                os.replace(self.temporary, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.temporary)


class LatentReader:
    """Reads such a file latent by latent. LatentFileError if it is damaged, foreign, or from a model that does not
    match. `note`: a warning, or "", if it is from another variant, or was encoded in other tiles than `tiles`, those of
    the decoder."""

    def __init__(self, path, model, tiles=""):
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
            parts = [self.archive.getinfo(name) for name in ("about.npy", "latents.npy")]
            if parts[0].file_size > MAX_ABOUT or parts[1].file_size > MAX_RATIO * os.path.getsize(path):
                raise LatentFileError(f"{path}: {sum(part.file_size for part in parts)} bytes in a file of "
                                      f"{os.path.getsize(path)}: these are no latents")
            for part in parts:
                with self.archive.open(part) as file:
                    while file.read(1 << 20):  # to its end, where zipfile compares the checksum
                        pass
            with self.archive.open("about.npy") as file:
                about = json.loads(str(np.lib.format.read_array(file, allow_pickle=False)))
            with self.archive.open("latents.npy") as file:
                self.shape, dtype = self.header(file)
                if parts[1].file_size - file.tell() != dtype.itemsize * math.prod(self.shape):
                    raise ValueError(f"{parts[1].file_size} bytes for latents {self.shape}")
            self.fps, self.height, self.width = float(about["fps"]), int(about["height"]), int(about["width"])
            self.frames, made_by = int(about["frames"]), about["model_config"]
            if min(self.frames, self.height, self.width, *self.shape) < 1:
                raise ValueError(f"{self.frames} frames of {self.height}x{self.width}, latents {self.shape}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, EOFError, zipfile.BadZipFile, RuntimeError,
                NotImplementedError, MemoryError, tokenize.TokenError) as error:  # the last by NumPy, of a header
            raise LatentFileError(f"{path}: no file of latents, or damaged ({error})") from None
        factor = model.space_factor
        needed = (-(-self.height // factor), -(-self.width // factor))
        made_by = made_by if isinstance(made_by, dict) else {}
        if dtype != np.float32 or len(self.shape) != 4 or self.shape[1:] != (model.latent_channels, *needed) \
                or made_by.get("encoder_time_downscale") != model.config.get("encoder_time_downscale"):
            keys = sorted({*made_by, *model.config})
            other = [f"{key} {made_by.get(key)}, here {model.config.get(key)}" for key in keys
                     if made_by.get(key) != model.config.get(key)]
            raise LatentFileError(f"{path}: latents {self.shape} of a {self.height}x{self.width} video are not this "
                                  f"model's: {'; '.join(other)[:300] or 'another shape'}")
        self.note, self.total = "", self.shape[0]
        if made_by.get("variant") != model.config.get("variant"):
            self.note = f"{path}: made by variant {made_by.get('variant')}, decoded by {model.config.get('variant')}"
        elif about.get("tiles", "") != tiles:
            self.note = f"{path}: encoded {in_tiles(about.get('tiles', ''))}, decoded {in_tiles(tiles)}"

    @staticmethod
    def header(file):
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject:
            raise ValueError("unexpected array layout")
        return shape, dtype

    def __iter__(self):
        """Yields float32 tensors 1 1 C h w."""
        size = 4 * int(np.prod(self.shape[1:]))
        with self.archive.open("latents.npy") as file:
            self.header(file)
            for _ in range(self.shape[0]):
                chunk = file.read(size)
                if len(chunk) != size:
                    raise LatentFileError(f"{self.path}: ends too early")
                yield torch.frombuffer(bytearray(chunk), dtype=torch.float32).view(1, 1, *self.shape[1:])
