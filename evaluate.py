"""Measures the quality of reconstructions, for the validation of a run, for infer.py and for leaderboard.py.

To add a metric, write its function in metrics.py and add a row to `MEASURES` there. Validation, TensorBoard, infer.py,
its report and leaderboard.py then have it.
"""
import torch

import metrics
from check_config import ConfigError
from device import DeviceError, is_out_of_memory, time_call
from metrics import MEASURES, Measure
from ranks import agree

TIMED_CLIPS = 3  # number of validation clips that are encoded and decoded once more, to measure the speed
LATENT_FACTS = ("latent_mean", "latent_square", "teacher_mean", "teacher_square")


# The two means that sharpness is computed from: see `metrics.sharpness`.
DETAILS = {"detail": Measure(lambda output, target: metrics.laplacian_variance(output), ""),
           "original_detail": Measure(lambda output, target: metrics.laplacian_variance(target), "")}


# Squared error by a frame's position among the frames that one latent decodes to.
PHASES = "mse_first", "mse_inner", "mse_last"


def group_of(model, frames):
    """(number of frames that a latent decodes to, position of the first decoded frame in its group), for a clip of
    `frames` decoded frames. (1, 0) if a latent is one frame, and for taeh3, whose groups have gaps."""
    model = getattr(model, "taehv", model)
    size, trimmed = getattr(model, "time_factor", 1), getattr(model, "frames_to_trim", 0)
    if getattr(model, "t_upscale", size) != size or getattr(model, "is_h3", False):
        return 1, 0
    return size, trimmed if frames % size else 0  # the decoder drops the first `trimmed` frames


class Quality:
    """Means over frames of `metrics.MEASURES` and of sharpness, or of those named in `only`. lpips: its function, or
    None to leave LPIPS out. fid: a metrics.FID, which gets every `every`-th frame and may be shared with others, or
    None. group: see `group_of`; if it has more than one frame, the squared errors of PHASES are measured too."""

    def __init__(self, lpips=None, fid=None, every=1, only=(*MEASURES, *DETAILS), group=(1, 0)):
        measures = {**MEASURES, "lpips": MEASURES["lpips"]._replace(function=lpips), **DETAILS}
        self.measures = {name: measure for name, measure in measures.items()
                         if measure.function and name in (*only, "lpips")}
        self.fid, self.every, self.frames, self.group = fid, every, 0, group
        self.last, self.phase = None, 0  # previous `add`: its last frames; position in a group of the next frame
        self.names = [*self.measures, *PHASES]
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64)  # per measure: its sum, the number of frames

    @torch.no_grad()
    def add(self, output, target, follows=False):
        """output, target: N T 3 H W in [0, 1]. A measure leaves out frames that are too small for it. follows: whether
        these frames continue the videos of the previous call."""
        frames = output.shape[:-3].numel()
        if self.fid:
            wanted = [i for i in range(frames) if (self.frames + i) % self.every == 0]
            if wanted:
                self.fid.add(*(video.flatten(0, -4)[wanted] for video in (output, target)))
        self.frames += frames
        pair, found = (output, target), {}
        if follows and self.last:
            pair = [torch.cat([last, video], 1) for last, video in zip(self.last, pair)]
        for name, measure in self.measures.items():
            given = pair if measure.frames > 1 else (output, target)
            if min(output.shape[-2:]) >= measure.least and given[0].shape[1] >= measure.frames:
                found[name] = measure.function(*given)
        size, first = self.group[0], self.phase if follows and self.last else self.group[1]
        if size > 1 and "mse" in found:
            phases = [(first + t) % size for t in range(output.shape[1])]
            for name, wanted in zip(PHASES, ({0}, set(range(1, size - 1)), {size - 1})):
                found[name] = found["mse"][:, [t for t, phase in enumerate(phases) if phase in wanted]]
        self.last, self.phase = (output[:, -1:].clone(), target[:, -1:].clone()), first + output.shape[1]
        values = [value.flatten() for value in found.values()]
        if values:  # they come from a GPU together, once
            parts = torch.cat(values).cpu().double().split([len(value) for value in values])
            self.sums[[self.names.index(name) for name in found]] += torch.tensor(
                [[part.sum(), len(part)] for part in parts], dtype=torch.float64)

    def reduce(self, group=None):
        """{"mse": mean over all ranks of the process group `group`, or None if no frame was measured, ...}. It has
        "sharpness" instead of "detail" and "original_detail", PHASES if they were measured, and "count", the number of
        frames."""
        if group is not None:
            torch.distributed.all_reduce(self.sums, group=group)
        means = {name: sum / count if count else None
                 for name, (sum, count) in zip(self.names, self.sums.tolist())}
        means = {name: mean for name, mean in means.items() if name not in PHASES or mean is not None}
        if "detail" in means:
            detail, original = means.pop("detail"), means.pop("original_detail")
            means["sharpness"] = None if detail is None else metrics.sharpness(detail, original)
        return {**means, "count": int(self.sums[0, 1])}


@torch.no_grad()
def evaluate(model, samples, device, autocast, control, lpips=None, make_fid=None):
    """Measure a model on the clips of all ranks, each counted once. All ranks call this.

    samples: this rank's clips, [{"video": uint8 T 3 H W, and, from a latent cache, "latents": T' C h w}]. Returns (a
    dict, [up to four (original, reconstruction) of this rank, T 3 H W on the CPU]). DeviceError on all ranks if memory
    runs out on one. The dict holds:
    - "mse", "psnr" (dB, at most 100 per frame), "ssim", "flicker" (None for clips of one frame), "sharpness" (see
      `metrics.sharpness`; None for flat clips), PHASES (if a latent stands for several frames), "count" (of frames);
    - "lpips" and "fid" if their functions are given (`metrics.load_lpips`, `metrics.load_fid`);
    - for a tokenizer, the result of `metrics.CodeStatistics`;
    - with a teacher's latents, "latent_mse" and LATENT_FACTS, and, for the pictures decoded from them, "teacher_psnr",
      "teacher_mse", "teacher_ssim" and with lpips "teacher_lpips";
    - "encode_fps", "decode_fps": frames per second and rank, measured on the first clips.
    """
    fid = make_fid() if make_fid else None
    quality, teachers = Quality(lpips, fid), Quality(lpips, only=("psnr", "mse", "ssim"))
    shown = []
    statistics = metrics.CodeStatistics(model.codebook_sizes) if hasattr(model, "tokenize") else None
    latents_mean = metrics.Mean("latent_mse", *LATENT_FACTS)
    seconds = metrics.Mean("encode", "decode")  # per frame

    def measure(number, sample):
        """Add what sample `number` shows to all of the above."""
        video = sample["video"][None].to(device).float().div_(255)
        with autocast:
            output, info = model(video)
        if number < TIMED_CLIPS:  # after the call above, which was the warm-up
            with autocast:
                times = time_halves(model, video, device)
            seconds.add(**{half: torch.full((video.shape[1],), t / video.shape[1]) for half, t in times.items()})
        own, output, target = info["latents"].float(), output.float().clamp(0, 1), model.targets(video)
        if statistics:
            statistics.add(info["codes"], video[:, :, 0].numel())
        quality.group = group_of(model, target.shape[1])
        quality.add(output, target)
        if len(shown) < 4:
            shown.append((target[0].cpu(), output[0].cpu()))
        if "latents" not in sample:
            return
        latents = sample["latents"][None].to(device).float()
        latents_count, frames_count = model.aligned(video.shape[1], latents.shape[1])
        latents_mean.add(latent_mse=(own[:, :latents_count] - latents[:, :latents_count]).square().mean()[None],
                         latent_mean=own.mean()[None], latent_square=own.square().mean()[None],
                         teacher_mean=latents.mean()[None], teacher_square=latents.square().mean()[None])
        with autocast:
            output = model.decode(latents)
        output = output.float().clamp(0, 1)[:, :frames_count]
        target = model.targets(video, latents.shape[1])[:, :frames_count]
        teachers.add(output, target)

    out_of_memory = False
    try:
        for number, sample in enumerate(samples):
            measure(number, sample)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    if any(agree(control, out_of_memory)):
        raise DeviceError("out of memory in validation")
    result = quality.reduce(control)
    for half, value in seconds.reduce(control).items():
        if half != "count":
            result[f"{half}_fps"] = 1 / value if value > 0 else None
    of_latents, of_teacher = latents_mean.reduce(control), teachers.reduce(control)
    if of_latents.pop("count"):
        del of_teacher["count"]
        result.update(of_latents, **{f"teacher_{name}": mean for name, mean in of_teacher.items()})
    if statistics:
        result.update(statistics.reduce(control))
    if fid:
        result["fid"] = fid.reduce(control)
    return result, shown


def time_halves(model, video, device):
    """{"encode": seconds for encoding the clips N T 3 H W, "decode": seconds for decoding their latents}"""
    latents, encode_seconds = time_call(model.encode, video, device)
    return {"encode": encode_seconds, "decode": time_call(model.decode, latents, device)[1]}


def rms_of(facts):
    """Replace mean squares by their roots: {"latent_square": 4.0} -> {"latent_rms": 2.0}. The rest stays as it is."""
    return {name.replace("_square", "_rms") if name in LATENT_FACTS else name:
            value ** 0.5 if name in LATENT_FACTS and name.endswith("_square") else value
            for name, value in facts.items()}


def load_judges(cfg, device):
    """The arguments of `evaluate` for val_metrics: {"lpips": function, "make_fid": function}, as far as asked for.
    ConfigError if one cannot be loaded."""
    judges = {}
    for name, keyword, load in (("lpips", "lpips", lambda: metrics.load_lpips(device=device)),
                                ("fid", "make_fid", lambda: metrics.load_fid(device))):
        if name in cfg.val_metrics:
            judges[keyword], problem = load()
            if problem:
                raise ConfigError(f"val_metrics={cfg.val_metrics}: {problem}")
    return judges


def describe_phases(means):
    """The PHASES among the means as a text, or "" if there are none: the error by position in a latent's group."""
    found = [f"{name.removeprefix('mse_')} {means[name]:.5f}" for name in PHASES if means.get(name) is not None]
    return f"mse in a latent's group of frames: {', '.join(found)}" if found else ""


def describe_validation(result):
    """`evaluate`'s dict as a log line, with units."""
    ssim, sharpness = ("-" if result[name] is None else f"{result[name]:.{digits}f}"
                       for name, digits in (("ssim", 4), ("sharpness", 3)))  # None: for tiny or flat frames
    others = [name for name in (*MEASURES, "fid")
              if name not in ("psnr", "ssim", "mse") and result.get(name) is not None]
    line = (f"psnr {result['psnr']:.2f} dB, ssim {ssim}, mse {result['mse']:.5f}, sharpness {sharpness}"
            + "".join(f", {name} {result[name]:.4g}" for name in others)
            + f" over {result['count']} frames")
    if phases := describe_phases(result):
        line += f"; {phases}"
    if "codebook_use" in result:
        line += (f"; codebook use {100 * result['codebook_use']:.1f} %, perplexity {result['perplexity']:.1f}, bits "
                 f"per pixel {result['bits_per_pixel']:.4f} ({result['entropy_bits_per_pixel']:.4f} entropy-coded)")
    if "latent_mse" in result:
        line += (f"; latents: mse {result['latent_mse']:.4g}, mean and rms {result['latent_mean']:.3g} "
                 f"{result['latent_square'] ** 0.5:.3g} (teacher's {result['teacher_mean']:.3g} "
                 f"{result['teacher_square'] ** 0.5:.3g}); psnr from the teacher's {result['teacher_psnr']:.2f} dB")
    return line
