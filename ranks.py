"""What the ranks of a run do together: starting, agreeing, stopping, and reducing gradients.

The rule behind this file: no rank leaves a step alone. A fault or a wish to stop is a flag; all ranks agree on the
flags at one place of every step, and then do the same thing.

Why there is no DistributedDataParallel: it reduces gradients during each rank's backward pass, and a rank that runs out
of memory there strands the others. Here the reduction runs during the backward pass too, but whatever happens to a
rank, it sends every slice of its gradients, once and in the same order, before the ranks agree on what the step was
worth; what they agree with goes its own way. So nobody waits for what does not come.
"""
import importlib
import os
import signal
import sys
import textwrap
import time
import traceback
import uuid
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

LAUNCHER = os.getppid()


def start_ranks(device, timeout_minutes):
    """(rank, world size, process group for the host's own messages); one rank and no group without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1, None
    # The optimizers import this later on: it then keeps a reference to the process group, whose threads outlive
    # destroy_process_group and can abort the interpreter as it ends ("terminate called without an active exception").
    importlib.import_module("torch._dynamo")
    timeout = timedelta(minutes=timeout_minutes)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        where = dict(store=fresh_store(rank, world, timeout), rank=rank, world_size=world)
    if device.type == "cuda":
        where["device_id"] = device  # or NCCL guesses it from the rank, and barriers warn of that
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **where)
    sys.excepthook = end_at_once  # instead of PyTorch's own
    # Ranks agree over this group: between CPUs, so that no GPU has to be waited for, and beside the gradients.
    return dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout)


def end_at_once(kind, error, trace):
    """For sys.excepthook: an error on one rank. Its traceback, or one line if it is only that another rank is gone,
    and the process's end, without what the interpreter or NCCL would wait for: other ranks notice within moments, and
    data processes, which take no part in signals, would hold up the interpreter's end for good."""
    rank = os.environ.get("RANK")
    if kind is KeyboardInterrupt:  # Ctrl-C before the first step, where nothing is to be saved
        os._exit(128 + signal.SIGINT)
    if "/gloo/" in str(error):
        reason = str(error).splitlines()[0].rpartition("/gloo/")[2].partition("] ")[2].partition(". ")[0]
        print(f"rank {rank}: no answer from another rank ({reason}): its own message says why", file=sys.stderr)
    else:
        lines = "".join(traceback.format_exception(kind, error, trace))
        print(textwrap.indent(lines, f"rank {rank}: " if rank else ""), end="", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def fresh_store(rank, world, timeout):
    """A part of torchrun's store that is for this start of the ranks alone. torchrun (seen with PyTorch 2.15) keeps one
    store over all its restarts: a rank that is early finds there where the dead ones listened, and fails or hangs. (Of
    several machines, torchrun then waits in vain for one that is replaced, which no rank can mend. With its variable
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each start has a store of its own, and does not need this function.)"""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store, mine, began = dist.TCPStore(*address, timeout=timeout), uuid.uuid4().hex, time.monotonic()
    if rank == 0:
        store.set("start", mine)
        for other in range(1, world):
            store.set(f"{mine}/welcome/{other}", store.get(f"{mine}/hello/{other}"))
        return dist.PrefixStore(mine, store)
    while time.monotonic() - began < timeout.total_seconds():
        start = store.get("start").decode()  # perhaps a dead rank 0's, who does not answer
        store.set(f"{start}/hello/{rank}", mine)
        welcome = f"{start}/welcome/{rank}"
        if store.check([welcome]) and store.get(welcome).decode() == mine:
            return dist.PrefixStore(start, store)
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 did not start within {timeout}")


def agree(control, *flags):
    """Each flag, true if it is true on any rank: then all ranks act on it at the same place, and none waits alone."""
    return tuple(bool(value) for value in largest(control, *(bool(flag) for flag in flags)))


def largest(control, *values):
    """The largest of all ranks' numbers, for each of the values."""
    votes = torch.tensor([float(value) for value in values])
    if control is not None:
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=control)
    return votes.tolist()


class Vote(NamedTuple):
    """What a rank says at the end of its part of a step; after `count`, what all ranks do."""
    out_of_memory: bool = False  # do the step again, in smaller parts
    stop: bool = False           # a signal has come: save and end after this step
    no_data: bool = False        # a rank has no clips: save and end without this step
    time: float = 0.0            # part of max_minutes that has passed; from 1 on, this step is the last

    def count(self, control):
        """All ranks call it: the Vote in which each field is true that is true on any rank, with their latest time."""
        *flags, time = largest(control, *self)
        return Vote(*map(bool, flags), time)


class LeftStep(Exception):
    """A rank is at the step's end before its time; `vote` is what all ranks have agreed on with that."""

    def __init__(self, vote):
        super().__init__(f"a rank has left the step: {vote}")
        self.vote = vote


def stay_together(control):
    """Call it before ranks communicate within a step. LeftStep if a rank is at the step's end already, because its
    memory ran out, say: this call and that rank's `Vote.count` have then met."""
    vote = Vote().count(control)
    if any(vote):
        raise LeftStep(vote)


def from_rank_0(control, make):
    """What make() returns on rank 0, on every rank. An error there is raised everywhere, or the others would wait."""
    if control is None:
        return make()
    box = [None]
    if dist.get_rank() == 0:
        try:
            box = [(make(), None)]
        except Exception as error:  # raised again below, on every rank
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0, group=control)
    value, error = box[0]
    if error is not None:
        raise error
    return value


def everywhere(control, make):
    """What make() returns, on each rank its own. An error is raised on all ranks, the first rank's where one has none
    itself: a file that one machine lacks ends all of them with the same words."""
    if control is None:
        return make()
    value = error = None
    try:
        value = make()
    except Exception as raised:  # raised again below, on every rank
        error = raised
    errors = gather(control, error)
    if any(errors):
        raise error or next(filter(None, errors))
    return value


def copy_from_rank_0(tensors):
    """The same start everywhere, whatever each rank's own generator and libraries made of the seed."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def gather(control, value):
    """[every rank's value], on every rank."""
    if control is None:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control)
    return values


class StopSignal:
    """True once SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a closed terminal; nohup's wish to ignore it is kept) has come. A
    second one ends the process at once (launchers repeat a signal within moments: those count as one). True also once
    torchrun was killed: its ranks would train on, unseen, while the next start shares their folder."""

    def __init__(self):
        self.since = self.number = None  # when the first came, and which
        self.launcher = LAUNCHER if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, _):
        if self.since is None:
            self.since, self.number = time.monotonic(), number
        elif time.monotonic() - self.since > 2:
            os._exit(128 + number)

    def orphaned(self):
        return self.launcher not in (None, os.getppid())

    def __bool__(self):
        return self.since is not None or self.orphaned()

    def exit_code(self, control):
        """Of a run that has stopped; all ranks ask together. Without torchrun: 130 after Ctrl-C, as of any program that
        it ends, so that `train.py && infer.py` goes no further; 0 after SIGTERM and the others, which schedulers send.
        Under torchrun: 0 where a rank of the same machine got the signal, or it would start them again. 1 on other
        machines: their torchruns then wait for that one to come back, where 0 would mean that all is done."""
        if control is None:
            return 128 + self.number if self.number == signal.SIGINT else 0
        machine = os.environ.get("GROUP_RANK")
        return 0 if (machine, True) in gather(control, (machine, self.since is not None)) else 1


def batch_statistics(model):
    """The buffers that BatchNorm layers of a model move in every forward pass: running means, variances and counts."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


SLICE = 4_000_000  # numbers of the gradient that are reduced together, 16 MB


class Gradients:
    """The gradients of a network in one flat buffer that each parameter's .grad looks into: one norm, no copies, and
    all ranks skip a step that is not finite on one. The model has one of these, and so has each discriminator.

    `totals` is a part of the buffer: `extra` numbers of the step (its loss, say) that are averaged along with it.
    `statistics`: buffers of the network that its forward pass changes (see `batch_statistics`). Those of floating point
    are averaged along too, so that all ranks hold the same; a step that is bad or has to be done again gives them back.
    All ranks make it together: they start with rank 0's parameters and statistics.

    Several ranks add the buffer up in slices of about SLICE numbers at the borders of parameters, from the last to the
    first, as a backward pass fills them. After `last_pass` a slice is sent as soon as it and all before it are full.
    """

    def __init__(self, parameters, extra=0, statistics=()):
        parameters, self.statistics, self.before = list(parameters), list(statistics), None
        copy_from_rank_0([*parameters, *self.statistics])
        self.averaged = [b for b in self.statistics if b.is_floating_point()]
        sizes = [sum(p.numel() for p in parameters), extra, sum(b.numel() for b in self.averaged)]
        self.all = torch.zeros(sum(sizes), device=parameters[0].device)
        self.flat, self.totals, self.means = self.all.split(sizes)
        self.slices, self.parameters_in = [], []  # (start, end), in the order of sending; how many parameters are in it
        self.missing, self.sent, self.underway, self.sends_early = [], 0, [], False
        start, ranks = sizes[0], dist.get_world_size() if dist.is_initialized() else 1
        for p in reversed(parameters):
            end, start = start, start - p.numel()
            p.grad = self.flat.as_strided(p.shape, p.stride(), start)
            if not self.slices or self.slices[-1][1] - self.slices[-1][0] >= SLICE:
                self.slices.append((start, end))
                self.parameters_in.append(0)
            self.slices[-1] = start, self.slices[-1][1]
            self.parameters_in[-1] += 1
            if ranks > 1:
                p.register_post_accumulate_grad_hook(lambda _, number=len(self.slices) - 1: self.filled(number))
        self.slices.append((sizes[0], len(self.all)))  # totals and statistics

    @torch.no_grad()
    def begin(self):
        """Before a step's micro-batches, also where the step is done again."""
        self.give_up()
        self.all.zero_()
        self.before = [buffer.clone() for buffer in self.statistics]

    def last_pass(self):
        """Call it before a step's last backward pass: what it fills is complete, and may be sent."""
        self.sends_early = True
        self.missing = list(self.parameters_in)  # of each slice: parameters that are not filled yet

    def filled(self, number):
        """Autograd has added to a parameter's gradient, in slice `number`."""
        if number < self.sent:
            raise RuntimeError("a gradient has grown after it was sent to the other ranks")
        if self.sends_early:
            self.missing[number] -= 1
            while self.sent < len(self.missing) and self.missing[self.sent] == 0:
                self.send()

    def send(self):
        start, end = self.slices[self.sent]
        self.sent += 1
        if dist.is_initialized() and end > start:
            mean = dist.ReduceOp.AVG if self.all.device.type == "cuda" else dist.ReduceOp.SUM  # gloo has no AVG
            self.underway.append(dist.all_reduce(self.all[start:end], op=mean, async_op=True))

    @torch.no_grad()
    def send_rest(self):
        """Every rank calls it in each attempt at a step, whatever has happened to it, before it votes."""
        if self.averaged and self.sent < len(self.slices):
            torch.cat([buffer.flatten() for buffer in self.averaged], out=self.means)
        self.sends_early = False
        while self.sent < len(self.slices):
            self.send()

    def wait(self):
        """Until all that was sent has come from all ranks."""
        for work in self.underway:
            work.wait()
        self.sent, self.underway, self.sends_early = 0, [], False

    @torch.no_grad()
    def give_up(self):
        """Where a step ends without `step`: the statistics are again what they were before it."""
        self.wait()
        for now, before in zip(self.statistics, self.before or ()):
            now.copy_(before)
        self.before = None

    @torch.no_grad()
    def step(self, optimizer, limit=0.0):
        """All ranks together: the optimizer's step with the mean of their gradients, whose norm is held to `limit` if
        that is above 0. Returns (norm, bad): bad is 1.0 where the norm, a total or a statistic is not finite, and then
        no weight has changed, else 0.0. One rank's NaN is in the sum, so all see it. Nothing waits for the GPU.
        """
        self.send_rest()
        self.wait()
        if dist.is_initialized() and self.all.device.type != "cuda":
            self.all.div_(dist.get_world_size())
        norm = torch.linalg.vector_norm(self.flat)
        bad = 1.0 - (norm.isfinite() & self.totals.isfinite().all() & self.means.isfinite().all()).float()
        if limit > 0:
            self.flat.mul_((limit / (norm + 1e-6)).clamp(max=1))
        for buffer, mean in zip(self.averaged, self.means.split([b.numel() for b in self.averaged])):
            buffer.copy_(mean.view(buffer.shape))
        for now, before in zip(self.statistics, self.before or ()):
            now.copy_(torch.where(bad > 0, before, now))
        self.before = None
        if optimizer.defaults.get("fused") and self.all.device.type in ("cuda", "cpu"):
            optimizer.grad_scale, optimizer.found_inf = None, bad  # the kernel itself skips a bad step: no host waits
            optimizer.step()
        elif not bad:
            optimizer.step()
        return norm, bad
