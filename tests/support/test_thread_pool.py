"""Tasks on the threads of the pool."""

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

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run_in_turns([task(number) for number in range(5)])
    finally:
        torch.set_num_threads(before)
    assert done == [4, 3, 2, 1, 0]
