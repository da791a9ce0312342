"""Float32 where it is promised: code search and metrics under TF32 and bfloat16, and in models that were cast.

No GPU is needed: `Narrow` rounds what products are made of, wherever the process allows it, as tensor cores do.
"""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import metrics
import quantize
import quantize_base
from conftest import transport_plan
from device import to_device
from model_vq_latents import VQLatents
from quantize import FSQ, EMAQuantizer, Quantizer, ResidualQuantizer, SinkhornQuantizer, VectorQuantizer
from test_tokenizers import MODELS, make

aten, backends = torch.ops.aten, torch.backends
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
needs_new_names = pytest.mark.skipif(not quantize_base.NEW_NAMES, reason="PyTorch 2.9 brought these names")


def allowed():
    """The bits of mantissa that the process lets (products, convolutions) have: 23, 10 (TF32) or 7 (bfloat16)."""
    if not quantize_base.NEW_NAMES:
        products = {"highest": 23, "high": 10, "medium": 7}[torch.get_float32_matmul_precision()]
        return products, 10 if backends.cudnn.allow_tf32 else 23
    bits = {"tf32": 10, "bf16": 7}
    pairs = (backends.cuda.matmul, backends.mkldnn.matmul), (backends.cudnn.conv, backends.mkldnn.conv)
    return tuple(min(bits.get(place.fp32_precision, 23) for place in pair) for pair in pairs)


class Narrow(TorchDispatchMode):
    """Rounds float32 factors to the bits that are allowed, and counts the products seen."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            self.count += 1
            drop = 23 - allowed()[function.overloadpacket is aten.convolution]
            factors = slice(1, 3) if function.overloadpacket in (aten.addmm, aten.baddbmm) else slice(0, 2)
            args = [*args[:factors.start], *(self.rounded(x, drop) for x in args[factors]), *args[factors.stop:]]
        return function(*args, **(kwargs or {}))

    def rounded(self, x, drop):
        if x.dtype != torch.float32 or not drop:
            return x
        return (x.contiguous().view(torch.int32) + (1 << drop >> 1) & -(1 << drop)).view(torch.float32)


@pytest.fixture(params=["TF32", "bfloat16"])
def narrow(request):
    """A function that calls another where float32 may be multiplied in fewer bits."""

    def call(function, *arguments):
        torch.set_float32_matmul_precision("medium" if request.param == "bfloat16" else "highest")
        if request.param == "TF32":
            backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = True  # as device.tune does on a GPU
        elif quantize_base.NEW_NAMES:
            backends.mkldnn.conv.fp32_precision = "bf16"
        before = allowed()
        assert before[0] < 23
        with Narrow() as mode:
            result = function(*arguments)
        assert mode.count > 0, "no matrix product, no convolution"
        assert allowed() == before, "what was set before is set again"
        return result

    yield call
    torch.set_float32_matmul_precision("highest")
    if quantize_base.NEW_NAMES:
        backends.mkldnn.conv.fp32_precision = "none"


QUANTIZERS = {
    "vq": lambda: VectorQuantizer(512, 16),
    "ema": lambda: EMAQuantizer(512, 16),
    "optvq": lambda: SinkhornQuantizer(256, 16, num_head=2),
    "optvq, nearest": lambda: SinkhornQuantizer(256, 16, eval_nearest=True),
    "rvq": lambda: ResidualQuantizer(2, 512, 16, kind="ema"),
    "fsq": lambda: FSQ((8, 5, 5), 16),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
@torch.no_grad()
def test_codes_are_those_of_float32(kind, narrow):
    torch.manual_seed(0)
    quantizer, z = QUANTIZERS[kind]().eval(), 4 * torch.randn(8, 16, 16, 16)
    for p in quantizer.parameters():
        torch.nn.init.normal_(p)
    (quantized, info), (low_quantized, low) = quantizer(z), narrow(quantizer, z)
    for expected, codes in zip(info["codes"], low["codes"]):
        assert (codes != expected).sum() == 0 and expected.unique().numel() > 50
    assert torch.equal(low_quantized, quantized)
    if kind in ("optvq", "fsq"):  # vectors are products too
        assert torch.equal(narrow(quantizer.codes_to_vectors, low["codes"]), quantizer.codes_to_vectors(info["codes"]))


@torch.no_grad()
def test_kmeans_and_the_transport_plan_are_those_of_float32(narrow):
    def centres():
        return quantize.kmeans(rows, 64, 3, torch.Generator().manual_seed(0))

    rows = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrow(centres), centres())
    torch.manual_seed(0)
    quantizer, z = SinkhornQuantizer(64, 16), torch.randn(1, 16, 16, 16)
    assert torch.equal(narrow(transport_plan, quantizer, z), transport_plan(quantizer, z))


class Network(torch.nn.Module):
    """Stands for LPIPS's (of two images) and FID's (of one): B 3 H W -> B 8 features, or B distances."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 5)

    def forward(self, a, b=None):
        return self.conv(a).mean((2, 3)) if b is None else (self.conv(a) - self.conv(b)).square().mean((1, 2, 3))


@torch.no_grad()
def test_figures_are_those_of_float32(narrow, monkeypatch):
    torch.manual_seed(0)
    a = torch.rand(2, 1, 3, 32, 32) * 0.02 + 0.5  # nearly flat: SSIM then is a ratio of small differences
    b = a + 0.005 * torch.randn_like(a)
    assert torch.equal(narrow(metrics.ssim, a, b), metrics.ssim(a, b))
    monkeypatch.setattr(losses, "lpips_network", lambda net: network)
    network = Network()
    distance, _ = metrics.load_lpips()
    assert torch.equal(narrow(distance, a, b), distance(a, b))
    fids = [metrics.FID(network, 8) for _ in range(2)]
    narrow(fids[0].add, a, b), fids[1].add(a, b)
    assert torch.equal(fids[0].products, fids[1].products)


@pytest.mark.parametrize("new_names", [pytest.param(True, marks=needs_new_names), False])
def test_an_error_leaves_the_settings_as_they_were(new_names, monkeypatch):
    monkeypatch.setattr(quantize_base, "NEW_NAMES", new_names)
    try:
        torch.set_float32_matmul_precision("medium")
        before = allowed()
        with pytest.raises(ZeroDivisionError), quantize.true_float32("cpu"):
            assert allowed() == (23, 23) and not torch.is_autocast_enabled("cpu")
            1 / 0
        assert allowed() == before == (7, 10) and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_both_files_that_have_it_have_the_same():
    assert inspect.getsource(metrics.true_float32) == inspect.getsource(quantize.true_float32)


@needs_new_names
def test_settings_by_their_new_names_alone_are_respected():
    """Once they were used, PyTorch refuses to read the older ones."""
    try:
        backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with quantize.true_float32("cpu"):
            assert allowed() == (23, 23)
        assert allowed() == (10, 10)
    finally:
        torch.set_float32_matmul_precision("highest")


CAST = {**MODELS, "vq_latents": lambda: VQLatents(n_embed=64, width=8),
        "vq_latents_fsq": lambda: VQLatents(quantizer="fsq", levels=(5, 4, 4), width=8)}


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in CAST), ("ema", torch.float16)])
@torch.no_grad()
def test_a_cast_model_searches_in_float32(name, dtype, monkeypatch):
    """What its encoder gives in few bits is searched by the quantizer, and scaled before, as it was trained."""
    torch.manual_seed(0)
    model, video = CAST[name]().eval(), torch.rand(1, 4, 3, 32, 32)
    if hasattr(model, "calibrate"):
        model.calibrate(torch.randn(8, 2, 16, 4, 4) * 1.7 + 0.3)
    low, found = to_device(copy.deepcopy(model), torch.device("cpu"), dtype), []
    codes = low.tokenize(video.to(dtype))

    def note(twin, search):
        def noted(rows):
            found.append((twin, rows, search(rows)))
            return found[-1][-1]
        return noted

    for twin, quantizer in zip(quantize.quantizers(model), quantize.quantizers(low)):
        monkeypatch.setattr(quantizer, "quantize_rows", note(twin, quantizer.quantize_rows))
    assert all(torch.equal(a, b) for a, b in zip(low.tokenize(video.to(dtype)), codes)) and found
    for twin, rows, (vectors, info) in found:
        expected_vectors, expected = twin.quantize_rows(rows)
        assert rows.dtype == torch.float32 and torch.equal(vectors, expected_vectors)
        assert all(torch.equal(a.flatten(), b) for a, b in zip(info["codes"], expected["codes"]))
    if hasattr(model, "calibrate"):
        latents = low.taehv.encode(video.to(dtype)).float()
        assert torch.equal(found[0][1], (latents.movedim(2, -1) - model.shift).div(model.scale).reshape(-1, 16))
    assert next(low.parameters()).dtype == low.last_layer.dtype == dtype if hasattr(low, "last_layer") else True
    output = low.detokenize(codes)
    assert output.dtype == dtype and torch.equal(output, low.decode(low.encode(video.to(dtype))))
    assert next(q for q in low.double().modules() if isinstance(q, Quantizer)).counts.dtype == torch.float64


# ---- bfloat16 where a GPU's autocast would take float32 ------------------------------------------------------------


class AutocastOfCuda(TorchFunctionMode):
    """A CPU's autocast with one more rule of CUDA's: group norm and nearest upsampling are computed in float32 (both
    are in AT_FORALL_FP32 of ATen/autocast_mode.h)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.group_norm, F.interpolate) and torch.is_autocast_enabled("cpu"):
            args = [a.float() if torch.is_tensor(a) else a for a in args]
            with torch.autocast("cpu", enabled=False):
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vq", "video"])
def test_norms_and_enlarging_keep_the_type_under_a_gpus_autocast(name):
    model, video, seen = make(name), torch.rand(1, 4, 3, 32, 32), []
    with torch.no_grad():
        latents = model.encode(video)
        exact = model.train().decode(latents)
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.Upsample)):
            module.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, given, out: seen.append((out, out)))
    to_device(model, torch.device("cpu"))
    channels_last = torch.channels_last
    with torch.autocast("cpu", torch.bfloat16), AutocastOfCuda():
        x = torch.rand(1, 32, 4, 4).bfloat16()
        assert F.group_norm(x, 4).dtype == F.interpolate(x, scale_factor=2.0).dtype == torch.float32, "the rule works"
        output, decoded = model(video)[0], model.decode(latents)
    assert len(seen) > 10 and {out.dtype for _, out in seen} == {torch.bfloat16}
    assert all(out.is_contiguous(memory_format=channels_last) for given, out in seen
               if given.is_contiguous(memory_format=channels_last))
    assert (decoded.float() - exact).norm() < 0.03 * exact.norm()
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
