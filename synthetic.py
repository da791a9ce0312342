"""The demo set: short synthetic clips. Moving textured shapes, camera pans over noise of several scales, and fades.

This file works alone with numpy and opencv-python.
"""
import glob
import os
import re
import shutil
import time

import cv2
import numpy as np


def make_demo(folder, videos=24, frames=40, size=96, seed=0):
    """Write `videos` synthetic clips (train/) and a quarter as many more (val/) unless they are there already.

    Moving textured shapes, camera pans over noise of several scales, and fades between two of these; seconds to make.
    """
    if os.path.isdir(folder):
        return
    for other in glob.glob(f"{glob.escape(folder)}.*.tmp"):  # a killed process's: it takes seconds
        if re.fullmatch(r".*\.\d+\.tmp", other) and time.time() - os.path.getmtime(other) > 600:
            shutil.rmtree(other, ignore_errors=True)
    building = f"{folder}.{os.getpid()}.tmp"
    try:
        write_clips(building, videos, frames, size, seed)
        os.rename(building, folder)
    except OSError:
        if not os.path.isdir(folder):  # or another process has made them meanwhile: they are the same
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_clips(folder, videos, frames, size, seed):
    for part, count in (("train", videos), ("val", videos // 4)):
        os.makedirs(os.path.join(folder, part), exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng((seed, part == "val", i))
            clip = demo_clip(i % 3, frames, size, rng)
            path = os.path.join(folder, part, f"{('shapes', 'pan', 'fade')[i % 3]}_{i:02d}.mp4")
            writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 25, (size, size))
            if not writer.isOpened():
                raise OSError(f"{path!r} cannot be written")
            for frame in clip:
                writer.write(frame)
            writer.release()
            if cv2.VideoCapture(path, cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT) != frames:  # OpenCV says nothing
                raise OSError(f"{path!r} is not whole; is the disk full?")


def demo_clip(kind, frames, size, rng):
    """kind 0: shapes over noise, 1: a pan, 2: a fade between the two. Returns T H W 3 uint8."""
    if kind == 2:
        a, b = demo_clip(0, frames, size, rng), demo_clip(1, frames, size, rng)
        weight = np.linspace(0, 1, frames)
        return [cv2.addWeighted(p, 1 - w, q, w, 0) for p, q, w in zip(a, b, weight)]
    world = demo_texture(3 * size, rng)
    start, speed = rng.uniform(0, size, 2) + size / 2, rng.uniform(-1, 1, 2) * (2.0 if kind else 0.5)
    shapes = [] if kind else [(rng.uniform(0, size, 2), rng.uniform(-2.5, 2.5, 2), rng.uniform(0.08, 0.3) * size,
                               rng.uniform(-0.1, 0.1), int(rng.integers(2)), demo_texture(size, rng))
                              for _ in range(rng.integers(2, 6))]
    clip = []
    for t in range(frames):
        move = np.float32([[1, 0, -(start + speed * t)[0]], [0, 1, -(start + speed * t)[1]]])
        frame = cv2.warpAffine(world, move, (size, size), borderMode=cv2.BORDER_REFLECT)
        for place, velocity, radius, spin, sides, texture in shapes:
            x, y = (place + velocity * t) % size
            mask = np.zeros((size, size), np.uint8)
            if sides:
                box = cv2.boxPoints(((float(x), float(y)), (2 * radius, 1.4 * radius), np.degrees(spin * t)))
                cv2.fillConvexPoly(mask, box.astype(np.int32), 255, cv2.LINE_AA)
            else:
                cv2.circle(mask, (int(x), int(y)), int(radius), 255, -1, cv2.LINE_AA)
            alpha = mask[..., None].astype(np.float32) / 255
            frame = (frame * (1 - alpha) + texture * alpha).astype(np.uint8)
        clip.append(frame)
    return clip


def demo_texture(size, rng):
    """Coloured noise: a sum of octaves with random strength, about a random colour."""
    texture = np.full((size, size, 3), rng.uniform(60, 200, 3), np.float32)
    for cells in (3, 8, 24, 72):
        noise = rng.normal(0, rng.uniform(2, 40), (cells, cells, 1)) + rng.normal(0, 8, (cells, cells, 3))
        texture += cv2.resize(noise.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(texture, 0, 255).astype(np.uint8)
