"""How benchmarks measure: functions take turns, each process measures its own memory, and rates are compared with the
machine's peak."""
import multiprocessing
import statistics
import sys
import threading
import time

import torch

from device import peak_memory, pick_device, reset_peak_memory, synchronize, tune

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_fp16(device):
    """Whether float16 is usable: some CPUs emulate it, and take minutes for a frame."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def alternate(functions, repeat, device, limit=30, clock=time.perf_counter):
    """{name: median seconds} of functions that take turns, after one warm-up each. There are `repeat` turns, or fewer:
    after `limit` seconds no further turn begins, but there is always one. clock: time.process_time instead counts this
    process's CPU time."""
    times, begin = {name: [] for name in functions}, time.perf_counter()
    for turn in range(repeat + 1):
        if turn > 1 and time.perf_counter() - begin > limit:
            break
        for name, function in functions.items():
            start = clock()
            function()
            synchronize(device)
            times[name].append(clock() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def memory_of(function, device):
    """Bytes by which a call's peak memory exceeds the memory before it."""
    reset_peak_memory(device)
    before = peak_memory(device)
    function()
    synchronize(device)
    return peak_memory(device) - before


def alone(function, *arguments):
    """function(*arguments) in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peaks(options):
    """{type: multiplications and additions per second of a matrix product}, and bytes copied per second."""
    device = pick_device(options.device)
    tune(device)
    size, found = 1024 if device.type == "cpu" else 8192, {}
    for name in [*TYPES] if has_fp16(device) else ["fp32", "bf16"]:
        a = torch.randn(size, size, device=device).to(TYPES[name])
        seconds = alternate({"product": lambda a=a: a @ a}, 3 if options.quick else 15, device)["product"]
        found[name] = 2 * size ** 3 / seconds
    block = torch.empty(1 << (24 if device.type == "cpu" else 30), dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    found["copy"] = 2 * len(block) / alternate({"copy": lambda: other.copy_(block)}, 15, device)["copy"]
    return found


def flops(call):
    """Number of multiplications and additions in the convolutions and linear layers of a call, of the plain model."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


class Waiting:
    """A line on stderr that says what is being measured, and for how long; nothing if stderr is no terminal.

    `start(what)` begins it, `clear()` removes it.
    """

    def __init__(self):
        self.what, self.since, self.lock, self.shown = "", 0.0, threading.Lock(), sys.stderr.isatty()
        if self.shown:
            threading.Thread(target=self.tick, daemon=True).start()

    def tick(self):
        while True:
            with self.lock:
                if self.what:
                    self.write(f"measuring {self.what}: {time.monotonic() - self.since:.0f} s")
            time.sleep(1)

    def write(self, text):
        sys.stderr.write(f"\r\033[K{text[:100]}")
        sys.stderr.flush()

    def start(self, what):
        self.what, self.since = what, time.monotonic()

    def clear(self):
        with self.lock:
            self.what = ""
            if self.shown:
                self.write("")
