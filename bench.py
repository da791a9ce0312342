"""How fast, and in how much memory: a table, and the same as JSON.

    python bench.py                              # every section: half an hour on two cores
    python bench.py codec --sizes 256x256 480x832 --json fast.json
    python bench.py loader --data videos/        # real clips; without --data, clips are made on the fly
    python bench.py quality --data train/ --val-data val/     # training runs of 12 minutes; only where asked for
    python bench.py codec quantizer --quick      # small sizes, few repetitions: does it run?

Sections: codec (encode and decode, plain and fast), train (a training step), loader (clips from videos, cached clips),
quantizer (against full distances and one-hot matrices), quality (PSNR of a TAEHV from scratch after so many minutes,
and how much sooner our recipe has the PSNR that the published notebook's ends with). Each row is timed in turn with the
row that it is compared to, within one process of its own; medians. "of peak" is the share of the multiplication rate
that a matrix product reaches here, in float32 or bf16; memory is the process's peak over what it held before.
"""
import argparse
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from config import load_config
from device import describe, peak_memory, pick_device, pick_precision, place, reset_peak_memory, synchronize, tune

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# ---- measuring ---------------------------------------------------------------------------------------------------


def alternate(functions, repeat, device):
    """{name: median seconds} of functions that take turns; each runs once before."""
    times = {name: [] for name in functions}
    for turn in range(repeat + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def memory_of(function, device):
    """Bytes at the peak of a call beyond those before it."""
    reset_peak_memory(device)
    before = peak_memory(device)
    function()
    synchronize(device)
    return peak_memory(device) - before


def alone(function, *arguments):
    """function(*arguments) in a fresh process: its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peaks(options):
    """{type: multiplications and additions per second of a matrix product}, and bytes copied per second."""
    device = pick_device(options.device)
    tune(device)
    size, found = 1024 if device.type == "cpu" else 8192, {}
    for name, dtype in TYPES.items():
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = alternate({"product": lambda a=a: a @ a}, 3 if options.quick else 15, device)["product"]
        found[name] = 2 * size ** 3 / seconds
    block = torch.empty(1 << (24 if device.type == "cpu" else 30), dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    found["copy"] = 2 * len(block) / alternate({"copy": lambda: other.copy_(block)}, 15, device)["copy"]
    return found


def flops(call):
    """Multiplications and additions of the convolutions and linear layers in a call, as the plain model does them."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


# ---- sections: each gives rows, dicts of what is printed -------------------------------------------------------------


def families():
    """{name: function that makes a model}: the published sizes but for VQGAN (f8, ch 64) and a narrow DC-AE."""
    from model_dcae import DCAE
    from model_taehv import TAEHV
    from model_vqgan import VQGAN
    from model_vqvae import VQVAE2
    narrow = dict(width_list=(32, 32, 64, 64, 64, 64), encoder_depth_list=(1,) * 6, decoder_depth_list=(1,) * 6)
    return {"taehv": TAEHV, "taew2_2": lambda: TAEHV("taew2_2"),
            "vqgan": lambda: VQGAN(ch=64, ch_mult=(1, 1, 2, 4), attn_resolutions=(32,)), "vqvae2": VQVAE2,
            "dcae_small": lambda: DCAE(**narrow, latent_channels=64)}


def streamed(model, kind, pieces):
    stream = model.stream()
    for piece in pieces:
        getattr(stream, kind)(piece)
    (stream.flush_encoder if kind == "encode" else stream.flush_decoder)()


def codec_call(options, name, size, label, task):
    """(function to time, model, its input) of encoding or decoding a clip. label: "plain fp32", "fast bf16", "at once
    fp32" (the whole clip in one pass, the published default)."""
    device = pick_device(options.device)
    tune(device)
    how, kind = label.rsplit(" ", 1)
    torch.manual_seed(0)
    model = place(families()[name]().eval(), device, TYPES[kind])
    height, width = (-(-n // model.space_factor) * model.space_factor for n in size)
    if task == "encode":
        x = torch.rand(1, options.frames, 3, height, width, device=device)
    else:
        x = torch.randn(1, model.latent_frames(options.frames), model.latent_channels, height // model.space_factor,
                        width // model.space_factor, device=device)
    x = x.to(TYPES[kind])
    if how == "at once":
        call = model.encode if task == "encode" else model.decode
        return torch.no_grad()(lambda: call(x)), model, x
    runner = model.fast() if how == "fast" else model
    return lambda: streamed(runner, task, x.split(1, 1)), model, x


def codec_rows(options, name, size, labels, task):
    calls = {label: codec_call(options, name, size, label, task) for label in labels}
    _, model, x = calls[labels[0]]
    work = flops(lambda: model.encode(x) if task == "encode" else model.decode(x))
    seconds = alternate({label: call for label, (call, _, _) in calls.items()}, options.repeat, x.device)
    size = "x".join(map(str, size))
    return [dict(what=f"{name} {task} {size}x{options.frames}", how=label, value=options.frames / seconds[label],
                 unit="frames/s", ratio=seconds[labels[0]] / seconds[label], rate=work / seconds[label],
                 type=label.split()[-1]) for label in labels]


def codec_memory(options, name, size, label, task):
    call, _, x = codec_call(options, name, size, label, task)
    return memory_of(call, x.device)


def codec(options):
    kinds = [options.precision] if options.precision else ["fp32", "bf16"]
    for name in options.families:
        has_fast = hasattr(families()[name](), "fast") and pick_device(options.device).type == "cpu"
        ways = ["plain", *(["fast"] if has_fast else []),
                *(["at once"] if options.at_once else [])]
        labels = [f"{way} {kind}" for kind in kinds for way in ways]
        for size in options.sizes:
            for task in ("encode", "decode"):
                for row in alone(codec_rows, options, name, size, labels, task):
                    if not options.quick:
                        row["memory"] = alone(codec_memory, options, name, size, row["how"], task)
                    yield row


def published(blocks, x):
    """An encoder or decoder by the published file's whole-clip routine, which is retyped here: N T C H W to
    N T' C' H' W', in the layout as it comes; the frames before are padded and concatenated, and space is enlarged
    before time grows."""
    from model_taehv import MemBlock, SuperMemBlock, TGrow, TPool
    n, x = len(x), x.flatten(0, 1)
    for block in blocks:
        if isinstance(block, (MemBlock, SuperMemBlock)):
            frames = x.unflatten(0, (n, -1))
            x = block(x, F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1))
        elif isinstance(block, TPool):
            x = block.conv(x.reshape(-1, block.stride * x.shape[1], *x.shape[2:]))
        elif isinstance(block, TGrow):
            x = block.conv(x).reshape(-1, *x.shape[1:])
        else:
            x = block(x)
    return x.unflatten(0, (n, -1))


def train_call(options, size, batch, label):
    """(a training step, its forward and backward passes, the reconstruction that it makes) of a TAEHV. "plain": the
    published routine and PyTorch's AdamW; "ours": as train.py does it, but without the norm of the gradients."""
    from model_taehv import TAEHV
    device = pick_device(options.device)
    tune(device)
    torch.manual_seed(0)
    model = TAEHV().to(device) if label in ("plain fp32", "plain bf16") else place(TAEHV(), device)
    ours = label.startswith("ours")
    optimizer = torch.optim.AdamW(model.parameters(), **dict(fused=device.type in ("cpu", "cuda")) if ours else {})
    video = torch.rand(batch, 12, 3, size, size, device=device)

    def forward(video=video):
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in label):
            if ours:
                return model(video)[0]
            return published([*model.encoder, *model.decoder], video)[:, model.frames_to_trim:]

    def passes(video=video):
        F.l1_loss(forward(video).float(), model.targets(video)).backward()

    def step():
        passes()
        optimizer.step()
        optimizer.zero_grad()
    return step, passes, forward


def train_rows(options, size, batch, labels):
    calls = {label: train_call(options, size, batch, label) for label in labels}
    outputs = [forward().detach().float() for _, _, forward in calls.values()]
    for label, output in zip(labels, outputs):
        error = (output - outputs[0]).norm() / outputs[0].norm()
        assert error < (0.05 if "bf16" in label else 1e-4), f"{label} is {error:.1e} away from {labels[0]}"
    seconds = alternate({label: step for label, (step, _, _) in calls.items()}, options.repeat, outputs[0].device)
    first = next((label for label in labels if label == "plain bf16"), labels[0])
    return [dict(what=f"train taehv {size}x{size}x12, batch {batch}", how=label, value=batch / seconds[label],
                 unit="clips/s", ratio=seconds[first] / seconds[label], type=label.split()[1]) for label in labels]


def train_memory(options, size, batch, label):
    """Bytes for each clip at the peak of the two passes, beyond the weights and their gradients."""
    step, passes, _ = train_call(options, size, batch, label)
    video = torch.rand(batch, 12, 3, size, size, device=pick_device(options.device))
    passes(video[:1, :4, :, :16, :16])  # the gradients exist from here on
    return memory_of(lambda: passes(video), video.device) / batch


def train(options):
    """A training step: forward and backward passes, AdamW. Ratios are to "plain bf16" if that is run."""
    labels = ["plain fp32", "plain bf16", "plain bf16 channels-last", "ours fp32", "ours bf16"]
    labels = [label for label in labels if options.precision in (None, label.split()[1])]
    for size, batch in [(32, 2)] if options.quick else [(64, 4), (128, 2)]:
        for row in alone(train_rows, options, size, batch, labels):
            row["memory"] = alone(train_memory, options, size, batch, row["how"])
            yield row


def notebook_clip(path, size, frames, rng):
    """A clip as notebooks read it: a seek for each frame, all of it converted to RGB and to float, then resized."""
    capture = data.open_video(path)
    count = max(1, int(capture.get(data.cv2.CAP_PROP_FRAME_COUNT)))
    first, clip = int(rng.integers(max(1, count - frames))), []
    for t in range(first, first + frames):
        capture.set(data.cv2.CAP_PROP_POS_FRAMES, min(t, count - 1))
        ok, frame = capture.read()
        if not ok:
            break
        frame = torch.from_numpy(data.cv2.cvtColor(frame, data.cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None].float() / 255
        edge = min(frame.shape[-2:])
        clip.append(F.interpolate(frame[..., :edge, :edge], size=(size, size), mode="area"))
    return torch.cat(clip)


def loader_rows(options, folder):
    """Clips of 128 x 128 x 12 read by this process alone."""
    data.start_worker(0)
    sources, _ = data.probe([s for s in data.find_sources(folder) if not s.is_image])
    clips, rng, number = data.TrainClips(sources, max_frame_delta=1), np.random.default_rng(0), iter(range(1 << 30))
    calls = {"a seek per frame, float, resize": lambda: [notebook_clip(s.path, 128, 12, rng) for s in sources],
             "ours": lambda: [clips[data.Key(*divmod(next(number), len(sources)), 128, 12)] for _ in sources]}
    seconds = alternate(calls, options.repeat, torch.device("cpu"))
    rows = [dict(what=f"loader, {len(sources)} videos, 128x128x12", how=label, value=len(sources) / seconds[label],
                 unit="clips/s", ratio=seconds["a seek per frame, float, resize"] / seconds[label]) for label in calls]
    return rows + cache_rows(options, rows[0]["value"])


def cache_rows(options, notebook):
    """Batches of 16 cached clips with their latents."""
    from latent_cache import CachedClips, LatentCache, ShardWriter, write_index
    count = 64 if options.quick else 512
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        with ShardWriter(folder, 0, count) as shard:
            shard.write("clips", rng.integers(0, 256, (count, 12, 128, 128, 3), dtype=np.uint8))
            shard.write("latents", rng.standard_normal((count, 3, 16, 16, 16)).astype(np.float16))
            shard.origins = [{"file": "noise"}] * count
        write_index(folder, dict(format=1, complete=True, frames=12, size=128, latents=[3, 16, 16, 16],
                                 latent_dtype="float16", teacher=dict(name="noise", fingerprint="0"),
                                 shards=[dict(clips=count, crc32=shard.crc32)]))
        clips = CachedClips(LatentCache(folder), range(count))
        schedule = data.TrainSchedule(clips, [data.Bucket(128, 12, 1.0, 16)], 0)
        batches = clips.batches(schedule, 0)
        block = np.empty((16, 12, 128, 128, 3), np.uint8)
        seconds = alternate({"cache": lambda: [next(batches) for _ in range(8)],
                             "copy": lambda: [block.copy() for _ in range(8)]}, options.repeat, torch.device("cpu"))
        batches.close()
    speed = 8 * 16 / seconds["cache"]
    return [dict(what="latent cache, 128x128x12", how="ours", value=speed, unit="clips/s", ratio=speed / notebook),
            dict(what="latent cache, 128x128x12", how="copying memory alone", value=8 * 16 / seconds["copy"],
                 unit="clips/s", ratio=8 * 16 / seconds["copy"] / notebook)]


def loader(options):
    if options.data:
        yield from alone(loader_rows, options, options.data)
        return
    from synthetic import make_demo
    with tempfile.TemporaryDirectory() as folder:
        make_demo(os.path.join(folder, "demo"))
        yield from alone(loader_rows, options, os.path.join(folder, "demo", "train"))


def quantizer_step(kind, codes, vectors, dim):
    """(seconds, bytes) of one forward and backward pass of a quantizer, in a process of its own."""
    import quantize
    device = torch.device("cpu")
    tune(device)
    torch.manual_seed(0)
    z = torch.randn(vectors // 256, dim, 16, 16, requires_grad=True)
    classes = {"vq": quantize.VectorQuantizer, "ema": quantize.EMAQuantizer, "optvq": quantize.SinkhornQuantizer}
    layer = classes[kind](codes, dim) if kind in classes else None
    book = torch.randn(codes, dim)
    if layer is not None:
        with torch.no_grad():
            layer.embedding.weight.copy_(book)

    def step():
        if layer is not None:
            out, info = layer(z)
            (info["vq_loss"] + out.mean()).backward()
            return
        flat = z.permute(0, 2, 3, 1).reshape(-1, dim)  # the textbook's way: all distances, then one-hot rows
        with torch.no_grad():
            distances = flat.square().sum(1, keepdim=True) + book.square().sum(1) - 2 * flat @ book.t()
            one_hot = F.one_hot(distances.argmin(1), codes).float()
            quantized = one_hot @ book
            one_hot.t() @ flat  # the sums of the moving averages
        (F.mse_loss(flat, quantized) + (flat + (quantized - flat).detach()).mean()).backward()

    start = time.perf_counter()
    memory = memory_of(step, device)
    return time.perf_counter() - start, memory


def quantizer(options):
    sizes = (1024, 4096, 64) if options.quick else (16384, 65536, 256)  # 17 GB the textbook's way
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 20e9:
        sizes = (min(sizes[0], 4096), *sizes[1:])
    first = None
    for label, kind in (("all distances, one-hot", "plain"), ("ours, VQ", "vq"), ("ours, EMA", "ema"),
                        ("ours, OptVQ", "optvq")):
        seconds, memory = alone(quantizer_step, kind, *sizes)
        first = first or seconds
        yield dict(what=f"quantizer, {sizes[0]} codes, {sizes[1]}x{sizes[2]}", how=label, value=seconds,
                   unit="s", memory=memory, ratio=first / seconds)


RECIPES = {"the notebook's recipe": ["taehv_notebook"], "ours": ["taehv", "size=64", "batch_size=2", "lr=1e-4",
           "pixel_loss=l2", "warmup_steps=20", "ema_decay=0.98"]}


def learning_curve(options, recipe, seed, folder):
    """[(minutes of training, validation PSNR at 128 px)] of a run of train.py."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    batch = load_config(recipe).batch_size
    settings = [f"data={options.data}", f"val_data={options.val_data}", "val_size=128", "val_clips_per_video=4",
                f"val_every={max(1, options.val_every // batch)}", f"max_minutes={options.minutes}",
                f"device={options.device}", f"seed={seed}", f"out_dir={folder}"]
    if options.quick:
        settings += ["size=32", "batch_size=2", "val_size=32", "val_clips=2"]
    done = subprocess.run([sys.executable, script, *recipe, *settings], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # train.py has said why
    found = re.findall(r"validation psnr (\S+) dB.* after (\S+) minutes", done.stdout)
    return [(float(minutes), float(psnr)) for psnr, minutes in found]


def quality(options):
    for seed in range(options.seeds):
        first = None
        for how, recipe in RECIPES.items():
            with tempfile.TemporaryDirectory() as folder:
                curve = learning_curve(options, recipe, seed, folder)
            minutes, psnr = first = first or curve[-1]
            soonest = minutes if first == curve[-1] else next((m for m, p in curve if p >= psnr), math.inf)
            yield dict(what=f"quality, {options.minutes:g} minutes, seed {seed}", how=how, value=curve[-1][1],
                       unit="dB", ratio=minutes / soonest, curve=curve)


SECTIONS = {"codec": codec, "train": train, "loader": loader, "quantizer": quantizer, "quality": quality}


# ---- the command -------------------------------------------------------------------------------------------------


def show(row, peak):
    share = f"{100 * row['rate'] / peak[row['type']]:.0f} %" if row.get("rate") else ""
    memory = f"{row['memory'] / 1e6:.0f} MB" if row.get("memory") is not None else ""
    print(f"{row['what']:42} {row['how']:32} {row['value']:9.2f} {row['unit']:9} {row['ratio']:6.2f}x {memory:>9} "
          f"{share:>7}", flush=True)


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"{', '.join(SECTIONS)} (default: all but quality)")
    parser.add_argument("--families", nargs="+", default=list(families()), metavar="NAME",
                        help="models of codec (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["256x256"], metavar="HxW", help="frames of codec (%(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="of a clip in codec (default: %(default)s)")
    parser.add_argument("--precision", choices=TYPES, help="one type only (default: both)")
    parser.add_argument("--at-once", action="store_true", help="whole clips in one pass too, the published default")
    parser.add_argument("--repeat", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--data", help="folder of videos for loader")
    parser.add_argument("--val-data", help="folder of videos for quality's validation")
    parser.add_argument("--minutes", type=float, default=12, help="of training in quality (default: %(default)s)")
    parser.add_argument("--val-every", type=int, default=160, help="clips between validations (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe in quality (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--json", metavar="FILE", help="write all rows there")
    parser.add_argument("--quick", action="store_true", help="small and few: to see that it runs")
    options = parser.parse_args(arguments)
    for name, known in (("sections", SECTIONS), ("families", families())):
        if wrong := [given for given in getattr(options, name) if given not in known]:
            parser.error(f"{wrong[0]!r} is none of {', '.join(known)}")
    try:
        options.sizes = [tuple(int(n) for n in size.split("x")) for size in options.sizes]
        if any(len(size) != 2 or min(size) < 16 for size in options.sizes):
            raise ValueError
    except ValueError:
        parser.error("--sizes: height x width of 16 or more are wanted, like 480x832")
    if options.repeat < 1 or options.frames < 4:
        parser.error("--repeat must be 1 or more, and --frames 4 or more")
    for name, folder in (("data", options.data), ("val-data", options.val_data)):
        if folder and not os.path.isdir(folder):
            parser.error(f"--{name}: {folder!r} is no folder")
        if not folder and "quality" in options.sections:
            parser.error(f"quality wants --{name}, a folder of videos")
    if options.quick:
        options.sizes, options.frames, options.repeat = [(64, 64)], 4, 1
    return options


def main():
    options = parse()
    device = pick_device(options.device)
    tune(device)
    peak = alone(peaks, options)
    machine = describe(device)
    print(f"{machine}; matrix product {peak['fp32'] / 1e9:.0f} GFLOP/s in fp32, {peak['bf16'] / 1e9:.0f} in bf16; "
          f"memory {peak['copy'] / 1e9:.1f} GB/s; auto is {str(pick_precision('auto', device)).removeprefix('torch.')}")
    print(f"{'':42} {'':32} {'':9} {'':9} {'to 1st':>7} {'memory':>9} {'of peak':>7}")
    rows = []
    for name in options.sections or [name for name in SECTIONS if name != "quality"]:
        for row in SECTIONS[name](options):
            show(row, peak)
            rows.append(row)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(machine=machine, peak=peak, rows=rows), file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
