"""Runs scripts in forks of a process that has imported PyTorch: a new one takes two to three seconds for that.

conftest.py's `run` starts one of these and writes it a line of JSON for each command; the answers are lines too: the
process's id and, once it has ended, its exit code. A fork becomes the script by running it as `__main__`. The project's
files are imported by the script, as always; so is cv2, which reads its settings from the environment as it is imported.
Forks share what new processes do not: the hashes of strings, say, by which sets are ordered. So some tests ask for new
ones (`fresh`): test_smoke.py for torchrun's own two ranks.
"""
import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

for name in ("torch._dynamo", "torch.distributed.elastic", "torch.utils.tensorboard", "tqdm", "PIL.Image"):
    importlib.import_module(name)

ENDS = 30  # seconds that torchrun, too, gives the other ranks after SIGTERM


def next_command():
    """Forks for each command, waits for its end and answers. Returns the command in a fork, None at the end of all."""
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        os.write(1, b"%d\n" % pid)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return None


def take_place(command):
    """This fork becomes the command's process, with its folder, environment and output."""
    os.setsid()
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(command["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if command["ranks"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    if "OMP_NUM_THREADS" in os.environ:  # OpenMP has read it as it was when PyTorch was imported
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def start_ranks(count):
    """As torchrun does on one machine, without a restart: returns in each rank; this process ends when they have, with
    exit code 1 if one failed. The others get SIGTERM then, and that one's exit code is printed in torchrun's words."""
    run = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
           "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0,
           "TORCHELASTIC_RUN_ID": "warm", "TORCHELASTIC_USE_AGENT_STORE": True}
    reading, writing = os.pipe()
    running = set()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            run.update(RANK=rank, LOCAL_RANK=rank, MASTER_PORT=int(os.read(reading, 5)))
            os.environ.update({key: str(value) for key, value in run.items()})
            return
        running.add(pid)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after the forks: it has threads
    os.write(writing, b"%05d" % store.port * count)
    failed, end = False, float("inf")
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        running.discard(pid)
        if pid and status and not failed:
            failed, end = True, time.monotonic() + ENDS
            print(f"a rank failed first:\n  exitcode  : {os.waitstatus_to_exitcode(status)}", flush=True)
            for other in running:
                os.kill(other, signal.SIGTERM)
        if time.monotonic() > end:
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    os._exit(int(failed))


def become(arguments):
    """Runs the script as `python SCRIPT ARGUMENTS` does, and ends this process; but the interpreter is not taken apart,
    module by module, which takes as long as the smallest training."""
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # what the interpreter does with any
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.freeze()  # collections in the forks leave these objects alone, and so their memory shared
    command = next_command()
    if command is not None:
        take_place(command)
        if command["ranks"]:
            start_ranks(command["ranks"])
        become(command["arguments"])
