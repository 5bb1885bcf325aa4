"""Peak memory of the training step, each candidate in a process of its own.

Run as a module it measures one candidate: settings as JSON on standard input, numbers as JSON on standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.lab.benchmark.candidates import Training
from netdeconv.lab.benchmark.settings import MemorySettings
from netdeconv.lab.devices import device_of, matmul_precision, threads
from netdeconv.lab.methods import Method

__all__ = ["measure", "measure_in_fresh_process", "peak_after", "saved_bytes"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

# glibc by default moves this limit up as blocks are freed, and keeps what lies below it; how the heap is broken up then
# decides on a tenth of the peak, another one every time. With a fixed limit in bytes what is freed is given back.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure_in_fresh_process(kind: str, settings: MemorySettings) -> dict[str, Any]:
    """What :func:`measure` finds where nothing else has used memory before.

    Raises:
        RuntimeError: the process failed; its complaint is in the message.
    """
    job = {"kind": kind, "settings": {f.name: getattr(settings, f.name) for f in dataclasses.fields(MemorySettings)}}
    done = subprocess.run(
        [sys.executable, "-m", "netdeconv.lab.benchmark.memory"],
        env=_GIVE_BACK | os.environ,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"measuring the memory of {Method.named(kind).label} failed with code {done.returncode} (-9: too little "
            f"memory): {done.stderr.strip()[-600:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, settings: MemorySettings) -> dict[str, Any]:
    """Memory that one candidate takes beyond what was taken before it was built.

    Returns:
        ``peak``: bytes at the worst moment of building and of three training steps (the first, a refresh in steady
        state, an ordinary one), and ``how`` it was found: ``"resident set"`` of the process on a CPU,
        ``"allocated"`` on a GPU. ``saved``: bytes of the tensors that autograd keeps for backward, without
        parameters, buffers and input, the larger of the two kinds of steady steps. ``model``: bytes of parameters
        and buffers.
    """
    device = device_of(settings.device)
    _warm_up(device)
    before = _reset_peak(device)
    training = Training(kind, settings)
    training.step()
    for refresh in (True, False):
        training.make_next_step(refresh=refresh)
        training.step()
    peak, how = peak_after(device)
    saved = []
    for refresh in (True, False):
        training.make_next_step(refresh=refresh)
        saved.append(saved_bytes(training))
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _held(training.model)}
    return {"peak": peak - before, "how": how, "saved": max(saved), "model": sum(held.values())}


def saved_bytes(training: Training) -> int:
    """Bytes that autograd keeps from the forward for the backward of one step, every storage counted once."""
    known = {t.untyped_storage().data_ptr() for t in (*_held(training.model), training.images, training.labels)}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = training.loss_of_batch()
    del loss
    return sum(found.values())


def peak_after(device: torch.device) -> tuple[int, str]:
    """The peak since :func:`_reset_peak`, and what it is a peak of."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated"
    status = _status()
    if "VmHWM" in status and _CLEAR.exists():
        return status["VmHWM"], "resident set"
    return _lifetime_peak(), "resident set, over the life of the process"


def _reset_peak(device: torch.device) -> int:
    """Forget the peak so far; returns what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: the peak begins anew at what is in use
    status = _status()
    return status["VmRSS"] if "VmRSS" in status else _lifetime_peak()


def _status() -> dict[str, int]:
    """Memory lines of the process's status in bytes; empty where the system has no such file."""
    try:
        lines = [line.split() for line in _STATUS.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}


def _lifetime_peak() -> int:
    # Not the first choice on Linux: there it starts from the parent's size when the process was forked.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _warm_up(device: torch.device) -> None:
    """Let torch load what a training step loads on first use, which is not the network's memory."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(2, 3, 8, 8, device=device)).sum().backward()
    optimizer.step()


def _held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _main() -> None:
    job = json.load(sys.stdin)
    settings = MemorySettings(**job["settings"])
    warnings.simplefilter("ignore")  # those of building a network, which the parent shows
    with threads(settings.threads), matmul_precision(settings.matmul_precision):
        print(json.dumps(measure(job["kind"], settings)))


if __name__ == "__main__":
    _main()
