"""TAEHV as a single step with explicit state, for torch.export and ONNX, whose graphs have no Python and no loops.

    step = DecoderStep(model)                            # or EncoderStep(model)
    memories = step.start(latent)                        # zeros: a clip begins
    for latent in latents:                               # N 1 C h w, what the diffusion model consumes
        frames, *memories = step(latent, *memories)      # N time_factor 3 H W in [0, 1]

The memory blocks look one frame back, so a graph for a whole clip would have the clip's length built in. A step
instead takes the frames of one latent and, for each memory block, the frame that it saw last (its memory); it returns
the memories for the next call. Any height, width and batch size work. The caller does the rest that whole clips need:
it drops the decoder's first frames, and cuts H3's chunks, as `about` says. `frames_of` and `latents_of` do so in
Python.

This file works with torch and model_taehv.py beside it; ONNX needs the packages of `ONNX_PACKAGES`.
"""
import importlib.util
import io
import json
import warnings

import torch
from torch import nn

from model_taehv import H3_DROPPED, H3_FRAMES, H3_LATENTS, MEMORY_BLOCKS, TGrow, TPool, running_order

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# {dtype: by how much a step's pixels, and its latents of about -3 to 3, may differ from the model's}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}


class Step(nn.Module):
    """What both steps have in common. The model is in eval mode; a step uses its weights, and does not change it."""

    def __init__(self, model, blocks):
        super().__init__()
        self.blocks, self.frames_a_step = blocks, model.time_factor
        for name in ("patch_size", "output_range", "variant", "latent_channels", "space_factor", "t_upscale"):
            setattr(self, name, getattr(model, name))
        self.unshuffle, self.shuffle = model._unshuffle, model._shuffle
        self.own, self.normalised = model._own, model._normalised

    def run(self, frames, memories):
        """(frames, new memories) after the blocks; all are lists of N C H W. Without memories, a clip begins: zeros."""
        memories, kept = list(memories), []
        for _, block in running_order(self.blocks):
            if isinstance(block, MEMORY_BLOCKS):
                past = memories.pop(0) if memories else torch.zeros_like(frames[0])
                kept.append(frames[-1])
                frames = [block(now, before) for now, before in zip(frames, [past, *frames])]
            elif isinstance(block, TPool):
                groups = zip(*[iter(frames)] * block.stride)
                frames = [block.conv(torch.cat(group, 1)) for group in groups]
            elif isinstance(block, TGrow):
                frames = [piece for frame in frames for piece in block.conv(frame).chunk(block.stride, 1)]
            else:
                frames = [block(frame) for frame in frames]
        return frames, kept

    @torch.no_grad()
    def start(self, x):
        """The memories of a clip's beginning, for a step's input x: zeros."""
        return [torch.zeros_like(memory) for memory in self(x)[1:]]


class DecoderStep(Step):
    """forward(latent N 1 C h w, *memories) -> (frames N t 3 H W in [0, 1], *memories), t of `t_upscale`."""

    part = "decoder"

    def __init__(self, model):
        super().__init__(model, model.decoder)

    def forward(self, latent, *memories):
        frames, kept = self.run([self.own(latent)[:, 0]], memories)
        return torch.stack([self.shuffle(frame) for frame in frames], 1).clamp(0, 1), *kept


class EncoderStep(Step):
    """forward(frames N time_factor 3 H W in [0, 1], *memories) -> (latent N 1 C h w, *memories)."""

    part = "encoder"

    def __init__(self, model):
        super().__init__(model, model.encoder)

    def forward(self, frames, *memories):
        (latent,), kept = self.run(list(self.unshuffle(frames).unbind(1)), memories)
        return self.normalised(latent.unsqueeze(1)), *kept


# ---- whole clips, step by step -------------------------------------------------------------------------------------


def frames_of(step, model, latents, memories):
    """Decode latents N T C h w -> N T' 3 H W step by step, as a caller of an exported step does. Nothing is dropped
    from an even number of CogVideoX's latents. For H3, T should be 5 k + 2: others end with blank frames."""
    raw = []
    for latent in latents.split(1, 1):
        frames, *memories = step(latent, *memories)
        raw.append(frames)
    raw = torch.cat(raw, 1)
    if model.is_h3:
        size = H3_LATENTS * model.t_upscale
        kept = [i for i in range(-(-raw.shape[1] // size) * size) if i % size >= model.frames_to_trim]
        return raw[:, kept[:len(kept) - H3_DROPPED * model.t_upscale]]
    return raw if model.is_cogvideox and latents.shape[1] % 2 == 0 else raw[:, model.frames_to_trim:]


def latents_of(step, model, frames, start):
    """Encode frames N T 3 H W step by step, as a caller of an exported step does. T: a multiple of the time factor, or
    for H3 of 17."""
    if not model.is_h3:
        return torch.cat(steps_of(step, frames, model.time_factor, start), 1)
    black = torch.zeros_like(frames[:, :H3_LATENTS * model.time_factor - H3_FRAMES])
    latents = [latent for chunk in frames.split(H3_FRAMES, 1)  # every chunk is a clip of its own
               for latent in steps_of(step, torch.cat([black, chunk], 1), model.time_factor, start)]
    return torch.cat(latents[:-H3_DROPPED], 1)


def steps_of(step, frames, size, memories):
    done = []
    for piece in frames.split(size, 1):
        latent, *memories = step(piece, *memories)
        done.append(latent)
    return done


def about(step, model, start):
    """A dict, which JSON can hold, with all that a caller of the step has to know."""
    words = dict(
        part=step.part, variant=model.variant, latent_channels=model.latent_channels,
        frames_in_a_latent=model.time_factor, frames_of_a_latent=model.t_upscale, pixels_per_latent=model.space_factor,
        drop_first_frames=0 if step.part == "encoder" else model.frames_to_trim, memories=len(start),
        memory_channels=[memory.shape[1] for memory in start])
    if model.is_h3:
        words["chunks"] = dict(frames=H3_FRAMES, latents=H3_LATENTS, drop_last_latents=H3_DROPPED, each="encoder: "
                               "memories start anew, after 3 black frames; decoder: the first frames are dropped")
    if model.is_cogvideox:
        words["drop_first_frames_of"] = "an odd number of latents"
    return words


# ---- files ---------------------------------------------------------------------------------------------------------


def example(step, model, height, width, latents=1):
    """Random input for `latents` steps; height and width are those of the latents."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    if step.part == "decoder":
        return torch.randn(1, latents, model.latent_channels, height, width, generator=generator).to(dtype)
    frames, scale = latents * model.time_factor, model.space_factor
    return torch.rand(1, frames, 3, height * scale, width * scale, generator=generator).to(dtype)


def graph_of(step, model):
    """(the step as a torch.export program in which batch, height and width are free, names of inputs, of outputs)."""
    from torch.export import Dim
    x = example(step, model, 6, 10).expand(2, -1, -1, -1, -1)
    start = step.start(x)
    batch, height, width = (Dim(name, min=1, max=4096) for name in ("batch", "height", "width"))
    scale = 1 if step.part == "decoder" else model.space_factor
    shapes = [{0: batch, 3: scale * height, 4: scale * width}]
    for memory in start:
        scale = memory.shape[2] // 6
        shapes.append({0: batch, 2: scale * height, 3: scale * width})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(step, (x, *start), dynamic_shapes=(shapes[0], tuple(shapes[1:])), strict=False)
    first, last = ("latent", "frames") if step.part == "decoder" else ("frames", "latent")
    numbers = range(len(start))
    return program, [first, *(f"memory_{i}" for i in numbers)], [last, *(f"new_memory_{i}" for i in numbers)]


def as_torch(step, model):
    """The bytes of a .pt2 file for torch.export.load, with `about` in its extra file about.json."""
    program, _, _ = graph_of(step, model)
    words, file = about(step, model, step.start(example(step, model, 2, 2))), io.BytesIO()
    torch.export.save(program, file, extra_files={"about.json": json.dumps(words)})
    return file.getvalue()


def open_torch(content):
    """The step, a function of tensors, from the bytes of `as_torch`."""
    return torch.export.load(io.BytesIO(content)).module()


def missing_packages():
    """The packages that ONNX needs and that are not installed."""
    return [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]


def as_onnx(step, model):
    """The bytes of an .onnx file, with the entries of `about` in its metadata."""
    program, inputs, outputs = graph_of(step, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = torch.onnx.export(program, (), input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    words = about(step, model, step.start(example(step, model, 2, 2)))
    done.model.metadata_props.update({key: value if isinstance(value, str) else json.dumps(value)
                                      for key, value in words.items()})
    return done.model_proto.SerializeToString()


def open_onnx(content):
    """The step, a function of tensors on the CPU, from the bytes of `as_onnx`."""
    import onnxruntime
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def step(*tensors):
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors)}
        return [torch.from_numpy(array) for array in session.run(None, given)]
    return step


@torch.no_grad()
def difference(step, opened, model):
    """The largest difference between the results of `opened`, an exported step, and of the model's own stream, for a
    random clip."""
    count = 7 if model.is_h3 else 3
    x = example(step, model, 4, 3, count)  # another size than the graph was made with
    stream = model.stream(total_latents=count)
    if step.part == "decoder":
        expected = torch.cat([stream.decode(x), stream.flush_decoder()], 1)
        found = frames_of(opened, model, x, step.start(x[:, :1]))
    else:
        if model.is_h3:
            x = x[:, :1].expand(-1, H3_FRAMES, -1, -1, -1) * torch.linspace(0, 1, H3_FRAMES).view(1, -1, 1, 1, 1)
            x = torch.cat([x, x.flip(1)], 1).to(next(model.parameters()).dtype)
        expected = torch.cat([stream.encode(x), stream.flush_encoder()], 1)
        found = latents_of(opened, model, x, step.start(x[:, :model.time_factor]))
    if found.shape != expected.shape:
        raise RuntimeError(f"the step gives {tuple(found.shape)}, and the model {tuple(expected.shape)}")
    return (found.float() - expected.float()).abs().max().item()
