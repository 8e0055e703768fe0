"""The properties of a GPU that determine block sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    """The properties that heuristics may use."""

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
"""One device per architecture of the compile report. Limits of shared memory: CUDA C++ Programming Guide,
table of technical specifications per compute capability."""

INTERPRETER = Device("Triton's interpreter", (9, 0), 227 * 1024, 2)
"""The device that the interpreter simulates: two multiprocessors, so that few programs loop over the work."""

_assumed: Device | None = None


@contextmanager
def assume(device: Device) -> Iterator[None]:
    """Inside, launchers choose configurations for `device`, whatever the real one."""
    global _assumed
    before, _assumed = _assumed, device
    try:
        yield
    finally:
        _assumed = before


def assumed() -> bool:
    """Whether `assume` is active, so that nothing has to run."""
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
    """The properties of the device of tensors; for a CPU, those that the interpreter simulates."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return INTERPRETER
    return _cuda(torch.cuda.current_device() if device.index is None else device.index)
