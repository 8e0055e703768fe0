"""Candidate configurations for `minilm tune`, in addition to a heuristic's result; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from .devices import Device
from .heuristics import attention_shared_memory, next_power_of_2

WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4)
ATTENTION = {"queries": (16, 32, 64, 128), "keys": (16, 32, 64, 128, 256), "num_warps": (4, 8)}
VARIED: dict[str, dict[str, tuple[int, ...]]] = {
    "norm": {"rows": (1, 2, 4, 8), "num_warps": WARPS},
    "norm_backward": {"rows": (1, 2, 4, 8), "num_warps": WARPS, "programs": (1, 2, 4)},
    "activation_backward": {"num_warps": WARPS, "programs": (2, 4, 8, 16)},
    "rope": {"heads": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)},
    "decode_parts": {"parts": (1, 2, 4, 8, 16, 32, 64, 128), "keys": (64, 128, 256, 512)},
    "decode_combine": {"parts": (8, 16, 32, 64), "num_warps": (1, 2, 4, 8)},
    "linear_cross_entropy": {"rows": (128, 256, 512, 1024, 2048, 4096)},
    "attention": {**ATTENTION, "num_stages": STAGES},
    "attention_dq": {**ATTENTION, "num_stages": (1, 2, 3)},
    "attention_dkdv": {**ATTENTION, "num_stages": (1, 2, 3)},
}
"""Fields of a block to vary, and their values. For kernels that are not listed, only warps and stages are
varied, not the tiles."""

LENGTHS = {"queries": "max_queries", "keys": "max_keys"}
"""Tile dimension -> the length beyond which it would be mostly masked."""

SHARED_MEMORY: dict[str, Callable[[Mapping[str, int], Any, Device], int]] = {
    "attention": lambda sizes, block, device: attention_shared_memory(
        sizes["head_dim"], sizes["itemsize"], block, device, bool(sizes["biased"])
    ),
}
"""Bytes of shared memory that a block needs, if a formula is known. Blocks that do not fit are excluded."""


def _distance(one: Any, other: Any) -> float:
    """Number of halvings and doublings (for stages: differences) between two blocks."""
    steps = 0.0
    for name, a, b in zip(one._fields, one, other, strict=True):
        if name == "num_stages":
            steps += abs(a - b)
        elif a != b:
            steps += abs(max(a, 1).bit_length() - max(b, 1).bit_length())
    return steps


def candidates(kernel: str, sizes: Mapping[str, int], answer: Any, device: Device) -> list[Any]:
    """Blocks to try for `kernel` at `sizes`: the heuristic's own `answer` first, the most similar ones next.

    All combinations of the values in VARIED whose tiles are not longer than the sequences, and whose shared
    memory fits the device.
    """
    varied = VARIED.get(kernel) or {
        name: values
        for name, values in (("num_warps", WARPS), ("num_stages", STAGES))
        if name in answer._fields
    }
    needed = SHARED_MEMORY.get(kernel)
    found = []
    for values in product(*varied.values()):
        block = answer._replace(**dict(zip(varied, values, strict=True)))
        too_long = any(
            field in varied
            and length in sizes
            and getattr(block, field) > max(16, next_power_of_2(sizes[length]))
            for field, length in LENGTHS.items()
        )
        too_large = needed is not None and needed(sizes, block, device) > device.shared_memory
        if block != answer and not too_long and not too_large:
            found.append(block)
    return [answer, *sorted(found, key=lambda block: _distance(block, answer))]
