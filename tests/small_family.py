"""A small family for the tests of weights: model, rules and checkpoints, each written down for itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from minilm.files.checkpoint import WeightError
from minilm.files.opening import open_checkpoint
from minilm.weights.loading import LoadReport, affine, load_weights
from minilm.weights.rules import Rule, copy, fuse, ignore, tied, transpose

C, KV, F, V = 6, 4, 10, 11
"""Channels, rows of k and of v, hidden size of the MLP, vocabulary."""

RULES = (
    copy("emb.weight", "body.embeddings.tokens.weight"),
    fuse([f"h.{{i}}.{x}.weight" for x in "qkv"], "body.layers.{i}.attention.qkv.weight", sizes="qkv"),
    fuse([f"h.{{i}}.{x}.bias" for x in "qkv"], "body.layers.{i}.attention.qkv.bias", sizes="qkv"),
    transpose("h.{i}.up.weight", "body.layers.{i}.mlp.up.weight"),
    fuse(["h.{i}.a", "h.{i}.b"], "body.layers.{i}.ab"),
    *affine("h.{i}.LayerNorm", "body.layers.{i}.mlp_norm"),
    ignore("h.{i}.mask", "a buffer"),
    ignore("pos*", "positions need no storage"),
    *affine("pooler.dense", "pooler.dense"),
    tied("cls.out.weight", "head.decoder.weight", "tied to the embeddings"),
    copy("cls.out.bias", "head.bias", also=("cls.bias", "cls.old.bias")),
    *affine("classifier", "head.out"),
)  # fmt: skip
PREFIXES = ("base.", "other.")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.qkv = nn.Linear(C, C + 2 * KV)
        self.mlp = nn.Module()
        self.mlp.up = nn.Linear(C, F, bias=False)
        self.mlp_norm = nn.LayerNorm(C)
        self.ab = nn.Parameter(torch.empty(4))


class Model(nn.Module):
    """What the engine sees of a model: parameter names, `fused_sizes`, and which heads there are."""

    def __init__(self, *, layers: int = 2, pooler: bool = False, labels: int = 0, lm: str = "") -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.embeddings = nn.Module()
        self.body.embeddings.tokens = nn.Embedding(V, C)
        self.body.layers = nn.ModuleList(Layer() for _ in range(layers))
        if pooler:
            self.pooler = nn.Module()
            self.pooler.dense = nn.Linear(C, C)
        if labels or lm:
            self.head = nn.Module()
        if labels:
            self.head.out = nn.Linear(C, labels)
        if lm:
            self.head.bias = nn.Parameter(torch.empty(V))
        if lm in ("untied", "shared"):
            self.head.decoder = nn.Linear(C, V, bias=False)
        if lm == "shared":
            self.head.decoder.weight = self.body.embeddings.tokens.weight

    def fused_sizes(self) -> dict[str, tuple[int, ...]]:
        return {"qkv": (C, KV, KV)}


def on_meta(**options: Any) -> Model:
    with torch.device("meta"):
        return Model(**options)


def stored(*, layers: int = 2, seed: int = 0, prefix: str = "", **extra: Tensor) -> dict[str, Tensor]:
    """A checkpoint of the bare model; `extra` replaces or adds tensors, by name."""
    random = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    tensors = {"emb.weight": tensor(V, C)}
    for i in range(layers):
        for name, rows in (("q", C), ("k", KV), ("v", KV)):
            tensors[f"h.{i}.{name}.weight"] = tensor(rows, C)
            tensors[f"h.{i}.{name}.bias"] = tensor(rows)
        tensors[f"h.{i}.up.weight"] = tensor(C, F)  # [in, out]
        tensors[f"h.{i}.LayerNorm.weight"] = tensor(C)
        tensors[f"h.{i}.LayerNorm.bias"] = tensor(C)
        tensors[f"h.{i}.a"] = tensor(2)
        tensors[f"h.{i}.b"] = tensor(2)
    return {prefix + name: value for name, value in tensors.items()} | extra


def expected(tensors: dict[str, Tensor], layers: int = 2) -> dict[str, Tensor]:
    """What the body's parameters must be."""
    values = {"body.embeddings.tokens.weight": tensors["emb.weight"]}
    for i in range(layers):
        ours, theirs = f"body.layers.{i}.", f"h.{i}."
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{theirs}{name}.{kind}"] for name in "qkv"]
            values[f"{ours}attention.qkv.{kind}"] = torch.cat(qkv)
            values[f"{ours}mlp_norm.{kind}"] = tensors[f"{theirs}LayerNorm.{kind}"]
        values[f"{ours}mlp.up.weight"] = tensors[f"{theirs}up.weight"].T
        values[f"{ours}ab"] = torch.cat([tensors[theirs + "a"], tensors[theirs + "b"]])
    return values


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def no_init(name: str, tensor: Tensor) -> None:
    raise AssertionError(f"{name} should have been loaded")


def load(
    path: Path,
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    init: Callable[[str, Tensor], None] = no_init,
    rules: tuple[Rule, ...] = RULES,
    **options: Any,
) -> LoadReport:
    with open_checkpoint(path) as checkpoint:
        return load_weights(
            model, checkpoint, rules, PREFIXES, dtype=dtype, device="cpu", init=init, **options
        )


def fill_with_sevens(name: str, tensor: Tensor) -> None:
    tensor.fill_(7)


def still_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def fails(path: Path, model: nn.Module, *parts: str, **options: Any) -> str:
    """Loading fails with a message that has all `parts`, and the model is as it was."""
    with pytest.raises(WeightError) as caught:
        load(path, model, **options)
    message = str(caught.value)
    assert all(part in message for part in (str(path), *parts)), message
    assert still_meta(model)
    return message


def damaged(data: bytes, draw: st.DataObject, header: int) -> bytes:
    """`data` cut, lengthened, or with some bytes changed, mostly in its header."""
    kind = draw.draw(st.sampled_from(["cut", "flip", "flip", "flip", "replace", "append"]))
    if kind == "cut":
        return data[: draw.draw(st.integers(0, len(data) - 1))]
    if kind == "append":
        return data + draw.draw(st.binary(min_size=1, max_size=9))
    changed = bytearray(data)
    where = st.integers(0, header - 1) | st.integers(0, min(40, header) - 1) | st.integers(0, len(data) - 1)
    for position in draw.draw(st.lists(where, min_size=1, max_size=4)):
        if kind == "flip":
            changed[position] ^= 1 << draw.draw(st.integers(0, 7))
        else:
            changed[position] = draw.draw(st.integers(0, 255))
    return bytes(changed)
