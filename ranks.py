"""What the ranks of a run do together: starting, agreeing, stopping, and reducing gradients.

The rule of this file: no rank leaves a step alone. An error or a request to stop is a flag. All ranks agree on the
flags at one point of every step, and then do the same thing.

Why there is no DistributedDataParallel: it reduces gradients during each rank's backward pass, and a rank that runs out
of memory there leaves the others waiting. Here the reduction runs during the backward pass too. But whatever happens to
a rank, it sends every slice of its gradients, once and in the same order, before the ranks agree on the flags, which
are reduced over another process group. So no rank waits for something that is never sent.
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
    """Returns (rank, world size, gloo process group for messages of the CPUs); (0, 1, None) without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1, None
    # The optimizers import this module. Imported after the process group is made, it keeps a reference to the group,
    # whose threads then outlive destroy_process_group and can abort the interpreter at its end ("terminate called
    # without an active exception"). So it is imported first.
    importlib.import_module("torch._dynamo")
    timeout = timedelta(minutes=timeout_minutes)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        options = dict(store=fresh_store(rank, world, timeout), rank=rank, world_size=world)
    if device.type == "cuda":
        options["device_id"] = device  # otherwise NCCL guesses it from the rank, and barriers warn of that
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **options)
    sys.excepthook = end_at_once  # instead of PyTorch's own
    # Ranks agree over a group of their own: on the CPU, so that they need not wait for a GPU, nor for the gradients.
    return dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout)


def end_at_once(kind, error, trace):
    """A sys.excepthook for an error on one rank. Prints the traceback, or one line if the error is only that another
    rank is gone, and ends the process without waiting for the interpreter or NCCL. So the other ranks notice within
    moments. The interpreter would wait forever for data processes, which ignore signals."""
    rank = os.environ.get("RANK")
    if kind is KeyboardInterrupt:  # Ctrl-C before the first step: there is nothing to save yet
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
    """A part of torchrun's store, under a prefix of its own for each start of the ranks. TimeoutError without rank 0.

    torchrun (seen with PyTorch 2.15) keeps one store over all its restarts. A rank that starts early finds the
    addresses of the dead ranks there, and fails or hangs. (On several machines, torchrun also waits in vain for one
    that was replaced, which no rank can repair. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment,
    each start has a store of its own, and does not need this function.)"""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store, own_id, began = dist.TCPStore(*address, timeout=timeout), uuid.uuid4().hex, time.monotonic()
    if rank == 0:
        store.set("start", own_id)
        for other in range(1, world):
            store.set(f"{own_id}/welcome/{other}", store.get(f"{own_id}/hello/{other}"))
        return dist.PrefixStore(own_id, store)
    while time.monotonic() - began < timeout.total_seconds():
        start = store.get("start").decode()  # possibly that of a dead rank 0, which does not answer
        store.set(f"{start}/hello/{rank}", own_id)
        welcome = f"{start}/welcome/{rank}"
        if store.check([welcome]) and store.get(welcome).decode() == own_id:
            return dist.PrefixStore(start, store)
        time.sleep(0.05)
    raise TimeoutError(f"rank 0 did not start within {timeout}")


def agree(control, *flags):
    """Returns a tuple: each flag, true if it is true on any rank. So all ranks act on it at the same point."""
    return tuple(bool(value) for value in largest(control, *(bool(flag) for flag in flags)))


def largest(control, *values):
    """[for each of the values, the largest over all ranks]"""
    votes = torch.tensor([float(value) for value in values])
    if control is not None:
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=control)
    return votes.tolist()


class Vote(NamedTuple):
    """The flags of a rank at the end of its part of a step; after `count`, those that all ranks act on."""
    out_of_memory: bool = False  # repeat the step, in smaller parts
    stop: bool = False           # a signal has come: save and end after this step
    no_data: bool = False        # a rank has no clips: save and end without this step
    elapsed: float = 0.0         # fraction of max_minutes that has passed; from 1 on, this step is the last

    def count(self, control):
        """All ranks call this. Returns a Vote: each flag is true if it is true on any rank; elapsed is the largest."""
        *flags, elapsed = largest(control, *self)
        return Vote(*map(bool, flags), elapsed)


class LeftStep(Exception):
    """Another rank has ended its part of the step early; `vote` is the Vote that all ranks have agreed on."""

    def __init__(self, vote):
        super().__init__(f"a rank has left the step: {vote}")
        self.vote = vote


def stay_together(control):
    """Call this before ranks communicate within a step. LeftStep if a rank has already ended its part of the step, for
    example because its memory ran out: then this call is answered by that rank's `Vote.count`."""
    vote = Vote().count(control)
    if any(vote):
        raise LeftStep(vote)


def from_rank_0(control, make):
    """Call make() on rank 0, and return its result on every rank. An error in it is raised on every rank."""
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
    """Call make() on every rank, and return each rank's own result. If it raises on some ranks, all ranks raise: a rank
    without an error of its own raises that of the lowest rank that has one."""
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
    """Overwrite the tensors on all ranks with those of rank 0, whose random generator and libraries may differ."""
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
    """True once SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a closed terminal; ignored under nohup) has come. A second signal
    ends the process at once, but not within two seconds of the first: launchers repeat a signal. True also once
    torchrun was killed: its ranks would otherwise train on unnoticed, and the next start would use the same folder."""

    def __init__(self):
        self.since = self.number = None  # time and number of the first signal
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
        """The exit code of a run that was stopped; all ranks call this together. Without torchrun: 130 after Ctrl-C, as
        usual, so that `train.py && infer.py` stops; 0 after SIGTERM and the others, which schedulers send. Under
        torchrun: 0 if a rank of the same machine got the signal, since torchrun restarts ranks that fail. 1 on other
        machines: their torchruns then wait for that machine to come back. With 0 they would take the run as done."""
        if control is None:
            return 128 + self.number if self.number == signal.SIGINT else 0
        machine = os.environ.get("GROUP_RANK")
        return 0 if (machine, True) in gather(control, (machine, self.since is not None)) else 1


def batch_statistics(model):
    """The buffers that a model's BatchNorm layers update in every forward pass: running means, variances and counts."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


SLICE = 4_000_000  # elements of the gradient that are reduced together, 16 MB


class Gradients:
    """The gradients of a network, averaged over the ranks. They lie in one flat buffer, and each parameter's .grad is a
    view of it: there is one norm and no copy, and all ranks skip a step that is not finite on one of them. The model
    has one of these, and so has each discriminator.

    `totals` is a part of the buffer: `extra` scalars of the step (such as its loss) that are averaged with the
    gradients. `statistics`: buffers of the network that its forward pass changes (see `batch_statistics`). Those of
    floating point are averaged too, so that all ranks hold the same. After a bad step, and before a step is repeated,
    all of them get their earlier values back. All ranks make this object together, and all take rank 0's parameters and
    statistics.

    Several ranks reduce the buffer in slices of whole parameters, about SLICE elements each, from the last to the
    first: in the order in which a backward pass fills them. After `last_pass`, a slice is sent as soon as it is
    complete and all slices before it are sent.
    """

    def __init__(self, parameters, extra=0, statistics=()):
        parameters, self.statistics, self.before = list(parameters), list(statistics), None
        copy_from_rank_0([*parameters, *self.statistics])
        self.averaged = [b for b in self.statistics if b.is_floating_point()]
        sizes = [sum(p.numel() for p in parameters), extra, sum(b.numel() for b in self.averaged)]
        self.all = torch.zeros(sum(sizes), device=parameters[0].device)
        self.flat, self.totals, self.means = self.all.split(sizes)
        self.slices, self.parameters_in = [], []  # [(start, end)] in the order of sending; number of parameters in each
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
        """Call this before a step's micro-batches, and again if the step is repeated."""
        self.give_up()
        self.all.zero_()
        self.before = [buffer.clone() for buffer in self.statistics]

    def last_pass(self):
        """Call this before a step's last backward pass, which completes the gradients: they may be sent then."""
        self.sends_early = True
        self.missing = list(self.parameters_in)  # for each slice: how many of its gradients are not complete yet

    def filled(self, number):
        """A hook: autograd has added to the gradient of a parameter in slice `number`."""
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
        """Send the remaining slices. Every rank calls this before its vote, in each attempt at a step."""
        if self.averaged and self.sent < len(self.slices):
            torch.cat([buffer.flatten() for buffer in self.averaged], out=self.means)
        self.sends_early = False
        while self.sent < len(self.slices):
            self.send()

    def wait(self):
        """Wait until all slices that were sent are reduced."""
        for work in self.underway:
            work.wait()
        self.sent, self.underway, self.sends_early = 0, [], False

    @torch.no_grad()
    def give_up(self):
        """End a step without `step`: restore the statistics from before it."""
        self.wait()
        for now, before in zip(self.statistics, self.before or ()):
            now.copy_(before)
        self.before = None

    @torch.no_grad()
    def step(self, optimizer, limit=0.0):
        """All ranks call this together: take the optimizer's step with the mean of their gradients, clipped to the norm
        `limit` if that is above 0. Returns (norm before clipping, bad), scalars on the device. bad is 1.0 if the norm,
        a total or a statistic is not finite, and then no weight has changed; else 0.0. A NaN of one rank is in the
        mean, so all ranks see it. With a fused optimizer on a GPU, the host does not wait for the GPU.
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
            optimizer.grad_scale, optimizer.found_inf = None, bad  # the kernel skips a bad step, without a wait
            optimizer.step()
        elif not bad:
            optimizer.step()
        return norm, bad
