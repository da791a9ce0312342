"""The machine: its device, precision and memory. Every command uses this file; it works alone with torch."""
import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
import time

import torch


class DeviceError(Exception):
    """A device that does not exist, or has too little memory; the message says what to use instead."""


def pick_device(name="auto"):
    """"auto", "cpu", "cuda", "cuda:1", "mps" -> torch.device; under torchrun "auto" and "cuda" take this rank's GPU.

    DeviceError for a device that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device: {name!r} is none of auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device: {name!r} asked for, but this PyTorch sees no GPU; use device=cpu")
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise DeviceError(f"device: {name!r} for several ranks; use device=cuda, and each takes its own GPU")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        most = max(index + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if most > torch.cuda.device_count():
            raise DeviceError(f"device: GPU {most - 1} asked for, but there are {torch.cuda.device_count()}, numbered "
                             "from 0; start as many processes per node as there are GPUs")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device: mps asked for, but this machine has none; use device=cpu")
    elif device.type not in ("cpu", "mps"):
        raise DeviceError(f"device: {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    return device


def pick_precision(name, device, trains_volumes=False):
    """"auto", "bf16", "fp16" or "fp32" -> torch.bfloat16, torch.float16 or torch.float32.

    "auto" is bf16 if the hardware multiplies it: a GPU from compute capability 8.0 on, a CPU with AMX or with AVX-512's
    bf16 instructions. Other CPUs emulate it: a 64-channel convolution took 110 ms in float32 and 530 ms in bf16 (12 x
    128 x 128, channels-last, AVX-512 without bf16, two cores). With AVX512_BF16 (AMD EPYC), a training step in bf16 is
    1.5 times as fast. trains_volumes: whether 3D convolutions are trained. Then "auto" is float32 on a CPU, where their
    bf16 gradients are wrong for clips of one or two frames (see Adversary.precision).
    """
    if name == "auto":
        if trains_volumes and device.type == "cpu":
            return torch.float32
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:  # torch 2.4 cannot tell whether there is AVX512_BF16, and so takes float32
            fast = device.type == "cpu" and any(getattr(torch.cpu, has, bool)() for has in (
                "_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return torch.bfloat16 if fast else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def cores_per_rank():
    """The number of cores that this process may use, divided by the number of ranks on this machine; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_workers(device):
    """Number of data processes per rank: one if the model runs on the CPU, which needs the cores; else one for each
    core, up to 16."""
    return 1 if device.type == "cpu" else min(16, cores_per_rank())


def tune(device):
    """Set what makes this process faster: one thread for each core (torchrun gives each rank one); on a GPU, TF32 and
    cuDNN's benchmark; on a CPU, an allocator that keeps freed memory. On a CPU, also limit memory to what there is."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(cores_per_rank())
    if device.type == "cuda":
        # By the old names: torch.compile reads these, and raises an error if the new ones (fp32_precision) were set.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu":
        keep_freed_blocks(1 << 30)
        limit_memory(host_memory())


def keep_freed_blocks(largest):
    """Have the C allocator keep freed blocks of up to `largest` bytes. Otherwise it returns them to the kernel, and
    gets them back page by page, which takes longer than many layers. Blocks that are free now are returned once."""
    if libc := glibc():
        libc.mallopt(-3, largest)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)


def share_freed_blocks():
    """Have threads that start later use one common heap, where each finds the blocks that others freed. With a heap for
    each thread, infer.py took 0.1 GB more at 1080p."""
    if libc := glibc():
        libc.mallopt(-8, 1)  # M_ARENA_MAX


def limit_memory(most):
    """Limit this process to `most` bytes of memory. Otherwise Linux grants more than the machine has, and kills a
    process when the memory is used. With the limit, the allocation fails, which can be reported or tried in parts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux" and not 0 <= soft <= most:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


@functools.cache  # since libc_ver() reads the interpreter's file
def glibc():
    """The C library, if it is glibc; else None."""
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None


def to_device(model, device, dtype=None):
    """Move a model to a device and a dtype (None: unchanged), in place, and make the weights of 2D and 3D convolutions
    channels-last. Returns the model. Quantizers stay float32, whatever `dtype` is: see quantize.py."""
    model.to(device, dtype)
    for parameter in model.parameters():
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
        if layout:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


# Parts of the messages with which libraries report that memory ran out. cuBLAS and cuDNN need some memory of their own:
# without it they report that a handle cannot be made, or that no engine can compute a convolution.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cudnn_status_alloc_failed",
                 "cublas_status_alloc_failed", "cublas_status_not_initialized", "unable to find an engine")


def is_out_of_memory(error):
    """Whether the exception means that memory ran out, on the device or the host. Then smaller parts may succeed."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_call(call, argument, device):
    """Returns (call(argument), seconds until the device was done)."""
    synchronize(device)
    start = time.perf_counter()
    result = call(argument)
    synchronize(device)
    return result, time.perf_counter() - start


def reset_peak_memory(device):
    """Let `peak_memory` count from now on. Returns whether that worked: not every system can do so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if os.access("/proc/self/clear_refs", os.W_OK):
        with contextlib.suppress(PermissionError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
            return True
    return False


def peak_memory(device):
    """Peak memory since `reset_peak_memory`, bytes. On a GPU: of tensors. On a CPU: resident memory of the process,
    since its start if the system cannot reset the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory(device):
    """Memory in use now, bytes: of tensors on a GPU; else the resident memory of the process, without freed blocks."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if libc := glibc():
        libc.malloc_trim(0)
    return resident_memory()


def resident_memory():
    """Bytes of physical memory that this process and its descendants (data processes) hold now; 0 without /proc."""
    total, waiting = 0, [os.getpid()]
    while waiting and os.path.exists("/proc/self/statm"):
        process = waiting.pop()
        with contextlib.suppress(OSError, ValueError):  # a child may end meanwhile
            with open(f"/proc/{process}/statm") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            with open(f"/proc/{process}/task/{process}/children") as file:
                waiting += file.read().split()
    return total


def host_memory():
    """Bytes of memory that this machine has, or that its container may use."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path) as file:  # absent, or "max"
            found.append(int(file.read()))
    return min(found)


def free_memory(device):
    """Bytes of memory that this process can still allocate. On a GPU this includes memory that PyTorch has reserved but
    does not use; else it is that of the machine, or of its container."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    found = [host_memory() - resident_memory()]
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        found.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    return max(0, min(found))


def stream_limit(device):
    """A memory_limit for a model's stream: the bytes that its activations may take. A GPU is faster with several
    latents at a time, but more than 2 GB of them only delay the next stage. None on other devices: a latent at a time.
    """
    return min(1 << 31, free_memory(device) // 4) if device.type == "cuda" else None


def describe(device):
    """A description of the device, in one line for logs and reports."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
