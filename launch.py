"""Train several tasks from one JSON file over this machine's GPUs.

    python launch.py tasks.json                    # all GPUs; on a machine without, one task at a time
    python launch.py tasks.json --gpus 0,1,2,3     # these, as CUDA_VISIBLE_DEVICES names them
    python launch.py tasks.json --slots 2          # without GPUs (on a CPU, say): two tasks at a time
    python launch.py tasks.json --dry-run          # check settings, data and models, show the commands, start nothing

    {"tasks": [
        {"name": "wide", "preset": "taehv", "overrides": {"data": "videos/", "lr": 1e-4}, "gpus": 2},
        {"name": "codes", "preset": "vqgan",
         "overrides": {"data": "videos/", "net.attn_resolutions": [], "net.ch": 64, "net.ch_mult": [1, 2, 4]}}
    ]}

`overrides` are settings of config.py; without `gpus` a task gets one GPU. Each task is its own torchrun with the run
folder runs/NAME, where launch.log holds what it prints. Whenever GPUs are free, the first waiting task that fits them
starts: a small one may overtake a large one. If a task fails, the others go on. After Ctrl-C or SIGTERM, all tasks save
and end, however long that takes. A second signal, at least two seconds later, kills the remaining tasks without saving.
The same command again goes on from what is saved, and skips finished tasks.

Exit code: 0 if all tasks are done; 1 if a task failed, which the last line names, or if a full disk lost output of
--dry-run; 2 for a mistake in the file or command; 130 if interrupted.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid

import lock
import progress
from check_config import ConfigError, nearest
from config import PRESETS, Config, load_config
from screen import guard_screen, one_line, text_is_lost
from untrusted import SETTINGS, open_regular, read_json

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
LINUX = sys.platform == "linux"
PIECE = 1 << 20  # bytes of metrics.jsonl that are read at once
ENDINGS = "done", "nothing to do", "stopped", "not saved"  # kinds of lines in metrics.jsonl that end a run
# {kind of line in metrics.jsonl: {name in the line: (column of the table, number of decimals)}}
FIGURES = {"train": {"loss": ("loss", 5), "clips_per_second": ("speed", 2)},
           "val": {"psnr": ("psnr", 2)}}


@dataclasses.dataclass
class Task:
    """One task of the file, and its state."""
    name: str
    arguments: list             # command line of train.py
    gpus: int
    config: Config
    folder: str                 # its run folder
    state: str = "queued"       # queued, running, done, failed, stopped or killed
    note: str = ""
    devices: tuple = ()         # devices that it has while it runs
    process: object = None      # its torchrun
    mark: str = ""              # an environment variable that all its processes have
    log: object = None          # launch.log, open and locked
    log_start: int = 0          # position in launch.log where the output of this launch begins
    read: int = 0               # bytes of metrics.jsonl that were read into `seen`
    seen: dict = dataclasses.field(default_factory=dict)  # newest step, a number; loss, speed, psnr, ending: texts


# ---- the file ----------------------------------------------------------------------------------------------------


def read_tasks(path):
    """[Task, ...] from a JSON file. ConfigError, naming the task, for any mistake in it."""
    try:
        content = read_json(path, SETTINGS, object_pairs_hook=without_repeats)
    except ValueError as error:  # not UTF-8, not JSON, nested too deeply, too long
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks", []), list):
        raise ConfigError(f'{path}: {{"tasks": [...]}} is wanted; see --help')
    only_keys(content, ["tasks"])
    tasks, taken = [], set()
    for number, entry in enumerate(content.get("tasks", []), 1):
        where = f"task {number}"
        try:
            if not isinstance(entry, dict):
                raise ConfigError('an object {"name": ..., "preset": ...} is wanted')
            where += f" ({entry['name'][:50]})" if isinstance(entry.get("name"), str) else ""
            task = make_task(**only_keys(entry, ["name", "preset", "overrides", "gpus"]))
            for unique in (("name", task.name), ("run folder", os.path.realpath(task.folder))):
                if unique in taken:
                    raise ConfigError(f"the {unique[0]} {unique[1]} is another task's already")
                taken.add(unique)
        except (ConfigError, OverflowError, RecursionError) as error:  # a number of 400 digits, a list 900 deep
            raise ConfigError(f"{path}: {where}: {error}") from None
        tasks.append(task)
    if not tasks:
        raise ConfigError(f"{path} holds no tasks")
    return tasks


def without_repeats(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key twice in {{{', '.join(key for key, _ in pairs)}}}")
    return dict(pairs)


def only_keys(given, known):
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{nearest(key, known)}; there are {', '.join(known)}")
    return given


def make_task(name=None, preset=None, gpus=1, overrides=None):
    """A Task, after config.py has checked its settings. ConfigError for a mistake, or for data that does not exist."""
    overrides = {} if overrides is None else overrides
    for key, value, kind, words in (("name", name, str, "a text"), ("preset", preset, str, "a text"), (
            "gpus", gpus, int, "a whole number"), ("overrides", overrides, dict, 'an object like {"lr": 1e-4}')):
        if type(value) is not kind:
            raise ConfigError(f"{key}={json.dumps(value)[:50]}: {words} is wanted")
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    if gpus < 1:
        raise ConfigError(f"gpus={gpus}: at least 1 is wanted")
    arguments = [preset, *(as_argument(key, value) for key, value in overrides.items()), f"name={name}"]
    config = load_config(arguments)
    if not name:
        raise ConfigError("a name is wanted")
    if config.device.startswith("cuda:"):
        raise ConfigError(f"device={config.device}: launch.py chooses the GPUs; set gpus, and leave device=auto")
    if not (config.data or config.latent_cache or config.clip_cache):
        raise ConfigError("no data given: set data, latent_cache or clip_cache in its overrides")
    for key in ("data", "val_data", "data_root", "latent_cache", "clip_cache"):
        path = getattr(config, key)
        if path and not os.path.exists(path) and (key, path) != ("data", "demo"):
            raise ConfigError(f"{key}: {path!r} does not exist")
    for key, path in (("init_from", config.init_from), ("resume", config.resume)):
        is_name = key == "resume" and path in ("auto", "none") or re.fullmatch(r"\w*", path)  # taew2_1
        if not is_name and not os.path.exists(path):
            raise ConfigError(f"{key}: {path!r} does not exist (tasks run in any order: one that starts from another's "
                              "weights goes into a file of its own)")
    return Task(name, arguments, gpus, config, os.path.join(config.out_dir, name))


def check_models(tasks):
    """ConfigError, naming the task, for a model that cannot be built from its settings."""
    ask = "import json, models, sys; print(json.dumps([models.problem_of(a) for a in json.load(sys.stdin)]))"
    done = subprocess.run([sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": os.path.dirname(TRAIN)},
                          input=json.dumps([task.arguments for task in tasks]), stdout=subprocess.PIPE, text=True,
                          check=True)  # in a process of its own, which takes PyTorch's memory and threads with it
    for task, problem in zip(tasks, json.loads(done.stdout.splitlines()[-1])):
        if problem:
            raise ConfigError(f"task {task.name}: {problem}")


def as_argument(key, value):
    """("lr", 1e-4) -> "lr=0.0001", an argument of train.py. ConfigError for a key or value that cannot be one."""
    if not re.fullmatch(r"\w+(\.\w+)?", key) or key == "name":
        raise ConfigError(f"overrides: {key!r} is set beside overrides, as the task's name" if key == "name" else
                          f"overrides: {key!r} is no setting, or not one to set here{nearest(key, vars(Config()))}")
    if type(value) is list and key.startswith("net.") and all(type(v) in (int, float, bool) for v in value):
        value = str(tuple(value))
    if type(value) is bool:
        value = str(value).lower()
    if type(value) not in (int, float, str) or type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{key}={json.dumps(value)[:50]}: a finite number, true, false or a text is wanted"
                          + ", or a list of numbers" * key.startswith("net."))
    if not re.fullmatch("[^\0\ud800-\udfff]{0,4096}", str(value)):  # no command line can hold it
        raise ConfigError(f"{key}={value!r:.50}: a text of up to 4096 characters is wanted")
    return f"{key}={value}"


def finished(task):
    """Whether the task's folder holds a checkpoint of its last step with exactly its settings, so that train.py would
    say "nothing to do". In all other cases train.py decides."""
    try:
        found = read_json(os.path.join(task.folder, "config.json"), SETTINGS)
        same = same_settings(found, json.loads(json.dumps(dataclasses.asdict(task.config))))
    except (OSError, ValueError, KeyError, TypeError):  # no such folder, or no settings of a run
        return False
    return task.config.resume == "auto" and same and saved_step(task.folder) >= task.config.max_steps


def saved_step(folder):
    """The step of the newest checkpoint in a folder, by the names of the files; 0 if there is none."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return max([int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,12})\.pt", name))], default=0)


def same_settings(found, asked):
    """Whether the settings of a run, `found`, are those of a task, `asked`. If the task leaves the model's shape open,
    the run's settings have that of init_from or of the variant taehv instead."""
    if asked["model"] == "taehv" and not asked["init_from"]:
        asked = {**asked, "variant": asked["variant"] or "taehv"}
    elif asked["init_from"]:
        shape = {key: found[key] for key in ("variant", "patch_size", "latent_channels") if not asked[key]}
        asked = {**asked, **shape, "net": {**found["net"], **asked["net"]}}
    return found == asked


# ---- devices and processes ---------------------------------------------------------------------------------------


def visible_gpus():
    """The GPUs that PyTorch sees, as CUDA_VISIBLE_DEVICES names them: ["0", "1"]."""
    count = "import torch; print(torch.cuda.device_count())"  # in a process of its own, which takes its memory with it
    output = subprocess.run([sys.executable, "-c", count], check=True, stdout=subprocess.PIPE, text=True).stdout
    count = int(output.split()[-1])
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def find_devices(gpus, slots):
    """([devices for the tasks], whether they are GPUs). gpus, slots: the values of --gpus and --slots, or None."""
    if slots is not None:
        if not 1 <= slots <= 1024:
            raise ConfigError(f"--slots {slots}: 1 to 1024 is wanted")
        return [str(slot) for slot in range(slots)], False
    present = visible_gpus()
    if gpus is None:
        return present or ["0"], bool(present)
    wanted = [gpu.strip() for gpu in gpus.split(",")]
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(present):
        raise ConfigError(f"--gpus {gpus}: each once, of those that PyTorch sees ({','.join(present) or 'none'})")
    return wanted, True


def train_command(task):
    """The command line of a task: torchrun, on a free port of this machine, with train.py."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(task.gpus), TRAIN,
            *task.arguments]


def claim(task):
    """Open and lock the task's launch.log, until the last of its processes has ended. So a folder has only one launch
    at a time, and no leftovers of an earlier one. ConfigError if it is locked already."""
    os.makedirs(task.folder, exist_ok=True)
    task.log = open(os.path.join(task.folder, "launch.log"), "ab")  # noqa: SIM115 (its processes write to it)
    try:
        problem = lock.lock(task.log.fileno())
        if problem:
            print(f"{task.folder} cannot be locked ({problem}): start no other launch.py with this task")
    except BlockingIOError:
        raise ConfigError(f"task {task.name}: {task.folder} is in use by another launch.py or what it left") from None


def start(task, devices, on_gpus, command):
    """Start a task in a session of its own, so that a terminal's Ctrl-C reaches only launch.py. InUse if its folder is
    in use, OSError if no process can be started."""
    launcher = os.getpid()

    def end_with_launcher():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: kill -9 of launch.py ends its tasks too
        if os.getppid() != launcher:
            os._exit(1)

    task.log_start = task.log.tell()
    if other := lock.holder(task.folder):  # train.py would wait for it, and then fail with the same message
        reason = f"{task.folder} is in use by {other}"
        task.log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} not started: {reason}\n".encode(errors="replace"))
        task.log.flush()
        raise lock.InUse(reason)
    words, mark = command(task), uuid.uuid4().hex
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "LAUNCH_TASK": mark}
    if on_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    task.log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(words)}\n".encode(errors="replace"))
    task.log.flush()
    task.log_start, task.mark = task.log.tell(), f"LAUNCH_TASK={mark}".encode()
    follow(task)
    task.seen.update(ending="", speed="")
    task.process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=task.log,
                                    stderr=subprocess.STDOUT, start_new_session=True,
                                    preexec_fn=end_with_launcher if LINUX else None)  # noqa: PLW1509 (no threads here)
    task.state, task.devices, task.note = "running", tuple(devices), on_gpus * f"GPU {','.join(devices)}"


def processes_of(task):
    """{pid: parent's pid} of the task's processes. They are found by the mark in their environment, since torchrun
    gives each rank a session of its own, and orphans get another parent. Without /proc: only torchrun."""
    if not LINUX:
        return {task.process.pid: 0} if task.process.poll() is None else {}
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as environment, open(f"/proc/{pid}/stat", "rb") as stat:
                if task.mark in environment.read().split(b"\0"):
                    found[int(pid)] = int(stat.read().rpartition(b")")[2].split()[1])
        except OSError:  # the process has ended, or belongs to another user
            continue
    return found


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def ask_to_end(task):
    """Send SIGTERM to the task's ranks: they save and end, and then torchrun ends too. (If torchrun got the signal, it
    would kill its ranks after 30 seconds.) torchrun gets it only while it has no ranks yet."""
    ranks = [pid for pid, parent in processes_of(task).items() if parent == task.process.pid]
    send(ranks or [task.process.pid], signal.SIGTERM)


def kill(task):
    """Kill the task's remaining processes."""
    limit = time.monotonic() + 5  # a process that is stuck in a driver may need longer, and ends by itself then
    while (left := processes_of(task)) and time.monotonic() < limit:
        send(left, signal.SIGKILL)
        time.sleep(0.01)


def finish(task, stopping):
    """After the task's torchrun has ended: set the task's final state, and free its devices. stopping: whether
    launch.py was asked to end."""
    kill(task)
    follow(task)
    task.log.close()
    code, ending, task.devices, task.note = task.process.returncode, task.seen["ending"], (), ""
    full = code and not ending and no_room(task.folder)  # on a full disk, metrics.jsonl has no last line
    if ending.startswith("not saved") or full:
        task.state, task.note = "failed", one_line(ending, 400) or f"exit code {code}, and its disk is full"
        task.seen["step"] = saved_step(task.folder)
    elif stopping and code == -signal.SIGKILL and not ending:
        task.state, task.seen["step"] = "killed", saved_step(task.folder)
        task.note = f"not saved since step {task.seen['step']}"
    elif ending.startswith("stopped") or code == 130 or stopping and not ending:  # 130: Ctrl-C
        task.state = "stopped"
    elif code:
        task.state, task.note = "failed", f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    else:
        task.state = "done"


def no_room(folder):
    """Whether the disk of a folder has no room for some lines of text."""
    try:
        return shutil.disk_usage(folder).free < 1 << 16
    except OSError:
        return False


def run_all(tasks, devices, on_gpus, command):
    """Run all tasks until none is queued or running. Returns whether a signal has ended that early."""
    screen, told, signals = Screen(tasks), False, []  # told: whether tasks were asked to end; signals: when each came
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    for number in numbers:
        signal.signal(number, lambda *_: signals.append(time.monotonic()))
    while True:
        stopping = bool(signals)  # read once per turn, since a signal may come at any line
        hard = stopping and signals[-1] - signals[0] > 2  # launchers repeat a signal: within two seconds it counts once
        for task in [t for t in tasks if t.state == "running"]:
            if hard:
                kill(task)
            if task.process.poll() is not None:
                finish(task, stopping)
            else:
                follow(task)
                if stopping and not told:
                    task.note = "saves and ends"
                    ask_to_end(task)
        told = stopping
        for task in [t for t in tasks if t.state == "queued"]:
            free = [d for d in devices if not any(d in other.devices for other in tasks)]
            if stopping:
                task.state = "stopped"
            elif task.gpus <= len(free):
                try:
                    start(task, free[:task.gpus], on_gpus, command)
                except OSError as error:  # no memory, or too many processes
                    task.state, task.note = "failed", f"cannot be started: {error.strerror}"
                except lock.InUse as error:
                    task.state, task.note = "failed", str(error)
        states = [t.state for t in tasks]
        screen.show(f"{states.count('running')} running, {states.count('queued')} queued; "
                    + ("Ctrl-C again kills" if stopping else "Ctrl-C saves and ends"))
        if "running" not in states and "queued" not in states:
            for number in numbers:  # a signal after Python has removed the handlers would replace the exit code
                signal.signal(number, signal.SIG_IGN)
            return stopping
        time.sleep(0.1)


# ---- what people see ---------------------------------------------------------------------------------------------


def follow(task):
    """Read the complete lines that were added to metrics.jsonl, at most its last megabyte, into task.seen."""
    try:
        with open_regular(os.path.join(task.folder, progress.FILE)) as file:
            size = file.seek(0, os.SEEK_END)
            task.read = file.seek(max(task.read if task.read <= size else 0, size - PIECE))
            lines, newline, _ = file.read(PIECE).rpartition(b"\n")
    except OSError:
        return
    task.read += len(lines + newline)
    for found in filter(None, map(progress.parse, lines.split(b"\n"))):
        kind, task.seen["step"] = found["kind"], found["step"]
        if kind in ENDINGS:
            task.seen["ending"] = kind if not found.get("reason") else f"{kind}: {found['reason']}"
        for name, (column, decimals) in FIGURES.get(kind, {}).items():
            if type(value := found.get(name, "")) is not str:
                task.seen[column] = figure(value, decimals)


def figure(value, decimals):
    """A number of metrics.jsonl as a text for the table. None (a number that is not finite) becomes "nan"."""
    if value is None:
        return "nan"
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.3g}"


class Screen:
    """The table of tasks. On a terminal it is redrawn in place. Elsewhere a task gets a line when its state changes,
    and every minute while it runs."""

    def __init__(self, tasks):
        self.tasks, self.width = tasks, max(len("task"), *(len(task.name) for task in tasks))
        self.live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.shown, self.drawn, self.next = {}, 0, 0.0

    def row(self, name, state, step, loss, psnr, speed, note):
        return f"{name:{self.width}}  {state:7} {step:>15} {loss:>9} {psnr:>7} {speed:>8}  {note}".rstrip()

    def show(self, words):
        """Draw the table if something has changed or enough time has passed. words: the line below it on a terminal."""
        new = {t.name: (t.state, t.note) for t in self.tasks}
        due = time.monotonic() >= self.next
        if new == self.shown and not due:
            return
        self.next = time.monotonic() + (1 if self.live else 60)
        tasks = [t for t in self.tasks if self.live or self.shown.get(t.name) != new[t.name]
                 or due and t.state == "running"]
        self.shown, (columns, height) = new, shutil.get_terminal_size()
        if self.live and len(tasks) > height - 3:  # running tasks come first; those at the end are not shown
            tasks = sorted(tasks, key=lambda t: t.state != "running")[:max(1, height - 3)]
        rows = [self.row(t.name, t.state, f"{t.seen.get('step', 0)}/{t.config.max_steps}", t.seen.get("loss", ""),
                         t.seen.get("psnr", ""), t.seen.get("speed", "") * (t.state == "running"), t.note)
                for t in tasks]
        header = self.row("task", "state", "step", "loss", "PSNR", "clips/s", "")
        if self.live:
            lines = [line[:columns - 1] for line in (header, *rows, words)]
            text = f"\x1b[{self.drawn}F" * (self.drawn > 0) + "\x1b[K" + "\n\x1b[K".join(lines) + "\n\x1b[J"
        else:
            lines = [f"{time.strftime('%H:%M:%S')} {row}" for row in rows]
            text = "\n".join([f"{'time':8} {header}"] * (not self.drawn) + lines) + "\n"
        self.drawn = len(lines)
        print(text, end="", flush=True)


def last_lines(task):
    """[the last lines that the task printed, without progress bars and torchrun's own report]"""
    try:
        with open(os.path.join(task.folder, "launch.log"), "rb") as file:
            file.seek(max(task.log_start, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = [line.rstrip("\r").split("\r")[-1] for line in file.read().decode("utf-8", "replace").split("\n")]
    except OSError as error:  # the folder was removed
        return [str(error)]
    report = next((i for i, line in enumerate(lines) if "failed (exitcode:" in line), len(lines))
    return [one_line(line, 400) for line in lines[:report] if line.strip()][-12:]


def report(tasks):
    """Print how the tasks have ended."""
    failed = [task for task in tasks if task.state == "failed"]
    for task in failed:
        print(f"\n{task.name}: {task.note}; the end of {task.folder}/launch.log:", *last_lines(task), sep="\n    ")
    stopped = [task.name for task in tasks if task.state == "stopped"]
    if stopped:
        print(f"stopped: {', '.join(stopped)}; the same command goes on from there")
    killed = [f"{task.name} ({task.note})" for task in tasks if task.state == "killed"]
    if killed:
        print(f"killed: {', '.join(killed)}; the same command goes on from what is saved")
    if failed:
        print(f"failed: {', '.join(f'{task.name} ({task.folder}/launch.log)' for task in failed)}")


def main(arguments=None, command=train_command):
    """Returns the exit code. command: function that makes the command line of a Task."""
    guard_screen()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"launch.py: {one_line(message)}\n")  # one line, without usage
    parser.add_argument("tasks", metavar="tasks.json")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--gpus", metavar="LIST", help="GPUs to use (default: all)")
    places.add_argument("--slots", type=int, metavar="N", help="places for tasks, without giving out GPUs")
    parser.add_argument("--dry-run", action="store_true", help="check, and show what would run")
    options = parser.parse_args(arguments)
    try:
        tasks = read_tasks(options.tasks)
        devices, on_gpus = find_devices(options.gpus, options.slots)
        for task in tasks:
            if task.gpus > len(devices):
                raise ConfigError(f"task {task.name}: gpus={task.gpus} of {len(devices)}"
                                  + ("" if on_gpus else " (without GPUs: --slots)"))
            follow(task)
            if finished(task):
                task.state, task.note, task.seen["step"] = "done", "nothing to do", saved_step(task.folder)
        waiting = [task for task in tasks if task.state == "queued"]
        if waiting:  # the models of finished tasks were built before
            check_models(waiting)
        if options.dry_run:
            for task in tasks:
                print(f"{task.name}: {task.note or shlex.join(command(task))}")
            return int(text_is_lost())
        for task in waiting:
            claim(task)
        if any(task.config.data == "demo" for task in waiting):
            from synthetic import make_demo  # here, as it needs OpenCV
            make_demo("demo_data")  # now, since two tasks could make it at the same time
    except (ConfigError, OSError) as error:
        print(f"launch.py: {one_line(str(error), 400)}", file=sys.stderr)
        return 2
    interrupted = run_all(tasks, devices, on_gpus, command)
    report(tasks)
    return 130 if interrupted else int(any(task.state != "done" for task in tasks))


if __name__ == "__main__":
    sys.exit(main())
