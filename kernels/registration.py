"""Registers launchers as PyTorch ops.

On a GPU they are `triton_op`s: torch.compile traces into them and sees the kernels. In Triton's interpreter
(TRITON_INTERPRET=1, kernels run as NumPy on the CPU) tracing would run the interpreter on tensors without
data, so there the same functions are opaque `custom_op`s.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED: bool = isinstance(tl.cdiv, InterpretedFunction)
"""Whether the kernels of this process run in Triton's interpreter (decided when triton was imported)."""

kernel_op = torch.library.custom_op if INTERPRETED else torch.library.triton_op
"""Decorator: ``@kernel_op("minilm_triton::name", mutates_args={})``."""
