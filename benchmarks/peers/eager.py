"""Eager PyTorch: the specification of minilm.ops itself, which is what a plain PyTorch program would run."""

from __future__ import annotations

from typing import Any

from .base import OpPeer, Skipped


def op_peers(case: Any, device: str, dtype: Any) -> list[OpPeer | Skipped]:
    """Listed among our own implementations as `reference`; nothing to add."""
    return []
