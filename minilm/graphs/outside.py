"""Calls that torch.compile does not compile.

This is a separate file, imported only while a graph is made, because the decorator imports torch._dynamo,
which takes time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="past_key_values: a call that continues a KV cache is not compiled")  # type: ignore[no-untyped-call, untyped-decorator]
def uncompiled(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run the call uncompiled."""
    return function(*arguments, **options)
