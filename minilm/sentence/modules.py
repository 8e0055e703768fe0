"""The modules after the Transformer in a sentence-transformers model: Pooling, Dense, Normalize, LayerNorm,
Dropout.

modules.json lists them in order; each has a folder with its config.json and, if it has weights,
model.safetensors. Both the older and the newer format of these files are read. Each module takes and returns
`Features`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..files import (
    INDEX,
    MOST_CONFIG,
    SINGLE,
    FileError,
    WeightError,
    has_file,
    open_checkpoint,
    read_json,
    saving,
)
from ..model import Linear, Packed


@dataclass
class Features:
    """The data that modules take and return: token and sentence embeddings of a batch of texts."""

    tokens: Tensor
    """[T, C], packed."""
    packed: Packed
    prompt_length: int | Sequence[int] = 0
    """Prompt tokens at the start of every text (or of each text), with the special token before them."""
    sentence: Tensor | None = None
    """[B, D], set by the pooling."""

    def get(self, name: str) -> Tensor:
        """`token_embeddings` or `sentence_embedding`."""
        if name == "token_embeddings":
            return self.tokens
        if self.sentence is None:
            raise ValueError("there is no sentence embedding yet: a Pooling module must come before")
        return self.sentence

    def set(self, name: str, value: Tensor) -> None:
        """Set `token_embeddings` or `sentence_embedding`."""
        if name == "token_embeddings":
            self.tokens = value
        else:
            self.sentence = value


class Module(nn.Module):
    """One module of a sentence encoder."""

    kind: ClassVar[str]
    """Its name in modules.json, after `sentence_transformers.models.`."""

    def forward(self, features: Features) -> Features:
        """Change the features, in place, and return them."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The contents of its config.json."""
        raise NotImplementedError

    def dimension(self, size: int) -> int:
        """Size of the embeddings after this module, given `size` before it."""
        return size

    @classmethod
    def load(cls, folder: Path) -> Module:
        """Read the module from its folder. Raises FileError, WeightError."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write config.json, and the weights if there are any."""
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        with saving(folder, replaces=(SINGLE, INDEX)) as new:
            write_json(new / "config.json", self.config())
            if tensors:
                from safetensors.torch import save_file

                save_file(tensors, new / SINGLE, metadata={"format": "pt"})


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older format: one flag per mode, concatenated in this order."""


class Pooling(Module):
    """One vector per text: its first or last token, the maximum or the mean of each channel, the sum divided
    by the square root of the number of tokens, or a mean weighted by position: 1, 2, 3, ...

    Several modes are concatenated. Without `include_prompt` the tokens of the prompt are excluded, but they
    count as positions. A text without remaining tokens gives zeros.
    """

    kind = "Pooling"

    def __init__(
        self,
        embedding_dimension: int,
        pooling_mode: str | Sequence[str] = "mean",
        include_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.modes = (pooling_mode,) if isinstance(pooling_mode, str) else tuple(pooling_mode)
        if not self.modes or not set(self.modes) <= set(MODES):
            raise ValueError(
                f"pooling_mode must be one or several of {', '.join(MODES)}, and is {pooling_mode!r}"
            )
        self.embedding_dimension = embedding_dimension
        self.include_prompt = include_prompt

    def forward(self, features: Features) -> Features:
        """token embeddings [T, C] -> sentence embeddings [B, C * number of modes]."""
        packed, x = features.packed, features.tokens
        skip = 0 if self.include_prompt else features.prompt_length
        if type(packed) is not Packed:
            features.sentence = self._in_graph(packed, x, skip)
            return features
        rows = torch.arange(len(x), device=x.device)  # packed indices of the tokens that count
        offsets = packed.cu_seqlens.long()
        if skip:
            sizes = offsets.diff()
            skips = torch.tensor(skip, device=x.device).expand(len(sizes))
            rows = rows[packed.positions >= skips.repeat_interleave(sizes)]
            offsets = F.pad((sizes - skips).clamp(min=0).cumsum(0), (1, 0))
        wide = x if x.dtype == torch.float64 else x.float()

        def counts() -> Tensor:
            return offsets.diff()[:, None].to(wide.dtype)

        def bags(mode: str, weights: Tensor | None = None) -> Tensor:
            return F.embedding_bag(
                rows, wide, offsets, mode=mode, per_sample_weights=weights, include_last_offset=True
            )

        def token(index: Tensor) -> Tensor:
            if len(rows) == 0:
                return wide.new_zeros(len(offsets) - 1, wide.shape[1])
            return wide[rows[index.clamp(0, len(rows) - 1)]].masked_fill(counts() == 0, 0.0)

        pooled = []
        for mode in self.modes:
            if mode == "cls":
                pooled.append(token(offsets[:-1]))
            elif mode == "lasttoken":
                pooled.append(token(offsets[1:] - 1))
            elif mode in ("max", "mean"):
                pooled.append(bags(mode))
            elif mode == "weightedmean":
                positions = packed.positions[rows] + 1
                total = F.pad(positions.cumsum(0), (1, 0))[offsets].diff()[:, None]
                pooled.append(bags("sum", positions.to(wide.dtype)) / total.clamp(min=1))
            else:
                pooled.append(bags("sum") / counts().clamp(min=1).sqrt())
        features.sentence = (pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)).to(x.dtype)
        return features

    def _in_graph(self, padded: Any, x: Tensor, skip: int | Sequence[int]) -> Tensor:
        """The same of a batch with its padding, by ops that can be exported."""
        rows = padded.rows(x if x.dtype == torch.float64 else x.float())  # [B, S, C]
        positions, there = padded.rows(padded.positions), padded.tokens_at()
        if skip:
            there = there & (positions >= torch.tensor(skip, device=x.device).view(-1, 1))
        chosen = there[..., None].to(rows.dtype)
        counts, at = chosen.sum(1), torch.arange(padded.batch, device=x.device)
        pooled = []
        for mode in self.modes:
            if mode in ("cls", "lasttoken"):
                column = torch.where(there, positions, -1).argmax(1) if mode == "lasttoken" else None
                column = there.int().argmax(1) if column is None else column
                pooled.append(rows[at, column] * (counts > 0))
            elif mode == "max":
                highest = rows.masked_fill(~there[..., None], torch.finfo(rows.dtype).min).amax(1)
                pooled.append(highest.masked_fill(counts == 0, 0.0))
            elif mode == "weightedmean":
                weights = chosen * (positions + 1)[..., None]
                pooled.append((rows * weights).sum(1) / weights.sum(1).clamp(min=1))
            else:
                total, size = (rows * chosen).sum(1), counts.clamp(min=1)
                pooled.append(total / (size if mode == "mean" else size.sqrt()))
        found: Tensor = torch.cat(pooled, dim=-1).to(x.dtype)
        return found

    def dimension(self, size: int) -> int:
        """C * number of modes."""
        return size * len(self.modes)

    def config(self) -> dict[str, Any]:
        """In the older format, which every release reads, unless the order of modes needs the newer one."""
        if list(self.modes) == [mode for mode in _FLAGS.values() if mode in self.modes]:
            flags = {flag: mode in self.modes for flag, mode in _FLAGS.items()}
            modes: dict[str, Any] = {"word_embedding_dimension": self.embedding_dimension, **flags}
        else:
            modes = {"embedding_dimension": self.embedding_dimension, "pooling_mode": list(self.modes)}
        return {**modes, "include_prompt": self.include_prompt}

    @classmethod
    def load(cls, folder: Path) -> Pooling:
        """From config.json, in either format."""
        config = _config(folder)
        older = config.pop("word_embedding_dimension", None)
        config.setdefault("embedding_dimension", older)
        flags = [mode for flag, mode in _FLAGS.items() if config.pop(flag, False)]
        config["pooling_mode"] = config.get("pooling_mode") or flags or "mean"
        if not isinstance(config["embedding_dimension"], int):
            size = config["embedding_dimension"]
            raise FileError(
                f"{folder / 'config.json'}: embedding_dimension must be a number, and is {size!r}"
            )
        return _build(cls, folder, config, ("embedding_dimension", "pooling_mode", "include_prompt"))


class _Named(Module):
    """A module that works on the token or the sentence embeddings, depending on its config."""

    def __init__(
        self, module_input_name: str = "sentence_embedding", module_output_name: str | None = None
    ) -> None:
        super().__init__()
        self.input = module_input_name
        self.output = module_output_name or module_input_name
        for name in (self.input, self.output):
            if name not in ("sentence_embedding", "token_embeddings"):
                raise ValueError(f"a module works on sentence_embedding or token_embeddings, not on {name!r}")

    def config(self) -> dict[str, Any]:
        """The names; default names are left out, so that older releases can read the file too."""
        if self.input == self.output == "sentence_embedding":
            return {}
        return {"module_input_name": self.input, "module_output_name": self.output}


class Normalize(_Named):
    """Scales embeddings to length 1."""

    kind = "Normalize"

    def forward(self, features: Features) -> Features:
        """x / |x|; zeros stay zeros."""
        x = features.get(self.input)
        eps = max(1e-12, torch.finfo(x.dtype).tiny)  # 1e-12 is zero in float16
        features.set(self.output, F.normalize(x, dim=-1, eps=eps))
        return features

    @classmethod
    def load(cls, folder: Path) -> Normalize:
        """From config.json; older models do not have one."""
        config = _config(folder) if has_file(folder / "config.json") else {}
        return _build(cls, folder, config, ("module_input_name", "module_output_name"))


ACTIVATIONS = (
    nn.Identity, nn.Tanh, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU,
    nn.LeakyReLU, nn.Softplus, nn.Softsign, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.LogSigmoid, nn.Tanhshrink,
)  # fmt: skip
"""The only activation classes that a file may name."""


def activation(name: str, file: Path | str) -> nn.Module:
    """The activation whose class `file` names (torch.nn.modules.activation.Tanh). Runs no other code."""
    for cls in ACTIVATIONS:
        if name in (f"{cls.__module__}.{cls.__name__}", f"torch.nn.{cls.__name__}"):
            made: nn.Module = cls()
            return made
    known = ", ".join(cls.__name__ for cls in ACTIVATIONS)
    raise FileError(f"{file}: the activation function {name!r} is not one of torch.nn's {known}")


class Dense(_Named):
    """act(W x + b), optionally with a residual connection (projected if the sizes differ)."""

    kind = "Dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_function: nn.Module | None = None,
        *,
        use_residual: bool = False,
        **names: Any,
    ) -> None:
        super().__init__(**names)
        self.linear = Linear(in_features, out_features, bias=bias)
        self.activation_function = nn.Tanh() if activation_function is None else activation_function
        self.use_residual = use_residual
        projected = use_residual and in_features != out_features
        self.residual = Linear(in_features, out_features, bias=False) if projected else None

    def forward(self, features: Features) -> Features:
        """[..., in_features] -> [..., out_features]."""
        x = features.get(self.input)
        y = self.activation_function(self.linear(x))
        if self.use_residual:
            y = y + (x if self.residual is None else self.residual(x))
        features.set(self.output, y)
        return features

    def dimension(self, size: int) -> int:
        """out_features."""
        return self.linear.out_features

    def config(self) -> dict[str, Any]:
        """Sizes, and the class name of the activation."""
        act = type(self.activation_function)
        config: dict[str, Any] = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{act.__module__}.{act.__qualname__}",
            **super().config(),
        }
        return {**config, "use_residual": True} if self.use_residual else config

    @classmethod
    def load(cls, folder: Path) -> Dense:
        """From config.json and model.safetensors."""
        file = folder / "config.json"
        config = _config(folder)
        config["activation_function"] = activation(config.get("activation_function", "torch.nn.Tanh"), file)
        names = ("in_features", "out_features", "bias", "activation_function", "use_residual")
        return read_weights(
            _build(cls, folder, config, (*names, "module_input_name", "module_output_name")), folder
        )


class LayerNorm(Module):
    """LayerNorm of the sentence embeddings."""

    kind = "LayerNorm"

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dimension)

    def forward(self, features: Features) -> Features:
        """[B, D] -> [B, D]."""
        features.sentence = self.norm(features.get("sentence_embedding"))
        return features

    def config(self) -> dict[str, Any]:
        """The size."""
        return {"dimension": self.norm.normalized_shape[0]}

    @classmethod
    def load(cls, folder: Path) -> LayerNorm:
        """From config.json and model.safetensors."""
        return read_weights(_build(cls, folder, _config(folder), ("dimension",)), folder)


class Dropout(Module):
    """Dropout of the sentence embeddings, in training."""

    kind = "Dropout"

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.p = dropout

    def forward(self, features: Features) -> Features:
        """[B, D] -> [B, D]."""
        features.sentence = F.dropout(features.get("sentence_embedding"), self.p, self.training)
        return features

    def config(self) -> dict[str, Any]:
        """The probability."""
        return {"dropout": self.p}

    @classmethod
    def load(cls, folder: Path) -> Dropout:
        """From config.json."""
        return _build(cls, folder, _config(folder), ("dropout",))


M = TypeVar("M", bound=Module)

KINDS: dict[str, type[Module]] = {cls.kind: cls for cls in (Pooling, Normalize, Dense, LayerNorm, Dropout)}


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", limit=MOST_CONFIG)


def _build(cls: type[M], folder: Path, config: dict[str, Any], names: Sequence[str]) -> M:
    """The module that config.json describes; `names` are the allowed options."""
    file = folder / "config.json"
    check_known(file, cls.__name__, {name: value for name, value in config.items() if name not in names})
    try:
        return cls(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"{file}: {error}") from error


def check_known(file: Path, kind: str, rest: dict[str, Any]) -> None:
    """Raise FileError if `rest` has options that are set, so that no setting is silently ignored."""
    unknown = sorted(name for name, value in rest.items() if value not in (None, False))
    if unknown:
        raise FileError(f"{file}: {kind} with {', '.join(unknown)} is not supported")


def read_weights(module: M, folder: Path) -> M:
    """Load the parameters of `module` from model.safetensors in `folder`. Every tensor must have a place."""
    parameters = dict(module.named_parameters())
    with open_checkpoint(folder) as checkpoint:
        if set(parameters) != set(checkpoint.tensors):
            expected, found = (", ".join(sorted(names)) for names in (parameters, checkpoint.tensors))
            raise WeightError(f"{checkpoint.path}: expected the tensors {expected}, found {found}")
        for name, parameter in parameters.items():
            checkpoint.read_into(name, parameter.data)
    return module


def write_json(file: Path, value: Any) -> None:
    """Write `file`, a path in a folder from `saving`."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_modules(modules: Sequence[Module], features: Features) -> Features:
    """Run all modules after the Transformer. The usual ones, mean pooling and optionally Normalize, are one
    op."""
    if _are_one_op(modules, features):
        unit = len(modules) == 2
        features.sentence = ops.pool(features.tokens, features.packed.cu_seqlens, unit=unit)
        return features
    for module in modules:
        features = module(features)
    return features


def _are_one_op(modules: Sequence[Module], features: Features) -> bool:
    pooling = modules[0] if modules else None
    return (
        type(pooling) is Pooling
        and type(features.packed) is Packed
        and pooling.modes == ("mean",)
        and (pooling.include_prompt or not features.prompt_length)
        and len(modules) <= 2
        and all(type(m) is Normalize and m.input == m.output == "sentence_embedding" for m in modules[1:])
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    )
