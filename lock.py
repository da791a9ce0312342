"""A lock for a folder, so that only one command at a time writes to it. The system releases the lock when the process
ends, even by kill -9.

    with locked("runs/mine", "choose another name="):
        ...                            # or InUse: one line that names the process that has the folder

The lock is flock(2) on FOLDER/.lock, a file that is removed at the end. The text in it is for people: a file that a
killed process has left does not lock anything. What the lock does on a network file system depends on how it is
mounted:
- It holds for all machines: NFS (where Linux locks all bytes of the file instead), SMB, Lustre with `flock`.
- It holds for the processes of one machine only, which cannot be noticed here: NFS with `nolock` or `local_lock`,
  Lustre with `localflock`.
- The folder cannot be locked, which `locked` reports: Lustre with `noflock`.
If the machine with the lock dies, the file server releases the lock some time later: Linux's NFS 4 after 90 seconds.
This file works alone, with Python's library only.
"""
import contextlib
import errno
import os
import re
import shlex
import socket
import sys
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
RETRY_AFTER = 0.2  # seconds between two attempts
# Under torchrun, the seconds to wait for earlier ranks of this machine to end, and for the lock of another machine,
# which may have died.
DYING, LOST = 10, 120
HELD = {}  # {file descriptor of a lock that this process has: path of its lock file}


def let_go():
    """In a forked child: close the locks, so that the child does not hold them after this process has ended."""
    while HELD:
        os.close(HELD.popitem()[0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


class InUse(Exception):
    """Another process has the folder; the message is one line that says which."""


@contextlib.contextmanager
def locked(folder, way_out):
    """Make the folder, and lock it until the block ends. If the folder was made here and is empty then, it is removed.

    Yields "", or one line that says why the folder cannot be locked on this system or file system. InUse if another
    process has it; under torchrun only after some seconds, since earlier ranks may still be ending. way_out: what the
    user can do instead, for messages. OSError if the folder cannot be made or written to.
    """
    path, made = os.path.join(folder, NAME), not os.path.isdir(folder)
    try:
        handle, problem = open_and_lock(folder, path, f": wait for its end, or {way_out}", patient="RANK" in os.environ)
    except OSError as error:
        told = OSError(f"{folder} cannot be made or written to ({error.strerror}): {way_out}")
        told.strerror = error.strerror
        raise told from None
    HELD[handle] = path
    try:
        yield f"{folder} cannot be locked ({problem}): start no other command that writes there" if problem else ""
    finally:
        if handle in HELD:  # it is not in a forked child
            with contextlib.suppress(OSError):  # the folder or the disk may be gone
                if is_at(handle, path):
                    os.remove(path)
            del HELD[handle]
            os.close(handle)
            if made:
                with contextlib.suppress(OSError):  # not empty, which is the usual case
                    os.rmdir(folder)


def holds(folder):
    """Whether a folder that this process has locked is still there, with that lock file. OSError if that is unknown."""
    path = os.path.join(folder, NAME)
    return any(is_at(handle, path) for handle, held in HELD.items() if held == path)


def hold_again(folder):
    """Make and lock again a folder that this process had locked and that was removed since. InUse if another process
    has locked it meanwhile. OSError if it cannot be made."""
    path = os.path.join(folder, NAME)
    new, _ = open_and_lock(folder, path, ", and was removed before", patient=False)
    os.dup2(new, next(handle for handle, held in HELD.items() if held == path), inheritable=False)
    os.close(new)


def open_and_lock(folder, path, advice, patient):
    """Returns (descriptor of the lock file, "" or why it cannot be locked). Writes a description of this process to the
    file. InUse, with a message that ends with `advice`, if another process has the lock. patient: whether to wait some
    seconds for it first."""
    began, told, removed = time.monotonic(), False, 0
    while True:
        os.makedirs(folder, exist_ok=True)
        try:  # opened for writing, as NFS requires for a lock
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # the folder was removed just now
            removed += 1
            if removed > 9:  # no file can be made there, as in /proc
                raise
            continue
        other = ""
        try:
            problem = lock(handle)
            if is_at(handle, path):
                with contextlib.suppress(OSError):  # on a full disk the lock has no text, but it holds
                    os.truncate(handle, 0)
                    os.write(handle, own_description().encode(errors="backslashreplace"))
                return handle, problem
        except BlockingIOError:
            other = read_description(handle)
        os.close(handle)
        if not other:  # the file that was locked here has just been removed by its owner
            continue
        limit = RETRY_AFTER  # try once more: the other process may not have written its description yet
        if patient:
            limit = DYING if f" on {socket.gethostname()} " in other else LOST
        waited = time.monotonic() - began
        if waited >= limit:
            raise InUse(f"{folder} is in use by {other}{advice}")
        if limit > RETRY_AFTER and not told:
            print(f"{folder} is in use by {other}: waiting up to {limit} seconds for its end", file=sys.stderr)
            told = True
        time.sleep(RETRY_AFTER)


def lock(handle):
    """Lock an open file. Returns "", or why it cannot be locked. BlockingIOError if another process has locked it."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # some SMB servers report a lock of others so
        raise BlockingIOError(*error.args) from None
    except BlockingIOError:
        raise
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return error.strerror
    return ""


def holder(folder):
    """A description of the process that has the folder; "" if there is none."""
    try:
        handle = os.open(os.path.join(folder, NAME), os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return ""
    try:
        lock(handle)
        return ""
    except BlockingIOError:
        return read_description(handle)
    finally:
        os.close(handle)


def is_at(handle, path):
    """Whether `path` still names the open file. OSError if that cannot be found out."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # ESTALE: another machine has removed the file on NFS
            raise
        return False


def own_description():
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    command = command if len(command) < 100 else f"{command:.96} ..."
    return f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({command})\n"


def read_description(handle):
    """The description that the lock's owner has written, on one line; "another process" if it cannot be read."""
    text = b""
    with contextlib.suppress(OSError):  # on SMB, nobody else can read a locked file
        text = os.pread(handle, 2000, 0)
    line = "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace").rstrip("\n"))
    return line if re.match(r"pid \d+ on ", line) else "another process"
