"""Freed memory is kept: the second round of the same work maps no new pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import torch
from netdeconv.lab.allocator import keep_freed_memory

def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(10_000_000) for _ in range(2)]  # 40 MB each, above what glibc learns to keep
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
print(work(), min(work() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
@pytest.mark.parametrize("keep", [True, False])
def test_the_pages_of_freed_tensors_are_used_again(keep: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "keep" if keep else "leave"], capture_output=True, text=True, check=True
    )
    first, later = map(int, done.stdout.split())
    assert first > 10_000  # 80 MB in pages of 4 KB: the counter counts
    assert (later < 1_000) is keep  # at best, as the heap may still grow at the second time
