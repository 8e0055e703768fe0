"""GGUF models of decoders, presented as checkpoints of transformers.

llama.cpp stores a model in one file: weights, mostly quantised, configuration and tokenizer. `GGUFCheckpoint`
presents the weights under transformers' names, so that the rules of the families (Llama, Mistral, Qwen2,
Qwen3, SmolLM3, OLMo 2, Gemma 1 to 3) apply unchanged, and `hf_config()` reconstructs the config.json. Weights
are dequantised to float32 by the `gguf` package, a few rows at a time. For types that minilm computes with,
`read_codes_into` gives the codes unchanged.

The weights themselves differ in two points. Gemma's norms multiply by 1 + weight, and files have the sum.
Rotary embedding rotates pairs of channels of a head. transformers pairs channel j with j + D/2; llama.cpp,
for its architectures `llama` and `smollm3`, pairs 2j with 2j + 1, as in Meta's implementation, and its
converter reorders the rows of q and k accordingly: row 2j + s of a head is row j + s * D/2 in transformers,
for s in (0, 1). Reading restores the order. (For the others llama.cpp pairs like transformers.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.quantized import QuantizedWeight
from .checkpoint import Checkpoint, TensorInfo, WeightError
from .gguf_config import ARCHITECTURES, GEMMAS, config_from_metadata, head_counts
from .gguf_file import GGUFTensor, read_gguf, read_gguf_metadata

__all__ = ["GGUFCheckpoint", "read_gguf_metadata"]

_PIECE = 1 << 19  # elements that are dequantised at a time: 2 MB, and a few times that temporarily

_FORMATS = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}
"""Types in the file -> formats of `minilm.ops.quantized` with the same blocks."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AFTER = {  # of families with norms of what the sub-layers add
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHER_NAMES: dict[str, dict[str, str]] = {
    "olmo2": _AFTER,
    "gemma2": {**_AFTER, "ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {**_AFTER, "ffn_norm": "pre_feedforward_layernorm"},
}
"""Architecture -> names that it does not share with Llama."""
_NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]*)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"  # not a weight: hf_config() computes the rope scaling of Llama 3 from it


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of one of `ARCHITECTURES` (llama is also Mistral's), under transformers' names.

    `metadata` is that of the file. Tensors are read as float32; `stored` of their info is the type in the
    file. Opening raises WeightError if the file is damaged, or if its architecture, one of its tensors or its
    tensor types is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors = {}
        self._stream: BufferedReader | None = None
        file = read_gguf(self.path)
        self.metadata = file.metadata
        self.architecture = self._checked_architecture()
        self._stored: dict[str, GGUFTensor] = {}
        self._heads: dict[str, int] = {}  # number of heads of the tensors whose rows are reordered
        self._rope_freqs = file.tensors.get(_ROPE_FREQS)
        unreadable = _unreadable_types(tensor.type for tensor in file.tensors.values())
        for theirs, tensor in file.tensors.items():
            kind = tensor.type.name
            if tensor.type in unreadable:
                raise WeightError(f"{path}: {theirs} is stored as {kind}, which cannot be dequantised")
            if theirs == _ROPE_FREQS:
                continue
            name = self._name(theirs)
            self._stored[name] = tensor
            format = _FORMATS.get(kind, "") if len(tensor.shape) == 2 else ""
            self.tensors[name] = TensorInfo(tensor.shape, torch.float32, self.path, kind, format)
        if self.architecture in ("llama", "smollm3"):
            self._note_permuted()

    def _checked_architecture(self) -> str:
        architecture = self.metadata.get("general.architecture")
        kind = self.metadata.get("general.type", "model")
        parts = self.metadata.get("split.count", 1)
        if kind != "model":
            raise WeightError(f"{self.path}: expected a model, general.type is {kind!r}")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise WeightError(f"{self.path}: architecture {architecture!r} is not supported, only {known}")
        if parts not in (0, 1):
            raise WeightError(f"{self.path}: one of {parts} files; join them with llama-gguf-split --merge")
        return architecture

    def _name(self, theirs: str) -> str:
        found = _NAME.fullmatch(theirs)
        if found and found["layer"] is None and found["part"] in _NAMES:
            return f"{_NAMES[found['part']]}.{found['kind']}"
        inside = _LAYER_NAMES | _OTHER_NAMES.get(self.architecture, {})
        if found and found["layer"] is not None and found["part"] in inside:
            return f"model.layers.{found['layer']}.{inside[found['part']]}.{found['kind']}"
        raise WeightError(f"{self.path}: tensor {theirs} is not one of architecture {self.architecture}")

    def _note_permuted(self) -> None:
        heads, kv_heads = head_counts(self.path, self.metadata, self.architecture)
        for name, tensor in self._stored.items():
            part = name.split(".")[-2]
            if part in ("q_proj", "k_proj"):
                count = heads if part == "q_proj" else kv_heads
                if tensor.shape[0] % (2 * count) or len(tensor.shape) > 2:
                    shape = list(tensor.shape)
                    raise WeightError(f"{self.path}: {name} of shape {shape} does not fit {count} heads")
                self._heads[name] = count

    def hf_config(self) -> dict[str, Any]:
        """The config.json of this model, with transformers' names.

        Raises WeightError, which names the key, if the metadata is incomplete, contradicts the tensors, or
        has an option that these families do not support.
        """
        shapes = {name: info.shape for name, info in self.tensors.items()}
        factors = None
        if self._rope_freqs is not None:
            factors = self._rows(_ROPE_FREQS, self._rope_freqs, 0, self._rope_freqs.shape[0]).reshape(-1)
        return config_from_metadata(self.path, self.metadata, self.architecture, shapes, factors)

    def _read(self, name: str, info: TensorInfo, out: Tensor) -> None:
        for rows in self._pieces(name, info):
            piece = torch.from_numpy(self._rows(name, self._stored[name], rows.start, rows.stop))
            if self.architecture in GEMMAS and name.endswith("norm.weight"):
                piece = piece - 1
            out[rows].copy_(self._in_order(name, info, piece))

    def _read_codes(self, name: str, info: TensorInfo, out: QuantizedWeight) -> None:
        tensor = self._stored[name]
        for rows in self._pieces(name, info):
            data = torch.frombuffer(self._data(name, tensor, rows.start, rows.stop), dtype=torch.uint8)
            # A block consists of the scale, the minimum if there is one, and the codes.
            left = data.view(rows.stop - rows.start, out.scale.shape[1], -1)
            for plane in ("scale", "minimum"):
                if plane in out.planes:
                    values, left = left[..., :2], left[..., 2:]
                    values = values.contiguous().view(torch.float16).squeeze(-1)
                    out.planes[plane][rows].copy_(self._in_order(name, info, values))
            codes = left.flatten(1).view(out.codes.dtype)
            out.codes[rows].copy_(self._in_order(name, info, codes))

    def _pieces(self, name: str, info: TensorInfo) -> Iterator[slice]:
        """Slices of the rows of a tensor; rows of one head stay together if they have to be reordered."""
        rows = info.shape[0]
        unit = self._head_rows(name, info)
        step = max(1, _PIECE // (unit * math.prod(info.shape[1:]))) * unit
        if len(info.shape) == 1:
            step = rows  # a vector is one row in the file
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def _head_rows(self, name: str, info: TensorInfo) -> int:
        heads = self._heads.get(name, 0)
        return info.shape[0] // heads if heads else 1

    def _in_order(self, name: str, info: TensorInfo, piece: Tensor) -> Tensor:
        """Some rows in transformers' order."""
        if name not in self._heads:
            return piece
        pairs = piece.view(-1, self._head_rows(name, info) // 2, 2, *piece.shape[1:])  # head, j, s, ...
        return pairs.transpose(1, 2).reshape(piece.shape)

    def _rows(
        self, name: str, tensor: GGUFTensor, start: int, stop: int
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Rows `start` to `stop` of a tensor, dequantised."""
        from gguf.quants import dequantize

        data = np.frombuffer(self._data(name, tensor, start, stop), np.uint8)
        # As one long row, which the package dequantises at once: blocks do not depend on rows. Damaged scales
        # may overflow; the later check for NaN and infinity reports that.
        with np.errstate(all="ignore"):
            values = dequantize(data.reshape(1, -1), tensor.type)
        return np.asarray(values, np.float32).reshape(stop - start, *tensor.shape[1:])

    def _data(self, name: str, tensor: GGUFTensor, start: int, stop: int) -> bytearray:
        """The bytes of rows `start` to `stop` of a tensor."""
        row = tensor.nbytes // tensor.shape[0] if len(tensor.shape) > 1 else 0
        data = bytearray(row * (stop - start) if row else tensor.nbytes)
        try:
            if self._stream is None:
                self._stream = open(self.path, "rb")  # noqa: SIM115 - kept open from one tensor to the next
            self._stream.seek(tensor.offset + start * row)
            if self._stream.readinto(data) != len(data):
                raise WeightError(f"{self.path}: {name} ends early: the file has been cut while it was open")
        except OSError as error:
            raise WeightError(f"{self.path}: {name} cannot be read: {error}") from error
        return data

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _unreadable_types(types: Any) -> set[Any]:
    """The tensor types among `types` that the installed `gguf` cannot dequantise."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    unreadable = set()
    for kind in set(types):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            unreadable.add(kind)
    return unreadable
