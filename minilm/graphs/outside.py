"""What torch.compile leaves alone. A file of its own, imported while a graph is made: the decorator brings in
torch._dynamo, which nobody else should wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="past_key_values: a call that continues a KV cache is not compiled")  # type: ignore[no-untyped-call, untyped-decorator]
def outside(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call, as if nothing was compiled."""
    return function(*arguments, **options)
