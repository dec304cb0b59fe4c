import resource
import threading

import pytest
import torch

from deconvnet.sparse_coding import solve as solving
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.support import allocation
from deconvnet.support.allocation import memory_kept

pytestmark = pytest.mark.skipif(allocation._glibc() is None, reason="not the memory of glibc")
SIZE = 40 * 2**20


def faults_of_filling(times):
    """The pages that the system had to provide."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_and_returned_in_the_end():
    once = faults_of_filling(1)
    assert faults_of_filling(8) > 7 * once  # by default, every time
    before = resident()
    with memory_kept():
        faults_of_filling(2)
        assert faults_of_filling(8) < 2 * once
    assert resident() < before + SIZE / 4


def test_memory_is_kept_until_the_last_thread_has_left_and_after_errors():
    def work():
        with memory_kept(), memory_kept():
            faults_of_filling(1)

    with memory_kept():
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert allocation._users == 1
    with pytest.raises(KeyError), memory_kept():
        raise KeyError
    assert allocation._users == 0


def test_parameters_of_the_user_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    allocation._glibc.cache_clear()
    with memory_kept():
        assert allocation._users == 0
    monkeypatch.undo()
    allocation._glibc.cache_clear()


@pytest.mark.parametrize("method", ["fista", "admm", "half_quadratic"])
def test_codes_do_not_depend_on_it(method, monkeypatch):
    y, f = torch.randn(1, 1, 72, 72), torch.randn(64, 1, 5, 5)
    settings, codes = SolverSettings(method, iterations=3), []
    for least in (1, 2**60):
        monkeypatch.setattr(solving, "KEEP_BYTES", least)
        codes.append(solving.sparse_code(y, f, lam=20.0, settings=settings).z)
    assert torch.equal(*codes)
