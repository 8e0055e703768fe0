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
        "this batch is padded on the left, and the model has a table of positions: each text begins at the "
        "first of them, as with padding on the right (transformers counts the padding, unless it is given "
        "position_ids)"
    ),
    "first-token": (
        "a text that is padded on the left is judged by its own first token (transformers takes the first "
        "column of the batch, which is padding)"
    ),
    "labels-at-padding": (
        "labels stand at padding, and are left out of the loss (transformers counts all but -100, so that "
        "its loss is another)"
    ),
    "labels-after-padding": (
        "labels of a batch that is padded on the left: the first token of a text is not predicted "
        "(transformers predicts it from the padding before it, so that its loss is another)"
    ),
}

said: set[str] = set()
"""What has been said in this process. Empty it to hear all again."""


def tell(difference: str) -> None:
    """Warn of one of `DIFFERENCES`, the first time that it happens."""
    once(difference, f"{DIFFERENCES[difference]}; see docs/differences.md")


def once(key: str, message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, the first time that it is asked for under `key`, of the program's line that called minilm."""
    if key in said:
        return
    said.add(key)
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("minilm", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def renamed(who: str, options: Mapping[str, Any], older: Mapping[str, str]) -> dict[str, Any]:
    """`options` with the names that they have now, by `older`: older name -> newer name.

    Each older name warns once. None stands for an option that is not given. Raises TypeError where both are.
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
