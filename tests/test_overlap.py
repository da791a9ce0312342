"""Gradients are reduced slice by slice while the backward pass goes on: the same bits as all at once after it."""
import pytest

from conftest import BATCH_NORM, different, run, spoilt, state_of

LATE = """
ranks.SLICE = 10 ** 12
ranks.Gradients.last_pass = lambda self: None
"""
EARLY = """
sent_early = []
def note(self, send_rest=ranks.Gradients.send_rest):
    sent_early.append(self.sent)
    send_rest(self)
ranks.Gradients.send_rest = note
import atexit
atexit.register(lambda: print("slices sent before the backward pass had ended:", max(sent_early)))
"""


@pytest.mark.slow
def test_the_same_bits_as_one_reduction_after_the_backward_pass(clips, tmp_path, monkeypatch):
    """With two micro-batches, batch statistics and a discriminator of its own reduction."""
    settings = [*BATCH_NORM, "accumulation=2", "frames=1", "size=24", "gan_weight=0.1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, faults in (("early", EARLY), ("late", LATE)):
        output = run(spoilt(tmp_path, faults), *settings, f"data={clips}", "max_steps=3", f"name={name}", ranks=2,
                     cwd=tmp_path)
        if name == "early":
            counts = [int(line.rpartition(" ")[2]) for line in output.splitlines() if "slices sent before" in line]
            assert len(counts) == 2 and min(counts) > 5
    states = [state_of(tmp_path / "runs" / name, 3) for name in ("early", "late")]
    assert set(different(*states)) <= {"state.config.name"}
