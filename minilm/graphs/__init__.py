"""Running a model while it is traced into a graph: torch.compile, torch.export, torch.jit.trace, ONNX.

`minilm.model.batch` drops padding, and how much is left depends on the values of the mask; a graph is made
for all values. So in a graph every place of a batch goes through the layers, T = B * S, and `Padded` stands
where `Packed` stands otherwise: what looks across tokens (attention, positions, pooling, labels) looks at
the mask. Nothing at padding reaches a token, and results have zeros there, as ever.

`graphed` wraps a model's `forward`. A graph has no KV cache: torch.compile makes one of the keys and values
that the graph gives (`LateCache`), and steps that continue a cache run outside of it; an exported model has
none.
"""

from .entry import graphed, in_graph, quiet, taken_apart
from .late import LateCache
from .padded import Padded

__all__ = ["LateCache", "Padded", "graphed", "in_graph", "quiet", "taken_apart"]
