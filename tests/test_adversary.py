"""The adversary: layouts, losses, weights, steps, ranks, resume. Minutes: under one."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import objective
from adversary import Adversary, PatchGAN, adaptive_weight, discriminator_loss, generator_loss
from conftest import CODES, COMMON, log_of, run, same
from ranks import Gradients


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(**settings):
    """A small adversary without chance or BatchNorm, unless asked for."""
    return Adversary(**{"ndf": 8, "n_layers": 1, "norm": "none", "dropout": 0.0, "lr": 1e-2, "gradients": Gradients,
                        **settings})


class Decoder(nn.Module):
    """One layer from noise to a video."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, video):
        return self.last(video.flatten(0, 1)).unflatten(0, video.shape[:2])


def calls(adversary):
    """A list that grows with every pass through the discriminator."""
    seen = []
    adversary.discriminator.register_forward_hook(lambda *_: seen.append(1))
    return seen


def weights(adversary):
    return torch.cat([p.detach().flatten() for p in adversary.discriminator.parameters()])


# ---- the net -----------------------------------------------------------------------------------------------------


def batch_norm(name, width):
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{n}": (width,) for n in names}, f"{name}.num_batches_tracked": ()}


def test_the_frame_discriminator_has_the_published_layout():
    expected = {"main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,)}
    for conv, n_in, n_out in ((2, 64, 128), (5, 128, 256), (8, 256, 512)):
        expected |= {f"main.{conv}.weight": (n_out, n_in, 4, 4), **batch_norm(f"main.{conv + 1}", n_out)}
    expected |= {"main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,)}
    net = PatchGAN()
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == expected
    assert [net.main[i].stride for i in (0, 2, 5, 8, 11)] == [(2, 2)] * 3 + [(1, 1)] * 2
    assert abs(net.main[8].weight.std() - 0.02) < 1e-3 and abs(net.main[9].weight.mean() - 1) < 1e-2
    assert net.main[9].weight.std() > 0.01 and not net.main[9].bias.any()


def test_the_clip_discriminator_has_the_published_layout():
    expected = {"main.0.weight": (64, 3, 3, 3, 3), "main.0.bias": (64,)}
    for conv, n_in, n_out in ((2, 64, 128), (6, 128, 256), (10, 256, 512), (14, 512, 512), (18, 512, 512)):
        expected |= {f"main.{conv}.weight": (n_out, n_in, 3, 3, 3), **batch_norm(f"main.{conv + 1}", n_out)}
    expected |= {"main.22.weight": (1, 512, 3, 3, 3), "main.22.bias": (1,)}
    net = PatchGAN(dims=3)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == expected
    strides = [(2, 2, 2)] * 2 + [(1, 2, 2)] * 3 + [(1, 1, 1)] * 2
    assert [net.main[i].stride for i in (0, 2, 6, 10, 14, 18, 22)] == strides
    assert [net.main[i].p for i in (5, 9, 13, 17, 21)] == [0.3] * 5


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_one_score_for_each_patch(norm):
    frames, clips = PatchGAN(ndf=8, norm=norm), PatchGAN(dims=3, ndf=8, norm=norm)
    assert frames(torch.rand(2, 3, 3, 64, 48)).shape == (6, 1, 6, 4)
    assert frames(torch.rand(1, 1, 3, 24, 24)).shape == (1, 1, 1, 1)
    for t, out in ((1, 1), (2, 1), (4, 1), (5, 2), (7, 2), (9, 3), (32, 8)):
        assert clips(torch.rand(2, t, 3, 64, 33)).shape == (2, 1, out, 2, 2)
    with pytest.raises(ValueError, match="24 pixels or more, got 23x64"):
        frames(torch.rand(1, 1, 3, 23, 64))


def test_a_patch_reaches_70_pixels():
    net = PatchGAN(ndf=2, norm="none")
    video = torch.rand(1, 1, 3, 128, 128, requires_grad=True)
    net(video)[0, 0, 7, 7].backward()
    rows = video.grad.abs().sum((0, 1, 2, 4)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_batchnorm_of_a_single_value_is_refused_in_words():
    net = PatchGAN(dims=3, ndf=8)
    with pytest.raises(ValueError, match="single value: larger frames"):
        net(torch.rand(1, 4, 3, 32, 32))
    assert net(torch.rand(1, 5, 3, 32, 32)).isfinite().all() and net(torch.rand(1, 1, 3, 33, 32)).isfinite().all()


def test_wrong_settings_are_refused():
    for settings, words in (({"dims": 4}, "dims is 4"), ({"norm": "layer"}, "'layer'; there are batch"),
                            ({"loss": "wgan"}, "'wgan'; there are hinge"), ({"every": 0}, "every is 0")):
        with pytest.raises(ValueError, match=words):
            Adversary(**settings)
    adversary = make()
    adversary.begin(0)
    with pytest.raises(ValueError, match="differ in shape"):
        adversary.generator_term(torch.rand(1, 2, 3, 16, 16), torch.rand(1, 1, 3, 16, 16))
    with pytest.raises(ValueError, match="set adaptive=False"):
        adversary.generator_term(torch.rand(1, 2, 3, 16, 16), torch.rand(1, 2, 3, 16, 16))


# ---- losses and weights ------------------------------------------------------------------------------------------


def test_losses_against_hand_computed_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx((2.5 / 3 + 3 / 3) / 2)
    softplus = lambda *values: sum(math.log1p(math.exp(v)) for v in values) / 3
    vanilla = (softplus(-2, -0.5, 1) + softplus(-2, 0, 1)) / 2
    assert discriminator_loss("vanilla", real, fake).item() == pytest.approx(vanilla)
    assert generator_loss(fake).item() == pytest.approx(1 / 3)


def test_adaptive_weight_is_the_ratio_of_the_last_layers_gradients():
    last_layer = torch.tensor([2.0, -1.0], requires_grad=True)
    x = torch.tensor([3.0, 4.0])
    fake = last_layer * x
    loss = fake.sum()  # gradient at the last layer: x, norm 5
    of = lambda loss, gradient, **k: adaptive_weight(loss, fake, torch.tensor(gradient), last_layer, **k).item()
    assert of(loss, [0.1, 0.0]) == pytest.approx(5 / (0.3 + 1e-4))
    assert of(loss, [0.0, 0.0]) == 10000  # 5 / 1e-4 = 50000, held
    assert of(loss, [0.1, 0.0], most=2.0) == 2
    assert of(loss * 0, [0.1, 0.0]) == 0
    for bad in (math.nan, math.inf):
        assert of(loss * bad, [0.1, 0.0]) == 0 and of(loss, [bad, 0.0]) == 0
    at_output = adaptive_weight(loss, fake, torch.tensor([0.3, 0.4]), fake)
    assert at_output.item() == pytest.approx(2 ** 0.5 / (0.5 + 1e-4)) and not at_output.requires_grad


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_term_is_that_of_the_plain_method(dims, adaptive):
    """Value and gradients against the published way: a pass with the graph kept, then separate passes to learn."""
    adversary = make(dims=dims, norm="batch", n_layers=2, adaptive=adaptive, weight=0.5, ramp=4, start=3)
    net, model = adversary.discriminator, Decoder()
    real = torch.rand(2, 3, 3, 16, 16)
    plain = copy.deepcopy(net)
    fake = model(real)
    loss = (fake - real).abs().mean()
    g_loss = -plain(fake).mean()
    ratio = 1.0
    if adaptive:
        norms = [torch.autograd.grad(x, model.last.weight, retain_graph=True)[0].norm() for x in (loss, g_loss)]
        ratio = norms[0] / (norms[1] + 1e-4)
    expected = g_loss * ratio * 0.5 * 2 / 4  # the second of the ramp's four steps
    d_loss = 0.5 * (F.relu(1 - plain(real)).mean() + F.relu(1 + plain(fake.detach())).mean())
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
    expected_learning = torch.autograd.grad(d_loss, list(plain.parameters()))

    adversary.begin(4)
    term = adversary.generator_term(real, fake, loss, model.last.weight)
    learning = [p.grad.clone() for p in net.parameters()]
    term.backward()
    assert term.item() == pytest.approx(expected.item(), rel=1e-4)
    for p, g in zip(model.parameters(), expected_gradients):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-7)
    for p, g, before in zip(net.parameters(), expected_learning, learning):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)
        assert torch.equal(p.grad, before), "the generator's backward pass reached the discriminator"


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_term_that_is_not_finite_is_left_out(adaptive):
    adversary, model = make(adaptive=adaptive), Decoder()
    with torch.no_grad():
        adversary.discriminator.main[0].weight[0, 0, 0, 0] = math.inf
    before = weights(adversary)
    video = torch.rand(1, 2, 3, 16, 16)
    adversary.begin(0)
    fake = model(video)
    loss = (fake - video).abs().mean()
    expected = torch.autograd.grad(loss, model.last.weight, retain_graph=True)[0]
    term = adversary.generator_term(video, fake, loss, model.last.weight)
    (loss + term).backward()
    figures = adversary.step()
    assert term.item() == 0 and torch.equal(model.last.weight.grad, expected)
    assert figures["skipped"].item() == 1 and torch.equal(weights(adversary), before)


def test_lecam_follows_its_definition():
    adversary = make(lecam=0.3, lecam_decay=0.9, adaptive=False, lr=0.0)
    real, fake = torch.rand(1, 2, 3, 16, 16), torch.rand(1, 2, 3, 16, 16, requires_grad=True)
    with torch.no_grad():
        scores_real, scores_fake = adversary.discriminator(real), adversary.discriminator(fake)
    plain = discriminator_loss("hinge", scores_real, scores_fake).item()
    for step in range(3):  # the weights stay, so the running means are the scores' own from the first step on
        adversary.begin(step)
        adversary.generator_term(real, fake)
        figures = adversary.step()
        mean_real, mean_fake = scores_real.mean(), scores_fake.mean()
        apart = (F.relu(scores_real - mean_fake) ** 2).mean() + (F.relu(mean_real - scores_fake) ** 2).mean()
        expected = plain + (0.3 * apart.item() if step else 0)  # nothing is known in the first
        assert figures["discriminator_loss"].item() == pytest.approx(expected, abs=1e-6)
    assert apart > 0 and adversary.lecam_means[2].item() == pytest.approx(1 - 0.9 ** 3)


# ---- steps -------------------------------------------------------------------------------------------------------


def test_nothing_runs_before_the_start_and_learning_comes_every_nth_step():
    adversary, model = make(start=3, every=2, weight=0.5, ramp=2, adaptive=False), Decoder()
    seen, video = calls(adversary), torch.rand(1, 2, 3, 16, 16)
    passes, moved, factors = [], [], []
    for step in range(8):
        before = weights(adversary)
        adversary.begin(step)
        fake = model(video)
        scores = -adversary.discriminator.main(fake.detach().flatten(0, 1) * 2 - 1).mean().item()
        term = adversary.generator_term(video, fake)
        adversary.step()
        passes.append(len(seen))
        moved.append(not torch.equal(weights(adversary), before))
        factors.append((term.item() if step >= 3 else term) / scores)
    assert passes == [0, 0, 0, 2, 3, 5, 6, 8]  # fakes in every step, real clips where it learns
    assert moved == [False, False, False, True, False, True, False, True]
    assert factors == pytest.approx([0, 0, 0, 0.25, 0.5, 0.5, 0.5, 0.5], rel=1e-3)


def test_two_micro_batches_are_one_batch():
    video = torch.rand(4, 2, 3, 16, 16)
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        adversary, model = make(adaptive=False, lecam=0.1), Decoder()
        for step in range(2):
            adversary.begin(step)
            model.zero_grad()
            for part in video.chunk(parts):
                fake = model(part)
                loss = (fake - part).abs().mean()
                term = adversary.generator_term(part, fake, fraction=1 / parts)
                ((loss + term) / parts).backward()
            figures = adversary.step(limit=1.0)
        results.append((model.last.weight.grad, weights(adversary), torch.stack(list(figures.values()))))
    for one, two in zip(*results):
        assert torch.allclose(one, two, atol=1e-5)


def test_a_step_can_be_done_again_from_its_start():
    once, twice, model = make(norm="batch"), make(norm="batch"), Decoder()
    twice.load_training_state(copy.deepcopy(once.training_state()))
    video = torch.rand(2, 2, 3, 16, 16)
    for step in range(2):
        for adversary in (once, twice):
            adversary.begin(step)
            fake = model(video)
            if adversary is twice:
                adversary.generator_term(video + 1, fake, (fake - video).square().mean(), fake)
                adversary.begin(step)
            adversary.generator_term(video, fake, (fake - video).square().mean(), model.last.weight)
            adversary.step()
    assert same(once.training_state(), twice.training_state())
    assert once.discriminator.main[3].num_batches_tracked == 4


def test_alone_it_learns_as_with_the_projects_gradients(monkeypatch):
    alone, together = make(norm="batch", gradients=None), make(norm="batch")
    video, model = torch.rand(2, 2, 3, 16, 16), Decoder()
    alone.load_training_state(copy.deepcopy(together.training_state()))
    for step in range(3):
        figures = []
        for adversary in (alone, together):
            adversary.begin(step)
            fake = model(video)
            adversary.generator_term(video, fake, (fake - video).square().mean(), fake)
            figures.append(adversary.step(limit=1e9))
        assert same(*figures)
    assert same(alone.training_state(), together.training_state())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="on several ranks Adversary needs gradients=Gradients"):
        make(gradients=None)


def test_the_limit_holds_the_gradient():
    adversary = make(adaptive=False)
    real, fake = torch.rand(1, 2, 3, 16, 16), torch.rand(1, 2, 3, 16, 16, requires_grad=True)
    adversary.begin(0)
    adversary.generator_term(real, fake)
    norm = torch.cat([p.grad.flatten() for p in adversary.discriminator.parameters()]).norm()
    adversary.step(limit=norm.item() / 3)
    held = torch.cat([p.grad.flatten() for p in adversary.discriminator.parameters()]).norm()
    assert held.item() == pytest.approx(norm.item() / 3, rel=1e-4)


@pytest.mark.parametrize("settings", [{"norm": "batch", "lecam": 0.1, "every": 2},
                                      {"dims": 3, "norm": "batch", "dropout": 0.3}])
def test_resume_is_exact(settings, tmp_path):
    videos = torch.rand(6, 2, 3, 3, 16, 16)

    def go_on(adversary, steps):
        for step in steps:
            torch.manual_seed(step)  # of the dropout
            adversary.begin(step)
            fake = (videos[step] * 0.5).requires_grad_()
            adversary.generator_term(videos[step], fake, fake.square().mean(), fake)
            figures = adversary.step(limit=1.0)
        return figures

    through = make(**settings)
    go_on(through, range(3))
    torch.save(through.training_state(), tmp_path / "state.pt")
    figures = go_on(through, range(3, 6))
    resumed = make(**settings)
    assert not torch.equal(weights(resumed), weights(through))
    resumed.load_training_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(go_on(resumed, range(3, 6)), figures)
    assert same(resumed.training_state(), through.training_state())


def test_the_state_of_another_discriminator_is_refused():
    with pytest.raises(ValueError, match="another discriminator"):
        make(ndf=16).load_training_state(make().training_state())


def test_todays_learning_rate_outlives_a_resume():
    adversary = make(lr=0.5)
    adversary.load_training_state(make(lr=0.1).training_state())
    assert adversary.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("dims, frames, dtype", [(2, 3, torch.float32), (3, 1, torch.float32), (3, 5, torch.float32),
                                                 (2, 3, torch.bfloat16), (3, 1, torch.bfloat16),
                                                 (3, 2, torch.bfloat16), (3, 5, torch.bfloat16)])
def test_clips_of_any_length_train_in_any_precision(dims, frames, dtype):
    adversary = make(dims=dims, n_layers=2, norm="batch", dropout=0.3)
    video, model = torch.rand(2, frames, 3, 32, 32), Decoder()
    for step in range(2):
        adversary.begin(step)
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext():
            fake = model(video).float()
            loss = (fake - video).abs().mean()
            term = adversary.generator_term(video, fake, loss, model.last.weight)
        (loss + term).backward()
        figures = adversary.step(limit=1.0)
    assert term.dtype == torch.float32 and model.last.weight.grad.isfinite().all()
    assert all(f.dtype == torch.float32 and f.isfinite() for f in figures.values()) and figures["skipped"] == 0


@pytest.mark.parametrize("dims, dtype", [(2, torch.bfloat16), (3, torch.float32)])
def test_on_a_cpu_only_frames_are_scored_in_bf16(dims, dtype):
    """Its 3D convolutions in bf16 are wrong there (Adversary.precision)."""
    adversary, video, model, seen = make(dims=dims, n_layers=2), torch.rand(2, 2, 3, 32, 32), Decoder(), []
    for layer in adversary.discriminator.main:
        if hasattr(layer, "kernel_size"):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    adversary.begin(0)
    with torch.autocast("cpu", torch.bfloat16):
        fake = model(video)
        adversary.generator_term(video, fake, (fake - video).abs().mean(), model.last.weight)
    assert set(seen) == {dtype}


# ---- it learns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dims": 3}, {"loss": "vanilla"}, {"norm": "group"}, {"lecam": 0.01}])
def test_it_tells_sets_apart_and_then_pulls_a_free_image_over(settings):
    adversary = make(n_layers=2, lr=3e-3, adaptive=False, weight=1.0, **settings)
    stripes = (torch.arange(16) // 2 % 2).float()
    real = lambda: stripes * 0.5 + 0.25 + 0.05 * torch.randn(2, 2, 3, 16, 16)
    losses = []
    for step in range(40):
        adversary.begin(step)
        fake = (0.5 + 0.05 * torch.randn(2, 2, 3, 16, 16)).requires_grad_()
        adversary.generator_term(real(), fake)
        losses.append(adversary.step(limit=1.0)["discriminator_loss"].item())
    assert losses[-1] < 0.3 * losses[0]
    image = torch.full((1, 2, 3, 16, 16), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([image], lr=0.01)
    contrast = lambda: (image[..., stripes > 0].mean() - image[..., stripes == 0].mean()).item()
    for step in range(40, 90):
        adversary.begin(step)
        optimizer.zero_grad()
        adversary.generator_term(real()[:1], image).backward()
        optimizer.step()
        adversary.step(limit=1.0)
    assert contrast() > 0.1, "the image did not take up the stripes of the real ones"


# ---- ranks -------------------------------------------------------------------------------------------------------

RANKS = """
import os, sys
import torch, torch._dynamo, torch.distributed as dist
from adversary import Adversary
from ranks import Gradients

torch.set_num_threads(1)
ranks = "RANK" in os.environ
if ranks:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
torch.manual_seed(rank)
adversary = Adversary(ndf=8, n_layers=2, lr=1e-3, lecam=0.1, every=2, gradients=Gradients)
scale = torch.ones((), requires_grad=True)
skipped = []
for step in range(10):
    adversary.begin(step)
    mine = [rank] if ranks else [0, 1]  # one rank does both ranks' clips as two micro-batches
    for part in mine:
        real = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(100 * step + part))
        fake = real.square() * scale
        if step in (4, 5) and part == 1 and "nan" in sys.argv:
            fake = fake * float("nan")
        loss = (fake - real).abs().mean()
        adversary.generator_term(real, fake, loss, scale, fraction=1 / len(mine))
    skipped.append(adversary.step(limit=1.0)["skipped"].item())
torch.save({"state": adversary.training_state(), "skipped": skipped}, f"rank{rank}.pt")
if ranks:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["nan", "none"])
def test_two_ranks_stay_equal_to_the_bit_and_skip_together(tmp_path, trouble):
    script = tmp_path / "both.py"
    script.write_text(RANKS)
    run(script, trouble, ranks=2, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert same(one, two)
    state = one["state"]["adversary"]
    assert all(v.isfinite().all() for v in state.values())
    # It learns in steps 0, 2, ...: the NaN of step 4 is skipped on both, that of step 5 has nothing to spoil.
    assert one["skipped"] == ([0.0] * 4 + [1.0] * 6 if trouble == "nan" else [0.0] * 10)
    if trouble == "none":
        (tmp_path / "alone").mkdir()
        run(script, trouble, cwd=tmp_path / "alone")
        alone = torch.load(tmp_path / "alone" / "rank0.pt", weights_only=True)["state"]["adversary"]
        for name, value in state.items():
            if "running" not in name and "batches" not in name:  # one rank passes both micro-batches through them
                assert torch.allclose(value, alone[name], atol=1e-5), name


def test_a_runs_settings_reach_its_discriminator(here, monkeypatch):
    made, limits = [], []

    class Watched(Adversary):
        def __init__(self, **settings):
            super().__init__(**settings)
            made.append(self)

        def step(self, limit=0.0):
            limits.append(limit)
            return super().step(limit)

    monkeypatch.setattr(objective, "Adversary", Watched)
    here("vqgan", *CODES, "net.n_embed=16", "size=24", "max_steps=1", "gan_beta1=0.3", "gan_beta2=0.7", "gan_clip=0.5",
         "gan_weight_decay=0.2", "gan_max_weight=12", "name=run")
    group = made[0].optimizer.param_groups[0]
    assert group["betas"] == (0.3, 0.7) and group["weight_decay"] == 0.2
    assert limits == [0.5] and made[0].max_weight == 12 and made[0].figures[4] <= 12


@pytest.mark.slow
def test_the_small_video_dcae_goes_on_with_a_discriminator(here):
    narrow = [*COMMON, "net.width_list=(16,16,16,32,32,32)", "net.latent_channels=16", "size=32", "frames=4",
              "batch_size=1", "max_steps=1", "gan_norm=group"]
    first = here("dcae_small", *narrow, "gan_weight=0", "name=first")
    second = here("dcae_small_disc", *narrow, f"init_from={first}", "name=second")
    assert f"from {first}" in log_of(second) and "adversarial" in log_of(second)
