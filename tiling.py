"""Encode and decode videos of any size and length in overlapping tiles, blended so that no seams show.

    tiled = Tiled(model)                             # tiles of 256 x 256 pixels and 32 frames, a quarter of it overlap
    reconstruction, info = tiled(video)              # N T 3 H W in [0, 1], any T, H and W: exactly that size comes back
    latents = tiled.encode(video)
    video = tiled.decode(latents, frames=100, size=(1080, 1920))

    stream = tiled.stream()                          # memory that does not grow with the video's length
    for frames in pieces:                            # N t 3 H W, any t
        show(stream.decode(stream.encode(frames)))
    show(stream.flush())

This file works alone with torch. It takes any model with time_factor, space_factor, latent_channels, encode, decode,
stream, latent_frames and frame_index as in this repository's models (video N T 3 H W in [0, 1], latents N T C h w).
Inference only: no gradients.

Tiles are blended by normalised overlap-add in float32: the weights of a pixel add up to one however many tiles cover
it. (Open-Sora and diffusers blend each tile with its left, upper and previous neighbours one after the other. That
drops the diagonal neighbour, and miscounts frames and pixels if tiles do not divide the length.)
"""
import collections
import itertools

import torch
import torch.nn.functional as F


def starts(size, tile, overlap):
    """Where tiles begin along an axis. The last tile begins earlier if need be, so that it is whole. tile 0: one tile.
    """
    return [0] if not tile or size <= tile else [*range(0, size - tile, tile - overlap), size - tile]


def windows(size, tile, overlap, unit):
    """[(start, weights)] of the tiles along one axis; the weights add up to one everywhere, and are never 0.

    At first a tile's weights are 1 in its middle, and fall linearly over the overlap at both ends; then all are divided
    by their sum over the tiles. size, tile, overlap and start are in latents; the weights, float32, are one for each
    output value, `unit` for each latent.
    """
    length = unit * min(size, tile or size)
    position = torch.arange(length) + 0.5
    window = torch.minimum(position, length - position).div(max(overlap * unit, 0.5)).clamp(max=1)
    begins, total = starts(size, tile, overlap), torch.zeros(size * unit)
    for start in begins:
        total[start * unit:start * unit + length] += window
    return [(start, window / total[start * unit:start * unit + length]) for start in begins]


class Tiled:
    """A model, used tile by tile: its methods for whole clips, and `stream`.

    use_spatial_tiling, use_temporal_tiling: which axes are cut. spatial_tile_size: in pixels, a multiple of the model's
    space factor. temporal_tile_size: in frames, a multiple of its time factor. tile_overlap_factor: how much of a tile
    its neighbour covers too, a fraction from 0 to 0.5, rounded down to whole latents. The published Video DC-AE takes
    256 pixels, 32 frames and 0.25. A video that fits into one tile gives exactly the model's own result.

    Without temporal tiling, a clip is one tile in time, and a stream uses one of the model's own streams for each
    spatial tile. That is right for causal models (TAEHV), which would start each temporal tile without memory.
    ValueError for sizes that do not fit, for temporal tiling of models whose output frames are not their input frames,
    and for tokenizers: codes of overlapping tiles cannot be averaged.
    """

    def __init__(self, model, use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=256,
                 temporal_tile_size=32, tile_overlap_factor=0.25):
        if hasattr(model, "tokenize"):
            raise ValueError("a tokenizer cannot be tiled: codes of overlapping tiles cannot be blended")
        if getattr(model, "space_upscale", model.space_factor) != model.space_factor:
            raise ValueError("a preview decoder, which gives smaller frames, cannot be tiled")
        if not 0 <= tile_overlap_factor <= 0.5:
            raise ValueError(f"tile_overlap_factor is a part of the tile from 0 to 0.5, got {tile_overlap_factor}")
        self.model = model
        self.overlap = tile_overlap_factor
        self.space_tile = self.space_overlap = self.time_tile = self.time_overlap = 0  # in latents; tile 0: not tiled
        if use_spatial_tiling:
            self.space_tile = in_latents("spatial_tile_size", spatial_tile_size, model.space_factor)
            self.space_overlap = int(self.space_tile * tile_overlap_factor)
        if use_temporal_tiling:
            self.time_tile = in_latents("temporal_tile_size", temporal_tile_size, model.time_factor)
            self.time_overlap = int(self.time_tile * tile_overlap_factor)
            lengths = (temporal_tile_size, temporal_tile_size + model.time_factor)
            if any(model.frame_index(frames) != list(range(frames)) for frames in lengths):
                raise ValueError("this model cannot be tiled in time, since its frames do not keep their places: "
                                 "use_temporal_tiling=False leaves time to its own stream")
            if not self.time_overlap:  # the last tile could be a single latent, which the DCAE takes for an image
                raise ValueError(f"temporal tiles must overlap by one latent: a tile_overlap_factor of "
                                 f"{1 / self.time_tile:.3g} or more, or a larger temporal_tile_size")

    def __str__(self):
        space, time = self.space_tile * self.model.space_factor, self.time_tile * self.model.time_factor
        sides = " x ".join([f"{space} x {space} px"] * bool(space) + [f"{time} frames"] * bool(time))
        return f"{sides}, overlap {self.overlap:g}"

    @torch.no_grad()
    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T' C h w; H and W are padded to whole latents by repeating the edge.
        """
        x = self._pad(video)
        if not self.time_tile:
            return self._encode_tiles(x).to(x.dtype)
        tiles = self._encoder()
        return torch.cat([*tiles.push(x), *tiles.flush()], 1)

    @torch.no_grad()
    def decode(self, latents, frames=None, size=None):
        """Latents N T C h w -> video N T' 3 H W in [0, 1], cropped to the original's `frames` and `size` (height,
        width) where they are given."""
        if self.time_tile:
            tiles = self._decoder()
            video = torch.cat([*tiles.push(latents), *tiles.flush()], 1)
        else:
            video = self._decode_tiles(latents).to(latents.dtype)
        height, width = size or video.shape[-2:]
        return video[:, :len(self.model.frame_index(frames)) if frames else None, :, :height, :width]

    def __call__(self, video):
        """Returns (reconstruction N T' 3 H W, {"latents": ...}); T' = T unless the model drops frames (`targets`)."""
        latents = self.encode(video)
        return self.decode(latents, video.shape[1], video.shape[-2:]), {"latents": latents}

    def stream(self, memory_limit=None, total_latents=None):
        """A TiledStream. Without temporal tiling, the arguments go to the model's own streams."""
        return TiledStream(self, memory_limit, total_latents)

    def _pad(self, video):
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"expected video as N T 3 H W, got shape {tuple(video.shape)}")
        bottom, right = (-size % self.model.space_factor for size in video.shape[-2:])
        if not (bottom or right) or not video.shape[1]:
            return video
        return F.pad(video.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, video.shape[:2])

    def _encoder(self):
        return TimeTiles(self._encode_tiles, self.time_tile, self.time_overlap, self.model.time_factor, 1)

    def _decoder(self):
        return TimeTiles(self._decode_tiles, self.time_tile, self.time_overlap, 1, self.model.time_factor)

    def _encode_tiles(self, x):
        factor = self.model.space_factor
        return self._blend(lambda _, tile: self.model.encode(tile), x, latent_size(x, factor), factor, 1)

    def _decode_tiles(self, latents):
        return self._blend(lambda _, tile: self.model.decode(tile), latents, latents.shape[-2:], 1,
                           self.model.space_factor).clamp_(0, 1)

    def _blend(self, run, x, size, unit_in, unit_out):
        """The weighted sum, float32, of run(i, tile i of x) over all spatial tiles.

        x: N T C H W, or None; then run gets None as the tile. size: height and width of the whole, in latents. A latent
        is unit_in pixels wide in x, and unit_out in the result.
        """
        rows, columns = (windows(side, self.space_tile, self.space_overlap, unit_out) for side in size)
        total = None
        for i, ((top, row_weights), (left, column_weights)) in enumerate(itertools.product(rows, columns)):
            bottom, right = top + len(row_weights) // unit_out, left + len(column_weights) // unit_out
            out = run(i, None if x is None else x[..., top * unit_in:bottom * unit_in, left * unit_in:right * unit_in])
            if total is None:
                total = out.new_zeros(*out.shape[:3], *(side * unit_out for side in size), dtype=torch.float32)
            region = total[..., top * unit_out:bottom * unit_out, left * unit_out:right * unit_out]
            region.addcmul_(out.float(), (row_weights[:, None] * column_weights).to(out.device))
        return total


def in_latents(name, size, factor):
    if size < factor or size % factor:
        raise ValueError(f"{name} must be a multiple of {factor}, got {size}")
    return size // factor


def latent_size(frames, factor):
    return [-(-side // factor) for side in frames.shape[-2:]]


class TimeTiles:
    """Encodes or decodes tiles along time. Takes input as it comes; gives output once no later tile can change it.

    run: function of N t C H W input -> float32 output. tile, overlap: in latents. unit_in, unit_out: input and output
    frames per latent. A tile begins every `tile - overlap` latents; the last takes the rest, more than the overlap.
    Over the overlap, a tile fades linearly into the next. At most two tiles overlap, so their weights add up to one.
    """

    def __init__(self, run, tile, overlap, unit_in, unit_out):
        self.run, self.tile, self.overlap = run, tile * unit_in, overlap * unit_in  # in input frames
        self.kept = overlap * unit_out                                              # in output frames
        self.buffer, self.filled = None, 0  # input of the next tile, N tile C H W, and how many of its frames are there
        self.tail = None                    # the end of the last tile's output, float32, which the next tile overlaps

    def push(self, x):
        """Take N t C H W input; yields finished output, N t' C' H' W', in the input's dtype. Exhaust the iterator."""
        if self.buffer is None:
            self.buffer = x.new_empty(x.shape[0], self.tile, *x.shape[2:])
        while x.shape[1]:
            count = min(x.shape[1], self.tile - self.filled)
            self.buffer[:, self.filled:self.filled + count] = x[:, :count]
            self.filled, x = self.filled + count, x[:, count:]
            if self.filled == self.tile:
                out = self._fade(self.run(self.buffer))
                self.tail = out[:, -self.kept:].clone()  # a view would keep the whole tile
                self.buffer[:, :self.overlap] = self.buffer[:, -self.overlap:]
                self.filled = self.overlap
                yield out[:, :-self.kept].to(x.dtype)

    def flush(self):
        """End of the clip; yields the remaining output."""
        if self.filled > (0 if self.tail is None else self.overlap):
            yield self._fade(self.run(self.buffer[:, :self.filled])).to(self.buffer.dtype)
        elif self.tail is not None:
            yield self.tail.to(self.buffer.dtype)
        self.buffer, self.filled, self.tail = None, 0, None

    def _fade(self, out):
        if self.tail is not None:
            weight = ((torch.arange(self.kept, device=out.device) + 0.5) / self.kept).view(-1, 1, 1, 1)
            out[:, :self.kept] = torch.lerp(self.tail, out[:, :self.kept], weight)
        return out


class OwnStreams:
    """Used instead of TimeTiles if time is not tiled: pieces go to the model's own streams, one for each spatial tile.
    """

    def __init__(self, tiled, streams, call, flush, unit_in, unit_out):
        self.tiled, self.streams, self.call, self.end = tiled, streams, call, flush
        self.unit_in, self.unit_out = unit_in, unit_out
        self.size = self.dtype = None

    def push(self, x):
        self.size, self.dtype = latent_size(x, self.unit_in), x.dtype
        yield self._blend(lambda i, tile: getattr(self.streams[i], self.call)(tile), x)

    def flush(self):
        yield self._blend(lambda i, _: getattr(self.streams[i], self.end)(), None)

    def _blend(self, run, x):
        return self.tiled._blend(run, x, self.size, self.unit_in, self.unit_out).to(self.dtype)


class TiledStream:
    """Encodes and decodes clips piece by piece in blended tiles. With temporal tiling it computes what `Tiled` does.

    `encode` and `decode` take pieces of any length and return what is finished, possibly N 0 C H W; they lag behind by
    up to a temporal tile. Height and width are padded, and cropped back. Exactly the frames that came in come out (if
    the model drops frames, those that it keeps).
    """

    def __init__(self, tiled, memory_limit=None, total_latents=None):
        self.tiled, self._arguments = tiled, (memory_limit, total_latents)
        if tiled.time_tile:
            self._encoder, self._decoder = tiled._encoder(), tiled._decoder()
        else:
            factor = tiled.model.space_factor
            streams = collections.defaultdict(lambda: tiled.model.stream(memory_limit, total_latents))
            self._encoder = OwnStreams(tiled, streams, "encode", "flush_encoder", factor, 1)
            self._decoder = OwnStreams(tiled, streams, "decode", "flush_decoder", 1, factor)
        self._no_latents = self._no_frames = None  # empty pieces; None until there was input
        self._size = None                          # height and width of the clip, if this stream encodes it
        self._seen = self._shown = 0               # frames in, frames out
        self._ended = False

    @torch.no_grad()
    def encode(self, frames):
        """Take N t 3 H W frames in [0, 1], return the latents N t' C h w that are complete."""
        x = self.tiled._pad(frames)
        if self._no_latents is None:
            model, self._size = self.tiled.model, frames.shape[-2:]
            self._no_latents = frames.new_empty(len(frames), 0, model.latent_channels,
                                                *latent_size(frames, model.space_factor))
        self._seen += frames.shape[1]
        return joined([*self._encoder.push(x)], self._no_latents)

    @torch.no_grad()
    def flush_encoder(self):
        """End of the clip: the remaining latents; None if no frames were given."""
        if self._no_latents is None:
            return None
        self._ended = True
        return joined([*self._encoder.flush()], self._no_latents)

    @torch.no_grad()
    def decode(self, latents):
        """Take N t C h w latents, return the frames N t' 3 H W that are complete, in [0, 1]."""
        if self._no_frames is None:
            size = self._size or [side * self.tiled.model.space_factor for side in latents.shape[-2:]]
            self._no_frames = latents.new_empty(len(latents), 0, 3, *size)
        return self._show(self._decoder.push(latents))

    @torch.no_grad()
    def flush_decoder(self):
        """End of the clip: the remaining frames; None if no latents were given."""
        return None if self._no_frames is None else self._show(self._decoder.flush())

    def _show(self, pieces):
        height, width = self._no_frames.shape[-2:]
        frames = joined([*pieces], self._no_frames)[..., :height, :width]
        if self._ended and self.tiled.time_tile:  # the model's own streams count their frames themselves
            frames = frames[:, :self._seen - self._shown]
        self._shown += frames.shape[1]
        return frames

    def flush(self):
        """End of the clip: the remaining frames if this stream was decoding, else the remaining latents. The stream is
        as new afterwards. ValueError if nothing was streamed."""
        if self._no_latents is None and self._no_frames is None:
            raise ValueError("flush() of a stream that was given nothing")
        rest = self.flush_encoder()
        if self._no_frames is not None:
            frames = [] if rest is None else [self.decode(rest)]
            rest = joined([*frames, self.flush_decoder()], self._no_frames)
        self.__init__(self.tiled, *self._arguments)
        return rest


def joined(pieces, empty):
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0] if pieces else empty
