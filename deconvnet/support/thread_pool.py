"""A thread pool of torch's size for compiled loops, which release the interpreter's lock."""

from __future__ import annotations

import collections
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_all(tasks: list[Callable[[], object]]) -> None:
    """Run all tasks on as many threads as torch uses, including the calling one.

    A thread takes the next task when it is free, so that none waits for one that the system does
    not let run.
    """

    def finished(task: Callable[[], object]) -> bool:
        task()
        return True

    run_in_turns([functools.partial(finished, task) for task in tasks])


def run_in_turns(tasks: list[Callable[[], bool]]) -> None:
    """Call tasks that may wait for each other, on as many threads, until each has returned True.

    A task that returns False is called again later, by any thread, so that tasks proceed even if
    the system lets only one of the threads run. After an exception, such as that of Ctrl-C, no task
    is called again, since it might wait for the one that has failed, for ever.
    """
    waiting, failed = collections.deque(tasks), threading.Event()

    def work() -> None:
        try:
            while not failed.is_set():
                try:
                    task = waiting.popleft()
                except IndexError:  # nothing is left, or another thread was faster
                    return
                if not task():
                    waiting.append(task)
                    time.sleep(0)
        except BaseException:
            failed.set()
            raise

    workers = min(torch.get_num_threads(), len(tasks))
    others = [_pool(workers - 1).submit(work) for _ in range(1, workers)]
    try:
        work()
    finally:
        for other in others:
            # One that has not begun has nothing left to do.
            if not other.cancel():
                other.result()


@functools.lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="deconvnet")


if hasattr(os, "register_at_fork"):
    # A forked process inherits the pool but not its threads, and would wait for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)
