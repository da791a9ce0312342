"""Quality of reconstructions: MSE, PSNR, SSIM, LPIPS, flicker, FID, sharpness, and their means over clips and ranks.

All functions take videos N T C H W (or images N C H W) in [0, 1] and return one value per image, shape N T (or N).
`flicker` takes videos only, and returns one value per pair of consecutive frames, shape N T-1.
Networks and windows compute in true float32 (no TF32, no autocast), so that results from a GPU can be compared with
others. This file works alone with torch. LPIPS also needs losses.py and the package lpips, FID the package pytorch-fid.
"""
import contextlib
import math
import warnings
from typing import NamedTuple

import torch

# The names for precision that PyTorch 2.9 brought. Once one of them was set, reading the older ones is an error.
NEW_NAMES = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@contextlib.contextmanager
def true_float32(kind):
    """Within it float32 is multiplied as float32: no TF32 on a GPU, no bfloat16 on a CPU, and no autocast.

    kind: a device's type, "cuda" say. TF32 keeps 10 of 23 bits: emulated, it changes 0.1 to 3 % of all codes, and SSIM
    by up to 0.03. What was set before is set again at the end. torch.compile bakes precision into its kernels: what
    needs this is to be kept out of it, by torch.compiler.disable. (quantize_base.py and metrics.py, which work alone,
    both have this function.)
    """
    backends, before = torch.backends, []
    if NEW_NAMES:
        for backend in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv):
            if backend.fp32_precision not in ("ieee", "none"):
                before.append((backend, backend.fp32_precision))
                backend.fp32_precision = "ieee"
    else:
        products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision
        if not NEW_NAMES:
            torch.set_float32_matmul_precision(products)
            backends.cudnn.allow_tf32 = convolutions


def mse(output, target):
    """Mean squared error per image."""
    return (output.float() - target.float()).square().mean((-3, -2, -1))


def psnr(output, target):
    """Peak signal-to-noise ratio per image, dB, for a peak of 1; infinite for equal images. As in scikit-image."""
    return -10 * mse(output, target).log10()


def blur_matrix(size, device):
    """A matrix, size x (size + 10), that blurs a column of size + 10 pixels with SSIM's Gaussian: `size` remain."""
    window = torch.exp(-(torch.arange(11, dtype=torch.float32) - 5).square() / (2 * 1.5 ** 2))
    matrix = torch.zeros(size, size + 10)
    for k, weight in enumerate((window / window.sum()).tolist()):
        matrix.diagonal(k).fill_(weight)
    return matrix.to(device)


def ssim(output, target):
    """Structural similarity per image (Wang et al. 2004): 11 x 11 Gaussian window of deviation 1.5, mean over channels.

    As in scikit-image with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1. ValueError for
    images smaller than 11 pixels.
    """
    height, width = output.shape[-2:]
    if min(height, width) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, got {height}x{width}")
    a, b = (images.reshape(-1, height, width) for images in (output, target))  # B H W
    # Images are blurred in blocks, by products with banded matrices: on a CPU this takes a third of the time of 11
    # shifted sums for each axis. A CPU gets as many images at once as its caches hold; a GPU gets larger blocks, so
    # that it runs fewer kernels.
    rows, columns, most = (32, 16, 1 << 18) if a.device.type == "cpu" else (256, 128, 1 << 24)
    vertical, horizontal = blur_matrix(rows, a.device), blur_matrix(columns, a.device).t()
    whole, rest = divmod(width - 10, columns)  # number of whole blocks in a row; number of columns that remain

    def similarity(maps):  # n blocks, 4 blurred maps, images, pixels -> images
        mean_a, mean_b, squares, product = maps.unbind(1)  # of a, b, a^2 + b^2, a b
        means, mean_squares = mean_a * mean_b, mean_a.square() + mean_b.square()
        c1, c2 = 0.01 ** 2, 0.03 ** 2
        return ((2 * means + c1) * (2 * (product - means) + c2)
                / ((mean_squares + c1) * (squares - mean_squares + c2))).sum((0, 2))

    totals = []
    with true_float32(a.device.type):
        for x, y in zip(*(images.split(max(1, most // ((rows + 10) * width))) for images in (a, b))):
            total = 0
            for top in range(0, height - 10, rows):
                x_band, y_band = (images[:, top:top + rows + 10].float() for images in (x, y))
                maps = torch.stack([x_band, y_band, x_band.square() + y_band.square(), x_band * y_band])
                r = maps.shape[2] - 10
                maps = (vertical[:r, :r + 10] @ maps).view(-1, width)  # 4 maps, images, r rows; W
                if whole:
                    blocks = maps[:, :whole * columns + 10].unfold(1, columns + 10, columns).transpose(0, 1)
                    total = total + similarity(torch.bmm(blocks, horizontal.expand(whole, -1, -1)).view(
                        whole, 4, len(x), -1))
                if rest:
                    total = total + similarity((maps[:, whole * columns:] @ horizontal[:rest + 10, :rest]).view(
                        1, 4, len(x), -1))
            totals.append(total)
    return (torch.cat(totals) / ((height - 10) * (width - 10))).view(output.shape[:-2]).mean(-1)


def flicker(output, target):
    """Mean absolute error of the changes from frame to frame: N T C H W -> N T-1. Constant errors do not count.
    Movement that is only in the reconstruction shows here, and in no measure of single frames."""
    return (output.float() - target.float()).diff(dim=-4).abs().mean((-3, -2, -1))


def laplacian_variance(images):
    """Variance of the Laplacian (4 neighbours) of each image's grey values, which measures its fine detail. The ratio
    of a reconstruction's value to its original's is its sharpness: below 1 is blurred, above 1 oversharp or noisy."""
    grey = images.float().mean(-3)
    middle = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return (around - 4 * middle).var((-2, -1), correction=0)


class Measure(NamedTuple):
    """A measure of each frame, and how tables show its mean over all frames."""
    function: object    # (reconstructions, originals), N T 3 H W in [0, 1] -> N T; None if it has to be loaded
    heading: str
    style: str = ".4f"  # format of the number
    least: int = 1      # smallest height and width that it can measure, pixels; smaller frames are left out
    frames: int = 1     # number of consecutive frames that it compares; for 2, the function returns N T-1


# Validation, TensorBoard, infer.py's table and its report show all of these. A frame without error counts as 100 dB.
MEASURES = {"mse": Measure(mse, "MSE", ".5f"),
            "psnr": Measure(lambda output, target: psnr(output, target).clamp(max=100), "PSNR dB", ".2f"),
            "ssim": Measure(ssim, "SSIM", least=11),
            "lpips": Measure(None, "LPIPS", least=32),  # `load_lpips`
            "flicker": Measure(flicker, "flicker", ".5f", frames=2)}


# The detail that rounding to 8 bits adds: an error of variance 1/12 of a squared level, times the Laplacian's 4^2 + 4.
LEAST_DETAIL = 20 / 12 / 255 ** 2


def sharpness(detail, original_detail):
    """The reconstruction's detail over the original's, a float. None if the original has less detail than rounding to 8
    bits adds: then the ratio means nothing (for a black clip it was 154005837).

    detail, original_detail: mean of `laplacian_variance` over the frames, floats.
    """
    return detail / original_detail if original_detail > LEAST_DETAIL else None


def load_lpips(net="alex", device="cpu"):
    """(function of (output, target) -> LPIPS per image, "") or (None, why it cannot be loaded). Needs losses.py."""
    from losses import lpips_network
    try:
        model = lpips_network(net).to(device)
    except ImportError:
        return None, "LPIPS is left out: pip install lpips"
    except OSError as error:
        return None, f"LPIPS is left out: {error}"

    @torch.no_grad()
    def distance(output, target):
        a, b = (v.float().reshape(-1, *v.shape[-3:]) * 2 - 1 for v in (output, target))
        with true_float32(output.device.type):
            return model(a, b).view(output.shape[:-3])
    return distance, ""


class FID:
    """Frechet inception distance (Heusel et al. 2017) between all reconstructed and all original frames added.

    network: B 3 H W in [0, 1] -> B features. `load_fid` has pytorch-fid's, with which results compare to published
    ones. With fewer frames than features (2048) the result is biased: compare it only with others over as many frames.
    """

    def __init__(self, network, features=2048):
        self.network = network  # sums over the reconstructed frames, then over the originals:
        self.counts, self.totals, self.products = (torch.zeros(2, *shape, dtype=torch.float64) for shape in (
            (), (features,), (features, features)))

    @property
    def count(self):
        """Frames added so far (after `reduce`: on all ranks)."""
        return int(self.counts[0])

    @torch.no_grad()
    def add(self, output, target):
        """output, target: N T 3 H W (or N 3 H W) in [0, 1]."""
        for i, frames in enumerate((output, target)):
            with true_float32(frames.device.type):
                found = self.network(frames.float().reshape(-1, *frames.shape[-3:])).double().cpu()
            self.counts[i] += len(found)
            self.totals[i] += found.sum(0)
            self.products[i].addmm_(found.t(), found)

    def reduce(self, group=None):
        """The distance over all ranks of the process group `group`, a float; NaN for fewer than two frames."""
        if group is not None:
            for sums in (self.counts, self.totals, self.products):
                torch.distributed.all_reduce(sums, group=group)
        if self.count < 2:
            return float("nan")
        counts = self.counts.view(2, 1, 1)
        means = self.totals.unsqueeze(2) / counts
        ours, theirs = (self.products - counts * means * means.transpose(1, 2)) / (counts - 1)
        values, vectors = torch.linalg.eigh(ours)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
        overlap = torch.linalg.eigvalsh(root @ theirs @ root).clamp(min=0).sqrt().sum()  # trace of sqrt(ours theirs)
        return ((means[0] - means[1]).square().sum() + ours.trace() + theirs.trace() - 2 * overlap).item()


def load_fid(device="cpu"):
    """(a function that makes FIDs, "") or (None, why they cannot be made). Needs the package pytorch-fid."""
    try:
        from pytorch_fid.inception import InceptionV3
        network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval().to(device)
    except ImportError:
        return None, "FID is left out: pip install pytorch-fid"
    except OSError as error:  # URLError is one: no network
        return None, f"FID is left out: the weights of its network could not be downloaded ({error})"
    return lambda: FID(lambda frames: network(frames)[0].flatten(1)), ""


def load_i3d(path, device="cpu"):
    """A function that makes FIDs between videos, which are Frechet video distances (Unterthiner et al. 2018) with the
    I3D network in a TorchScript file. Each `add` takes one clip: 1 T 3 H W in [0, 1].

    The network gets clips 1 3 T 224 224 in [-1, 1]. StyleGAN-V's i3d_torchscript.pt, which is the usual file, is told
    to return features (400) and not to resize. OSError or RuntimeError for a file that cannot be used.
    """
    with warnings.catch_warnings():  # "torch.jit is deprecated"
        warnings.simplefilter("ignore")
        network = torch.jit.load(path, map_location=device).eval()
    known = {argument.name for argument in network.forward.schema.arguments}
    options = {name: value for name, value in (("rescale", False), ("resize", False), ("return_features", True))
               if name in known}

    def features(frames):  # one clip, T 3 H W
        sized = torch.nn.functional.interpolate(frames, size=(224, 224), mode="bilinear")
        return network(sized.transpose(0, 1)[None] * 2 - 1, **options).flatten(1)

    with torch.no_grad():
        size = features(torch.zeros(16, 3, 224, 224, device=device)).shape[1]
    return lambda: FID(features, size)


class CodeStatistics:
    """Statistics of how tokens use their codebooks, over all videos that were added on all ranks.

    codebook_sizes: the size of the codebook of each tensor in a model's list of codes.
    """

    def __init__(self, codebook_sizes):
        self.counts = [torch.zeros(size, dtype=torch.float64) for size in codebook_sizes]
        self.pixels = torch.zeros(1, dtype=torch.float64)

    def add(self, codes, pixels):
        """codes: a list of int64 tensors; pixels: number of pixels that they encode."""
        for counts, c in zip(self.counts, codes):
            counts += torch.bincount(c.flatten().cpu(), minlength=len(counts))
        self.pixels += pixels

    def reduce(self, group=None):
        """{"codebook_use": fraction of the codes that occurred, "perplexity" (both means over the code tensors),
        "bits_per_pixel": of codes of fixed length, "entropy_bits_per_pixel": by the order-0 entropy of the codes}"""
        if group is not None:
            for tensor in (*self.counts, self.pixels):
                torch.distributed.all_reduce(tensor, group=group)
        totals = [counts.sum() for counts in self.counts]
        entropies = [torch.special.entr(c / n.clamp(min=1)).sum() for c, n in zip(self.counts, totals)]  # nats
        pixels = self.pixels.clamp(min=1)
        plain = sum(n * math.log2(len(c)) for c, n in zip(self.counts, totals))
        coded = sum(n * e for e, n in zip(entropies, totals)) / math.log(2)
        return {"codebook_use": torch.stack([(c > 0).double().mean() for c in self.counts]).mean().item(),
                "perplexity": torch.stack(entropies).exp().mean().item(),
                "bits_per_pixel": (plain / pixels).item(), "entropy_bits_per_pixel": (coded / pixels).item()}


class Mean:
    """Means of per-image values over all ranks. Each rank calls `add`, then all ranks call `reduce` once.

    Every image counts equally, however the clips are distributed over the ranks.
    """

    def __init__(self, *names):
        self.names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64)

    def add(self, **values):
        """values: per-image tensors of equal shape, one for each name."""
        sums = torch.stack([values[name].cpu().double().sum() for name in self.names])
        self.sums += torch.cat([sums, sums.new_tensor([values[self.names[0]].numel()])])

    def reduce(self, group=None):
        """{name: mean over all ranks of `group`, ..., "count": images}; NaN if nothing was added."""
        if group is not None:
            torch.distributed.all_reduce(self.sums, group=group)
        *sums, count = self.sums.tolist()
        means = {name: s / count if count else float("nan") for name, s in zip(self.names, sums)}
        return {**means, "count": int(count)}
