"""The GPU's fast path on a CPU: the plain model's results; what cuDNN and CUDA graphs do there is acted out."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fast_cuda
from fast_cuda import fast
from model_taehv import TAEHV, StreamingTAEHV
from model_vq_latents import VQLatents
from test_fast import CASES, NARROW, clip, error, make

FUSED = "cudnn_convolution_relu", "cudnn_convolution_add_relu"


@pytest.fixture
def acted_cudnn(monkeypatch):
    """cuDNN's fused calls with their own signatures, in float32 within, as cuDNN computes them. Returns their names."""
    called = []

    def act(name):
        arguments = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]

        def acted(*given):
            called.append(name)
            given = dict(zip(arguments, given, strict=True))
            x, weight, z = given["self"], given["weight"], given.get("z")
            for tensor in (x, weight) if z is None else (x, weight, z):
                assert tensor.is_contiguous(memory_format=torch.channels_last) and tensor.dtype == x.dtype
                assert not tensor.shape[1] % 8
            y = F.conv2d(x.float(), weight.float(), given["bias"].float(), *(given[name] for name in (
                "stride", "padding", "dilation", "groups")))
            y = y if z is None else y + given["alpha"] * z.float()
            return y.relu_().to(x.dtype, memory_format=torch.channels_last)
        return acted

    for name in FUSED:
        monkeypatch.setattr(torch, name, act(name))
    monkeypatch.setattr(fast_cuda, "has_fused", lambda device, dtype: True)
    return called


@pytest.fixture
def acted_graphs(monkeypatch):
    """CUDA graphs: a call that is recorded runs once for warming up; a replay writes into the same tensors. Returns the
    shapes of the groups that were recorded, and then "replayed" for each replay."""
    events = []

    def record(call, device):
        call()
        result = torch.empty_like(call())
        events.append("recorded")

        def replay():
            events.append("replayed")
            result.copy_(call())
        return replay, result

    monkeypatch.setattr(fast_cuda, "record", record)
    return events


@torch.no_grad()
def unclamped(model, video):
    """The model with pictures that its clamp to [0, 1] leaves alone."""
    last = model.decoder[-1]
    last.bias.zero_()
    last.weight /= 4 * model._decode(model.encode(video)).abs().max()
    last.bias += 0.5
    return model


def graphed(model):
    """fast(model, graph=True), which a CPU is refused."""
    quick = fast(model)
    getattr(quick, "taehv", quick).graph = True
    return quick


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "changes"), CASES)
@torch.no_grad()
def test_results_are_the_plain_models(variant, changes, acted_cudnn):
    model = make(variant, **changes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quick, video = fast(model), clip({"taeh3": 20, "taecvx": 13}.get(variant, 9))
    if model.space_factor == 32:
        video = F.interpolate(video.flatten(0, 1), scale_factor=2).unflatten(0, (2, -1))[..., :96, :64]
    latents, given = model.encode(video), video.clone()
    assert error(quick.encode(video), latents) < 1e-5
    assert error(quick._decode(latents), model._decode(latents)) < 1e-5
    stream = quick.stream(memory_limit=1 << 20)
    streamed = torch.cat([stream.encode(piece) for piece in video.split(5, 1)] + [stream.flush()], 1)
    assert error(streamed, latents) < 1e-5
    assert torch.equal(video, given), "inputs are left alone"
    assert list(quick.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert ({*acted_cudnn} == {*FUSED}) == (model.activation == "relu" and model.arch_variant is None) or \
        acted_cudnn, "the encoders' blocks have ReLU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_types_with_and_without_cudnn(dtype, request):
    exact, video = make(**NARROW), clip()
    model = copy.deepcopy(exact).to(dtype)
    latents = exact.encode(video)
    frames = exact._decode(latents)

    def errors(m):
        """Of the encoder and the decoder: the largest in float32, else the mean, which a few numbers tell better."""
        pairs = (m.encode(video.to(dtype)), latents), (m._decode(latents.to(dtype)), frames)
        return [error(*pair) if dtype == torch.float32 else ((pair[0] - pair[1]).norm() / pair[1].norm()).item()
                for pair in pairs]

    limits = [1e-5] * 2 if dtype == torch.float32 else [1.2 * found for found in errors(model)]
    for fused in (False, True):
        called = request.getfixturevalue("acted_cudnn") if fused else None
        assert all(ours < limit for ours, limit in zip(errors(fast(model)), limits))
        assert called is None or len(called) == 2 * 9 * 3 + 3, "three a memory block, the first ones, the second last"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("cut", [1, 5, 13])
@torch.no_grad()
def test_streams_do_not_depend_on_the_cutting(cut, graph, dtype, acted_graphs):
    video = clip(21, dtype=dtype)
    model = unclamped(make(**NARROW), video.float()).to(dtype)
    quick = graphed(model) if graph else fast(model)
    streams = [m.stream(memory_limit=limit) for m in (model, quick) for limit in (None, 1_700_000 * dtype.itemsize)]
    assert streams[-1]._group(48, 32, dtype.itemsize) == 2
    plain, plain_too, single, groups = (
        torch.cat([stream.decode(stream.encode(piece)) for piece in video.split(cut, 1)] + [stream.flush()], 1)
        for stream in streams)
    limit = 1e-5 if dtype == torch.float32 else 0.02  # five steps of bf16 at 0.5
    assert max(error(single, plain), error(groups, plain_too)) < limit
    assert acted_graphs.count("recorded") == 4 * graph, "encoder and decoder, groups of one and two latents"


@torch.no_grad()
def test_graphs_keep_the_clips_of_several_streams_apart(acted_graphs):
    model = make(**NARROW)
    quick, videos = graphed(model), [clip(25), clip(25).flip(1), 1 - clip(25)]

    def check(videos):
        """Their streams take turns."""
        expected, done = [model.encode(video) for video in videos], [[] for _ in videos]
        streams = [quick.stream() for _ in videos]
        for k in range(0, 25, 5):
            for video, stream, latents in zip(videos, streams, done):
                latents.append(stream.encode(video[:, k:k + 5]))
        for latents, stream, theirs in zip(done, streams, expected):
            assert error(torch.cat([*latents, stream.flush()], 1), theirs) < 1e-5

    check(videos[:2])
    sessions, = quick.sessions.values()
    assert len(sessions) == 2 and acted_graphs.count("recorded") == 2
    check(videos[2:])
    check(videos[1:])
    assert len(sessions) == 2 and acted_graphs.count("recorded") == 2, "streams that ended have left theirs"
    check(videos)
    assert len(sessions) == 3
    single = clip(4)[:1]
    for _ in range(3):
        assert error(quick.encode(single), model.encode(single)) < 1e-5, "whole clips, of another size"
    assert acted_graphs.count("recorded") == 4


@torch.no_grad()
def test_what_a_graph_gave_is_not_overwritten(acted_graphs):
    quick = graphed(make(**NARROW))
    results = [quick.encode(clip()) for _ in range(3)]
    kept = results[2].clone()
    quick.encode(1 - clip())
    assert torch.equal(results[2], kept) and "replayed" in acted_graphs
    with torch.inference_mode():
        quick.encode(clip())
        assert torch.equal(quick.encode(clip()), results[1])
    assert torch.equal(quick.encode(clip()), results[1]), "tensors of the inference mode may not be changed outside it"


@torch.no_grad()
def test_the_published_calls(acted_graphs):
    video = clip(8, 75, 51)
    model = unclamped(make(**NARROW), clip())
    quick = graphed(model)
    latents = model.encode_video(video, show_progress_bar=False)
    for parallel in (True, False):
        assert error(quick.encode_video(video, parallel, show_progress_bar=False), latents) < 1e-5
    assert error(quick.encode_video(video), latents) < 1e-5, "with a bar"
    ours, theirs = ([streaming.decode(latents), *iter(streaming.decode, None)]
                    for streaming in map(StreamingTAEHV, (quick, model)))
    assert error(torch.cat(ours, 1), torch.cat(theirs, 1)) < 1e-5


@torch.no_grad()
def test_a_tokenizer_of_latents_uses_it(acted_graphs):
    model, video = VQLatents(n_embed=16, width=8), clip()
    model.calibrate(model.taehv.encode(video))
    quick = graphed(model.eval())
    assert isinstance(quick.taehv, fast_cuda.CudaTAEHV) and type(model.taehv) is TAEHV
    codes = model.tokenize(video)
    assert (quick.tokenize(video)[0] == codes[0]).float().mean() > 0.9  # but for near ties
    assert error(quick.detokenize(codes), model.detokenize(codes)) < 1e-5


@torch.no_grad()
def test_other_numbers_of_channels_go_without_cudnn(acted_cudnn):
    widths = {"encoder_widths": (20,) * 4, "decoder_widths": (24, 20, 20, 20)}
    model, video = make(**widths), clip()
    quick = fast(model)
    assert error(quick.encode(video), model.encode(video)) < 1e-5
    assert error(quick._decode(model.encode(video)), model._decode(model.encode(video))) < 1e-5
    assert not quick.steps["encoder"][1].now.fused and quick.steps["decoder"][2].now.fused


@torch.no_grad()
def test_maps_too_large_for_an_index_go_without_cudnn(acted_cudnn, monkeypatch):
    layer = torch.nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    for limit in (x.numel() + 1, x.numel()):
        monkeypatch.setattr(fast_cuda, "INDEX", limit)
        assert error(fast_cuda.Conv(layer.weight, layer.bias)(x, x, relu=True), F.relu(layer(x) + x)) < 1e-5
    assert acted_cudnn == ["cudnn_convolution_add_relu"]


def test_a_cpu_has_no_cudnn_and_no_graphs():
    assert not fast_cuda.has_fused(torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="graph=True is for a GPU"):
        fast(TAEHV().eval(), graph=True)
    with pytest.raises(ValueError, match="call model.eval"):
        fast(TAEHV())


@pytest.mark.parametrize("wrong", [0.0, 1.0])
def test_cudnn_is_tried_before_it_is_trusted(wrong, monkeypatch):
    """On a device that says it is a GPU, with fused calls that are right, wrong, or not there."""
    class Gpu(str):
        type = "cuda"

    def fused(x, weight, bias, add, stride, padding):
        return (F.conv2d(x, weight, bias, stride, padding) + (0 if add is None else add) + wrong).relu()

    monkeypatch.setattr(fast_cuda, "fused_conv", fused)
    assert fast_cuda.has_fused.__wrapped__(Gpu("cpu"), torch.bfloat16) == (not wrong)
    monkeypatch.undo()
    assert not fast_cuda.has_fused.__wrapped__(Gpu("cpu"), torch.float32), "a PyTorch for CPUs has none"
