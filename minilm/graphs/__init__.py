"""Running a model while it is traced into a graph: torch.compile, torch.export, torch.jit.trace, ONNX.

Normally the layers see no padding: `minilm.model.batch` removes it, and the number of tokens that remain
depends on the values of the mask. A graph must hold for all values of the mask. In a graph, therefore, the
layers process every position of the batch, T = B * S, and the class `Padded` replaces `Packed`: whatever
mixes or counts tokens (attention, positions, pooling, labels) applies the mask. Padding never affects a
token, and results are zero at padding, as without a graph.

`graphed` wraps a model's `forward`. A graph has no KV cache. After a call compiled by torch.compile, a
`LateCache` is built from the keys and values that the graph returns; calls that continue a cache run
uncompiled. An exported model has no cache at all.
"""

from .entry import graphed, in_graph, no_tracer_warnings, register_output
from .late import LateCache
from .padded import Padded

__all__ = ["LateCache", "Padded", "graphed", "in_graph", "no_tracer_warnings", "register_output"]
