"""Several machines, as two torchrun agents on this one: agents killed and back; the Slurm script of the docs, run."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import FRAMES, ROOT, command, different, log_of, run, spoilt, state_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux has them")

# As in docs/cluster.md; and dead machines are noticed within seconds, so that the tests need not wait.
ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
QUICK = "join_timeout=60,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=20"
RUN = [*FRAMES, "batch_size=1", "max_steps=9", "save_every=2", "timeout_minutes=1"]

# FAULT=2:killed: in step 2, this rank kills its agent, and then itself. FAULT=2:orphaned: its agent only. What is
# being saved is on disk before.
FAULTS = """
if "FAULT" in os.environ:
    import time
    from saving import Saver
    step, what = os.environ["FAULT"].split(":")
    writes = []
    def note(self, *arguments, begin=Saver.begin):
        begin(self, *arguments)
        writes[:] = [future for _, future, _ in self.pending]
    Saver.begin = note
    def fault(call):
        for write in writes:
            write.result()
        agent = os.getppid()
        os.kill(agent, signal.SIGKILL)
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while os.getppid() == agent:  # it takes a while to die, and the next step must find it dead
            time.sleep(0.01)
        return call()
    spoil(objective, "pixel_loss", {(int(step), rank): fault for rank in (0, 1)})
"""


@pytest.fixture
def agents(clips, tmp_path):
    """agent(name, ...) starts a torchrun with one rank, whose output goes to name.log; all are gone at the end."""
    started, script = [], spoilt(tmp_path, FAULTS)

    def start(log, port, *settings, fault=None, nodes="2"):
        line = command(script, *RUN, f"data={clips}", *settings)
        # Where one machine is enough, it waits for another: or its nine steps may be done before that one has started.
        conf = QUICK if nodes == "2" else QUICK.replace("last_call_timeout=1", "last_call_timeout=15")
        line[1:1] = ["-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", "1", "--max-restarts", "3",
                     "--rdzv_backend", "c10d", "--rdzv_id", "test", "--rdzv_endpoint", f"127.0.0.1:{port}",
                     "--rdzv_conf", conf]
        environment = {**ENVIRONMENT, "FAULT": fault} if fault else ENVIRONMENT
        with open(tmp_path / f"{log}.log", "w") as file:
            started.append(subprocess.Popen(line, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=subprocess.STDOUT, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_until_it_listens(port):
    limit = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """The folder of the same run on two ranks of one machine, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(spoilt(folder, ""), *RUN, f"data={clips}", "name=whole", ranks=2, cwd=folder)
    return folder / "runs" / "whole"


def assert_same_end(whole, folder):
    assert "done: 9 steps" in log_of(folder)
    assert set(different(state_of(whole, 9), state_of(folder, 9))) <= {"state.config.name", "state.config.out_dir"}


@pytest.mark.slow
def test_two_machines_are_one_with_as_many_ranks(agents, whole, tmp_path):
    port = free_port()
    both = [agents(name, port, "name=two") for name in "ab"]
    assert [process.wait(100) for process in both] == [0, 0], (tmp_path / "a.log").read_text()[-3000:]
    assert "2 ranks" in log_of(tmp_path / "runs" / "two")
    assert_same_end(whole, tmp_path / "runs" / "two")


@pytest.mark.slow
def test_a_machine_that_dies_and_comes_back_costs_the_steps_since_the_last_checkpoint(agents, whole, tmp_path):
    """First torchrun alone is killed (its rank saves), then, in step 8, all that runs on that machine."""
    port = free_port()
    host = agents("host", port, "name=back")  # of the rendezvous: what it holds goes with it, see below
    wait_until_it_listens(port)
    assert agents("orphaned", port, "name=back", fault="3:orphaned").wait(60) == -signal.SIGKILL
    assert agents("killed", port, "name=back", fault="8:killed").wait(60) == -signal.SIGKILL
    last = agents("last", port, "name=back")
    assert last.wait(60) == 0 and host.wait(60) == 0, (tmp_path / "host.log").read_text()[-3000:]
    log = log_of(tmp_path / "runs" / "back")
    resumed = [int(step) for step in re.findall(r"resumed from .* at step (\d+)", log)]
    assert len(resumed) == 2 and 3 <= resumed[0] <= 4 and resumed[1] == 6, "where the orphan saved; the newest"
    assert "no answer from another rank (" in (tmp_path / "host.log").read_text()
    assert_same_end(whole, tmp_path / "runs" / "back")


@pytest.mark.slow
def test_without_the_machine_of_the_rendezvous_all_end_and_the_run_can_go_on(agents, here, tmp_path):
    port = free_port()
    host = agents("host", port, "name=again", f"out_dir={tmp_path}", fault="5:killed")
    wait_until_it_listens(port)
    other = agents("other", port, "name=again", f"out_dir={tmp_path}")
    assert host.wait(60) == -signal.SIGKILL
    ended = time.monotonic()
    assert other.wait(60) == 1 and time.monotonic() - ended < 30, "it does not wait for timeout_minutes"
    log = log_of(here(*RUN, "name=again"))
    assert "step_00000004.pt at step 4" in log and "done: 9 steps" in log


@pytest.mark.slow
def test_with_one_machine_allowed_the_other_goes_on_alone(agents, tmp_path):
    port = free_port()
    stays = agents("stays", port, "name=alone", nodes="1:2")
    wait_until_it_listens(port)
    assert agents("leaves", port, "name=alone", nodes="1:2", fault="5:killed").wait(60) == -signal.SIGKILL
    assert stays.wait(60) == 0, (tmp_path / "stays.log").read_text()[-3000:]
    log = log_of(tmp_path / "runs" / "alone")
    assert re.findall(r"(\d) ranks?\n", log) == ["2", "1"] and "step_00000004.pt at step 4" in log
    state = state_of(tmp_path / "runs" / "alone", 9)
    assert "done: 9 steps" in log and state["samples"] == 2 * 4 + 5
    assert {int(v["step"]) for v in state["optimizer"]["state"].values()} == {9}
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


# ---- Slurm -------------------------------------------------------------------------------------------------------

# srun answers SIGTERM by killing its tasks; scancel sends a signal to the tasks alone (with cgroups, not to what they
# have started). `requeue` would end the batch shell too, which ends by itself here.
TOOLS = {
    "srun": """
        export BATCH=$PPID
        [ "$1" = --cpus-per-task=128 ] || exit 9
        shift
        for node in 1 2; do "$@" & tasks+=" $!"; done
        echo $tasks > tasks
        trap 'kill -KILL $tasks' TERM
        code=0; for task in $tasks; do wait $task || code=$?; done; exit $code""",
    "scancel": """[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat tasks)""",
    "scontrol": """if [ "$*" = "show hostnames" ]; then echo 127.0.0.1; echo other; else echo "$*" >> requeued; fi""",
    "torchrun": """exec $PYTHON -m torch.distributed.run "$@" """,
}
TIME_IS_UP = """
import time
received = []
def receive(self, number, frame, original=train.StopSignal.receive):
    received.append(number)
    original(self, number, frame)
train.StopSignal.receive = receive
def wait(call):
    if dist.get_rank() == 0:
        os.kill(int(os.environ["BATCH"]), signal.SIGUSR1)
    limit = time.monotonic() + 30
    while not received and time.monotonic() < limit:
        signal.sigtimedwait([], 0.05)
    return call()
if not os.path.exists("requeued"):
    spoil(objective, "pixel_loss", {(3, rank): wait for rank in (0, 1)})
"""


@pytest.mark.slow
def test_the_slurm_script_saves_before_its_time_is_up_queues_itself_again_and_goes_on(clips, whole, tmp_path):
    with open(os.path.join(ROOT, "docs", "cluster.md"), encoding="utf-8") as file:
        script = re.search(r"```bash\n(#!/bin/bash.*?)```", file.read(), re.S)[1]
    changes = {"train.py taehv data=/shared/videos": shlex.join([spoilt(tmp_path, TIME_IS_UP), *RUN, f"data={clips}"]),
               "/shared/runs": f"{tmp_path} name=slurm", "nproc_per_node 8": "nproc_per_node 1",
               ":29500": f":{free_port()} --rdzv_conf {QUICK}"}
    for there, here in changes.items():
        assert script.count(there) == 1
        script = script.replace(there, here)
    (tmp_path / "job.sh").write_text(script)
    for name, lines in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "128",
                   "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    codes = []
    for _ in range(2):
        done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
        assert (tmp_path / "requeued").read_text() == "requeue 7\n", done.stdout[-3000:]
        codes.append(done.returncode)
    log = log_of(tmp_path / "slurm")
    assert "stopped by a signal after step 3 of 9" in log and "step_00000003.pt at step 3" in log
    assert codes == [128 + signal.SIGUSR1, 0], done.stdout[-3000:]
    assert_same_end(whole, tmp_path / "slurm")
