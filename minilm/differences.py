"""Warnings given once per process: deliberate differences from transformers, and renamed arguments.

docs/differences.md lists all deliberate differences. Those that would change a result silently are here, and
warn where they take effect.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

DIFFERENCES = {
    "left-padding": (
        "this batch is padded on the left, and the model has a position table: each text starts at position "
        "0, as with padding on the right (transformers counts padding as positions, unless position_ids are "
        "given)"
    ),
    "first-token": (
        "this batch is padded on the left: the first token of each text is pooled (transformers pools the "
        "first column of the batch, which is padding)"
    ),
    "labels-at-padding": (
        "labels at padding are ignored in the loss (transformers counts all labels except -100, so its loss "
        "differs)"
    ),
    "labels-after-padding": (
        "this batch is padded on the left: the label of each text's first token is ignored in the loss "
        "(transformers predicts it from the padding before it, so its loss differs)"
    ),
}

said: set[str] = set()
"""Keys of the warnings already given in this process. Clear it to get them again."""


def tell(difference: str) -> None:
    """Give the warning for one of `DIFFERENCES`, the first time only."""
    once(difference, f"{DIFFERENCES[difference]}; see docs/differences.md")


def once(key: str, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, once per `key`, with the line of the user's program that called minilm as the location."""
    if key in said:
        return
    said.add(key)
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("minilm", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def renamed(who: str, options: Mapping[str, Any], older: Mapping[str, str]) -> dict[str, Any]:
    """`options` under their current names; `older` maps older name -> current name.

    Each older name warns once. None means that an option is not given. Raises TypeError if both names are.
    """
    found = dict(options)
    for old, new in older.items():
        if old not in found:
            continue
        value = found.pop(old)
        if value is not None and found.get(new) is not None:
            raise TypeError(f"{who}: {old} is the older name of {new}, and both are given")
        if value is not None or new not in found:
            found[new] = value
        once(f"{who}({old}=)", f"{who}: {old} is now called {new}", FutureWarning)
    return found
