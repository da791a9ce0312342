"""best.pt of a run: the averaged weights that validated best, and what they were judged by.

A score belongs to a measure and to a set of clips, and best.pt itself names both. So its score counts as long as they
are the same, whatever has happened to the run since; by another measure or on other clips it is judged anew.
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
    """`score` is what a validation has to be above, dB; with `offer` rank 0 alone keeps it.

    about: {"model_name", "model_config"} of the run; objective: its Objective, which measures; samples: this rank's
    validation clips, as `evaluate` takes them; saver: the run's Saver.
    """

    def __init__(self, about, objective, samples, saver):
        self.path, self.about, self.score_of = os.path.join(saver.folder, "best.pt"), about, objective.score
        self.judged_by = {"measure": objective.best_by(), "clips": fingerprint(samples, saver.control)}
        self.saver, self.log, self.score = saver, saver.log, -math.inf

    def take_up(self, average, goes_on, validate):
        """Before the first step, on all ranks together. validate: gives `evaluate`'s dict for a model like `average`;
        None without validation. goes_on: whether the run was resumed; if not, best.pt is another run's."""
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
        """(what best.pt was judged by, its step, its score), and its weights in `model`; None if there is none of this
        run. One that cannot be used is put aside under another name."""
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
        """Save the averaged weights of `step` if `evaluate`'s dict for them is better than what there is."""
        score = self.score_of(result)
        self.saver.settle()  # or what the last one has written does not count yet
        if self.log.rank == 0 and score > self.score:
            self.write(step, score, result, average)

    def write(self, step, score, result, model):
        """On rank 0. The score counts as soon as it is saved."""
        self.saver.best(dict(**self.about, step=step, val=result, score=score, judged_by=self.judged_by,
                             ema=model.state_dict()), lambda: setattr(self, "score", score))


def fingerprint(samples, control):
    """16 hexadecimal digits that differ for other clips or other latents of a teacher. They are the same however many
    ranks share the clips, and wherever the files lie."""
    own = [[[name, list(tensor.shape), zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())]
            for name, tensor in sorted(sample.items())] for sample in samples]
    every = sorted(itertools.chain(*gather(control, own)))
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()[:16]
