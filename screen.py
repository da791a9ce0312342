"""The screen may go away, and the work goes on: a closed terminal, `| tee log` whose tee has ended, a full disk behind
`> file`, a stdout or stderr that was closed before the start. Each command calls `guard_screen()` first of all; what
prints, warns, draws bars or shows tracebacks after that needs no care of its own.

What cannot be written is dropped, and what comes later is tried again: a disk may get room. The exit code is that of
the work, where Python's own is 120 as soon as its last words find no room. Only a command whose whole product is text
(bench.py without --json, launch.py --dry-run) asks what became of it: code 1 after a full disk, and 0, without a word,
where its reader wants no more, as `| head -1`.

This file works alone; it needs Python only, and tqdm for `progress_bar`.
"""
import contextlib
import io
import os
import signal
import sys
import threading


class Guarded(io.RawIOBase):
    """The lowest layer of a stream, that of bytes: `write` never fails. `lost` says why some were last lost, "" if none
    were; `unread`, whether it was for want of a reader."""

    def __init__(self, stream):
        self.stream = stream  # the one that was there: it would close its file if it were let go
        self.lost, self.unread = "", False
        self.lower = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no layer in between

    def write(self, content):
        try:
            written = self.lower.write(content)
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self.note(error)
            return len(content)
        return len(content) if written is None else written  # None: a pipe that does not wait is full

    def note(self, error):
        """Not the error itself: its traceback keeps alive what its frames hold. DataLoader's iterator, held so, let the
        interpreter wait for its processes for ever."""
        self.lost, self.unread = str(error), isinstance(error, BrokenPipeError)

    def writable(self):
        return True

    def fileno(self):
        return self.lower.fileno()

    def isatty(self):
        return self.lower.isatty()


def end_at_ctrl_c(name):
    """From here to `guard_screen`, Ctrl-C ends Python as it ends any program, without a traceback: for the seconds in
    which a command imports PyTorch. name: the caller's __name__; where it is imported itself, nothing is done. A job in
    the background, which ignores Ctrl-C, goes on to."""
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def guard_screen():
    """Make sys.stdout and sys.stderr such that no writing to them fails, whatever is behind them and whatever the text
    holds (file names may hold anything). File descriptors 0 to 2 that are closed lead to /dev/null from here on: or the
    next file that is opened, a checkpoint say, is what C libraries and other processes take for the screen."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed as Python started
            stream = open(os.devnull, "w")  # noqa: SIM115 (kept)
        if isinstance(getattr(stream.buffer, "raw", stream.buffer), Guarded):  # by an earlier call
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
    """tqdm(iterable, ...), as wide as the terminal. In a file, such as a scheduler's, each drawing stays: there it is
    drawn every 20 seconds."""
    from tqdm import tqdm
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 20, **options)


@contextlib.contextmanager
def ended_by_sigterm():
    """SIGTERM ends what is in the block as Ctrl-C does, by an exception, so that files are left whole or removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread choose
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
    """For the body of a command's main: ends the process with one line on stderr, after the errors `mistakes` with exit
    code 2, after Ctrl-C with 130 and after SIGTERM with 143; `when_stopped` ends the line then. words(error): what is
    said of it."""
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
    """A message without line breaks and other control characters, as values and names of files may hold them, of a
    bounded length."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])


def nobody_reads():
    """True if the reader of stdout has gone: `| head -1` has what it wants."""
    return flushed_stdout().unread


def text_is_lost():
    """Says in one line on stderr why text for stdout was lost, and returns True. No loss: that its reader has gone."""
    stdout = flushed_stdout()
    if not stdout.lost or stdout.unread:
        return False
    print(f"{os.path.basename(sys.argv[0])}: not all of the output could be written: {stdout.lost}", file=sys.stderr)
    return True


def flushed_stdout():
    """The Guarded of sys.stdout, after `guard_screen`."""
    sys.stdout.flush()
    return getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
