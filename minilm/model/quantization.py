"""Which matrices of a model are quantised, and where they go.

Quantised are the linear layers of the body. A decoder's token table and output matrix are so too, in q8_0
whatever the others: an output matrix is read in full for every token, and its errors are errors of the
logits. Norms, biases, positions, poolers and the heads of encoders are small and stay floating, and so does
the token table of an encoder, of which a text reads a few rows.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..ops.quantized import FORMATS, QuantizedWeight, plane_shapes
from ..weights import KEEP
from .pretrained import PreTrainedModel
from .quantized_layers import Quantized, QuantizedEmbedding, QuantizedLinear

METHOD = "minilm"
"""`quant_method` in the config.json of a folder that minilm quantised."""

ALIASES = {"q8": "q8_0", "q4": "q4_1"}
CHOICES = (*FORMATS, *ALIASES, "gguf", "float")
"""Values of `weights=`: a format; "gguf" keeps those of a GGUF file; "float" dequantises what is
quantised."""

_TABLES = "q8_0"
"""Of a decoder's tables."""
_TABLE = "body.embeddings.tokens.weight"
_OUTPUT = "head.decoder.weight"


def wanted_formats(
    model: PreTrainedModel, weights: str | None, *, stored: str | None, gguf: bool, path: Path
) -> dict[str, str]:
    """Our names of the matrices to quantise -> the format, or KEEP.

    `stored`: the format of the checkpoint at `path`, None if it is not quantised as minilm computes with it;
    `gguf`: it is a GGUF file. Raises ValueError for a choice that does not exist or cannot be had.
    """
    if weights is not None and weights not in CHOICES:
        raise ValueError(f"weights must be one of {', '.join(CHOICES)}, and is {weights!r}")
    if weights == "gguf" and not gguf:
        raise ValueError(f"weights='gguf' keeps the formats of a GGUF file, and {path} is none")
    targets = _matrices(model)
    if weights == "float" or (weights is None and (gguf or stored is None)):
        return {}
    format = ALIASES.get(weights or "", weights)
    if format in (None, "gguf") or (format == stored and not gguf):
        return dict.fromkeys(targets, KEEP)
    if stored is not None and not gguf:
        raise ValueError(f"{path} is quantised already, to {stored}: quantise the original to {format}")
    assert format is not None
    formats = {name: _TABLES if name in (_TABLE, _OUTPUT) else format for name in targets}
    if format == "int8":  # has no groups to fill
        formats = {
            name: format if _problem(formats[name], shape) else formats[name]
            for name, shape in targets.items()
        }
    problems = [problem for name, shape in targets.items() if (problem := _problem(formats[name], shape))]
    if len(problems) == len(targets):
        reason = problems[0] if problems else "it has none"
        raise ValueError(f"{path}: no matrix of the model can be quantised: {reason}")
    return formats


def _matrices(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Names and shapes of the matrices that can be quantised."""
    found = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("body.")
    }
    if model.spec.causal:
        size = (model.spec.vocab_size, model.spec.hidden_size)
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
    """Put a quantised layer in the place of the one whose weight has the name `name`; its bias stays."""
    place, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(place)
    old = getattr(parent, leaf)
    if isinstance(old, nn.Embedding):
        dtype = next(p.dtype for p in model.parameters() if not p.is_meta)
        setattr(parent, leaf, QuantizedEmbedding(matrix, dtype, old.padding_idx))
    else:
        setattr(parent, leaf, QuantizedLinear(matrix, old.bias))


def quantized_matrices(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised matrices of a model, by the names of the parameters in whose place they are."""
    return {
        f"{name}.weight": module.quantized
        for name, module in model.named_modules()
        if isinstance(module, Quantized)
    }


def describe(model: PreTrainedModel) -> dict[str, str] | None:
    """`quantization_config` of a model: its layers' format, "mixed" if they have several; None if it is not
    quantised."""
    formats = {name: matrix.format for name, matrix in quantized_matrices(model).items()}
    if not formats:
        return None
    layers = {format for name, format in formats.items() if name not in (_TABLE, _OUTPUT)}
    found = layers or set(formats.values())
    return {"quant_method": METHOD, "format": found.pop() if len(found) == 1 else "mixed"}
