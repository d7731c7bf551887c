"""Bytes: of live tensors, of the device's allocator, of the process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: glibc's M_MMAP_THRESHOLD; from so many bytes up a block is mapped by itself, and where glibc itself ends up.
_MMAP_THRESHOLD, _SMALL, _USUAL = -3, 2 * 2**20, 32 * 2**20


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Elements x element size, each tensor object once; None counts nothing."""
    distinct = {id(t): t for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def spanned_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes that contiguous tensors lie on, each byte once however many views cover it."""
    held = (t for t in tensors if t is not None and t.numel())
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held)
    total, end = 0, 0
    for first, last in spans:
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within it the C library gives large blocks back as they are freed, where it is glibc; otherwise nothing happens.

    glibc by itself keeps blocks of up to 32 MiB, and passes over batches of many lengths then hold half as much again as they use."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    set_option(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _USUAL)


def give_back() -> None:
    """Have the C library give back what it keeps of freed memory now, where it is glibc: small blocks, and those of other threads."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


class Meter:
    """Allocated and peak bytes: the CUDA allocator's on a GPU, the resident set of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sampled = 0
        self._kernel_peak = _STATUS.exists()

    def read(self, *, reset_peak: bool = False) -> tuple[int, int]:
        """(allocated, peak since the last reset), in bytes."""
        if self.device.type == "cuda":
            now, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
            if reset_peak:
                torch.cuda.reset_peak_memory_stats(self.device)
            return now, now if reset_peak else peak
        now = psutil.Process().memory_info().rss
        if reset_peak:
            self._sampled = now
            self._kernel_peak = _reset_kernel_peak()
        self._sampled = max(self._sampled, now)
        return now, max(now, _kernel_peak()) if self._kernel_peak else self._sampled


def _reset_kernel_peak() -> bool:
    """Whether the kernel let us reset its record of this process's peak (Linux; writing 5 is documented in proc(5))."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _kernel_peak() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
