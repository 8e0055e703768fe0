"""Which matrices of a model are quantised, and the layers that hold them: replacements for `Linear`
and `Embedding` of `minilm.model`, for inference.

The linear layers of the body are quantised. So are a decoder's token table and output matrix, always in q8_0:
the output matrix is read in full for every token, and its errors go directly into the logits. Norms, biases,
positions, poolers and the heads of encoders are small and stay floating point, and so does the token table of
an encoder, since a text reads only a few of its rows.

The planes of a quantised layer (codes, scale, minimum) are buffers, so they are in `state_dict()` and move
with the module. A change of dtype does not change them; it applies to the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import ops
from .config import ModelConfig
from .ops.quantized import FORMATS, QuantizedWeight, check, dequantise, plane_shapes
from .weights import KEEP

METHOD = "minilm"
"""`quant_method` in the config.json of a folder that minilm quantised."""

ALIASES = {"q8": "q8_0", "q4": "q4_1"}
CHOICES = (*FORMATS, *ALIASES, "gguf", "float")
"""Values of `weights=`: a format; "gguf" keeps the formats of a GGUF file; "float" dequantises a quantised
checkpoint."""

_TABLES = "q8_0"
"""Format of a decoder's token table and output matrix."""
_TABLE = "body.embeddings.tokens.weight"
_OUTPUT = "head.decoder.weight"

Layer = TypeVar("Layer", bound="Quantized")


class Quantized(nn.Module):
    """Base class of both layers: the planes of one matrix [out, in] (`minilm.ops.quantized`)."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        check(type(self).__name__, weight)
        self.format = weight.format
        for name in ("codes", "scale", "minimum"):
            self.register_buffer(name, getattr(weight, name))
        self.eval()

    @property
    def quantized(self) -> QuantizedWeight:
        """The matrix as an argument for the ops; it shares the memory of the buffers."""
        return QuantizedWeight(self.format, self.codes, self.scale, self.minimum)

    def train(self: Layer, mode: bool = True) -> Layer:
        """Raises RuntimeError for training mode."""
        if mode:
            raise RuntimeError(
                f"a {type(self).__name__} ({self.format}) cannot be trained: load the model without weights="
            )
        return super().train(mode)

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        planes = {id(plane) for plane in self.quantized.planes.values()}

        def moved(tensor: Tensor) -> Tensor:
            """`fn`, except that planes keep their dtype, which the format fixes, and only change device."""
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in planes and new.dtype != tensor.dtype else new

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class QuantizedLinear(Quantized):
    """x W^T + b, with an optional activation, by `minilm.ops.quantized_linear`."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = bias

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return ops.quantized_linear(x, self.quantized, self.bias, activation)

    def extra_repr(self) -> str:
        """As for nn.Linear, with the format."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


class QuantizedEmbedding(Quantized):
    """A lookup table of vectors; the rows that are looked up are dequantised to `dtype`."""

    like: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        # An empty tensor that carries dtype and device, so that `.to()` changes them as for parameters.
        self.register_buffer("like", weight.scale.new_empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] -> [..., C]."""
        rows = {name: plane[tokens.flatten()] for name, plane in self.quantized.planes.items()}
        found = dequantise(QuantizedWeight(self.format, **rows), self.like.dtype)
        return found.view(*tokens.shape, self.embedding_dim)

    def scores(self, hidden: Tensor) -> Tensor:
        """The table as an output matrix: hidden [T, C] -> [T, V]."""
        return ops.quantized_linear(hidden, self.quantized)

    def extra_repr(self) -> str:
        """As for nn.Embedding, with the format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


def wanted_formats(
    model: nn.Module, spec: ModelConfig, weights: str | None, *, stored: str | None, gguf: bool, path: Path
) -> dict[str, str]:
    """The model's names of the matrices to quantise -> their format, or KEEP.

    `stored`: the format of the checkpoint at `path`, None if it is not in one of minilm's formats; `gguf`: it
    is a GGUF file. Raises ValueError for an unknown choice, or one that this checkpoint does not allow.
    """
    if weights is not None and weights not in CHOICES:
        raise ValueError(f"weights must be one of {', '.join(CHOICES)}, and is {weights!r}")
    if weights == "gguf" and not gguf:
        raise ValueError(f"weights='gguf' keeps the formats of a GGUF file, and {path} is not one")
    targets = _matrices(model, spec)
    if weights == "float" or (weights is None and (gguf or stored is None)):
        return {}
    format = ALIASES.get(weights or "", weights)
    if format in (None, "gguf") or (format == stored and not gguf):
        return dict.fromkeys(targets, KEEP)
    if stored is not None and not gguf:
        raise ValueError(f"{path} is already quantised to {stored}: quantise the original to {format}")
    assert format is not None
    formats = {name: _TABLES if name in (_TABLE, _OUTPUT) else format for name in targets}
    if format == "int8":  # int8 has no groups, so any number of columns fits
        formats = {
            name: format if _problem(formats[name], shape) else formats[name]
            for name, shape in targets.items()
        }
    problems = [problem for name, shape in targets.items() if (problem := _problem(formats[name], shape))]
    if len(problems) == len(targets):
        reason = problems[0] if problems else "it has none"
        raise ValueError(f"{path}: no matrix of the model can be quantised: {reason}")
    return formats


def _matrices(model: nn.Module, spec: ModelConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices that can be quantised."""
    found = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("body.")
    }
    if spec.causal:
        size = (spec.vocab_size, spec.hidden_size)
        found[_TABLE] = size
        if _OUTPUT in dict(model.named_parameters()):
            found[_OUTPUT] = size
    return found


def _problem(format: str, shape: tuple[int, int]) -> str:
    try:
        plane_shapes(format, *shape)
    except ValueError as error:
        return str(error)
    return ""


def install(model: nn.Module, name: str, matrix: QuantizedWeight) -> None:
    """Replace the layer whose weight is called `name` by a quantised layer; the bias is kept."""
    place, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(place)
    old = getattr(parent, leaf)
    if isinstance(old, nn.Embedding):
        dtype = next(p.dtype for p in model.parameters() if not p.is_meta)
        setattr(parent, leaf, QuantizedEmbedding(matrix, dtype, old.padding_idx))
    else:
        setattr(parent, leaf, QuantizedLinear(matrix, old.bias))


def quantized_matrices(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised matrices of a model, by the names of the parameters that they replace."""
    return {
        f"{name}.weight": module.quantized
        for name, module in model.named_modules()
        if isinstance(module, Quantized)
    }


def describe(model: nn.Module) -> dict[str, str] | None:
    """The `quantization_config` of a model: its layers' format, "mixed" if they have several; None if the
    model is not quantised."""
    formats = {name: matrix.format for name, matrix in quantized_matrices(model).items()}
    if not formats:
        return None
    layers = {format for name, format in formats.items() if name not in (_TABLE, _OUTPUT)}
    found = layers or set(formats.values())
    return {"quant_method": METHOD, "format": found.pop() if len(found) == 1 else "mixed"}
