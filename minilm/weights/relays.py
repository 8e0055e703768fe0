"""What stands in an unfused model: the modules of its tree, and in its body the relays that look there.

`minilm.weights.unfused` puts them together and takes them apart again.
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
"""The classes of linear layers and tables that models here are made of."""


class Node(nn.Module):
    """A place in the tree that has others below it."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Only what is below it computes."""
        raise RuntimeError(
            "this is a name in an unfused model, not a layer: call the model, or model.base_model"
        )


class BaseNode(Node):
    """The base model of a model with a head: `model.bert`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_model"] = model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As ``model.base_model``."""
        return self.__dict__["_model"].base_model(*arguments, **options)


class PoolerNode(Node):
    """tanh(W x + b) of a sequence's first token (BERT); `dense` is below it."""

    def forward(self, hidden: Tensor, packed: Any) -> Tensor:
        """hidden [T, C] -> [B, C]."""
        if packed.padded_left:
            tell("first-token")
        return project(self._modules["dense"], hidden[packed.first()], "tanh")


class LayerNorm(nn.LayerNorm):
    """LayerNorm by `minilm.ops`."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm by `minilm.ops`."""

    weight: nn.Parameter

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C]."""
        return ops.rms_norm(x, self.weight, self.eps)


class OutputMatrix(nn.Module):
    """What scores the vocabulary: `lm_head`. The table of tokens where the two are tied.

    No `nn.Linear`, so that PEFT's target_modules="all-linear" leaves it out, as it leaves that of a model of
    transformers out. ``model.get_submodule`` gives a linear layer with its parameters, to be
    put in its place.
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
        """The same as a linear layer."""
        linear = linear_of(self.kind, self._parameters)
        linear.train(self.training)
        return linear


def linear_of(kind: type[nn.Linear], parameters: dict[str, nn.Parameter | None]) -> nn.Linear:
    """A linear layer with these very parameters."""
    weight, bias = parameters["weight"], parameters.get("bias")
    assert weight is not None
    made = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made._parameters.update(weight=weight, bias=bias)
    return made


def project(layer: Any, x: Tensor, activation: str | None = None) -> Tensor:
    """activation(layer(x)), in one operation where the layer is one of ours."""
    y: Tensor
    if activation is None:
        y = layer(x)
    elif type(layer) in OWN:
        y = layer(x, activation)
    else:
        y = ops.ACTIVATIONS[activation](layer(x))
    return y


def walk(root: nn.Module, path: Path) -> Any:
    """The module at a path, through whatever was put around one on the way."""
    found: Any = root
    for name in path:
        inside = found._modules.get(name)
        found = getattr(found, name) if inside is None else inside
    return found


class Relay(nn.Module):
    """Stands in the body for the module at one name of the tree."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        super().__init__()
        self.__dict__.update(_model=model, path=path)

    @property
    def named(self) -> Any:
        """What stands there now."""
        return walk(self.__dict__["_model"], self.__dict__["path"])

    def forward(self, *arguments: Any) -> Any:
        """As the module there."""
        return self.named(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.named, name)

    def extra_repr(self) -> str:
        return ".".join(self.__dict__["path"])


class LinearRelay(Relay):
    """For a linear layer, with the activation that its caller asks for."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., out]."""
        return project(self.named, x, activation)


class JoinedRelay(nn.Module):
    """For one matrix of several: query, key and value; gate and up."""

    def __init__(self, model: nn.Module, paths: Sequence[Path]) -> None:
        super().__init__()
        self.__dict__.update(_model=model, paths=tuple(paths))

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """x [..., in] -> [..., the sum of the parts]."""
        model = self.__dict__["_model"]
        y = torch.cat([walk(model, path)(x) for path in self.__dict__["paths"]], -1)
        return y if activation is None else ops.ACTIVATIONS[activation](y)

    def extra_repr(self) -> str:
        return ", ".join(".".join(path) for path in self.__dict__["paths"])


class NormRelay(Relay):
    """For a norm, with the residual sum before it."""

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + delta), x + delta)."""
        total = x if delta is None else x + delta
        return self.named(total), total

    def norm(self, x: Tensor) -> Tensor:
        """norm(x)."""
        y: Tensor = self.named(x)
        return y


class TableRelay(Relay):
    """For the table of types, of which the first row is read where a call gives none."""

    @property
    def weight(self) -> Tensor:
        """The vectors, as the module there gives them."""
        table = self.named
        plain = table.weight
        if type(table) in OWN:
            return plain  # type: ignore[no-any-return]
        rows: Tensor = table(torch.arange(plain.shape[0], device=plain.device))
        return rows


class MaskedLM(nn.Module):
    """The head that guesses masked tokens, over relays: `AutoModelForMaskedLM`'s."""

    def __init__(self, head: Any, decoder: Relay) -> None:
        super().__init__()
        self.activation = head.activation
        self.dense, self.norm, self.next_sentence = head.dense, head.norm, head.next_sentence
        self.decoder = decoder

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [T, C] -> logits [T, V]; the token table is not needed."""
        scores: Tensor = self.decoder(self.norm.norm(self.dense(hidden, self.activation)))
        return scores
