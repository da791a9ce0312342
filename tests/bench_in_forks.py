"""bench.py, but what it measures alone runs in forks of it, not in new processes, which import PyTorch first."""
import multiprocessing
import sys

import bench

if __name__ == "__main__":
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
    sys.exit(bench.main())
