"""Runs stages of work in parallel: each in a thread of its own, joined by short queues.

    with Pipeline() as pipeline:
        frames = pipeline.ahead("reading", reader)      # a thread takes the reader's items, a few ahead of the loop
        write = pipeline.beside("writing", work)        # a thread runs work(items); write(item) adds one of its items
        for frame in frames:
            write(model(frame))
    print(pipeline.busy)                                # {"reading": 1.2, "writing": 3.4}: seconds, without waiting

Items keep their order. A full queue blocks the thread that fills it, so memory does not depend on the number of items.
OpenCV and PyTorch release the interpreter's lock while they work, so threads are enough.

The block ends when all work is done. An error in any stage, or in the block itself (also Ctrl-C), ends all stages, and
the block raises the first error. All threads wait for one condition, which every change notifies, so none waits for a
stage that has ended.

This file works alone; it needs Python only.
"""
import collections
import threading
import time

END = object()


class Stopped(Exception):
    """Raised in a stage at its queues after another stage has failed. It never leaves a Pipeline's block."""


class Pipeline:
    """See above. depth: how many items a queue holds. busy: a Counter of seconds by stage, to add to."""

    def __init__(self, depth=4, busy=None):
        self.depth, self.busy = depth, collections.Counter() if busy is None else busy
        self.stopped, self.error = False, None
        self.changed = threading.Condition()   # guards all attributes and queues
        self.waited = collections.Counter()    # seconds waited at queues, by thread
        self.threads, self.given = [], []      # all threads; (queue, thread) of each stage made by `beside`

    def ahead(self, name, items):
        """An iterator over the same items, which a thread takes from `items` a few ahead."""
        queue = collections.deque()

        def take():
            for item in items:
                self._put(queue, item)
            self._put(queue, END)
        self._start(name, take)
        return self._taken_from(queue)

    def beside(self, name, work):
        """Runs work(items) in a thread; returns the function that adds an item. The items end when the block ends."""
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
        """Wait until ready() is true; the caller holds `changed`. Raises Stopped if the pipeline has stopped."""
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
            del item  # free it before the next one is made

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
            self._stop(error)  # also ends stages of `ahead` whose items the block did not use up
            for thread in self.threads:
                thread.join()
        if self.error is not None and (error is None or isinstance(error, Stopped)):
            raise self.error
