"""Checks of token ids and counts that users pass; errors name the option and its value."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

logger = logging.getLogger(__name__)

MOST_TEXTS = 16384
"""Maximum texts per prompt, as in vLLM; each takes memory before anything runs."""


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int, most: int | None = None, note: str = "") -> int:
    """The value as an int; ValueError unless it is an integer from `least` to `most`."""
    if not is_whole(value) or value < least or (most is not None and value > most):
        bounds = f"from {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}{note}, and is {value!r}")
    return int(value)


def number(name: str, value: Any) -> float:
    """The value as a float; ValueError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, and is {value!r}")
    return float(value)


def plain(value: Any) -> Any:
    """The Python number in an array or tensor without dimensions; other values unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value


def token_ids(name: str, value: Any) -> list[int]:
    """None, a number, a list, an array or a tensor -> list of ids; ValueError for anything else."""
    found = value.tolist() if hasattr(value, "tolist") else value
    if found is None:
        return []
    ids = [found] if is_whole(found) else found
    if isinstance(ids, str | bytes | dict) or not isinstance(ids, Iterable):
        raise ValueError(f"{name} must be token ids, and is {value!r:.80}")
    ids = [plain(i) for i in ids]
    if not all(map(is_whole, ids)):
        raise ValueError(f"{name} must be token ids, and is {value!r:.80}")
    return [int(i) for i in ids]


def in_vocabulary(name: str, ids: Sequence[int], size: int) -> list[int]:
    """The ids within the vocabulary. The others can never be generated; a warning names each once."""
    for token in ids:
        if not 0 <= token < size:
            _warn(name, token, size)
    return [token for token in ids if 0 <= token < size]


@lru_cache(maxsize=256)
def _warn(name: str, token: int, size: int) -> None:
    logger.warning("%s %d is ignored: the vocabulary has 0 to %d", name, token, size - 1)
