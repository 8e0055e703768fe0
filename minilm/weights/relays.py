"""The parts of an unfused model: the modules of its tree, and the relays in its body, which call them.

`minilm.weights.unfused` builds and removes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..differences import tell

Path = tuple[str, ...]
OWN: set[type] = set()
"""The classes of minilm's linear layers and tables, added by `minilm.weights.unfused`."""


class Node(nn.Module):
    """A module of the tree that only contains others."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Raises RuntimeError: a node does not compute."""
        raise RuntimeError(
            "this module of an unfused model only contains others and cannot be called: call the model, or "
            "model.base_model"
        )


class BaseNode(Node):
    """The base model of a model with a head: `model.bert`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_model"] = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Calls ``model.base_model``."""
        return self.__dict__["_model"].base_model(*arguments, **options)


class PoolerNode(Node):
    """BERT's pooler: tanh(W x + b) of the first token of each sequence. Its child `dense` has W and b."""

    def forward(self, hidden: Tensor, packed: Any) -> Tensor:
        """hidden [T, C] -> [B, C]."""
        if packed.padded_left:
            tell("first-token")
        return project(self._modules["dense"], hidden[packed.first()], "tanh")


class LayerNorm(nn.LayerNorm):
    """LayerNorm, computed by `minilm.ops`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm, computed by `minilm.ops`."""

    weight: nn.Parameter

    def __init__(self, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        if self.plus_one:
            wide = x if x.dtype == torch.float64 else x.float()
            return ops.rms_norm(wide, 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)
        return ops.rms_norm(x, self.weight, self.eps)


class OutputMatrix(nn.Module):
    """The output matrix, `lm_head`. If it is tied, its weight is the token table.

    It is not an `nn.Linear`, so PEFT's target_modules="all-linear" leaves it out, as it does in models of
    transformers. ``model.get_submodule`` returns it as a linear layer with the same parameters, which PEFT
    can wrap.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., V]."""
        return ops.linear(x, self.weight, self._parameters.get("bias"))

    def as_linear(self) -> nn.Linear:
        """A linear layer with the same parameters."""
        linear = linear_of(self.kind, self._parameters)
        linear.train(self.training)
        return linear


def linear_of(kind: type[nn.Linear], parameters: dict[str, nn.Parameter | None]) -> nn.Linear:
    """A linear layer with these parameters (shared, not copied)."""
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    made = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made._parameters.update(weight=weight, bias=bias)
    return made


def project(layer: Any, x: Tensor, activation: str | None = None) -> Tensor:
    """activation(layer(x)), as one operation if the layer is one of minilm's."""
    y: Tensor
    if activation is None:
        y = layer(x)
    elif type(layer) in OWN:
        y = layer(x, activation)
    else:
        y = ops.ACTIVATIONS[activation](layer(x))
    return y


def walk(root: nn.Module, path: Path) -> Any:
    """The module at a path, also if another module was wrapped around one along the path."""
    found: Any = root
    for name in path:
        inside = found._modules.get(name)
        found = getattr(found, name) if inside is None else inside
    return found


class Relay(nn.Module):
    """Takes the place of a layer in the body, and calls the module that has its name in the tree."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        super().__init__()
        self.__dict__.update(_model=model, path=path)

    @property
    def named(self) -> Any:
        """The module that has this name at present."""
        return walk(self.__dict__["_model"], self.__dict__["path"])

    def forward(self, *arguments: Any) -> Any:
        """Call that module."""
        return self.named(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.named, name)

    def extra_repr(self) -> str:
        return ".".join(self.__dict__["path"])


class LinearRelay(Relay):
    """A relay for a linear layer, followed by the activation that the caller requests."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return project(self.named, x, activation)


class JoinedRelay(nn.Module):
    """A relay for a fused matrix: query, key and value, or gate and up."""

    def __init__(self, model: nn.Module, paths: Sequence[Path]) -> None:
        super().__init__()
        self.__dict__.update(_model=model, paths=tuple(paths))

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., out], the outputs of the parts one after the other."""
        model = self.__dict__["_model"]
        y = torch.cat([walk(model, path)(x) for path in self.__dict__["paths"]], -1)
        return y if activation is None else ops.ACTIVATIONS[activation](y)

    def extra_repr(self) -> str:
        return ", ".join(".".join(path) for path in self.__dict__["paths"])


class NormRelay(Relay):
    """A relay for a norm, which also adds the residual."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + delta), x + delta)."""
        total = x if delta is None else x + delta
        return self.named(total), total

    def norm(self, x: Tensor) -> Tensor:
        """norm(x)."""
        y: Tensor = self.named(x)
        return y


class TableRelay(Relay):
    """A relay for the table of token types. Its first row is read if a call gives no types."""

    @property
    def weight(self) -> Tensor:
        """The vectors, as that module computes them."""
        table = self.named
        plain = table.weight
        if type(table) in OWN:
            return plain  # type: ignore[no-any-return]
        rows: Tensor = table(torch.arange(plain.shape[0], device=plain.device))
        return rows


class MaskedLM(nn.Module):
    """The masked LM head, with relays for its layers."""

    def __init__(self, head: Any, decoder: Relay) -> None:
        super().__init__()
        self.activation = head.activation
        self.dense, self.norm, self.next_sentence = head.dense, head.norm, head.next_sentence
        self.decoder = decoder

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [T, C] -> logits [T, V]; the token table is not needed."""
        scores: Tensor = self.decoder(self.norm.norm(self.dense(hidden, self.activation)))
        return scores
