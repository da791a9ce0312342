"""One command, one folder: a lock that the system gives back when its process ends, even by kill -9.

    with locked("runs/mine", "choose another name="):
        ...                            # or InUse: one line that names the process that has the folder

It is flock(2) on FOLDER/.lock, a file that is removed at the end. What is written in it is for people: a file that a
killed process has left means nothing, since its lock is gone. Folders on network file systems are locked at the server,
for all machines (NFS, where Linux makes of it a lock on all bytes of the file; SMB; Lustre with `flock`), or for the
processes of one machine only, which cannot be noticed here (NFS with `nolock` or `local_lock`, Lustre with
`localflock`), or not at all, which is said (Lustre with `noflock`). When the whole machine that had it has died, a
server gives a lock back some time later: NFS 4 by Linux after 90 seconds.
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
AGAIN = 0.2  # seconds between two attempts
# Under torchrun: how many seconds ranks of before have to end in, and the locks of a machine that has died.
DYING, LOST = 10, 120
HELD = {}  # this process's descriptors: the paths of their lock files


def let_go():
    """In a forked child: it must not keep a folder locked when this process is gone."""
    while HELD:
        os.close(HELD.popitem()[0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


class InUse(Exception):
    """Another process has the folder; the message is one line that says which."""


@contextlib.contextmanager
def locked(folder, way_out):
    """Makes the folder and holds it until the block ends; one that was made here and is empty then is removed.

    Yields "", or one line that says why it cannot be locked, here or on this file system. InUse if another process has
    it: at once, or, under torchrun, whose ranks of before may still be dying, after some seconds. way_out: what the
    user can do instead. OSError if the folder cannot be made or written to.
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
        if handle in HELD:  # not so in a forked child
            with contextlib.suppress(OSError):  # the folder or the disk may be gone
                if is_at(handle, path):
                    os.remove(path)
            del HELD[handle]
            os.close(handle)
            if made:
                with contextlib.suppress(OSError):  # not empty, as it should be
                    os.rmdir(folder)


def holds(folder):
    """Whether a folder that this process has locked is still there, with that lock. OSError if nobody can say."""
    path = os.path.join(folder, NAME)
    return any(is_at(handle, path) for handle, held in HELD.items() if held == path)


def hold_again(folder):
    """Makes and locks anew a folder that this process had locked, and that was removed. InUse if another process has it
    meanwhile. OSError."""
    path = os.path.join(folder, NAME)
    new, _ = open_and_lock(folder, path, ", and was removed before", patient=False)
    os.dup2(new, next(handle for handle, held in HELD.items() if held == path), inheritable=False)
    os.close(new)


def open_and_lock(folder, path, advice, patient):
    """(descriptor of the lock file, with this process's words in it; "" or why there is no lock on it). InUse, its
    message with `advice` at its end. `patient`: after some seconds only."""
    began, told, removed = time.monotonic(), False, 0
    while True:
        os.makedirs(folder, exist_ok=True)
        try:  # for writing: NFS wants that
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # the folder was removed just now
            removed += 1
            if removed > 9:  # it is one where no file can be, such as /proc
                raise
            continue
        other = ""
        try:
            problem = lock(handle)
            if is_at(handle, path):
                with contextlib.suppress(OSError):  # a full disk: the lock counts, not its words
                    os.truncate(handle, 0)
                    os.write(handle, own_words().encode(errors="backslashreplace"))
                return handle, problem
        except BlockingIOError:
            other = words_in(handle)
        os.close(handle)
        if not other:  # who had it has removed it just now
            continue
        limit = AGAIN  # once more, since the other may have got it just now, and not have written its words
        if patient:
            limit = DYING if f" on {socket.gethostname()} " in other else LOST
        waited = time.monotonic() - began
        if waited >= limit:
            raise InUse(f"{folder} is in use by {other}{advice}")
        if limit > AGAIN and not told:
            print(f"{folder} is in use by {other}: waiting up to {limit} seconds for its end", file=sys.stderr)
            told = True
        time.sleep(AGAIN)


def lock(handle):
    """Locks an open file. Returns "", or why that cannot be; BlockingIOError if another process has it locked."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # as some SMB servers say it
        raise BlockingIOError(*error.args) from None
    except BlockingIOError:
        raise
    except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return error.strerror
    return ""


def holder(folder):
    """Which process has the folder, in words; "" for none."""
    try:
        handle = os.open(os.path.join(folder, NAME), os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return ""
    try:
        lock(handle)
        return ""
    except BlockingIOError:
        return words_in(handle)
    finally:
        os.close(handle)


def is_at(handle, path):
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # ESTALE: another machine has removed it, on NFS
            raise
        return False


def own_words():
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    command = command if len(command) < 100 else f"{command:.96} ..."
    return f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({command})\n"


def words_in(handle):
    """What the holder has written, on one line."""
    text = b""
    with contextlib.suppress(OSError):  # an SMB server lets no one else read what is locked
        text = os.pread(handle, 2000, 0)
    line = "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace").rstrip("\n"))
    return line if re.match(r"pid \d+ on ", line) else "another process"
