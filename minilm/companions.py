"""What other libraries ask of a model: transformers' Trainer, accelerate, peft, and programs that move state
dicts about.

A Transformer can be read without it.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .graphs import in_graph
from .weights import resized, stored_tensors

if TYPE_CHECKING:
    from .config import ModelConfig
    from .families import Family, Head, PretrainedConfig


class LoadedKeys(NamedTuple):
    """What `load_state_dict` returns, as PyTorch names it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Companion(nn.Module):
    """The part of a model that others call."""

    if TYPE_CHECKING:
        family: Family
        head_kind: ClassVar[Head]
        config: PretrainedConfig
        body: Any
        spec: ModelConfig

        def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None: ...

    accepts_loss_kwargs: ClassVar[bool] = True
    """For transformers' Trainer: `num_items_in_batch` is an argument of `forward`."""
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    _keys_to_ignore_on_save: ClassVar[None] = None

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """The parameters under transformers' names, for ``theirs.load_state_dict``: views, so writing to them
        writes to the model. (`state_dict` has the names of the modules here.)"""
        family, head = self.family, self.head_kind
        tensors = stored_tensors(self, family.rules(head), family.prefix(head), {})
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in PyTorch; a state dict of transformers' model is understood too, and copied into the
        parameters (`assign` is refused for it)."""
        if not state_dict or any(name.startswith(("body.", "head.")) for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        places = self.checkpoint_state_dict()
        prefix = self.family.prefix(self.head_kind)
        given = {self._name_here(name, places, prefix): value for name, value in state_dict.items()}
        unexpected = [name for name in given if name not in places and not self._is_known(name)]
        missing = [name for name in places if name not in given]
        misshapen = [
            f"{name} is {list(given[name].shape)}, and {list(place.shape)} here"
            for name, place in places.items()
            if name in given and given[name].shape != place.shape
        ]
        problems = misshapen + [f"{name} is missing" for name in missing] * strict
        problems += [f"{name} is unexpected" for name in unexpected] * strict
        if assign:
            problems.append("assign=True cannot split or join matrices: leave it out")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise RuntimeError(
                f"the state dict does not fit {type(self).__name__}: {'; '.join(problems[:5])}{more}"
            )
        with torch.no_grad():
            for name, place in places.items():
                if name in given:
                    place.copy_(given[name])
        return LoadedKeys(missing, unexpected)

    def _name_here(self, name: str, places: Mapping[str, Tensor], prefix: str) -> str:
        """The body's names come with the prefix of a model with a head, or without."""
        for other in (name, prefix + name, *(name.removeprefix(p) for p in self.family.prefixes)):
            if other in places:
                return other
        return name

    def _is_known(self, name: str) -> bool:
        """Whether the family writes this name and the model has no use for it, as for a tied matrix."""
        short = next((name.removeprefix(p) for p in self.family.prefixes if name.startswith(p)), name)
        rules = self.family.rules(self.head_kind)
        return any(rule.match_key(key) is not None for rule in rules for key in (name, short))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, the elements of quantised matrices among them."""
        counts = {
            name: p.numel() for name, p in self.named_parameters() if p.requires_grad or not only_trainable
        }
        if not only_trainable:
            modules = ((n, m) for n, m in self.named_modules() if hasattr(m, "quantized"))
            counts |= {name: math.prod(module.quantized.shape) for name, module in modules}
        return sum(
            count
            for name, count in counts.items()
            if not (exclude_embeddings and name.startswith("body.embeddings."))
        )

    def get_memory_footprint(self) -> int:
        """Bytes that the parameters and the quantised matrices occupy."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Grow or shrink the vocabulary to `new_num_tokens` (None: as it is), rounded up to a multiple.

        Output matrices and biases follow; new rows are near the mean of the old, or if not `mean_resizing`
        random.
        """
        table: Any = self.body.embeddings.tokens
        output: Any = getattr(getattr(self, "head", None), "decoder", None)
        for name, size in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, and is {size!r}")
        for matrix in (table, output):
            if hasattr(matrix, "quantized"):
                raise ValueError(f"a matrix in {matrix.format} cannot be resized: load it without weights=")
        step, asked = pad_to_multiple_of or 1, new_num_tokens or self.spec.vocab_size
        rows, std = -(-asked // step) * step, float(self.config.get("initializer_range", 0.02))
        parameters = dict(self.named_parameters())
        for name in ("body.embeddings.tokens.weight", "head.decoder.weight", "head.bias"):
            if name in parameters and rows != len(parameters[name]):
                owner, _, leaf = name.rpartition(".")
                near = mean_resizing and (output is not None or leaf == "weight")  # a tied one's bias is 0
                new = resized(name, parameters[name], rows, near, std)
                setattr(self.get_submodule(owner), leaf, nn.Parameter(new, parameters[name].requires_grad))
        if output is not None:
            output.out_features = rows
        table.num_embeddings = self.config.vocab_size = rows
        if table.padding_idx is not None and table.padding_idx >= rows:
            table.padding_idx = None
        self.spec = replace(self.spec, vocab_size=rows)
        return table

    def get_output_embeddings(self) -> nn.Module | None:
        """The matrix that scores the vocabulary, where it is not the token table; None where it is, or there
        is none."""
        found = getattr(getattr(self, "head", None), "decoder", None)
        return found if isinstance(found, nn.Module) else None

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks first."""
        raise RuntimeError(
            "torch.jit.script cannot read a model of minilm, whose code is more than TorchScript knows: use "
            "torch.jit.trace(model, example) or torch.export.export(model, example)"
        )

    def tie_weights(self, **_: Any) -> None:
        """Nothing to do: a tied matrix is the token table itself here."""

    @property
    def loss_type(self) -> str | None:
        """For transformers' Trainer, which counts the labels of a batch by it: those of a causal model are
        shifted."""
        return "ForCausalLM" if self.head_kind == "causal-lm" else None

    def can_generate(self) -> bool:
        """Whether it has `generate`."""
        return self.head_kind == "causal-lm"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass, in place of keeping what they made."""
        return bool(getattr(self.body, "gradient_checkpointing", False))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Keep the inputs of each block alone for the backward pass, which runs the blocks again (Chen et al.
        2016, arXiv:1604.06174). Options of transformers may ask for what is done: use_reentrant=False,
        every_n_layers=1, offload=False."""
        asked = {"use_reentrant": False, "every_n_layers": 1, "offload": False}
        given = {**options, **(gradient_checkpointing_kwargs or {})}
        for name, value in given.items():
            if name not in asked or value not in (None, asked[name]):
                raise ValueError(f"gradient checkpointing has {asked}, and got {name}={value!r}")
        self.body.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything again."""
        self.body.gradient_checkpointing = False

    def enable_input_require_grads(self) -> None:
        """For adapters under reentrant checkpointing, which is not what is done here: nothing is needed."""

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> Any:
        """Save to a folder and upload it with huggingface_hub, which has the credentials; options are those
        of `HfApi.upload_folder` (commit_message, revision, create_pr, token). Returns its answer."""
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=url.repo_id, folder_path=folder, **options)


def check_save_options(options: dict[str, Any]) -> None:
    """Options of transformers' `save_pretrained` that ask for what is done anyway, or for nothing; others are
    a TypeError or ValueError. `state_dict`, `save_function` and `is_main_process` are accelerate's: the model
    writes its own parameters."""
    harmless: dict[str, tuple[Any, ...]] = {
        "safe_serialization": (True,),
        "push_to_hub": (False,),
        "save_peft_format": (True, False),
        "variant": (None,),
        "token": (None,),
        "save_function": (),
        "state_dict": (),
    }
    for name, value in options.items():
        if name not in harmless:
            raise TypeError(f"save_pretrained has no argument {name!r}")
        if harmless[name] and value not in harmless[name]:
            raise ValueError(f"save_pretrained does not support {name}={value!r:.60}")


def refuse_transforms() -> None:
    """RuntimeError within `torch.vmap`: the lengths of a batch are read to pack it, which that does not
    allow."""
    if in_graph():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(
            "torch.vmap cannot run a model of minilm, which reads the ids that it is given: pass the whole "
            "batch, [batch, tokens], to the model itself, or several models one after the other"
        )
