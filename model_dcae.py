"""Video DC-AE: a deep-compression autoencoder, 4 frames x 32 x 32 pixels to one latent of 128 channels.

    model = load_dcae("F32T4C128_AE.safetensors")    # published or own weights; widths and depths are recognised
    latents = model.encode(video)                    # N T 3 H W in [0, 1]  ->  N T/4 128 H/32 W/32
    video = model.decode(latents)                    # ... and back, clamped to [0, 1]

This file works alone: it needs torch, and safetensors only to read such a file. State_dict names, shapes and results
are those of `dc-ae-f32t4c128` in github.com/hpcaitech/Open-Sora (opensora/models/dc_ae), after Chen et al. 2024, "Deep
Compression Autoencoder". What differs: any number of frames goes in and comes back; attention is computed in float32.

Conventions: video is N T C H W, RGB, in [0, 1]; latents are N T C H W, the encoder's own numbers (Open-Sora's
inference takes them as they are; its configs/diffusion/train/high_compression.py has a scaling_factor of 0.493).
Inside, tensors are N C T H W in [-1, 1], channels-last if the weights are. The model is not causal: a frame depends on
the whole clip.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CONV_STAGES = 3       # stages of residual blocks; the stages after them have linear attention
TIME_STAGES = (3, 4)  # encoder stages that end with half as many frames
HEAD = 32             # channels of an attention head
SEGMENT = 8           # latents of a stream's segment: 32 frames, the clip length that the published model learned


# ---- layers ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divides by the root mean square over channels, then scales and shifts each channel."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[1] + 1e-5).rsqrt().to(x.dtype)
        weight, bias = (p.to(x.dtype).view(-1, 1, 1, 1) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x * scale, weight)


class Conv(nn.Module):
    """3D convolution, zero-padded on all six sides, then optionally a norm or an activation."""

    def __init__(self, n_in, n_out, kernel=3, stride=1, groups=1, bias=True, norm=False, act=False):
        super().__init__()
        self.conv = nn.Conv3d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = RMSNorm(n_out) if norm else None
        self.act = nn.SiLU(inplace=True) if act else None

    def forward(self, x):
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class Average(nn.Module):
    """Downsampling shortcut: cells of time x space x space become channels, and neighbouring channels are averaged."""

    def __init__(self, n_out, time=1, space=2):
        super().__init__()
        self.n_out, self.time, self.space = n_out, time, space

    def forward(self, x):
        n, _, t, h, w = x.shape
        time, s = (1 if t == 1 else self.time), self.space  # images have no time to halve
        x = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, s)).unflatten(2, (-1, s)).unflatten(1, (-1, time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # N T H W, channels, positions within a cell
        return x.reshape(n, t // time, h // s, w // s, self.n_out, -1).mean(5).permute(0, 4, 1, 2, 3)


class Duplicate(nn.Module):
    """Upsampling shortcut: channels are repeated, and then become cells of time x space x space."""

    def __init__(self, n_out, time=1, space=2):
        super().__init__()
        self.n_out, self.time, self.space = n_out, time, space

    def forward(self, x):
        n, c, t, h, w = x.shape
        time, s = (1 if t == 1 else self.time), self.space
        x = x.permute(0, 2, 3, 4, 1).repeat_interleave(self.n_out * time * s * s // c, 4)
        x = x.unflatten(4, (self.n_out, time, s, s)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(n, t * time, h * s, w * s, self.n_out).permute(0, 4, 1, 2, 3)


class Upsample(nn.Module):
    """Nearest upsampling by 2 in space, and by `time` in time unless it is a single frame; then a convolution."""

    def __init__(self, n_in, n_out, time):
        super().__init__()
        self.time = time
        self.conv = Conv(n_in, n_out)

    def forward(self, x):
        n, c, t, h, w = x.shape
        time = 1 if t == 1 else self.time
        x = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]  # no limit of 2^31 elements, unlike F.interpolate
        x = x.expand(-1, -1, time, -1, 2, -1, 2, -1).reshape(n, t * time, h * 2, w * 2, c)
        return self.conv(x.permute(0, 4, 1, 2, 3))


class Residual(nn.Module):
    """main(x) + shortcut(x)"""

    def __init__(self, main, shortcut=None):
        super().__init__()
        self.main = main
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return self.main(x) + self.shortcut(x)


class ResBlock(nn.Module):
    """Two convolutions, to be wrapped in `Residual`."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = Conv(width, width, act=True)
        self.conv2 = Conv(width, width, bias=False, norm=True)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class LinearAttention(nn.Module):
    """ReLU linear attention over all positions of the clip (Cai et al. 2022, EfficientViT), from queries, keys and
    values at two scales: single positions, and 5 x 5 x 5 neighbourhoods."""

    def __init__(self, width):
        super().__init__()
        self.qkv = Conv(width, 3 * width, 1, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(
            nn.Conv3d(3 * width, 3 * width, 5, padding=2, groups=3 * width, bias=False),
            nn.Conv3d(3 * width, 3 * width, 1, groups=3 * width // HEAD, bias=False))])
        self.proj = Conv(2 * width, width, 1, bias=False, norm=True)

    def forward(self, x):
        qkv = self.qkv(x)
        return self.proj(linear_attention(torch.cat([qkv, self.aggreg[0](qkv)], 1)))


def linear_attention(qkv):
    """ReLU linear attention of heads of 32 channels. qkv: N heads*96 T H W -> N heads*32 T H W.

    Computed in float32 (on a GPU the products may be TF32): in half precision the sums over all positions overflow, or
    lose the small weights.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        x = qkv.permute(0, 2, 3, 4, 1).flatten(1, 3).float().unflatten(2, (-1, 3 * HEAD)).transpose(1, 2)
        q, k, v = x.split(HEAD, 3)  # (N, heads, positions, 32)
        q, k = q.relu(), k.relu()
        total = q @ k.sum(2)[..., None]                                               # (N, heads, positions, 1)
        out = q @ (k.transpose(2, 3) @ v) / (total + 1e-15)
    out = out.transpose(1, 2).to(qkv.dtype, memory_format=torch.contiguous_format)    # (N, positions, heads, 32)
    return out.flatten(2).unflatten(1, qkv.shape[2:]).permute(0, 4, 1, 2, 3)


class GLUConv(nn.Module):
    """Inverted bottleneck with a depthwise convolution in its middle; half of the channels gate the other half."""

    def __init__(self, width):
        super().__init__()
        self.inverted_conv = Conv(width, 8 * width, 1, act=True)
        self.depth_conv = Conv(8 * width, 8 * width, groups=8 * width)
        self.point_conv = Conv(4 * width, width, 1, bias=False, norm=True)

    def forward(self, x):
        x, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, 1)
        return self.point_conv(x * F.silu(gate))


class AttentionBlock(nn.Module):
    """Linear attention, then a gated convolution, each beside a shortcut: N width H W, unchanged."""

    def __init__(self, width):
        super().__init__()
        self.context_module = Residual(LinearAttention(width))
        self.local_module = Residual(GLUConv(width))

    def forward(self, x):
        return self.local_module(self.context_module(x))


# ---- encoder and decoder -----------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Layers in a row, under the published name. With checkpointing, each layer but the last `spared` recomputes its
    activations in the backward pass."""

    def __init__(self, layers, spared=0):
        super().__init__()
        self.op_list = nn.ModuleList(layers)
        self.spared = spared

    def forward(self, x, checkpointing=False):
        for i, layer in enumerate(self.op_list):
            if checkpointing and i < len(self.op_list) - self.spared:
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return x


def blocks(stage, width, depth):
    return [Residual(ResBlock(width)) if stage < CONV_STAGES else AttentionBlock(width) for _ in range(depth)]


class Encoder(nn.Module):
    """N 3 T H W in [-1, 1] -> N latent_channels T/4 H/32 W/32."""

    def __init__(self, widths, depths, latent_channels):
        super().__init__()
        self.project_in = Conv(3, widths[0])
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            layers = blocks(i, width, depth)
            if i < len(widths) - 1:
                time, following = 2 if i in TIME_STAGES else 1, widths[i + 1]
                layers.append(Residual(Conv(width, following, stride=(time, 2, 2)), Average(following, time)))
            self.stages.append(Stage(layers))
        self.project_out = Residual(Stage([Conv(widths[-1], latent_channels)]), Average(latent_channels, space=1))

    def forward(self, x, checkpointing=False):
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x, checkpointing)
        return self.project_out(x)


class Decoder(nn.Module):
    """N latent_channels t h w -> N 3 4t 32h 32w in [-1, 1], or one frame where t is 1."""

    def __init__(self, widths, depths, latent_channels):
        super().__init__()
        self.project_in = Residual(Conv(latent_channels, widths[-1]), Duplicate(widths[-1], space=1))
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths)):
            layers = blocks(i, width, depth)
            if i < len(widths) - 1:
                time = 2 if i in TIME_STAGES else 1
                layers.insert(0, Residual(Upsample(widths[i + 1], width, time), Duplicate(width, time)))
            self.stages.append(Stage(layers))
        self.project_out = Stage([RMSNorm(widths[0]), nn.ReLU(inplace=True), Conv(widths[0], 3)], spared=2)

    def forward(self, x, checkpointing=False):
        x = self.project_in(x)
        for stage in reversed(self.stages):
            x = stage(x, checkpointing)
        return self.project_out(x, checkpointing)


def init_weights(model):
    """Set the weights to an autoencoder that keeps the mean colour of each cell, if there are eight channels or more.

    All branches start at zero (the norms at the end of blocks, the convolutions beside changes of size), so that only
    the chain of shortcuts is left: averages in the encoder, copies in the decoder. The channels form eight groups. Six
    carry the colours above and below mid-grey (the last ReLU keeps one sign each). The decoder sets the other two to a
    constant, so that the last norm divides by about the same number everywhere.
    """
    first, last = model.encoder.project_in.conv, model.decoder.project_out.op_list[-1].conv
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Conv) and module.norm is not None:
                module.norm.weight.zero_()
            if isinstance(module, Residual) and not isinstance(module.shortcut, nn.Identity):
                for parameter in module.main.parameters():
                    parameter.zero_()
        last.weight *= 0.1
        for layer in (first, last):
            layer.bias.zero_()
        constant = model.decoder.project_in.main.conv.bias
        constant[len(constant) * 6 // 8:] = 2
        width = len(first.bias) // 8
        for c in range(3 if width else 0):
            for group, sign in ((c, 1), (c + 3, -1)):
                channels = slice(group * width, (group + 1) * width)
                first.weight[channels, c, 1, 1, 1] += sign
                last.weight[:, channels] = 0
                last.weight[c, channels, 1, 1, 1] = sign / width


class DCAE(nn.Module):
    """The autoencoder; the defaults are the published dc-ae-f32t4c128 (459 M parameters).

    width_list: channels of each stage, from pixels to latents; from the fourth on, multiples of 32. Six stages divide
    height and width by 32; each further stage halves them again. encoder_depth_list, decoder_depth_list: number of
    blocks in each stage. ValueError for lists that do not fit each other.
    """

    def __init__(self, width_list=(128, 256, 512, 512, 1024, 1024), encoder_depth_list=(2, 2, 2, 3, 3, 3),
                 decoder_depth_list=(3, 3, 3, 3, 3, 3), latent_channels=128):
        super().__init__()
        check_lists(width_list, encoder_depth_list, decoder_depth_list, latent_channels)
        self.config = dict(width_list=list(width_list), encoder_depth_list=list(encoder_depth_list),
                           decoder_depth_list=list(decoder_depth_list), latent_channels=latent_channels)
        self.image_channels, self.latent_channels = 3, latent_channels
        self.time_factor, self.space_factor = 4, 2 ** (len(width_list) - 1)
        self.encoder = Encoder(width_list, encoder_depth_list, latent_channels)
        self.decoder = Decoder(width_list, decoder_depth_list, latent_channels)
        init_weights(self)
        self.gradient_checkpointing = False

    @property
    def last_layer(self):
        """Weight of the decoder's last convolution, for the adaptive GAN weight; never inside a checkpoint."""
        return self.decoder.project_out.op_list[-1].conv.weight

    # ---- frame counts and alignment: here, and nowhere else -------------------------------------------------------

    def latent_frames(self, frames):
        """How many latents `frames` input frames give: one for an image, a quarter (rounded up) for a clip.

        A clip gives at least two, since the decoder takes a single latent for an image: 2 to 4 frames are padded to 8.
        (The published encoder gives one latent, which its decoder turns into a single frame.)
        """
        return 1 if frames == 1 else max(2, -(-frames // self.time_factor))

    def frame_index(self, frames):
        """For each output frame of a clip of `frames` frames, the input frame (from 0) that it stands for."""
        return list(range(frames))

    def targets(self, video):
        """The frames that `forward(video)` reconstructs: all, N T C H W."""
        return video

    # ---- whole clips ----------------------------------------------------------------------------------------------

    def encode(self, video):
        """Video N T 3 H W in [0, 1] -> latents N T' C H/32 W/32, T' = latent_frames(T); the last frame is repeated
        to fill the last latent. ValueError if H or W is no multiple of the space factor."""
        if video.ndim != 5 or video.shape[2] != 3 or video.shape[1] == 0:
            raise ValueError(f"expected video as N T 3 H W, T at least 1, got shape {tuple(video.shape)}")
        if any(size % self.space_factor for size in video.shape[-2:]):
            raise ValueError(f"height and width must be multiples of {self.space_factor}, got "
                             f"{video.shape[-2]}x{video.shape[-1]}: crop, or pad with torch.nn.functional.pad")
        frames = video.shape[1]
        if frames > 1:
            missing = self.latent_frames(frames) * self.time_factor - frames
            video = torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1, -1)], 1) if missing else video
        return self._encoded(video.transpose(1, 2) * 2 - 1).transpose(1, 2)

    def decode(self, latents):
        """Latents N T' C h w -> video N 4T' 3 32h 32w, one frame if T' is 1, clamped to [0, 1] except in training mode.
        If `encode` padded the clip, its padding comes back too: crop it."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels or latents.shape[1] == 0:
            raise ValueError(f"expected latents as N T {self.latent_channels} H W, T at least 1, "
                             f"got shape {tuple(latents.shape)}")
        video = self._decoded(latents.transpose(1, 2)).transpose(1, 2) * 0.5 + 0.5
        return video if self.training else video.clamp(0, 1)

    def forward(self, video):
        """Returns (reconstruction N T 3 H W, {"latents": ...}), exactly as many frames as came in."""
        latents = self.encode(video)
        return self.decode(latents)[:, :video.shape[1]], {"latents": latents}

    def stream(self, memory_limit=None, total_latents=None):
        """A DCAEStream. The arguments, which other models need, change nothing: the result depends on the length of a
        segment, so a memory limit must not choose it."""
        return DCAEStream(self)

    def _encoded(self, x):
        return self.encoder(x, self._checkpointing())

    def _decoded(self, z):
        return self.decoder(z, self._checkpointing())

    def _checkpointing(self):
        return self.gradient_checkpointing and torch.is_grad_enabled()


def check_lists(widths, encoder_depths, decoder_depths, latent_channels):
    """ValueError, naming the first misfit, for widths and depths that make no network."""
    for name, values in (("width_list", widths), ("encoder_depth_list", encoder_depths),
                         ("decoder_depth_list", decoder_depths), ("latent_channels", [latent_channels])):
        if not isinstance(values, (tuple, list)) or any(type(value) is not int or value < 0 for value in values):
            raise ValueError(f"{name}: whole numbers are wanted, got {values}")
    stages = len(widths)
    if stages < 6 or not stages == len(encoder_depths) == len(decoder_depths):
        raise ValueError(f"a DCAE takes six or more widths and as many depths, got {stages} widths, "
                         f"{len(encoder_depths)} encoder depths and {len(decoder_depths)} decoder depths")
    if min(*encoder_depths, *decoder_depths) < 1:
        raise ValueError(f"each stage takes one block at least, got {encoder_depths} and {decoder_depths}")
    if min(*widths, latent_channels) < 1:
        raise ValueError(f"each stage takes one channel at least, got {widths} and latent_channels={latent_channels}")
    for i, width in enumerate(widths):
        if i >= CONV_STAGES and width % HEAD:
            raise ValueError(f"width {width} of stage {i} has attention: take a multiple of {HEAD}")
    for i, (width, following) in enumerate(zip(widths, [*widths[1:], latent_channels])):
        cell = 4 if i < stages - 1 else 1
        if width * cell % following or following % width and width % following:
            raise ValueError(f"the shortcut from {width} to {following} channels (stage {i}) averages whole groups of "
                             f"channels: one must divide the other, and the second be at most {cell} times the first")


class DCAEStream:
    """Encodes and decodes clips piece by piece, however the pieces are cut.

        stream = model.stream()
        for frames in pieces:                      # N t 3 H W, any t
            show(stream.decode(stream.encode(frames)))
        show(stream.flush())

    The model is not causal, so for clips of more than 36 frames a stream's result differs from `model(video)`: the
    stream cuts them into segments of 32 frames (8 latents), counted from the start, and codes each as a clip of its
    own. A rest of fewer than two latents joins the segment before. Seams may show where segments meet. `encode` and
    `decode` return what is complete so far, possibly N 0 C H W. Memory does not grow with the clip.
    """

    def __init__(self, model):
        self.model = model
        self._frames, self._latents = [], []  # what waits for a full segment, as pieces N t C H W
        self._empty_latents = self._empty_frames = None
        self._seen = self._shown = 0          # frames in, frames out
        self._total = None                    # frames of the clip, once its end is known
        self._decoding = False

    @torch.no_grad()
    def encode(self, frames):
        """Take N t 3 H W frames, return the latents N t' C h w that are complete."""
        model = self.model
        if self._empty_latents is None:
            n, _, _, height, width = frames.shape
            self._empty_latents = frames.new_empty(n, 0, model.latent_channels, height // model.space_factor,
                                                   width // model.space_factor)
        self._seen += frames.shape[1]
        self._frames.append(frames)
        segment = SEGMENT * model.time_factor  # cut only where at least two more latents are sure to follow
        done = [model.encode(piece) for piece in take(self._frames, segment, segment + model.time_factor + 1)]
        return torch.cat([self._empty_latents, *done], 1)

    @torch.no_grad()
    def flush_encoder(self):
        """End of the clip: the remaining latents; None if no frames were given."""
        if self._empty_latents is None:
            return None
        self._total = self._seen
        done = [self.model.encode(piece) for piece in take(self._frames, None)]
        return torch.cat([self._empty_latents, *done], 1)

    @torch.no_grad()
    def decode(self, latents):
        """Take N t C h w latents, return the frames N t' 3 H W that are complete, in [0, 1]."""
        self._decoding = True
        if self._empty_frames is None:
            n, _, _, h, w = latents.shape
            scale = self.model.space_factor
            self._empty_frames = latents.new_empty(n, 0, 3, h * scale, w * scale)
        self._latents.append(latents)
        return self._show(take(self._latents, SEGMENT, SEGMENT + 2))

    @torch.no_grad()
    def flush_decoder(self):
        """End of the clip: the remaining frames (in all, as many as this stream encoded; four for each latent if it
        encoded none). None if no latents were given."""
        return None if self._empty_frames is None else self._show(take(self._latents, None))

    def _show(self, segments):
        frames = torch.cat([self._empty_frames, *(self.model.decode(piece).clamp(0, 1) for piece in segments)], 1)
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
        self.__init__(self.model)
        return rest


def take(pieces, size, needed=None):
    """Yield pieces of `size` frames cut off the front of a list of N t C H W, while it holds `needed` frames or more.
    size None: yield all that it holds, as one piece."""
    while (waiting := sum(piece.shape[1] for piece in pieces)) >= (needed or 1):
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        cut = size or waiting
        pieces[:] = [joined[:, cut:]]
        yield joined[:, :cut]


# ---- weights -----------------------------------------------------------------------------------------------------


def recognise(state_dict):
    """The DCAE arguments that fit a state_dict, from its names and shapes. ValueError if these are no DCAE weights."""
    if "encoder.project_out.main.op_list.0.conv.weight" not in state_dict:
        raise ValueError("no Video DC-AE weights: encoder.project_out.main.op_list.0.conv.weight is missing")
    latent_channels = state_dict["encoder.project_out.main.op_list.0.conv.weight"].shape[0]
    layers = {tuple(name.split(".")[i] for i in (0, 2, 4)) for name in state_dict if ".stages." in name}
    stages = len({stage for _, stage, _ in layers})
    if stages > 32:
        raise ValueError(f"no Video DC-AE weights: {stages} stages")

    def depths(half):  # each stage but the last has one more layer, which changes the size
        counts = [sum(layer[:2] == (half, str(i)) for layer in layers) for i in range(stages)]
        return [count - (i < stages - 1) for i, count in enumerate(counts)]

    widths = []
    for i in range(stages):
        block = "main.conv2" if i < CONV_STAGES else "context_module.main.proj"
        name = f"encoder.stages.{i}.op_list.0.{block}.norm.weight"
        if name not in state_dict:
            raise ValueError(f"no Video DC-AE weights: {name} is missing")
        widths.append(state_dict[name].shape[0])
    return dict(width_list=widths, encoder_depth_list=depths("encoder"), decoder_depth_list=depths("decoder"),
                latent_channels=latent_channels)


def load_dcae(path_or_state):
    """The DCAE, in eval mode, from a .safetensors or .pth file of plain weights, or from a state_dict.

    Runs no code from the file. ValueError if the weights do not fit.
    """
    if isinstance(path_or_state, dict):
        state_dict = path_or_state
    elif str(path_or_state).endswith(".safetensors"):
        from safetensors.torch import load_file  # pip install safetensors
        state_dict = load_file(str(path_or_state))
    else:
        state_dict = torch.load(path_or_state, map_location="cpu", weights_only=True)
    model = DCAE(**recognise(state_dict))
    own = model.state_dict()
    problems = [f"{k} is {tuple(state_dict[k].shape)}, not {tuple(own[k].shape)}"
                for k in own if k in state_dict and state_dict[k].shape != own[k].shape]
    problems += [f"{k} is missing" for k in own if k not in state_dict]
    problems += [f"{k} is unknown" for k in state_dict if k not in own]
    if problems:
        raise ValueError(f"the weights do not fit a DCAE of {model.config}: {problems[0]}"
                         + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    model.load_state_dict(state_dict)
    return model.eval()
