"""Seraena: parity, grouping, the replay buffer, steps, ranks, resume. Minutes: under one."""

import io
import os

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, run, same
from golden.fill import fill_, make_input
from ranks import Gradients
from seraena import ReplayBuffer, Seraena, group_frames, ungroup_frames

SHAPE = ((9, 16, 16), (4, 2, 2))
SAMPLE = 2 * (9 * 16 * 16 + 4 * 2 * 2)  # bytes of one of these in bfloat16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(**settings):
    return Seraena(**{"c_im": 9, "c_ctx": 4, "replay_bytes": 1 << 20, "gradients": Gradients, **settings})


def batch(clips=2, frames=4, size=16):
    """(real, fake, latents), random."""
    shape = (clips, frames, 3, size, size)
    return torch.rand(shape), torch.rand(shape), torch.randn(clips, 2, 4, size // 8, size // 8)


def one_step(seraena, *data):
    seraena.begin()
    corrected = seraena.targets(*(data or batch()))
    return corrected, seraena.step()


def whole_state(seraena):
    return seraena.training_state(), seraena.rank_state()


def copied(state):
    """Through a file that runs no code when it is read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the published implementation --------------------------------------------------------------------------------


def test_scores_and_correction_are_the_published_ones():
    golden = torch.load(os.path.join(ROOT, "tests", "golden", "seraena.pt"), weights_only=True)
    seraena = Seraena(**golden["config"])
    assert [(k, tuple(v.shape)) for k, v in seraena.state_dict().items()] == [
        (k, tuple(s)) for k, s in golden["params"]
    ]
    fill_(seraena.state_dict())
    real, fake, context = (make_input(*golden["inputs"][name]) for name in ("real", "fake", "ctx"))
    correction = seraena.correction(real, fake, context)
    scores = seraena.scores(fake, context).detach()
    for name, ours in (("scores", scores), ("correction", correction)):
        theirs = golden["outputs"][name]
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("gradients", [None, Gradients])
def test_the_published_call_updates_first_and_then_corrects(gradients):
    seraena = make(gradients=gradients)
    before = seraena.disc.proj[5].weight.clone()
    real, fake, context = torch.rand(5, 9, 16, 16), torch.rand(5, 9, 16, 16), torch.randn(5, 4, 2, 2)
    corrected, debug = seraena.step_and_make_correction_targets(real, fake.requires_grad_(), context)
    assert not torch.equal(before, seraena.disc.proj[5].weight)
    assert torch.equal(corrected, fake + seraena.correction(real, fake, context)) and not corrected.requires_grad
    assert set(debug) == {"disc_loss", "disc_in", "disc_in_ctx", "disc_pred", "disc_targets"}
    assert debug["disc_in"].shape == real.shape and debug["disc_in_ctx"].shape == context.shape
    assert debug["disc_pred"].shape == debug["disc_targets"].shape == (5, 6, 2, 2)
    assert torch.equal(debug["disc_loss"], F.mse_loss(debug["disc_pred"], debug["disc_targets"]))
    assert seraena.replay.counts == {SHAPE: 5}


# ---- groups of frames --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_groups_are_consecutive_frames_and_the_last_is_filled_with_the_last_frame(n):
    for frames in range(1, 11):
        video = torch.rand(2, frames, 3, 2, 2)
        images = group_frames(video, n)
        groups = -(-frames // n)
        assert images.shape == (2 * groups, 3 * n, 2, 2)
        for clip in range(2):
            for g in range(groups):
                expected = [video[clip, min(t, frames - 1)] for t in range(g * n, g * n + n)]
                assert torch.equal(images[clip * groups + g], torch.cat(expected))
        assert torch.equal(ungroup_frames(images, frames, n), video)


@pytest.mark.parametrize("frames", [1, 4, 6])
def test_targets_have_the_clips_frames_and_the_mean_latents_as_context(frames):
    seraena = make()
    real, fake, latents = batch(frames=frames)
    seraena.begin()
    groups = -(-frames // 3)
    context = latents.mean(1).repeat_interleave(groups, 0)
    expected = seraena.correction(group_frames(real, 3), group_frames(fake, 3), context, eps=16e-5)  # 16 times fewer
    corrected = seraena.targets(real, fake, latents)
    assert torch.allclose(corrected, fake + ungroup_frames(expected, frames, 3), atol=1e-5)
    assert [shape for shape, _ in seraena.pending] == [SHAPE] and len(seraena.pending[0][1]) == 2 * groups


# ---- corrections -------------------------------------------------------------------------------------------------


def test_corrections_have_unit_deviation_and_vanish_where_nothing_differs():
    seraena = make()
    for p in seraena.disc.proj:
        p.weight.data *= 1000  # gradients far above eps
    real, fake, latents = batch(frames=6)
    corrected, _ = one_step(seraena, real, fake, latents)
    assert (corrected - fake).std(correction=0).item() == pytest.approx(1, abs=1e-3)
    corrected, figures = one_step(seraena, real, real, latents)
    assert torch.equal(corrected, real) and figures["disc_loss"].isfinite()
    almost = real + 1e-9 * torch.randn_like(real)
    for p in seraena.disc.proj:
        p.weight.data /= 1000
    assert (one_step(seraena, real, almost, latents)[0] - real).abs().max() < 0.1, "rounding noise is not blown up"


def test_the_correction_is_as_strong_for_large_frames_as_for_small_ones():
    real, fake, latents = batch(frames=3, size=32)
    tiled = [x.repeat(1, 1, 1, 2, 2) for x in (real, fake, latents)]
    small, large = ((one_step(make(), *data)[0] - data[1]).std() for data in ((real, fake, latents), tiled))
    assert 0.8 < large / small < 1.25


@pytest.mark.slow
def test_a_free_image_moves_towards_the_original():
    seraena = make(lr=1e-3)
    grid = torch.linspace(0, 6.28, 16)
    real = (0.5 + 0.4 * torch.sin(grid)[:, None] * torch.cos(grid)).expand(4, 3, 3, 16, 16)
    free = (real + 0.5 * torch.randn(real.shape)).requires_grad_()
    latents = torch.zeros(4, 1, 4, 2, 2)
    start = F.mse_loss(free, real).item()
    optimizer = torch.optim.SGD([free], lr=1.0)
    for _ in range(25):
        corrected, _ = one_step(seraena, real, free, latents)
        assert not corrected.requires_grad
        optimizer.zero_grad()
        (0.05 * (free - corrected).square().sum()).backward()
        optimizer.step()
    assert F.mse_loss(free, real).item() < 0.5 * start


# ---- the discriminator's steps -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_discriminator_learns_to_tell():
    seraena = make()
    for _ in range(16):
        real, fake, latents = batch(clips=6, frames=6)
        real, fake = 0.5 + 0.5 * real, 0.5 * fake
        _, figures = one_step(seraena, real, fake, latents)
    assert figures["disc_loss"] < 0.3, "1 from ignorance"
    assert figures["score_real"] < -0.6 and figures["score_fake"] > 0.6 and figures["skipped"] == 0


def test_half_originals_a_quarter_fresh_a_quarter_replayed_each_with_its_own_context():
    seraena = make()
    values = torch.rand(64, 1, 1, 1)
    image, context = values.expand(64, 9, 16, 16), values.expand(64, 4, 2, 2)
    kinds = []
    for step in range(6):  # originals are 1 brighter than their context, fakes as bright; fakes of step n: +/- 10 n
        sign = 10 * step
        seraena.begin()
        debug = seraena.learn(image + 1, image / 8, context + sign, 1.0)
        seraena.step()
        pictures, contexts, wanted = (debug[k].mean((1, 2, 3)) for k in ("disc_in", "disc_in_ctx", "disc_targets"))
        original = wanted < 0
        assert torch.allclose(pictures[original], contexts[original] - sign + 1, atol=1e-3)
        fresh = ~original & (contexts >= sign)
        assert torch.allclose(pictures[fresh], (contexts[fresh] - sign) / 8, atol=1e-3)
        old = ~original & ~fresh
        assert torch.allclose(pictures[old], contexts[old] % 10 / 8, atol=0.05)  # bfloat16
        assert step > 0 or not old.any()
        kinds.append([original.sum().item(), fresh.sum().item(), old.sum().item()])
    original, fresh, old = (sum(k[i] for k in kinds[1:]) / 320 for i in range(3))
    assert abs(original - 0.5) < 0.08 and abs(fresh - 0.25) < 0.08 and abs(old - 0.25) < 0.08


def test_in_pairs_every_fake_fresh_or_replayed_comes_with_its_original_and_its_context():
    seraena = make(pairs=True, replay_bytes=1 << 24, replay_dtype=torch.float32)
    values = 0.1 + 0.8 * torch.rand(63, 1, 1, 1)
    image, context = values.expand(63, 9, 16, 16), values.expand(63, 4, 2, 2)
    shares = []
    for step in range(6):  # originals are 0.5 brighter than their context, fakes a quarter of it; context of step n: + n
        seraena.begin()
        debug = seraena.learn(image + 0.5, image / 4, context + step, 1.0)
        seraena.step()
        pictures, contexts, wanted = (debug[k].mean((1, 2, 3)) for k in ("disc_in", "disc_in_ctx", "disc_targets"))
        assert (wanted[:63] == 1).all() and (wanted[63:] == -1).all() and len(wanted) == 126
        assert torch.equal(contexts[:63], contexts[63:])
        assert torch.allclose(pictures[:63], contexts[:63] % 1 / 4, atol=1e-4)
        assert torch.allclose(pictures[63:], contexts[63:] % 1 + 0.5, atol=1e-4)
        fresh = contexts[:63] >= step
        assert step > 0 or fresh.all()
        shares.append(fresh.float().mean().item())
        assert len(contexts[:63][fresh].unique()) == fresh.sum(), "no group twice"
    assert abs(sum(shares[1:]) / 5 - 0.5) < 0.15
    assert seraena.replay.counts == {(SHAPE[0], *SHAPE): 6 * 63}
    kept = copied(seraena.rank_state())
    other = make(pairs=False)
    other.load_rank_state(kept)
    one_step(other)
    assert other.replay.counts == {SHAPE: 4}, "samples of the other kind are left out"
    resumed = make(pairs=True, replay_bytes=1 << 24, replay_dtype=torch.float32)
    resumed.load_rank_state(kept)
    assert same(resumed.rank_state(), seraena.rank_state())


@pytest.mark.slow
def test_in_pairs_small_batches_tell_blurred_pictures_from_sharp_ones_sooner():
    """Pictures of random brightness and contrast, blurred or not, four at a time: what a fixed number of steps brings."""
    def losses(pairs):
        torch.manual_seed(1)
        seraena = make(pairs=pairs, replay_bytes=1 << 24)
        found = []
        for _ in range(40):
            real = torch.rand(4, 3, 3, 16, 16) * torch.rand(4, 1, 1, 1, 1) + torch.rand(4, 1, 1, 1, 1)
            fake = F.avg_pool2d(F.pad(real.flatten(0, 1), (1, 1, 1, 1), "replicate"), 3, 1).view_as(real)
            found.append(one_step(seraena, real, fake, torch.zeros(4, 1, 4, 2, 2))[1]["disc_loss"].item())
        return sum(found[-20:]) / 20
    assert losses(pairs=True) < losses(pairs=False) - 0.05


def test_micro_batches_add_up_to_their_mean():
    """With BatchNorm in the way, of equal halves: each gives the gradient that the whole step has."""
    data = batch(clips=4)
    gradients = []
    for parts in (1, 2):
        seraena = make()
        seraena.begin()
        for _ in range(parts):
            seraena.generator.manual_seed(5)
            seraena.targets(*data, fraction=1 / parts)
        gradients.append(seraena.gradients.flat)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3


def test_a_step_done_again_leaves_no_trace():
    plain, redone = make(), make()
    first, wasted, second = batch(), batch(), batch()
    for seraena in (plain, redone):
        one_step(seraena, *first)
    state = redone.generator.get_state()
    redone.begin()
    redone.targets(*wasted)
    redone.generator.set_state(state)
    assert same([one_step(s, *second) for s in (plain,)], [one_step(s, *second) for s in (redone,)])
    assert same(whole_state(plain), whole_state(redone))


def test_alone_it_learns_as_with_the_projects_gradients(monkeypatch):
    alone, together = make(gradients=None), make()
    for _ in range(3):
        data = batch()
        for seraena in (alone, together):
            seraena.begin()
        assert torch.equal(*(seraena.targets(*data) for seraena in (alone, together)))
        assert same(alone.step(limit=1e9), together.step(limit=1e9))
    assert same(whole_state(alone), whole_state(together))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="on several ranks Seraena needs gradients=Gradients"):
        make(gradients=None)


def test_the_gradients_norm_is_held():
    seraena = make()
    seraena.begin()
    seraena.targets(*batch())
    assert torch.linalg.vector_norm(seraena.gradients.flat) > 0.02
    seraena.step(limit=0.01)
    assert torch.linalg.vector_norm(seraena.gradients.flat).item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    seraena = make(seed=1)
    for _ in range(3):
        one_step(seraena)
    before = copied(seraena.training_state())
    real, fake, latents = batch(clips=4)
    corrected, figures = one_step(seraena, real, fake.fill_(bad), latents.fill_(bad))
    assert figures["skipped"] == 1
    assert same(before["seraena"], seraena.state_dict())
    assert same(before["optimizer"]["state"], seraena.optimizer.state_dict()["state"])
    state = seraena.rank_state()["replay"]
    assert len(state[0]["rows"]) == 3 * 4 + 8 and state[0]["rows"].isfinite().all()
    assert state[0]["rows"][:, :9 * 16 * 16].float().abs().max() <= 2
    for _ in range(2):
        corrected, figures = one_step(seraena)
        assert figures["skipped"] == 0 and corrected.isfinite().all()


@pytest.mark.slow
def test_bf16_autocast_trains_every_weight_and_never_uses_old_ones():
    seraena = make()
    before = [p.clone() for p in seraena.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            corrected, figures = one_step(seraena)
            assert corrected.dtype == torch.float32 and corrected.isfinite().all() and figures["skipped"] == 0
        assert not any(torch.equal(a, b) for a, b in zip(before, seraena.parameters()))
        real, fake, context = torch.rand(4, 9, 16, 16), torch.rand(4, 9, 16, 16), torch.randn(4, 4, 2, 2)
        corrected, _ = seraena.step_and_make_correction_targets(real, fake, context)
        scores = seraena.scores(fake, context)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(corrected, fake + seraena.correction(real, fake, context))
    assert 0 < (scores - seraena.scores(fake, context)).abs().max() < 0.1, "it was bfloat16 in there"


def test_chance_is_its_own():
    state = torch.get_rng_state()
    one = make(seed=3)
    data = batch()
    torch.set_rng_state(state)
    one_step(one, *data)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    other = make(seed=3)
    one_step(other, *data)
    assert same(whole_state(one), whole_state(other))
    assert not torch.equal(make(seed=4).disc.proj[0].weight, make(seed=3).disc.proj[0].weight)


def test_mistakes_are_refused_in_words():
    seraena = make()
    seraena.begin()
    real, fake, latents = batch()
    for data, words in (
        ((real, fake[:, :3], latents), "one shape, N T C H W"),
        ((real[:, :, :2], fake[:, :, :2], latents), "C that divides c_im=9"),
        ((real, fake, latents[0]), "with N=2 is needed"),
        ((real, fake, latents[:, :, :3]), "c_ctx=4 channels"),
        ((real[..., :8], fake[..., :8], latents), "16x16 pixels or more"),
    ):
        with pytest.raises(ValueError, match=words):
            seraena.targets(*data)


# ---- the replay buffer -------------------------------------------------------------------------------------------


def test_the_replay_buffer_keeps_its_budget_and_some_of_the_old():
    seraena = make(replay_bytes=10 * SAMPLE + 100)
    for step in range(8):
        real, fake, latents = batch()
        one_step(seraena, real, fake.fill_(step / 16), latents)
        assert seraena.replay.bytes <= 10 * SAMPLE + 100
        assert seraena.replay.counts[SHAPE] == min(10, 4 * (step + 1))
    ages = {round(row[0].item() * 16) for row in seraena.replay.parts[SHAPE]}
    assert {7} < ages and len(ages) > 3, "the newest, and some of before"
    small = make(replay_bytes=3 * SAMPLE)  # less than a step's fakes
    one_step(small)
    one_step(small)
    assert small.replay.counts[SHAPE] == 3


def test_sizes_share_the_budget():
    seraena = make(replay_bytes=14 * SAMPLE)
    other = ((9, 32, 24), (4, 4, 3))
    wide = torch.rand(1, 3, 3, 32, 24), torch.rand(1, 3, 3, 32, 24), torch.randn(1, 1, 4, 4, 3)
    one_step(seraena)
    assert len(seraena.replay.parts[SHAPE]) == 14
    one_step(seraena, *wide)
    assert seraena.replay.counts == {SHAPE: 0, other: 1} and seraena.replay.bytes <= 14 * SAMPLE
    assert {shape: len(part) for shape, part in seraena.replay.parts.items()} == {SHAPE: 7, other: 2}
    for shape, value, count in ((SHAPE, 0.25, 9), (other, 0.5, 3), (SHAPE, 0.75, 1)):  # they do not overlap
        rows = torch.full((count, seraena.replay.parts[shape].shape[1]), value, dtype=torch.bfloat16)
        seraena.replay.add(shape, rows, seraena.generator)
    assert set(seraena.replay.parts[SHAPE].unique().tolist()) == {0.25, 0.75}
    assert set(seraena.replay.parts[other].unique().tolist()) == {0.5}
    ahead = make(replay_bytes=14 * SAMPLE)
    ahead.reserve((16, 16, 2, 2), (32, 24, 4, 3))
    one_step(ahead)
    one_step(ahead, *wide)
    assert ahead.replay.counts == {SHAPE: 4, other: 1}, "told ahead, nothing is emptied"


def test_a_budget_below_one_sample_is_refused():
    seraena = make(replay_bytes=SAMPLE - 1)
    seraena.begin()
    with pytest.raises(ValueError, match=f"takes {SAMPLE} bytes, so give {SAMPLE} bytes"):
        seraena.targets(*batch())
    with pytest.raises(ValueError, match="each of 2 shapes.*9 channels of 32x24"):
        make(replay_bytes=2 * SAMPLE).reserve((16, 16, 2, 2), (32, 24, 4, 3))
    one_step(make(replay_bytes=SAMPLE))


def test_rows_come_back_as_they_went_in():
    buffer, generator = ReplayBuffer(1 << 16, torch.float16), torch.Generator().manual_seed(0)
    shape = ((2, 3, 4), (1, 2, 1))
    buffer.reserve([shape], torch.device("cpu"))
    images, contexts = torch.rand(5, 2, 3, 4), torch.rand(5, 1, 2, 1)
    buffer.add(shape, torch.cat([images.flatten(1), contexts.flatten(1)], 1).half(), generator)
    drawn = buffer.draw(shape, 40, generator)
    found = set()
    for image, context in drawn:
        i = (images - image).abs().sum((1, 2, 3)).argmin().item()
        assert torch.equal(image, images[i].half().float()) and torch.equal(context, contexts[i].half().float())
        found.add(i)
    assert found == set(range(5))


# ---- resume ------------------------------------------------------------------------------------------------------


def test_resume_with_the_replay_is_exact_and_without_goes_on():
    data = [batch() for _ in range(6)]
    whole, cut = make(replay_bytes=14 * SAMPLE), make(replay_bytes=14 * SAMPLE)
    expected = [one_step(whole, *d) for d in data]
    for d in data[:4]:
        one_step(cut, *d)
    training, rank, bare = (copied(s) for s in (cut.training_state(), cut.rank_state(), cut.rank_state(False)))
    resumed, rebuilt = (make(replay_bytes=14 * SAMPLE, seed=7) for _ in range(2))
    for seraena, state in ((resumed, rank), (rebuilt, bare)):
        seraena.load_training_state(training)
        seraena.load_rank_state(state)
    assert same([one_step(resumed, *d) for d in data[4:]], expected[4:])
    assert same(whole_state(resumed), whole_state(whole))
    assert rebuilt.replay.bytes == 0
    for d in data[4:]:
        corrected, figures = one_step(rebuilt, *d)
        assert corrected.isfinite().all() and figures["skipped"] == 0
    assert rebuilt.replay.counts == {SHAPE: 8} and not same(rebuilt.state_dict(), whole.state_dict())
    smaller = make(replay_bytes=6 * SAMPLE)
    smaller.load_rank_state(rank)
    assert smaller.replay.counts == {SHAPE: 6}
    reserved = make(replay_bytes=14 * SAMPLE)
    reserved.reserve((32, 24, 4, 3))
    reserved.load_rank_state(rank)
    assert list(reserved.replay.parts) == [((9, 32, 24), (4, 4, 3))], "samples of another size take no memory"
    assert reserved.replay.counts == {((9, 32, 24), (4, 4, 3)): 0}
    both = make(replay_bytes=14 * SAMPLE)
    both.reserve((16, 16, 2, 2), (32, 24, 4, 3))
    both.load_rank_state(rank)
    assert both.replay.counts == {SHAPE: 7, ((9, 32, 24), (4, 4, 3)): 0}
    with pytest.raises(ValueError, match="another discriminator .disc.blocks.0.0.weight differs"):
        make(c_im=6).load_training_state(training)


def test_todays_learning_rate_stays():
    old, new = make(lr=1.0), make(lr=0.5)
    one_step(old)
    new.load_training_state(copied(old.training_state()))
    assert new.optimizer.param_groups[0]["lr"] == 0.5 and len(new.optimizer.state) == len(list(new.parameters()))


# ---- ranks -------------------------------------------------------------------------------------------------------

RANKS = """
import sys
import torch
import torch._dynamo
import torch.distributed as dist
from ranks import Gradients
from seraena import Seraena
from test_seraena import SAMPLE, batch, one_step

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
seraena = Seraena(9, 4, replay_bytes=16 * SAMPLE, seed=rank, gradients=Gradients)  # begin has to make them equal
torch.manual_seed(100 + rank)

def everybodys():
    mine = torch.cat([t.flatten().double() for t in seraena.state_dict().values()])
    all = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(all, mine)
    return all

assert not torch.equal(*everybodys())
for step in range(10):
    real, fake, latents = batch()
    if step == 0:
        torch.save((real, fake, latents), f"data{rank}.pt")
        seraena.generator.manual_seed(rank)
    if step == 4 and rank == 1:
        fake[0, 0, 0, 0, 0] = float("nan")
    before = everybodys()[0]
    _, figures = one_step(seraena, real, fake, latents)
    after = everybodys()
    assert torch.equal(*after) and after[0].isfinite().all(), step
    assert torch.equal(before, after[0]) == (step == 4) == bool(figures["skipped"]), step
    assert 0 < seraena.replay.bytes <= 16 * SAMPLE
    if step == 0 and rank == 0:
        torch.save((seraena.state_dict(), figures["disc_loss"]), "after.pt")
rows = seraena.rank_state()["replay"][0]["rows"]
assert len(rows) == 16 and rows.isfinite().all()
others = [torch.empty_like(rows) for _ in range(2)]
dist.all_gather(others, rows)
assert not torch.equal(*others), "each rank replays its own"
open(f"rank{rank}_came_to_the_end", "w").close()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_stay_equal_to_the_bit_and_step_as_one(tmp_path):
    script = tmp_path / "both.py"
    script.write_text(RANKS)
    run(script, ranks=2, cwd=tmp_path)
    assert all((tmp_path / f"rank{rank}_came_to_the_end").exists() for rank in range(2))
    # One rank with the same clips in two micro-batches. (BatchNorm's running statistics average otherwise.)
    seraena = make(seed=0)
    seraena.begin()
    for rank in range(2):
        seraena.generator.manual_seed(rank)
        seraena.targets(*torch.load(tmp_path / f"data{rank}.pt", weights_only=True), fraction=0.5)
    figures = seraena.step()
    theirs, loss = torch.load(tmp_path / "after.pt", weights_only=True)
    assert torch.allclose(loss, figures["disc_loss"], atol=1e-5)
    for name, p in seraena.named_parameters():
        assert (theirs[name] - p).abs().mean() < 1e-6, name
