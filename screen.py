"""Lets a command go on when its output cannot be written: after its terminal was closed, after the tee of `| tee log`
has ended, with a full disk behind `> file`, or with a stdout or stderr that was closed before the start. Each command
calls `guard_screen()` first. After that, prints, warnings, progress bars and tracebacks need no care of their own.

Text that cannot be written is dropped. Later text is tried again, since the disk may get room. The exit code is that of
the work; Python's own would be 120 if its last text cannot be written. Only a command whose whole result is text
(bench.py without --json, launch.py --dry-run) checks whether it was written: its exit code is 1 after a full disk, and
0 if the reader has stopped reading, as in `| head -1`.

This file works alone; it needs Python only, and tqdm for `progress_bar`.
"""
import contextlib
import io
import os
import signal
import sys
import threading


class Guarded(io.RawIOBase):
    """The lowest layer of a stream, which takes bytes: its `write` never fails. `lost`: why bytes were lost the last
    time, "" if none were; `unread`: whether the reason was that the reader has gone."""

    def __init__(self, stream):
        self.stream = stream  # the original stream is kept, since it would close its file when it is deleted
        self.lost, self.unread = "", False
        self.lower = getattr(stream.buffer, "raw", stream.buffer)  # with python -u there is no buffer in between

    def write(self, content):
        try:
            written = self.lower.write(content)
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self.note(error)
            return len(content)
        return len(content) if written is None else written  # None: a non-blocking pipe is full

    def note(self, error):
        """Keep the error's text, not the error: its traceback keeps the objects in its frames alive. With DataLoader's
        iterator among them, the interpreter waited forever for its processes."""
        self.lost, self.unread = str(error), isinstance(error, BrokenPipeError)

    def writable(self):
        return True

    def fileno(self):
        return self.lower.fileno()

    def isatty(self):
        return self.lower.isatty()


def end_at_ctrl_c(name):
    """Until `guard_screen` is called, Ctrl-C ends the process without a traceback, while a command imports PyTorch for
    some seconds. name: the caller's __name__; nothing is done unless it is "__main__". A background job, which ignores
    Ctrl-C, still ignores it."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def guard_screen():
    """Replace sys.stdout and sys.stderr by streams to which no write fails, whatever is behind them and whatever the
    text holds (file names may hold anything). Open closed file descriptors 0 to 2 on /dev/null: otherwise the next file
    that is opened, such as a checkpoint, gets that number, and C libraries and child processes print into it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            stream = open(os.devnull, "w")  # noqa: SIM115 (kept)
        if isinstance(getattr(stream.buffer, "raw", stream.buffer), Guarded):  # guarded by an earlier call
            continue
        guarded = Guarded(stream)
        try:
            stream.flush()
        except OSError as error:
            guarded.note(error)
        layer = guarded if stream.write_through else io.BufferedWriter(guarded)
        setattr(sys, name, io.TextIOWrapper(layer, stream.encoding, "backslashreplace",
                                            line_buffering=stream.line_buffering, write_through=stream.write_through))


def progress_bar(iterable=None, **options):
    """tqdm(iterable, ...), as wide as the terminal. In a file, such as a scheduler's log, each update adds a line, so
    there is one every 20 seconds only."""
    from tqdm import tqdm
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 20, **options)


@contextlib.contextmanager
def ended_by_sigterm():
    """A context in which SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that files are left whole or removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    def stop(number, _):
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ending_in_one_line(command, mistakes, when_stopped, words=str):
    """A context for the body of a command's main. An error ends the process with one line on stderr: one of the classes
    `mistakes` with exit code 2, Ctrl-C with 130 and SIGTERM with 143. words: function that makes the message of a
    mistake; when_stopped: the end of the line after Ctrl-C or SIGTERM."""
    try:
        with ended_by_sigterm():
            yield
    except mistakes as error:
        print(f"{command}: {one_line(words(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"{command}: stopped by {signal.Signals(number).name}; {when_stopped}", file=sys.stderr)
        sys.exit(128 + number)


def one_line(text, most=4000):
    """The first `most` characters of a message, with line breaks and other control characters escaped: settings and
    file names may hold them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])


def nobody_reads():
    """Whether the reader of stdout has gone, as after `| head -1`."""
    return flushed_stdout().unread


def text_is_lost():
    """If text for stdout was lost, print why, in one line on stderr, and return True. If only its reader has gone, that
    does not count as lost."""
    stdout = flushed_stdout()
    if not stdout.lost or stdout.unread:
        return False
    print(f"{os.path.basename(sys.argv[0])}: not all of the output could be written: {stdout.lost}", file=sys.stderr)
    return True


def flushed_stdout():
    """Flush sys.stdout, and return its Guarded. Call `guard_screen` before."""
    sys.stdout.flush()
    return getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
