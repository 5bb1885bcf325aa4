"""Freed memory stays with the process, however much it is."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# malloc without touching the pages: three gigabytes cost nothing. sbrk(0) is the end of the heap.
_PROGRAM = """
import ctypes, sys
from netdeconv.lab.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = libc.sbrk(0)
libc.free(libc.malloc(3_000_000_000))
print(libc.sbrk(0) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
@pytest.mark.parametrize(("how", "kept"), [("keep", True), ("leave", False)])
def test_a_freed_block_stays_in_the_heap(how: str, kept: bool) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 2_900_000_000) is kept  # the heap had some room before
