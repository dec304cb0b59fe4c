import json
import subprocess
import sys
import threading

import pytest
import torch

from deconvnet.sparse_coding import solve as solving
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.support import allocation
from deconvnet.support.allocation import memory_kept

pytestmark = pytest.mark.skipif(allocation._glibc() is None, reason="not the memory of glibc")

# In the main thread of a process of its own: elsewhere, what other tests have left in memory
# decides where blocks are placed.
PAGES = """
import ctypes, json, resource, runpy, sys
memory_kept = runpy.run_path(sys.argv[1])["memory_kept"]
libc, size = ctypes.CDLL(None), 40 * 2**20
libc.malloc.restype = ctypes.c_void_p

def provided(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

once, usually, before = provided(1), provided(8), resident()
with memory_kept():
    provided(1)
    kept = provided(8)
print(json.dumps([once, usually, kept, resident() - before]))
"""


def test_freed_memory_is_used_again_and_returned_in_the_end():
    command = [sys.executable, "-c", PAGES, allocation.__file__]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    once, usually, kept, left = json.loads(run.stdout)
    assert usually > 7 * once
    assert kept < once
    assert left < once / 4


def test_memory_is_kept_until_the_last_thread_has_left_and_after_errors():
    def work():
        with memory_kept(), memory_kept():
            assert allocation._users >= 3

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
