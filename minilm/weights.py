"""Weights: from the names of a checkpoint to ours, and back (being written)."""

from __future__ import annotations

from minilm.rules import Rule, affine, copy, fuse, ignore, tied, transpose

__all__ = ["Rule", "affine", "copy", "fuse", "ignore", "tied", "transpose"]
