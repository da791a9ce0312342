"""Measure speed and memory; print a table, and write the same as JSON.

    python bench.py                              # every section but quality: half an hour on two cores
    python bench.py codec --sizes 256x256 480x832 --json fast.json
    python bench.py loader --data videos/        # real clips; without --data, clips are made on the fly
    python bench.py quality --data train/ --val-data val/     # training runs of 12 minutes; only if asked for
    python bench.py codec quantizer --quick      # small sizes, few repetitions: does it run?

Sections: codec (encode and decode: plain, fast, and as the published code does by default), train (a training step),
loop (train.py's whole loop beside the bare step, and its pauses; see bench_loop.py), loader (clips from videos, cached
clips; see bench_loader.py), quantizer (against full distances and one-hot matrices), quality (PSNR of a TAEHV trained
from scratch for --minutes, and how much sooner our preset taehv_small reaches the final PSNR of the published
notebook's network, optimizer and crops, on pixels only). The rows of a comparison take turns within one process of
their own; times are medians. Speed-ups are relative to the row with 1.00x. "of peak" is the fraction of a matrix
product's multiplication rate in the same dtype (for reading, of the rate of copying memory). That rate is measured once
at the start: above 100 % means that the machine was busy then. "memory" is the process's peak above what it held
before, if a section measures it.
"""
from screen import end_at_ctrl_c, guard_screen, nobody_reads, one_line, text_is_lost

end_at_ctrl_c(__name__)
import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

import fast_cuda
import models
import progress
from bench_loader import loader
from bench_loop import loop
from config import load_config
from data_files import find_sources
from device import DeviceError, describe, pick_device, pick_precision, stream_limit, to_device, tune
from measure import TYPES, Waiting, alone, alternate, flops, has_fp16, memory_of, peaks
from video_files import DataError

SIZES = [(256, 256), (480, 832)]  # on a CPU the second is for "taehv" only: others would take hours


def types(options):
    """The dtypes of --precision; by default both, or fp32 alone if bf16 is emulated."""
    usual = ["fp32", "bf16"] if pick_precision("auto", pick_device(options.device)) == torch.bfloat16 else ["fp32"]
    return options.precision or usual


# ---- sections: each yields a description of what it measures next (a str), then its rows (dicts) --------------------


def families():
    """{name: function that makes a model}, of the published sizes except VQGAN (f8, ch 64) and a narrow DC-AE."""
    from model_dcae import DCAE
    from model_taehv import TAEHV
    from model_vqgan import VQGAN
    from model_vqvae import VQVAE2
    narrow = dict(width_list=(32, 32, 64, 64, 64, 64), encoder_depth_list=(1,) * 6, decoder_depth_list=(1,) * 6)
    return {"taehv": TAEHV, "taew2_2": lambda: TAEHV("taew2_2"),
            "vqgan": lambda: VQGAN(ch=64, ch_mult=(1, 1, 2, 4), attn_resolutions=(32,)), "vqvae2": VQVAE2,
            "dcae_small": lambda: DCAE(**narrow, latent_channels=64)}


def streamed(model, kind, x):
    """Encode or decode a clip as infer.py does: piece by piece on a CPU, in larger groups on a GPU."""
    limit = stream_limit(x.device)
    stream = model.stream(memory_limit=limit)
    for piece in x.split(16 if limit else 1, 1):
        getattr(stream, kind)(piece)
    (stream.flush_encoder if kind == "encode" else stream.flush_decoder)()


def codec_call(options, name, size, label, task):
    """(function to time, model, its input) for encoding or decoding a clip. label: "plain fp32", "fast bf16", "graph
    bf16" (fast, with CUDA graphs), "at once fp32" (the whole clip in one pass), "published fp16" (the whole clip by the
    published routine, in its layout)."""
    device = pick_device(options.device)
    tune(device)
    how, kind = label.rsplit(" ", 1)
    torch.manual_seed(0)
    model = families()[name]().eval()
    model = model.to(device, TYPES[kind]) if how == "published" else to_device(model, device, TYPES[kind])
    height, width = (-(-n // model.space_factor) * model.space_factor for n in size)
    if task == "encode":
        x = torch.rand(1, options.frames, 3, height, width, device=device)
    else:
        x = torch.randn(1, model.latent_frames(options.frames), model.latent_channels, height // model.space_factor,
                        width // model.space_factor, device=device)
    x = x.to(TYPES[kind])
    if how == "published":
        return torch.no_grad()(lambda: published_pass(model, task, x)), model, x
    if how == "at once":
        call = model.encode if task == "encode" else model.decode
        return torch.no_grad()(lambda: call(x)), model, x
    runner = model if how == "plain" else fast_copy(model, graph=how == "graph")
    if how == "graph":
        streamed(runner, task, x)  # graphs are recorded when a shape occurs again: in the warm-up after this
    return lambda: streamed(runner, task, x), model, x


def fast_copy(model, graph=False):
    """The model's fast copy for inference on its device; the model itself if there is none."""
    if next(model.parameters()).device.type == "cuda" and type(model) is models.TAEHV:
        return fast_cuda.fast(model, graph)
    return models.fast(model)


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
    """Encoding and decoding by each family at each size. Ratios are to the plain layers in the first dtype."""
    device = pick_device(options.device)
    for name in options.families:
        model = families()[name]().eval().to(device)
        has_fast = fast_copy(model) is not model
        ways = ["plain", *["fast"] * has_fast, *["graph"] * (has_fast and device.type == "cuda"),
                *["at once"] * options.at_once]
        del model  # frees its memory
        labels = [f"{way} {kind}" for kind in types(options) for way in ways]
        if name.startswith("tae"):
            labels.append("published fp16" if has_fp16(device) else "published fp32")
        for size in options.sizes or (SIZES if device.type != "cpu" or name == "taehv" else SIZES[:1]):
            for task in ("encode", "decode"):
                title = f"{name} {task} {size[0]}x{size[1]}"
                yield title
                for row in alone(codec_rows, options, name, size, labels, task):
                    if not options.quick:
                        yield f"{title}: memory, {row['how']}"
                        row["memory"] = alone(codec_memory, options, name, size, row["how"], task)
                    yield row


def published_pass(model, task, x):
    """Encode or decode as the published encode_video and decode_video do by default: all frames at once."""
    if task == "encode":
        return published(model.encoder, model._unshuffle(x))
    return model._shuffle(published(model.decoder, x)).clamp(0, 1)[:, model.frames_to_trim:]


def published(blocks, x):
    """Run an encoder or decoder like the published file's whole-clip routine, which is rewritten here: N T C H W to
    N T' C' H' W', in the input's layout. Previous frames are padded and concatenated; space is enlarged before time
    grows."""
    from model_taehv import MEMORY_BLOCKS, TGrow, TPool
    n, x = len(x), x.flatten(0, 1)
    for block in blocks:
        if isinstance(block, MEMORY_BLOCKS):
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
    """(function for a training step, function for its forward and backward passes, function for its forward pass) of a
    TAEHV. label: "plain ...", the published routine and PyTorch's default AdamW; "ours ...", like train.py, but without
    the norm of the gradients."""
    from model_taehv import TAEHV
    from step_taehv import speed_up
    device = pick_device(options.device)
    tune(device)
    torch.manual_seed(0)
    model = TAEHV().to(device) if label in ("plain fp32", "plain bf16") else speed_up(to_device(TAEHV(), device))
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
    """Bytes per clip at the peak of the forward and backward passes, without the weights and their gradients."""
    step, passes, _ = train_call(options, size, batch, label)
    video = torch.rand(batch, 12, 3, size, size, device=pick_device(options.device))
    passes(video[:1, :4, :, :16, :16])  # allocates the gradients
    return memory_of(lambda: passes(video), video.device) / batch


def train(options):
    """A training step: forward and backward passes, AdamW. Ratios are to "plain bf16" if that runs."""
    labels = ["plain fp32", "plain bf16", "plain bf16 channels-last", "ours fp32", "ours bf16"]
    labels = [label for label in labels if label.split()[1] in types(options)]
    for size, batch in [(32, 2)] if options.quick else [(64, 4), (128, 2)]:
        yield f"train taehv {size}x{size}"
        for row in alone(train_rows, options, size, batch, labels):
            row["memory"] = alone(train_memory, options, size, batch, row["how"])
            yield row


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
        flat = z.permute(0, 2, 3, 1).reshape(-1, dim)  # the textbook way: all distances, then one-hot rows
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
    sizes = (1024, 4096, 64) if options.quick else (16384, 65536, 256)  # the textbook way takes 17 GB
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 20e9:
        sizes = (min(sizes[0], 4096), *sizes[1:])
    first = None
    for label, kind in (("all distances, one-hot", "plain"), ("ours, VQ", "vq"), ("ours, EMA", "ema"),
                        ("ours, OptVQ", "optvq")):
        yield f"quantizer: {label}"
        seconds, memory = alone(quantizer_step, kind, *sizes)
        first = first or seconds
        yield dict(what=f"quantizer, {sizes[0]} codes, {sizes[1]}x{sizes[2]}", how=label, value=seconds,
                   unit="s", memory=memory, ratio=first / seconds)


RECIPES = {"the notebook's network and recipe": ["taehv_notebook"],
           "ours": ["taehv_small", "clips_per_open=4"]}


def learning_curve(options, recipe, seed, folder):
    """[(minutes of training, validation PSNR at 128 px)] of a run of train.py."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
    batch = load_config(recipe).batch_size
    settings = [f"data={options.data}", f"val_data={options.val_data}", "val_size=128", "val_clips_per_video=4",
                f"val_every={max(1, options.val_every // batch)}", f"max_minutes={options.minutes}",
                f"device={options.device}", f"seed={seed}", f"out_dir={folder}", "name=run"]
    if options.quick:
        settings += ["size=32", "batch_size=2", "val_size=32", "val_clips=2", "workers=0"]
    done = subprocess.run([sys.executable, script, *recipe, *settings], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)  # train.py has said why
    with open(os.path.join(folder, "run", progress.FILE), "rb") as file:
        lines = [line for line in map(progress.parse, file) if line and line["kind"] == "val"]
    return [(line["seconds"] / 60, math.nan if line["psnr"] is None else line["psnr"]) for line in lines]


def quality(options):
    for seed in range(options.seeds):
        first = None
        for how, recipe in RECIPES.items():
            yield f"quality: {how}, seed {seed}"
            with tempfile.TemporaryDirectory() as folder:
                curve = learning_curve(options, recipe, seed, folder)
            minutes, psnr = first = first or curve[-1]
            soonest = minutes if first == curve[-1] else next((m for m, p in curve if p >= psnr), math.inf)
            yield dict(what=f"quality, {options.minutes:g} minutes, seed {seed}", how=how, value=curve[-1][1],
                       unit="dB", ratio=minutes / soonest, curve=curve)


SECTIONS = {"codec": codec, "train": train, "loop": lambda options: loop(options, train_call), "loader": loader,
            "quantizer": quantizer, "quality": quality}


# ---- the command -----------------------------------------------------------------------------------------------------


def show(row, peak, before):
    """Print a row; first the name of its comparison, if the row before was in another one."""
    if before is None or row["what"] != before["what"]:
        print(f"{row['what']:46} {'':9} {'speed-up':>16} {'memory':>9} {'of peak':>8}")
    of_peak = f"{100 * row['rate'] / peak[row['type']]:.0f} %" if row.get("rate") else ""
    memory = f"{row['memory'] / 1e6:.0f} MB" if row.get("memory") is not None else ""
    print(f"    {row['how']:34} {row['value']:8.2f} {row['unit']:9} {row['ratio']:15.2f}x {memory:>9} {of_peak:>8}"
          + (f"\n        {row['note']}" if "note" in row else ""), flush=True)


def parse(arguments=None):
    """Options from the command line; leaves with code 2 and one line where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {one_line(message)}\n")  # without lines of usage
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"{', '.join(SECTIONS)} (default: all but quality)")
    parser.add_argument("--families", nargs="+", default=list(families()), metavar="NAME",
                        help="models of codec (default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="HxW",
                        help="frames of codec (default: 256x256, and 480x832 for taehv, on a GPU for all)")
    parser.add_argument("--frames", type=int, default=16, help="of a clip in codec (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"),
                        help="default: both; fp32 where the CPU emulates bf16")
    parser.add_argument("--at-once", action="store_true", help="whole clips in one pass too, in codec")
    parser.add_argument("--repeat", type=int, default=5, help="turns, fewer where they take minutes (%(default)s)")
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
        if any(len(size) != 2 or min(size) < 16 or max(size) > 2 ** 14 for size in options.sizes):
            raise ValueError
    except ValueError:
        parser.error(f"--sizes: height x width of 16 to {2 ** 14} are wanted, like 480x832")
    for name, least, most in (("repeat", 1, 1000), ("frames", 4, 2 ** 16), ("minutes", 0.01, 10 ** 6),
                              ("val_every", 1, 10 ** 11), ("seeds", 1, 1000)):
        if not least <= getattr(options, name) <= most:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: {least} to {most} is wanted")
    for name, folder in (("data", options.data), ("val-data", options.val_data)):
        if folder and not os.path.isdir(folder):
            parser.error(f"--{name}: {folder!r} is no folder")
        if folder:
            try:
                find_sources(folder)
            except DataError as error:
                parser.error(f"--{name}: {error}")
        if not folder and "quality" in options.sections:
            parser.error(f"quality wants --{name}, a folder of videos")
    if options.json:
        try:
            open(options.json, "a").close()
        except (OSError, ValueError) as error:  # a null byte is a ValueError
            parser.error(f"--json {options.json!r} cannot be written: {getattr(error, 'strerror', None) or error}")
    if options.quick:
        options.sizes, options.frames, options.repeat = [(64, 64)], 4, 1
    return options


def main():
    """Returns the exit code: 1 if the table was lost on a full disk, and --json was not given."""
    guard_screen()
    options = parse()
    try:
        device = pick_device(options.device)
    except DeviceError as error:
        print(f"bench.py: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    tune(device)
    peak = alone(peaks, options)
    machine = describe(device)
    print(f"{machine}; matrix product {peak['fp32'] / 1e9:.0f} GFLOP/s in fp32, {peak['bf16'] / 1e9:.0f} in bf16; "
          f"memory {peak['copy'] / 1e9:.1f} GB/s; auto is {str(pick_precision('auto', device)).removeprefix('torch.')}")
    rows, waiting = [], Waiting()
    for name in options.sections or [name for name in SECTIONS if name != "quality"]:
        for row in SECTIONS[name](options):
            if isinstance(row, str):
                waiting.start(row)
                continue
            waiting.clear()
            show(row, peak, rows[-1] if rows else None)
            rows.append(row)
            if nobody_reads() and not options.json:
                return 0
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(machine=machine, peak=peak, rows=rows), file, indent=1)
        return 0
    return int(text_is_lost())


if __name__ == "__main__":
    sys.exit(main())
