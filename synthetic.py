"""The demo set: short synthetic clips of drawn scenes. Streets with cars, boats at sea, balloons over hills.

This file works alone with numpy and opencv-python.
"""
import glob
import os
import re
import shutil
import time

import cv2
import numpy as np

KINDS = "street", "sea", "balloons"
SKIES = (((230, 170, 90), (250, 225, 190)), ((150, 90, 60), (120, 170, 245)), ((190, 180, 170), (225, 220, 215)),
         ((120, 60, 70), (160, 130, 240)))  # day, dusk, clouded, evening: BGR at the top and at the horizon


def make_demo(folder, videos=24, frames=40, size=128, seed=0):
    """Write `videos` synthetic clips (train/), and a quarter as many more (val/), unless the folder exists already.

    A third are streets, a third the sea, a third balloons, each with random numbers of its own. It takes seconds.
    """
    if os.path.isdir(folder):
        return
    for other in glob.glob(f"{glob.escape(folder)}.*.tmp"):  # an old one is a killed process's: writing takes seconds
        if re.fullmatch(r".*\.\d+\.tmp", other) and time.time() - os.path.getmtime(other) > 600:
            shutil.rmtree(other, ignore_errors=True)
    building = f"{folder}.{os.getpid()}.tmp"
    try:
        write_clips(building, videos, frames, size, seed)
        os.rename(building, folder)
    except OSError:
        if not os.path.isdir(folder):  # else another process has made the same clips meanwhile
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_clips(folder, videos, frames, size, seed):
    """Write `videos` videos in folder/train and a quarter as many in folder/val. OSError if one is not complete."""
    for part, count in (("train", videos), ("val", videos // 4)):
        os.makedirs(os.path.join(folder, part), exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng((seed, part == "val", i))
            clip = demo_clip(KINDS[i % 3], frames, size, rng)
            path = os.path.join(folder, part, f"{KINDS[i % 3]}_{i:02d}.mp4")
            writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 25, (size, size))
            if not writer.isOpened():
                raise OSError(f"{path!r} cannot be written")
            for frame in clip:
                writer.write(frame)
            writer.release()
            if cv2.VideoCapture(path, cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT) != frames:  # no error by OpenCV
                raise OSError(f"{path!r} is not whole; is the disk full?")


def demo_clip(kind, frames, size, rng):
    """A clip, a list of H W 3 uint8, BGR: a camera pans slowly over a drawn scene in which things move. kind: of KINDS.
    """
    side, clip = 2 * size, []  # drawn at twice the size, for smooth edges
    world, movers = SCENES[kind](side, rng)
    start, pan = rng.uniform(0.2, 0.8) * side, rng.uniform(-1, 1) * side / 100
    for t in range(frames):
        left = float(np.clip(start + pan * t, 0, side))
        frame = cv2.warpAffine(world, np.float32([[1, 0, -left], [0, 1, 0]]), (side, side))
        for draw in movers:
            draw(frame, t, left)
        clip.append(cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA))
    return clip


# ---- scenes: (the background, side x 2*side x 3 uint8; functions that draw what moves) ------------------------------
#
# Such a function gets a frame to draw into, its number, and the position of its left edge in the scene.


def street(side, rng):
    world, ground, x = sky(side, rng), int(0.8 * side), 0.0
    hills(world, 0.62, 0.08, colour(rng, 40, 130), rng)
    while x < 2 * side:
        width = rng.uniform(0.22, 0.42) * side
        (house if rng.random() < 0.7 else tree)(world, x, ground, width, rng)
        x += width * rng.uniform(1.0, 1.3)
    world[ground:] = rough(np.full((side - ground, 2 * side, 3), rng.uniform(70, 110), np.float32), 8, rng)
    for x in range(0, 2 * side, side // 5):
        box(world, x, 0.89 * side, side / 10, side / 60, (210, 220, 225))
    return world, [car(side, row, rng) for row in (0.87, 0.97)]


def sea(side, rng):
    world, horizon = sky(side, rng), int(0.55 * side)
    if rng.random() < 0.6:
        lighthouse(world, rng.uniform(0.6, 1.4) * side, horizon, rng)
    deep, phases = colour(rng, 60, 120) * (1.6, 1.0, 0.5), rng.uniform(0, 6, 4)
    rows = np.linspace(0, 1, side - horizon)[:, None]
    length = 0.004 + 0.05 * rows  # waves are longer near the camera

    def waves(frame, t, left):
        x = (np.arange(side)[None] + left) / side
        height = sum(np.sin(x * (k + 1) / (8 * length) + rows / length * (2 + k % 2)
                            + (-1) ** k * (0.3 + 0.1 * k) * t + phase) for k, phase in enumerate(phases)) / 4
        light = 0.75 + 0.25 * rows + 0.35 * height * (0.3 + rows)
        frame[horizon:] = np.clip(light[..., None] * deep + 25, 0, 255)
    return world, [waves, *(boat(side, horizon, rng) for _ in range(rng.integers(2, 5)))]


def balloons(side, rng):
    world = sky(side, rng)
    for height, low in ((0.62, 90), (0.74, 60), (0.86, 40)):
        hills(world, height, 0.07, colour(rng, low, low + 60) * (0.7, 1.2, 0.8), rng)
    for _ in range(rng.integers(4, 9)):
        tree(world, rng.uniform(0, 2 * side), rng.uniform(0.85, 0.98) * side, rng.uniform(0.1, 0.2) * side, rng)
    return world, [balloon(side, rng) for _ in range(rng.integers(2, 5))]


SCENES = {"street": street, "sea": sea, "balloons": balloons}


# ---- backgrounds -----------------------------------------------------------------------------------------------------


def colour(rng, low, high):
    return rng.uniform(low, high, 3)


def rough(image, strength, rng):
    """The image, float32, with noise of two scales."""
    height, width = image.shape[:2]
    for cell in (2, 7):
        noise = rng.normal(0, strength, (height // cell + 1, width // cell + 1, 1)).astype(np.float32)
        image = image + cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    return np.clip(image, 0, 255)


def sky(side, rng):
    """A gradient, clouds and a sun: side x 2 side x 3."""
    above, below = (np.array(tone, np.float32) for tone in SKIES[rng.integers(len(SKIES))])
    down = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    image = np.repeat(above * (1 - down) + below * down, 2 * side, 1)
    sun = rng.uniform(0.3, 1.7) * side, rng.uniform(0.1, 0.4) * side
    oval(image, *sun, side / 14, side / 14, (170, 235, 255))
    clouds = sum(cv2.resize(rng.normal(0, 0.5 ** k, (4 * 2 ** k, 5 * 2 ** k)).astype(np.float32), (2 * side, side),
                            interpolation=cv2.INTER_CUBIC) for k in range(4))
    alpha = np.clip((clouds - 0.3) * 1.2, 0, 0.9)[..., None] * (1 - down)
    return (image * (1 - alpha) + 250 * alpha).astype(np.uint8)


def hills(world, level, height, tone, rng):
    """A ridge of sines about `level`, a fraction of the height, filled with a rough `tone` below."""
    side = len(world)
    x = np.linspace(0, 4 * np.pi, 2 * side)
    ridge = level + height * sum(np.sin(x * f + rng.uniform(0, 6)) / f for f in (0.7, 1.6, 3.7))
    below = (np.arange(side)[:, None] > ridge * side)[..., None]
    np.copyto(world, rough(np.full(world.shape, tone, np.float32), 9, rng).astype(np.uint8), where=below)


def box(image, x, y, width, height, tone):
    cv2.rectangle(image, (int(x), int(y)), (int(x + width), int(y + height)), tuple(map(float, tone)), -1)


def shape(image, points, tone):
    cv2.fillPoly(image, [np.array(points, np.int32)], tuple(map(float, tone)), cv2.LINE_AA)


def oval(image, x, y, width, height, tone):
    cv2.ellipse(image, (int(x), int(y)), (int(width), int(height)), 0, 0, 360, tuple(map(float, tone)), -1, cv2.LINE_AA)


def house(world, x, ground, width, rng):
    height, gable, wall = rng.uniform(1.0, 1.6) * width, rng.uniform(0.3, 0.6) * width, colour(rng, 110, 230)
    top = ground - height
    box(world, x, top, width, height, wall)
    shape(world, [(x - 0.08 * width, top), (x + width / 2, top - gable), (x + 1.08 * width, top)],
          wall * (0.4, 0.4, 0.6))
    columns, floors = rng.integers(2, 4, 2)
    wide, high = width / columns, height / (floors + 1)
    for i in range(columns):
        for j in range(floors):
            left, upper = x + (i + 0.25) * wide, top + (j + 0.2) * high
            box(world, left - 2, upper - 2, wide / 2 + 4, high / 2 + 4, wall * 0.7)
            box(world, left, upper, wide / 2, high / 2, (150, 225, 250) if rng.random() < 0.4 else (90, 70, 60))
    box(world, x + 0.4 * width, ground - 0.22 * height, 0.2 * width, 0.22 * height, wall * 0.45)


def lighthouse(world, x, ground, rng):
    side = len(world)
    oval(world, x, ground, 0.25 * side, 0.08 * side, colour(rng, 50, 90))
    for k in range(4):
        width = (0.1 - 0.01 * k) * side
        box(world, x - width / 2, ground - 0.085 * (k + 2) * side, width, 0.087 * side,
            (60, 50, 200) if k % 2 else (235, 240, 240))
    box(world, x - side / 60, ground - 0.47 * side, side / 30, 0.05 * side, (120, 230, 250))


def tree(world, x, ground, width, rng):
    box(world, x + 0.44 * width, ground - 0.6 * width, 0.12 * width, 0.6 * width, (40, 60, 90))
    green = colour(rng, 40, 90) * (0.8, 1.7, 1.0)
    for _ in range(9):
        centre = x + rng.uniform(0.2, 0.8) * width, ground - rng.uniform(0.5, 1.1) * width
        oval(world, *centre, *[rng.uniform(0.14, 0.26) * width] * 2, green * rng.uniform(0.75, 1.3))


# ---- what moves ------------------------------------------------------------------------------------------------------


def car(side, row, rng):
    tone, start, length = colour(rng, 30, 230), rng.uniform(0, 2) * side, rng.uniform(0.25, 0.35) * side
    speed = rng.choice([-1, 1]) * rng.uniform(0.01, 0.03) * side

    def draw(frame, t, left):
        x, y = (start + speed * t) % (2.5 * side) - length - left, row * side
        box(frame, x, y - 0.2 * length, length, 0.2 * length, tone)
        cabin = (0.15, -0.2), (0.3, -0.4), (0.7, -0.4), (0.88, -0.2)
        shape(frame, [(x + length * a, y + length * b) for a, b in cabin], tone * 0.6)
        for wheel in (0.22, 0.78):
            for radius, grey in ((0.1, 30), (0.05, 170)):
                oval(frame, x + wheel * length, y, radius * length, radius * length, (grey,) * 3)
    return draw


def boat(side, horizon, rng):
    size, start, speed = rng.uniform(0.06, 0.16) * side, rng.uniform(0, 2) * side, rng.uniform(-0.006, 0.006) * side
    level, hull, sail, phase = horizon + 1.8 * size, colour(rng, 20, 140), colour(rng, 150, 255), rng.uniform(0, 6)

    def draw(frame, t, left):
        x, y = start + speed * t - left, level + 0.08 * size * np.sin(0.25 * t + phase)
        for points, tone in ((((-1, 0), (1, 0), (0.7, 0.35), (-0.7, 0.35)), hull),
                             (((-0.05, -0.1), (-0.05, -1.8), (-0.8, -0.1)), sail),
                             (((0.05, -0.1), (0.05, -1.5), (0.7, -0.1)), sail * 0.85)):
            shape(frame, [(x + size * a, y + size * b) for a, b in points], tone)
    return draw


def balloon(side, rng):
    radius, tones = rng.uniform(0.09, 0.19) * side, (colour(rng, 30, 240), colour(rng, 60, 255))
    start, height = rng.uniform(0, 2) * side, rng.uniform(0.2, 0.8) * side
    rise, phase = rng.uniform(-0.006, 0.002) * side, rng.uniform(0, 6)

    def draw(frame, t, left):
        x, y = start - left + 0.15 * radius * np.sin(0.12 * t + phase), height + rise * t
        ropes = (-0.6, 0.75), (0.6, 0.75), (0.15, 1.5), (-0.15, 1.5)
        shape(frame, [(x + radius * a, y + radius * b) for a, b in ropes], tones[0] * 0.8)
        for stripe, part in enumerate((1, 0.72, 0.42, 0.14)):
            oval(frame, x, y, part * radius, 1.1 * radius, tones[stripe % 2])
        box(frame, x - 0.18 * radius, y + 1.55 * radius, 0.36 * radius, 0.3 * radius, (50, 80, 120))
    return draw
