"""Encode and decode videos of any size and length in overlapping tiles, blended so that no seams show.

    tiled = Tiled(model)                             # tiles of 256 x 256 pixels and 32 frames, a quarter of it overlap
    reconstruction, info = tiled(video)              # N T 3 H W in [0, 1], any T, H and W: exactly that size comes back
    latents = tiled.encode(video)
    video = tiled.decode(latents, frames=100, size=(1080, 1920))

    stream = tiled.stream()                          # memory that does not grow with the video's length
    for frames in pieces:                            # N t 3 H W, any t
        show(stream.decode(stream.encode(frames)))
    show(stream.flush())

This file works alone: it needs torch, and takes any model that has time_factor, space_factor, latent_channels, encode,
decode, latent_frames and frame_index as the models of this repository have them (video N T 3 H W in [0, 1], latents N T
C h w). Inference only: no gradients.

Tiles are blended by normalised overlap-add in float32: each is weighted by a window that falls off linearly over the
overlap, and the sum is divided by the sum of the windows, so that the weights of a pixel add up to one however many
tiles cover it. (Blending each tile with its left, upper and previous neighbours one after the other, as Open-Sora and
diffusers do, drops the diagonal neighbour, and miscounts frames and pixels where tiles do not divide the length.)
"""
import torch
import torch.nn.functional as F


def window(size, overlap):
    """Weights of a tile along one axis: 1 in the middle, falling off linearly over `overlap` at both ends; never 0."""
    if overlap == 0:
        return torch.ones(size)
    place = torch.arange(size, dtype=torch.float32) + 0.5
    return torch.minimum(place, size - place).div(overlap).clamp(max=1)


def tile_starts(size, tile, overlap):
    """Where tiles begin along height or width, which are known beforehand: the last one moves back to be a whole one."""
    if tile is None or size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def normalised_windows(size, tile, overlap, unit):
    """[(start, weights)] of the tiles along one axis; the weights add up to one everywhere.

    size, tile, overlap and start count latents; the weights (float32) count output values, `unit` for each latent.
    """
    starts = tile_starts(size, tile, overlap)
    length = unit * (size if tile is None else min(tile, size))
    weights, total = window(length, overlap * unit), torch.zeros(size * unit)
    for start in starts:
        total[start * unit:start * unit + length] += weights
    return [(start, weights / total[start * unit:start * unit + length]) for start in starts]


def in_latents(name, size, factor):
    if size < factor or size % factor:
        raise ValueError(f"{name} must be a multiple of {factor}, got {size}")
    return size // factor


def seam_figure(tiled, untiled, positions, axis=-1):
    """How much seams show, from the steps between `position - 1` and each `position` along `axis`.

    tiled, untiled: equal shapes, any layout. Returns {"tiled": mean absolute step, "untiled": the same in the untiled
    result, "added": mean absolute difference of the two steps, 0 where there is no seam}, in the units of the values.
    """
    positions = torch.as_tensor(positions, device=tiled.device)
    if tiled.shape != untiled.shape or not positions.numel():
        raise ValueError(f"seams take two results of equal shape and a position at least, got {tuple(tiled.shape)}, "
                         f"{tuple(untiled.shape)} and {positions.tolist()}")
    a, b = (x.float().index_select(axis, positions) - x.float().index_select(axis, positions - 1)
            for x in (tiled, untiled))
    return {"tiled": a.abs().mean().item(), "untiled": b.abs().mean().item(), "added": (a - b).abs().mean().item()}


class Tiled:
    """A model, used tile by tile. It has the model's own methods for whole clips, and `stream`.

    use_spatial_tiling, use_temporal_tiling: which axes are cut. spatial_tile_size: pixels, a multiple of the model's
    space factor; temporal_tile_size: frames, a multiple of its time factor; tile_overlap_factor: overlap of
    neighbours as a part of the tile, 0 to 0.5, rounded down to whole latents. The published Video DC-AE takes 256
    pixels, 32 frames and 0.25. A video that one tile covers gives exactly the model's own result.

    Time needs frames that stay in place: ValueError for models whose frames do not (preview decoders, taecvx, taeh3).
    Causal models (TAEHV) begin each temporal tile without memory: for them rather take use_temporal_tiling=False on
    clips that fit, and the model's own `stream` on those that do not. Blended latents of a tokenizer are means of codes.
    """

    def __init__(self, model, use_spatial_tiling=True, use_temporal_tiling=True, spatial_tile_size=256,
                 temporal_tile_size=32, tile_overlap_factor=0.25):
        if not 0 <= tile_overlap_factor <= 0.5:
            raise ValueError(f"tile_overlap_factor is a part of the tile from 0 to 0.5, got {tile_overlap_factor}")
        self.model = model
        self.time_factor, self.space_factor = model.time_factor, model.space_factor
        self.latent_channels = model.latent_channels
        self.latent_frames, self.frame_index, self.targets = model.latent_frames, model.frame_index, model.targets
        self.space_tile = self.time_tile = None  # in latents; None: the whole
        self.space_overlap = self.time_overlap = 0
        if use_spatial_tiling:
            self.space_tile = in_latents("spatial_tile_size", spatial_tile_size, self.space_factor)
            self.space_overlap = int(self.space_tile * tile_overlap_factor)
        if use_temporal_tiling:
            self.time_tile = in_latents("temporal_tile_size", temporal_tile_size, self.time_factor)
            self.time_overlap = int(self.time_tile * tile_overlap_factor)
            self._check_alignment()

    def _check_alignment(self):
        model, factor = self.model, self.time_factor
        trims = set()  # frames that are missing at a tile's end
        for latents in (self.time_tile, self.time_tile + 1):
            index = model.frame_index(latents * factor)
            trims.add(latents * factor - len(index))
            if model.latent_frames(latents * factor) != latents or index != list(range(len(index))):
                trims.add(None)
        if len(trims) > 1 or min(trims) < 0:
            raise ValueError("this model's frames do not keep their places from tile to tile, so it cannot be tiled in "
                             "time: use_temporal_tiling=False, or the model's own stream()")
        least = max(trims) // factor + 1 if max(trims) or model.latent_frames(factor) != 1 else 0
        if self.time_overlap < least:  # else frames between tiles are missing, or a rest of one latent reads as an image
            raise ValueError(f"this model's temporal tiles must overlap by {least * factor} frames or more: take a "
                             f"tile_overlap_factor of {least / self.time_tile:.3g} or more, or larger tiles")

    # ---- whole clips ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T' C h w; H and W are padded to whole latents by repeating the edge."""
        tiles = self._encoder()
        return torch.cat([*tiles.push(self._pad(video)), *tiles.flush()], 1)

    @torch.no_grad()
    def decode(self, latents, frames=None, size=None):
        """Latents N T C h w -> video N T' 3 H W, clamped to [0, 1], cropped to the original's `frames` and `size` (height,
        width) where they are given."""
        tiles = self._decoder()
        video = torch.cat([*tiles.push(latents), *tiles.flush()], 1)
        height, width = size or video.shape[-2:]
        return video[:, :len(self.frame_index(frames)) if frames else None, :, :height, :width]

    def __call__(self, video):
        """Returns (reconstruction N T' 3 H W, {"latents": ...}); T' = T but for models that drop frames (`targets`)."""
        latents = self.encode(video)
        return self.decode(latents, video.shape[1], video.shape[-2:]), {"latents": latents}

    def stream(self, memory_limit=None, total_latents=None):
        """A TiledStream. The arguments are the models' own, and change nothing here: tiles bound the memory.
        ValueError without temporal tiling."""
        if self.time_tile is None:
            raise ValueError("a stream cannot hold the whole clip: use_temporal_tiling=True, or the model's own stream()")
        return TiledStream(self)

    def stream_memory(self, height, width, itemsize=4):
        """Bytes that a stream of one clip holds at most, beside the model's own work on one tile: input that waits for its
        tile (twice while pieces are joined), the sums of one temporal tile, and finished frames on their way out.

        `itemsize`: bytes of a value in the input. Latents are not counted, and pieces of one frame are assumed.
        """
        frame = 3 * (height + -height % self.space_factor) * (width + -width % self.space_factor)
        tile, overlap = (latents * self.time_factor for latents in (self.time_tile, self.time_overlap))
        return frame * (2 * tile * itemsize + (tile + overlap) * 4 + 2 * tile * itemsize)

    def seam_positions(self, frames, height, width):
        """Where tiles begin or end in a video: {"time": [...], "height": [...], "width": [...]}, for `seam_figure`."""
        def ends(starts, tile, size, factor):
            return sorted({p * factor for s in starts for p in (s, s + (tile or size)) if 0 < p * factor < size * factor})

        latents = self.latent_frames(frames)
        stride = (self.time_tile or latents) - self.time_overlap
        starts = [s for s in range(0, latents, stride) if s == 0 or latents - s > self.time_overlap]
        found = {"time": ends(starts, self.time_tile, latents, self.time_factor)}
        for name, size in (("height", height), ("width", width)):
            size = -(-size // self.space_factor)
            starts = tile_starts(size, self.space_tile, self.space_overlap)
            found[name] = ends(starts, self.space_tile, size, self.space_factor)
        return {name: [p for p in found[name] if p < size]
                for name, size in (("time", frames), ("height", height), ("width", width))}

    # ---- tiles in space -------------------------------------------------------------------------------------------

    def _pad(self, video):
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"expected video as N T 3 H W, got shape {tuple(video.shape)}")
        bottom, right = (-size % self.space_factor for size in video.shape[-2:])
        if not (bottom or right) or not video.shape[1]:
            return video
        return F.pad(video.flatten(0, 1), (0, right, 0, bottom), mode="replicate").unflatten(0, video.shape[:2])

    def _encoder(self):
        return TimeTiles(lambda tile: self._blend(self.model.encode, tile, self.space_factor, 1),
                         self.time_tile, self.time_overlap, self.time_factor, 1)

    def _decoder(self):
        return TimeTiles(lambda tile: self._blend(self.model.decode, tile, 1, self.space_factor).clamp_(0, 1),
                         self.time_tile, self.time_overlap, 1, self.time_factor)

    def _blend(self, run, x, unit_in, unit_out):
        """run(x) by spatial tiles, float32. x: N T C H W; a latent is unit_in of its pixels and unit_out of the result's."""
        rows, columns = (size // unit_in for size in x.shape[-2:])
        total = None
        for top, row_weights in normalised_windows(rows, self.space_tile, self.space_overlap, unit_out):
            for left, column_weights in normalised_windows(columns, self.space_tile, self.space_overlap, unit_out):
                height, width = len(row_weights) // unit_out, len(column_weights) // unit_out
                out = run(x[..., top * unit_in:(top + height) * unit_in, left * unit_in:(left + width) * unit_in])
                if out.shape[-2:] != (height * unit_out, width * unit_out):
                    raise ValueError(f"a tile of {height}x{width} latents came out as {out.shape[-2]}x{out.shape[-1]} "
                                     f"and not {height * unit_out}x{width * unit_out}: preview decoders cannot be tiled")
                if total is None:
                    total = out.new_zeros(*out.shape[:3], rows * unit_out, columns * unit_out, dtype=torch.float32)
                place = total[..., top * unit_out:(top + height) * unit_out, left * unit_out:(left + width) * unit_out]
                weights = row_weights[:, None] * column_weights
                place.addcmul_(out.float(), weights.to(out.device))
        return total


class TimeTiles:
    """Tiles along time, of one direction: input as it comes, finished output as soon as no later tile can change it.

    run: function of N t C H W input -> float32 output, a tensor of its own. tile, overlap: in latents; tile None takes
    the whole at the end. unit_in, unit_out: input and output frames of a latent. Tiles begin every tile - overlap
    latents; the last one takes what is left, more than the overlap. Results do not depend on the cutting of the input.
    """

    def __init__(self, run, tile, overlap, unit_in, unit_out):
        self.run, self.tile, self.overlap, self.unit_in, self.unit_out = run, tile, overlap, unit_in, unit_out
        self.waiting = []             # input of tiles to come, as pieces
        self.sum = self.weight = None  # of output that the next tile overlaps
        self.dtype = None

    def push(self, x):
        """Take N t C H W input; yields finished output, N t' C' H' W' in the input's dtype. To be run to its end."""
        self.dtype = x.dtype
        if x.shape[1]:
            self.waiting.append(x)
        if self.tile is None:
            return
        size, step = self.tile * self.unit_in, (self.tile - self.overlap) * self.unit_in
        if sum(piece.shape[1] for piece in self.waiting) < size:
            return
        x = self._join()
        final = (self.tile - self.overlap) * self.unit_out
        for start in range(0, x.shape[1] - size + 1, step):
            out, weight = self._add(x[:, start:start + size])
            self.sum, self.weight = out[:, final:].clone(), weight[final:]  # a view would keep the whole tile alive
            yield out[:, :final].div_(weight[:final]).to(self.dtype)
        self.waiting = [x[:, start + step:].clone()]

    def flush(self):
        """End of the clip; yields the remaining output."""
        first = self.sum is None
        left = sum(piece.shape[1] for piece in self.waiting)
        if left and (first or left > self.overlap * self.unit_in):
            x = self._join()
            out, weight = (self.run(x), 1) if first else self._add(x)
            yield out.div_(weight).to(self.dtype)
        elif not first:
            yield self.sum.div_(self.weight).to(self.dtype)
        self.waiting, self.sum, self.weight = [], None, None

    def _join(self):
        x = self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting, 1)
        self.waiting = [x]  # lets go of the pieces
        return x

    def _add(self, x):
        out = self.run(x)
        weight = window(out.shape[1], self.overlap * self.unit_out).to(out.device).view(-1, 1, 1, 1)
        out.mul_(weight)
        if self.sum is not None:
            kept = self.sum.shape[1]
            out[:, :kept] += self.sum
            weight[:kept] += self.weight
        return out, weight


class TiledStream:
    """Encodes and decodes clips piece by piece in blended tiles; the same numbers as `Tiled` gives for the whole clip.

    `encode` and `decode` take pieces of any length, return what is finished, possibly N 0 C H W, and lag behind by
    up to a temporal tile. Height and width are padded and cropped back; exactly the frames that came in come out.
    """

    def __init__(self, tiled):
        self.tiled = tiled
        self._encoder, self._decoder = tiled._encoder(), tiled._decoder()
        self._empty_latents = self._empty_frames = None
        self._seen = self._shown = 0  # frames in, frames out
        self._total = None            # output frames of the clip, once its end is known
        self._size = None             # height and width of the clip, if this stream encoded it
        self._decoding = False

    @torch.no_grad()
    def encode(self, frames):
        """Take N t 3 H W frames in [0, 1], return the latents N t' C h w that are complete."""
        padded = self.tiled._pad(frames)
        if self._empty_latents is None:
            self._size = frames.shape[-2:]
            h, w = (-(-size // self.tiled.space_factor) for size in self._size)
            self._empty_latents = frames.new_empty(frames.shape[0], 0, self.tiled.latent_channels, h, w)
        self._seen += frames.shape[1]
        return torch.cat([self._empty_latents, *self._encoder.push(padded)], 1)

    @torch.no_grad()
    def flush_encoder(self):
        """End of the clip: the remaining latents; None if no frames were given."""
        if self._empty_latents is None:
            return None
        self._total = len(self.tiled.frame_index(self._seen))
        return torch.cat([self._empty_latents, *self._encoder.flush()], 1)

    @torch.no_grad()
    def decode(self, latents):
        """Take N t C h w latents, return the frames N t' 3 H W that are complete, in [0, 1]."""
        self._decoding = True
        if self._empty_frames is None:
            size = self._size or [side * self.tiled.space_factor for side in latents.shape[-2:]]
            self._empty_frames = latents.new_empty(latents.shape[0], 0, 3, *size)
        return self._show(self._decoder.push(latents))

    @torch.no_grad()
    def flush_decoder(self):
        """End of the clip: the remaining frames; None if no latents were given."""
        return None if self._empty_frames is None else self._show(self._decoder.flush())

    def _show(self, pieces):
        height, width = self._empty_frames.shape[-2:]
        frames = torch.cat([self._empty_frames, *(piece[..., :height, :width] for piece in pieces)], 1)
        if self._total is not None:
            frames = frames[:, :self._total - self._shown]
        self._shown += frames.shape[1]
        return frames

    def flush(self):
        """End of the clip: the remaining frames if this stream was decoding, else the remaining latents. The stream is
        as new afterwards. ValueError if nothing was streamed."""
        if self._empty_latents is None and self._empty_frames is None:
            raise ValueError("flush() of a stream that was given nothing")
        rest = self.flush_encoder()
        if self._decoding:
            frames = [] if rest is None else [self.decode(rest)]
            rest = torch.cat([*frames, self.flush_decoder()], 1)
        self.__init__(self.tiled)
        return rest
