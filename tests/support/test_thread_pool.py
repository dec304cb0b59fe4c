"""Tasks on the threads of the pool."""

import contextlib
import time

import pytest
import torch

from deconvnet.support.thread_pool import run_in_turns


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tasks_that_wait_for_each_other_all_end_on_any_number_of_threads(threads):
    done = []

    def task(number):
        # Ready once all later ones are done.
        def run():
            if len(done) < 4 - number:
                return False
            done.append(number)
            return True

        return run

    with threads_of_torch(threads):
        run_in_turns([task(number) for number in range(5)])
    assert done == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tasks_that_wait_for_one_that_was_interrupted_end_too(threads):
    """As by Ctrl-C, after which a process would otherwise never end."""
    deadline, calls = time.monotonic() + 5, []

    def interrupted():
        time.sleep(0.01)
        raise KeyboardInterrupt

    def waiting():
        calls.append(time.monotonic())
        return calls[-1] > deadline

    with threads_of_torch(threads), pytest.raises(KeyboardInterrupt):
        run_in_turns([interrupted, waiting, waiting])
    # No thread is left that still calls them.
    number = len(calls)
    time.sleep(0.05)
    assert len(calls) == number and all(called < deadline for called in calls)


@contextlib.contextmanager
def threads_of_torch(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
