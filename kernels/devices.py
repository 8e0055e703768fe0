"""What a GPU is to the choice of block sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """The properties that heuristics may look at."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    """Bytes of shared memory that one program may use."""
    processors: int
    """Multiprocessors."""


CHIPS = {
    "sm_80": Device("NVIDIA A100", (8, 0), 163 * 1024, 108),
    "sm_86": Device("NVIDIA A10", (8, 6), 99 * 1024, 72),
    "sm_90": Device("NVIDIA H100", (9, 0), 227 * 1024, 132),
    "sm_100": Device("NVIDIA B200", (10, 0), 227 * 1024, 148),
}
"""A device of each kind that the compile report compiles for. Limits of shared memory: CUDA C++ Programming
Guide, table of technical specifications per compute capability."""

INTERPRETER = Device("Triton's interpreter", (9, 0), 227 * 1024, 2)
"""What the interpreter plays: two multiprocessors, so that a grid of few programs is walked over by them."""

_assumed: Device | None = None


@contextmanager
def assume(device: Device) -> Iterator[None]:
    """Inside, launchers choose as on `device`, whatever runs them."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before


def assumed() -> bool:
    """Whether a device is assumed, so that nothing need be able to run."""
    return _assumed is not None


@cache
def _cuda(index: int) -> Device:
    found: Any = torch.cuda.get_device_properties(index)
    return Device(
        found.name,
        (found.major, found.minor),
        found.shared_memory_per_block_optin,
        found.multi_processor_count,
    )


def device_of(device: torch.device) -> Device:
    """The properties of the device that tensors are on; for a CPU, what the interpreter plays."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return INTERPRETER
    return _cuda(torch.cuda.current_device() if device.index is None else device.index)
