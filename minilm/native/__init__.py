"""A whole forward pass, or several decoding steps, as one call of the native extension.

Performance layer: skip on first reading. It computes what `minilm.model` defines, and the model does not
import it: the dispatch table does, when one of its ops is first used (`minilm.ops.dispatch.PLUGINS`).
"""

from __future__ import annotations

from typing import Any

import torch

from ..ops import WholeTraits
from ..ops.dispatch import Implementation, register
from . import blocks, embed, steps


def _supports(traits: WholeTraits) -> str | None:
    """None, or why the extension cannot run this call."""
    if traits.device != "cpu":
        return f"the extension has no kernel for {traits.device}"
    if traits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the extension has no kernel for {traits.dtype}"
    return traits.obstacle


_WHOLE: dict[str, tuple[Any, Any]] = {
    "embed": (embed.run_embed, embed.obstacle),
    "blocks": (blocks.run_blocks, blocks.obstacle),
    "decode_step": (steps.run_steps, steps.obstacle),
}
for _op, (_call, _examine) in _WHOLE.items():
    register(Implementation(_op, "native", _call, _supports, _examine))
