"""The fixed clips that leaderboard.py judges all models on, and the protocols by which papers choose theirs.

    clips = Clips(options.data, "results", height=256, width=256, frames=17)      # one from the middle of each video
    clips = Clips("MCL-JCV/", "results", *PROTOCOLS["mcl-jcv"][:4], protocol="mcl-jcv")
    video = clips.video(0)                               # 1 T 3 H W in [0, 1]

Each frame is scaled, keeping its aspect ratio, until height x width just fits into it; then the centre is cut out. A
folder of two images or more is a video too, with its frames in the order of their names; DAVIS is published like that.

mcl-jcv   VidTok (Tang et al. 2024, arXiv 2412.13061): all 30 videos, whole, as clips of 17 frames of 256x256, at 30
          frames/s, or at their own rate if that is lower; the last frame fills up the last clip. (MAGVIT-v2, Yu et al.
          2024, arXiv 2310.05737, has the same videos at 640x360: --size 360x640.)
ucf101    LARP (Wang et al. 2025, arXiv 2410.21264), as in OmniTokenizer and TATS: 16 frames of 128x128 of each video at
          its own rate, and rFVD over all. Papers take the training videos of split 1 (9537), and a random position in
          each. Here the frames come from the middle, and --data may be any folder of at least 3783 videos (split 1's
          test videos); figures of different folders cannot be compared.
davis     Cosmos (NVIDIA 2025, arXiv 2501.03575): DAVIS 2017 at 1080p (90 videos, JPEGImages/Full-Resolution), whole,
          17 frames at a time, which is the window in the published code (github.com/NVIDIA/Cosmos-Tokenizer); the paper
          does not name it.
--clips, --frames and --size override these; the page then says that it is a part of the protocol.
"""
import hashlib
import itertools
import os
import tempfile
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from data_files import Source, find_sources, probe
from video_files import MAX_PIXELS, DataError, VideoReader, fit_clip, read_frames, read_image


class Protocol(NamedTuple):
    """The clips that a published table is measured on: their size, and which part of a video they are."""
    height: int
    width: int
    frames: int
    whole: bool     # the whole video, cut into consecutive clips; else one clip from its middle
    fps: float = 0  # videos of a higher frame rate are thinned out to about this one; 0: never
    videos: int = 1  # least number of videos


PROTOCOLS = {"mcl-jcv": Protocol(256, 256, 17, True, 30, 30),
             "ucf101": Protocol(128, 128, 16, False, 0, 3783),
             "davis": Protocol(1080, 1920, 17, True, 0, 90)}


class Video(NamedTuple):
    """One video of a data set, in a file or as a folder of images."""
    name: str
    source: Source
    images: tuple = ()  # the paths of its frames, if it is a folder of images


def find_videos(path, max_pixels=MAX_PIXELS, what="--data"):
    """([Video] sorted by name, [(path, reason)] of unreadable files) of a folder, a list of files or a file. DataError,
    naming the option `what`, if there is no readable video."""
    sources = find_sources(path)
    folders = {}
    for source in sources:
        if source.is_image:
            folders.setdefault(os.path.dirname(source.path), []).append(source)
    videos, refused = probe([source for source in sources if not source.is_image], max_pixels)
    found = [Video(os.path.splitext(source.key)[0], source) for source in videos]
    for folder, images in folders.items():
        if len(images) > 1:
            name = os.path.dirname(images[0].key) or os.path.basename(os.path.abspath(folder))
            found.append(Video(name, images[0], tuple(sorted(image.path for image in images))))
    if not found:
        first = f"; the first: {refused[0][0]}: {refused[0][1]}" if refused else ", and single images are no videos"
        raise DataError(f"{what}: {path!r} holds no video that can be read{first}")
    return sorted(found, key=lambda video: video.name), refused


def fit(frame, height, width):
    """H W 3 BGR -> its centre, scaled to height x width, RGB, uint8."""
    scale = min(frame.shape[0] / height, frame.shape[1] / width)
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    top, left = (frame.shape[0] - rows) // 2, (frame.shape[1] - columns) // 2
    part = np.ascontiguousarray(frame[top:top + rows, left:left + columns])
    part = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if scale >= 1 else cv2.INTER_CUBIC)
    return cv2.cvtColor(part, cv2.COLOR_BGR2RGB)


def all_frames(video, max_pixels):
    """All frames of a Video, H W 3 BGR."""
    if video.images:
        for path in video.images:
            yield read_image(path, max_pixels)
    else:
        for frame in VideoReader(video.source.path, max_pixels):
            yield cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)


def pieces(frames, size, step):
    """Yields consecutive lists of `size` frames, taking every `step`-th frame; the last frame fills up the last list.
    """
    frames = itertools.islice(frames, 0, None, step)
    while piece := list(itertools.islice(frames, size)):
        yield piece + piece[-1:] * (size - len(piece))


class Clips:
    """The clips of a folder. Attributes: `names`, `fps` and `sources` (the video's name) of each; `fingerprint`, a hash
    of their pixels in 16 hexadecimal digits; `notes` on unusual videos; `height`, `width`, `frames`.

    whole, fps: see Protocol; protocol: a key of PROTOCOLS or "". clips: number of clips in all, evenly spaced over the
    videos, several of each if there are more clips than videos; 0: one of each video, or with `whole` all of it. They
    are read once, into a temporary file under `out`. DataError if there are no videos; or fewer than the protocol
    needs, unless `clips` is set.
    """

    def __init__(self, path, out, height, width, frames, whole=False, fps=0, clips=0, protocol="",
                 max_pixels=MAX_PIXELS, what="--data"):
        self.height, self.width, self.frames = height, width, frames
        videos, refused = find_videos(path, max_pixels, what)
        self.notes = [f"{path}: {reason}" for path, reason in refused]
        wanted = PROTOCOLS[protocol].videos if protocol else 1
        if len(videos) < wanted and not clips:
            raise DataError(f"--protocol {protocol} wants {wanted} videos, and {len(videos)} of {what} {path} can be "
                            "read: give the whole set, or --clips N for a part of the protocol")
        self.names, self.fps, self.sources = [], [], []
        self.file, digest = tempfile.TemporaryFile(dir=out), hashlib.sha256()
        if clips and clips < len(videos):
            videos = [videos[i] for i in np.linspace(0, len(videos) - 1, clips).round().astype(int)]
        counts = np.diff(np.arange(len(videos) + 1) * (clips or len(videos)) // len(videos))  # clips of each video
        for video, per_video in zip(tqdm(videos, desc="reading the clips", unit="video", dynamic_ncols=True,
                                         disable=None), counts):
            try:
                rate, step = self.fps_of(video, fps, max_pixels)
                found = list(self.clips_of(video, whole and not clips, step, per_video, max_pixels))
            except DataError as error:
                self.notes.append(f"{video.source.path}: {error}")
                continue
            for number, clip in enumerate(found):
                clip = np.stack([fit(frame, height, width) for frame in clip])
                digest.update(clip.data)
                self.write(clip, out)
                self.names.append(video.name + f" #{number + 1}" * (len(found) > 1))
                self.fps.append(rate)
                self.sources.append(video.name)
        if not self.names:
            raise DataError(f"{what}: no clip could be read; the first: {self.notes[0]}")
        self.pixels = np.memmap(self.file, np.uint8, "r", shape=(len(self.names), frames, height, width, 3))
        digest.update(f"{self.pixels.shape} {self.fps}".encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self):
        return len(self.names)

    def write(self, clip, out):
        try:
            self.file.write(clip.data)
            self.file.flush()
        except OSError as error:
            raise DataError(f"{out}: clip {len(self.names) + 1} finds no room there ({error.strerror}); clips take "
                            f"{clip.nbytes / 1e6:.1f} MB each") from None

    def fps_of(self, video, most, max_pixels):
        """(frames per second of a video's clips, step: they take every step-th frame)"""
        fps = 25.0 if video.images else VideoReader(video.source.path, max_pixels).fps
        step = max(1, round(fps / most)) if most else 1
        return fps / step, step

    def clips_of(self, video, whole, step, per_video, max_pixels):
        """Yields the clips of one Video, lists of H W 3 BGR frames, taking every `step`-th frame."""
        if whole:
            yield from pieces(all_frames(video, max_pixels), self.frames, step)
            return
        for k in range(per_video):
            position = (k + 0.5) / per_video
            if video.images:
                first, step = fit_clip(len(video.images), position, self.frames, step)
                paths = video.images[first::step][:self.frames]
                clip, notes = [read_image(path, max_pixels) for path in paths], []
                if len(clip) < self.frames:
                    notes = [f"only {len(clip)} frames, {self.frames} wanted: the last is repeated"]
                    clip += clip[-1:] * (self.frames - len(clip))
            else:
                clip, _, _, notes = read_frames(video.source.path, position, self.frames, step, max_pixels)
            self.notes += [f"{video.source.path}: {note}" for note in notes]
            yield clip

    def video(self, i, device="cpu"):
        """Clip number i: 1 T 3 H W in [0, 1]."""
        return torch.from_numpy(np.array(self.pixels[i])).to(device).permute(0, 3, 1, 2)[None].float().div_(255)
