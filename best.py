"""best.pt of a run: the averaged weights that validated best, their score, and what the score was measured with.

A score holds for one measure and one set of clips, and best.pt names both. As long as these are the same, its score
counts, whatever has happened to the run since. With another measure or other clips, the weights are validated again.
"""
import copy
import hashlib
import itertools
import json
import math
import os
import zlib

import torch

import checkpoint
from ranks import copy_from_rank_0, from_rank_0, gather


class Best:
    """Keeps best.pt up to date. `score` is the score to beat, dB; after `offer`, only rank 0 has the current one.

    about: {"model_name", "model_config"} of the run; objective: its Objective, which computes scores; samples: this
    rank's validation clips, as `evaluate` takes them; saver: the run's Saver.
    """

    def __init__(self, about, objective, samples, saver):
        self.path, self.about, self.score_of = os.path.join(saver.folder, "best.pt"), about, objective.score
        self.judged_by = {"measure": objective.best_by(), "clips": fingerprint(samples, saver.control)}
        self.saver, self.log, self.score = saver, saver.log, -math.inf

    def take_up(self, average, goes_on, validate):
        """Take over the score of an existing best.pt, or validate its weights again. All ranks call this before the
        first step. goes_on: whether the run was resumed; if not, best.pt is of another run. validate: function that
        returns `evaluate`'s dict for a model like `average`, or None without validation."""
        model = copy.deepcopy(average)
        found = from_rank_0(self.saver.control, lambda: self.find(model, goes_on))
        if not found or not validate:
            return
        judged_by, step, score = found
        if judged_by == self.judged_by:
            self.score = score
            return
        copy_from_rank_0([*model.state_dict().values()])
        result = validate(model)
        score = self.score_of(result)
        other = "by another measure" if judged_by.get("measure") != self.judged_by["measure"] else "on other clips"
        self.log(f"best.pt of step {step} is judged anew {other}: {score:.2f} dB ({self.judged_by['measure']})")
        if math.isfinite(score):
            self.score = score
            if self.log.rank == 0:
                self.write(step, score, result, model)

    def find(self, model, goes_on):
        """Load best.pt into `model`, and return (what it was judged by, its step, its score). None if this run has
        none. A best.pt that cannot be used is renamed."""
        if not os.path.isfile(self.path):
            return None
        try:
            state = checkpoint.read(self.path)
            checkpoint.check_finite(self.path, state["ema"])
            model.load_state_dict(state["ema"])
            found = dict(state.get("judged_by", {})), int(state["step"]), float(state.get("score", -math.inf))
            reason = "" if goes_on else "it is of an earlier run"
        except checkpoint.CheckpointError as error:
            reason = str(error)
        except checkpoint.MISSHAPEN as error:
            reason = f"it is of another model ({checkpoint.first_line(error)})"
        if not reason:
            return found
        names = (self.path.removesuffix(".pt") + f".old{number}.pt" for number in itertools.count(1))
        aside = next(name for name in names if not os.path.exists(name))
        os.replace(self.path, aside)
        self.log(f"warning: {self.path} is put aside as {os.path.basename(aside)}: {reason}")
        return None

    def offer(self, step, result, average):
        """Save the averaged weights of `step` if their score is the best so far. result: `evaluate`'s dict for them."""
        score = self.score_of(result)
        self.saver.settle()  # the score of a best.pt that is still being written counts too
        if self.log.rank == 0 and score > self.score:
            self.write(step, score, result, average)

    def write(self, step, score, result, model):
        """On rank 0: save best.pt. Its score counts as soon as it is saved."""
        self.saver.best(dict(**self.about, step=step, val=result, score=score, judged_by=self.judged_by,
                             ema=model.state_dict()), lambda: setattr(self, "score", score))


def fingerprint(samples, control):
    """16 hexadecimal digits that identify the validation clips and the teacher's latents of all ranks. They do not
    depend on the number of ranks, nor on where the files are."""
    own = [[[name, list(tensor.shape), zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())]
            for name, tensor in sorted(sample.items())] for sample in samples]
    every = sorted(itertools.chain(*gather(control, own)))
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()[:16]
