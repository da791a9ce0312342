"""Pictures of a reconstruction beside its original, and of latents.

    frame = side_by_side([original, reconstruction], ["original", "reconstruction"])
    picture = latent_picture(latents)                      # save with cv2.imwrite(path, picture[..., ::-1])

Frames and pictures are RGB uint8 H W 3 in [0, 255]. This file works alone with numpy and OpenCV.
"""
import math

import cv2
import numpy as np

DARK, LIGHT, ALARM = (24, 24, 24), (232, 232, 232), (255, 0, 255)


def _strip(text, width, height, colour=LIGHT):
    """A dark strip, uint8 height x width x 3, with `text` (ASCII), which is shrunk if it would not fit."""
    strip = np.full((height, width, 3), DARK, np.uint8)
    scale = height / 36
    scale *= min(1, max(1, width - 8) / cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0])
    baseline = round(height / 2 + 10 * scale)
    cv2.putText(strip, text, (4, baseline), cv2.FONT_HERSHEY_SIMPLEX, scale, colour, max(1, round(1.6 * scale)),
                cv2.LINE_AA)
    return strip


def _grid(cells, columns, gap=4):
    """Equally sized cells, row after row, as one picture; missing cells of the last row are dark."""
    cells = [cv2.copyMakeBorder(cell, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=DARK) for cell in cells]
    cells += [np.full_like(cells[0], DARK[0])] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i:i + columns]) for i in range(0, len(cells), columns)])


def side_by_side(frames, labels, max_width=3840, gain=4, max_height=16382):
    """One comparison frame: the frames, and |second - first| times `gain`, each under a strip with its label.

    frames: the original, the reconstruction and, if there is one, the teacher's; RGB uint8 H W 3 of one size.
    The panels form a row, or two columns if the row would be wider than `max_width` pixels. They are scaled down if two
    columns are still too wide, or higher than `max_height` (the limit of a VP8 video). Small frames are enlarged by a
    whole factor, to about 240 pixels a panel.
    Returns RGB uint8; its size depends only on H, W, the number of frames and the limits. Labels are ASCII.
    ValueError if the frames differ in size or are not uint8.
    """
    kinds = [(frame.shape, str(frame.dtype)) for frame in frames]
    if len(frames) not in (2, 3) or len(labels) != len(frames) or len(set(kinds)) > 1 or kinds[0][1] != "uint8":
        raise ValueError(f"expected 2 or 3 uint8 frames of one size, each with a label, got {kinds} and {list(labels)}")
    height, width = frames[0].shape[:2]
    panels = [*frames, cv2.convertScaleAbs(cv2.absdiff(frames[0], frames[1]), alpha=gain)]
    factor = max(1, min(-(-240 // width), 1080 // height))
    columns = len(panels) if len(panels) * width * factor <= max_width else 2
    highest = max_height / -(-len(panels) // columns) - max_width // 32  # of a panel, without its strip
    factor = min(factor, max_width / (columns * width), highest / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    how = cv2.INTER_NEAREST if factor >= 1 else cv2.INTER_AREA
    strip = max(22, size[0] // 32)
    return _grid([np.vstack([_strip(label, size[0], strip), cv2.resize(panel, size, interpolation=how)])
                  for label, panel in zip([*labels, f"difference x {gain}"], panels)], columns)


def _tile(picture, caption, side):
    """A small map, uint8 h w 3, above its caption. It is resized to about `side` pixels: up by whole factors, down by
    averaging."""
    height, width = picture.shape[:2]
    factor = max(1, round(side / max(height, width)))
    size = (width * max(factor, -(-12 // width)), height * max(factor, -(-12 // height)))  # at least 12 px a side
    if max(size) > 1.5 * side:
        size = tuple(max(12, round(pixels * 1.5 * side / max(size))) for pixels in size)
    how = cv2.INTER_NEAREST if size[0] >= width and size[1] >= height else cv2.INTER_AREA
    tile = np.full((size[1] + 20, max(size[0], 144), 3), DARK, np.uint8)
    tile[:size[1], :size[0]] = cv2.resize(picture, size, interpolation=how)
    tile[size[1]:] = _strip(caption, tile.shape[1], 20)
    return tile


def _principal_colours(frames):
    """T C h w -> uint8 T h w 3: the first three principal components of all frames' channels as red, green, blue.

    Each component's sign makes its largest weight positive; 1 % at either end is clipped. One channel gives grey.
    """
    t, c, h, w = frames.shape
    pixels = frames.transpose(0, 2, 3, 1).reshape(-1, c)
    finite = np.isfinite(pixels).all(axis=1)
    sample = (pixels[finite].astype(np.float64)[::max(1, int(finite.sum()) // 50000)] if finite.any()
              else np.zeros((1, c)))
    mean, size = sample.mean(axis=0), math.sqrt(np.mean(sample ** 2))
    axes = np.linalg.eigh((sample - mean).T @ (sample - mean))[1][:, ::-1][:, :3]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)
    mapped = (np.where(finite[:, None], pixels, mean) - mean) @ axes
    low, high = np.percentile(mapped, (1, 99), axis=0)
    mapped = 0.5 + (mapped - (low + high) / 2) / np.maximum(high - low, 1e-6 * size + 1e-30)
    colours = np.full((len(pixels), 3), 127, np.uint8)
    colours[:, :3 if c == 1 else c] = np.clip(255 * mapped, 0, 255)
    colours[~finite] = ALARM
    return colours.reshape(t, h, w, 3)


def latent_picture(latents, max_frames=8, max_channels=256, numbers=None, total=None):
    """A picture of latents, float T C h w (a few latent frames): RGB uint8 H W 3. If they are some of `total` latents,
    `numbers` are their positions among these, for the captions.

    The upper part shows up to `max_frames` frames, evenly spaced over T, with the channels' first three principal
    components as colours. The lower part shows each channel of the middle frame, blue below and red above zero, all on
    one scale: a dead channel stays white, and a dominating one saturates. Captions: channel, mean +- standard deviation
    over all T. Values that are not finite are magenta; the title counts them, and the figures leave them out.
    ValueError for another shape.
    """
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 4 or not latents.size:
        raise ValueError(f"expected latents of shape T C h w, got {latents.shape}")
    t, c, h, w = latents.shape
    numbers, total = range(t) if numbers is None else numbers, total or t
    finite = np.ma.masked_invalid(latents)
    lost = latents.size - finite.count()
    mean, deviation = [f(axis=(0, 2, 3), dtype=np.float64).filled(0) for f in (finite.mean, finite.std)]
    rms = np.hypot(mean, deviation)
    found = finite.compressed().astype(np.float64) if finite.count() else np.zeros(1)
    some = f" ({t} of them here)" if t < total else ""
    title = (f"latents T={total}{some} C={c} h={h} w={w}   mean {found.mean():.3g}   "
             f"rms {np.sqrt(np.mean(found ** 2)):.3g}   "
             f"min {found.min():.3g}   max {found.max():.3g}")
    title += f"   {lost} VALUES NOT FINITE (magenta)" if lost else ""
    times = np.unique(np.linspace(0, t - 1, min(t, max_frames)).round().astype(int))
    colours = _principal_colours(latents[times])
    tiles = [_tile(colour, f"t = {numbers[time]}", 192) for colour, time in zip(colours, times)]
    middle = times[len(times) // 2]
    limit = 3 * float(np.median(rms)) or 3 * float(rms.max()) or 1.0
    maps = []
    for i in range(min(c, max_channels)):
        strength = np.clip(finite[middle, i].filled(0) / limit, -1, 1)[..., None]
        shade = 255 + np.abs(strength) * (np.where(strength < 0, (33, 102, 172), (178, 24, 43)) - 255.0)
        shade = np.where(np.isfinite(latents[middle, i])[..., None], shade, ALARM).astype(np.uint8)
        maps.append(_tile(shade, f"{i}: {mean[i]:.2g} +- {deviation[i]:.2g}", 144))
    hidden = f", the first {max_channels} of {c}" if c > max_channels else ""
    blocks = [_grid(some, max(1, min(len(some), 1440 // (some[0].shape[1] + 4)))) for some in (tiles, maps)]
    width = max(960, *(block.shape[1] for block in blocks))
    blocks = [cv2.copyMakeBorder(block, 0, 8, 0, width - block.shape[1], cv2.BORDER_CONSTANT, value=DARK)
              for block in blocks]
    above = "PCA of the channels over these frames: components 1, 2, 3 as red, green, blue"
    below = (f"channels{hidden} at t = {numbers[middle]}: blue {-limit:.3g}, red {limit:.3g}; mean +- deviation over "
             f"{'all t' if t == total else 'those here'}")
    return np.vstack([_strip(title, width, 30, ALARM if lost else LIGHT), _strip(above, width, 24), blocks[0],
                      _strip(below, width, 24), blocks[1]])
