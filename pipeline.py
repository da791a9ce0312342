"""Stages of work beside each other: each runs in a thread of its own, and short queues join them.

    with Pipeline() as pipeline:
        frames = pipeline.ahead("reading", reader)      # a thread takes the reader's items, a few ahead of the loop
        write = pipeline.beside("writing", work)        # a thread runs work(items), on the items that write(item) gives
        for frame in frames:
            write(model(frame))
    print(pipeline.busy)                                # {"reading": 1.2, "writing": 3.4}: seconds, without waiting

Items keep their order, and a full queue holds up whoever fills it: memory does not depend on their number. OpenCV and
PyTorch let go of the interpreter while they work, so threads are enough.

The block ends when all work is done. An error of any stage, or in the block itself (Ctrl-C too), ends all stages, and
the block raises the first one. All waiting is for one condition, which every change wakes: nobody waits for a stage
that has ended.

This file works alone; it needs Python only.
"""
import collections
import threading
import time

END = object()


class Stopped(Exception):
    """What a stage meets at its queues after another one has failed. It never leaves a Pipeline's block."""


class Pipeline:
    """See above. depth: how many items a queue holds. busy: a Counter of seconds by stage, to go on with."""

    def __init__(self, depth=4, busy=None):
        self.depth, self.busy = depth, collections.Counter() if busy is None else busy
        self.stopped, self.error = False, None
        self.changed = threading.Condition()   # guards all that stands here
        self.waited = collections.Counter()    # seconds at queues, by thread
        self.threads, self.given = [], []      # all; (queue, thread) of each stage that is given its items

    def ahead(self, name, items):
        """An iterator over the same items, which a thread takes a few ahead."""
        queue = collections.deque()

        def take():
            for item in items:
                self._put(queue, item)
            self._put(queue, END)
        self._start(name, take)
        return self._taken_from(queue)

    def beside(self, name, work):
        """Runs work(items) in a thread; returns the function that gives it an item. The items end with the block."""
        queue = collections.deque()
        self.given.append((queue, self._start(name, lambda: work(self._taken_from(queue)))))
        return lambda item: self._put(queue, item)

    def _start(self, name, work):
        def run():
            start = time.perf_counter()
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 (it is raised again, where the block ends)
                self._stop(error)
            with self.changed:
                self.busy[name] += time.perf_counter() - start - self.waited[threading.get_ident()]
        thread = threading.Thread(target=run, name=name)
        thread.start()
        self.threads.append(thread)
        return thread

    def _wait(self, ready):
        """With `changed` held: until ready(). Stopped if that is no longer to be hoped for."""
        start = time.perf_counter()
        self.changed.wait_for(lambda: self.stopped or ready())
        self.waited[threading.get_ident()] += time.perf_counter() - start
        if self.stopped:
            raise Stopped

    def _put(self, queue, item):
        with self.changed:
            self._wait(lambda: len(queue) < self.depth)
            queue.append(item)
            self.changed.notify_all()

    def _taken_from(self, queue):
        while True:
            with self.changed:
                self._wait(lambda: queue)
                item = queue.popleft()
                self.changed.notify_all()
            if item is END:
                return
            yield item
            del item  # not to be held while the next one is made

    def _stop(self, error=None):
        with self.changed:
            if self.error is None and not isinstance(error, Stopped):
                self.error = error
            self.stopped = True
            self.changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        try:
            if error is None:
                for queue, _ in self.given:
                    self._put(queue, END)
                for _, thread in self.given:
                    thread.join()
        except Stopped:
            pass
        finally:
            self._stop(error)  # also those that run ahead of a block that wants no more
            for thread in self.threads:
                thread.join()
        if self.error is not None and (error is None or isinstance(error, Stopped)):
            raise self.error
