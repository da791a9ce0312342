"""What test_fuzz.py is made of: calls in processes of their own, on a machine that says it has little memory, and odd
values to call with. An attempt is refused, runs, or ends in a traceback, a hang or over the memory.
"""
import argparse
import collections
import contextlib
import functools
import glob
import importlib
import inspect
import multiprocessing
import os
import re
import resource
import signal
import sys
import time

import torch
from tqdm import tqdm

import check_config
import config
import device
import launch
import models
import quantize
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEMORY = 4 << 30  # bytes, that the machine says it has
SECONDS = 60
NOISE = re.compile(r"libpng (error|warning)|.*JPEG")  # by libraries that decode images
OUTCOMES = "refused", "run", "traceback", "hang", "over memory"
FORKS = multiprocessing.get_context("forkserver")  # its server imports this once, and each attempt is a fork of it
FORKS.set_forkserver_preload(["fuzz", "infer", "latent_cache", "bench", "step_taehv", "torch._dynamo", "PIL.Image",
                              "tensorboard.compat.proto.summary_pb2"])
COUNTS = collections.Counter()  # (kind, outcome): how often


# ---- one attempt -----------------------------------------------------------------------------------------------------


def attempt(kind, call, *arguments, folder, long=False):
    """Calls it in a process of its own, in that folder. Counts how that ends, and returns it with what it printed to
    stderr. A call refuses by an exit code of 2 and one line. long: training may go on for long once it has begun."""
    began = os.path.join(folder, "began")
    if os.path.exists(began):
        os.remove(began)
    process = FORKS.Process(target=alone, args=(str(folder), call, arguments))
    process.start()
    outcome, begin = "", time.monotonic()
    end = begin + (3 if long else 1) * SECONDS
    while process.is_alive() and not outcome:
        process.join(0.02)
        if memory_of(process.pid) > MEMORY:
            outcome = "over memory"
        elif time.monotonic() > end:
            outcome = "hang"
        elif long and time.monotonic() > begin + 8 and os.path.exists(began):
            outcome = "run"
    if outcome:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    with open(os.path.join(folder, "stderr"), errors="replace") as file:
        text = file.read().strip()
    if not outcome:
        lines = [line for line in text.splitlines() if not NOISE.match(line)]
        one_line = len(lines) == 1 and len(text) < 12_000
        outcome = {0: "run", 2: "refused" if one_line else "traceback"}.get(process.exitcode, "traceback")
    if outcome == "traceback" and re.search("MemoryError|bad_alloc|not enough memory", text):
        outcome = "over memory"
    COUNTS[kind, outcome] += 1
    return outcome, f"exit code {process.exitcode}, {time.monotonic() - begin:.1f} s: {text}"


def memory_of(pid):
    """Bytes of memory that a process has for itself; 0 when it has ended."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def alone(folder, call, arguments):
    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ["TAEHV_URL"] = "http://127.0.0.1:9"  # where nobody answers
    tqdm.status_printer = lambda *_: lambda text: None  # no bars
    torch.set_num_threads(1)
    sizes = {"SC_PHYS_PAGES": MEMORY // os.sysconf("SC_PAGE_SIZE")}
    os.sysconf = lambda name, real=os.sysconf: sizes.get(name) or real(name)
    call(*arguments)


def table():
    """What was counted, a line for each kind."""
    lines = [f"\n{'kind':28}" + "".join(f"{outcome:>13}" for outcome in OUTCOMES)]
    for kind in sorted({kind for kind, _ in COUNTS}):
        lines.append(f"{kind:28}" + "".join(f"{COUNTS[kind, outcome]:13}" for outcome in OUTCOMES))
    return "\n".join(lines)


# ---- what is called --------------------------------------------------------------------------------------------------


class SoonOver(train.StopSignal):
    """Stops a run after two steps, whatever max_steps says."""
    steps = 0

    def __init__(self):
        super().__init__()
        open("began", "w").close()

    def __bool__(self):
        self.steps += 1
        return self.steps > 2 or super().__bool__()


def train_with(*arguments):
    """train.py, but nothing is compiled: that takes minutes."""
    train.StopSignal, torch.compile = SoonOver, lambda function: function
    sys.argv = ["train.py", *arguments]
    train.main()


def run_command(name, *arguments):
    """Another command. bench.py measures in this process; launch.py builds its models here, and starts nothing."""
    module = importlib.import_module(name)
    if name == "bench":
        module.alone = lambda function, *given: function(*given)
    launch.check_models = check_models
    sys.argv = [f"{name}.py", *arguments]
    sys.exit(module.main())


def check_models(tasks):
    for task in tasks:
        if problem := models.problem_of(task.arguments):
            raise config.ConfigError(f"task {task.name}: {problem}")


def allocate(size):
    """Asks for so many bytes, as a command might. Exit code 2 and a line if that fails as it does where memory runs
    out."""
    device.tune(torch.device("cpu"))
    try:
        torch.empty(size, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        print(device.is_out_of_memory(error), file=sys.stderr)
        sys.exit(2)


# ---- what there is to set --------------------------------------------------------------------------------------------


def model_arguments(name):
    """{argument: default} of a model, with those of the quantizers where it passes options on to one."""
    found, waiting = {}, [models.MODELS[name]]
    while waiting:
        cls = waiting.pop()
        for key, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.kind == parameter.VAR_KEYWORD:
                waiting += quantize.QUANTIZERS.values() if cls is models.MODELS[name] else cls.__bases__
            elif key not in ("self", "dim"):
                found.setdefault(key, parameter.default)
    return found


def commands():
    """Names of the scripts that have an argparse parser."""
    return [os.path.basename(path)[:-3] for path in sorted(glob.glob(os.path.join(ROOT, "*.py")))
            if re.search(r"^def main\(", text := open(path).read(), re.M) and "ArgumentParser(" in text]


@functools.cache
def options_of(name):
    """The argparse actions of a command, but --help; found as its parser is used."""
    class Found(Exception):
        pass

    def found(parser, *_):
        raise Found(parser)

    module, original = importlib.import_module(name), argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = found
    try:
        getattr(module, "parse", module.main)([])
    except Found as caught:
        return [action for action in caught.args[0]._actions if "--help" not in action.option_strings]
    finally:
        argparse.ArgumentParser.parse_args = original


# ---- odd values ------------------------------------------------------------------------------------------------------

NUMBERS = ["0", "-1", "1", "2", "3", "7", "0.5", "1e-9", "1e-300", "1e300", "nan", "inf", "-inf", "1_0", "٣", "0x10",
           str(2 ** 31), str(2 ** 31 - 1), str(2 ** 63), str(-2 ** 63), str(2 ** 64), str(10 ** 30), "9" * 5000]
TEXTS = ["", " ", "x", "x" * 300, "x" * 5000, "\0", "\ud800", "é", "a\nb", "../x", "%s", "true", "None", "none",
         "auto", "taew2_1", "\x1b[2J", "a:b", "http://127.0.0.1:9/a.mp4", "-", "--", "/dev/null", "/dev/full",
         "/proc/nothing", "."]
LISTS = ["1,2", "(1,(2,3))", "[[1]]", "[]", "()", "{}", "(1,)" * 3, "1," * 70, "1," * 6000, "[" * 500, "'a','b'",
         "None", "'a'", "b'a'", "1j", "1.5,2.5", "-1,-1,-1", "0,0,0", "true,false,true", "32,32", "1,1,1", "'x'*9",
         "1 if 1 else 2"]


def setting(field, rng, places):
    """A text for a setting of config.Config: at its bounds, one of its choices, a path of `places`, or anything."""
    key, kind = field.name, field.type
    bounds = [limit for limit in check_config.limits_of(key) if limit is not None]
    if rng.random() < 0.2:
        return rng.choice(NUMBERS + TEXTS + LISTS)
    if key in config.CHOICES:
        return str(rng.choice(config.CHOICES[key]))
    if kind is bool:
        return rng.choice(["true", "false"])
    if kind is str:
        return rng.choice(TEXTS + places)
    near = [format(kind(limit * factor + more), "" if kind is int else ".17g")
            for limit in bounds for factor, more in ((1, 0), (1, 1), (1, -1), (0.5, 0))]
    return rng.choice(near if near and rng.random() < 0.5 else NUMBERS)


def argument(default, rng):
    """A text for an argument of a model: like its default, or anything."""
    few = rng.choice([0, 1, 2, 3, 4, 8, 16, 32, 64, 100, 2 ** 14, 2 ** 24, -1, 0.5, 1e300])
    if default is None and rng.random() < 0.6:  # of a TAEHV
        return rng.choice(["1", "2", "2,2,1", "1,2,2", "2,2", "1,1,1", "true,true,false", "false,false,false", "0,1",
                           "-1,1", "leaky_relu", "super", "wide", "8,8,8,8", "64,8,64,16", "256,128,64,64", "taecvx"])
    if isinstance(default, (tuple, list)) and rng.random() < 0.6:
        return ",".join(str(rng.choice([few, n])) for n in default) + ","
    if isinstance(default, bool) and rng.random() < 0.6:
        return rng.choice(["true", "false"])
    if isinstance(default, (int, float)) and rng.random() < 0.6:
        return str(rng.choice([few, few, default, 2 * default, default / 2]))
    if isinstance(default, str) and rng.random() < 0.6:
        return rng.choice([*quantize.QUANTIZERS, "sinkhorn", "l1", "l2", "ce", "all", "dim", "null"])
    return rng.choice(NUMBERS + TEXTS + LISTS)


def option(action, rng, places):
    """Words for an option of a command."""
    words = [action.option_strings[0]] if action.option_strings else []
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [rng.choice(action.option_strings)]
    if action.choices and rng.random() < 0.7:
        value = str(rng.choice(list(action.choices)))
    elif action.type in (int, float) and rng.random() < 0.8:
        value = rng.choice(NUMBERS)
    else:
        value = rng.choice(NUMBERS + TEXTS + LISTS + places)
    return words + [value]
