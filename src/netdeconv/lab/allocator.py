"""Memory that a training step has freed is kept for the next one."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1  # glibc's word for it; any number would be a limit in bytes


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory in this process, as torch does by itself on a GPU.

    By default glibc hands blocks above 32 MB back to the system when a tensor is freed, and the system clears and maps
    every page anew at the next step: some 60,000 page faults in a step of VGG-11, which on a virtual machine cost a
    fifth of its time. The process stays as large as it ever was. Applies to the whole process, until it ends.

    Returns:
        Whether it was done; elsewhere than with glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
