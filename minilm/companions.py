"""Methods that other libraries call on a model: transformers' Trainer, accelerate, peft, and code that copies
state dicts.

Not needed to understand the Transformer.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .graphs import in_graph
from .weights import CONFIG_KEY, POOLER, UNFUSED, config_tensor, resized, stored_tensors

if TYPE_CHECKING:
    from .config import ModelConfig
    from .families import Family, Head, PretrainedConfig


class LoadedKeys(NamedTuple):
    """Result of `load_state_dict`, with PyTorch's field names."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Companion(nn.Module):
    """The methods of a model that other libraries call."""

    if TYPE_CHECKING:
        family: Family
        head_kind: ClassVar[Head]
        config: PretrainedConfig
        body: Any
        spec: ModelConfig
        generation_config: Any

        def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None: ...

    accepts_loss_kwargs: ClassVar[bool] = True
    """For transformers' Trainer: `forward` takes `num_items_in_batch`."""
    main_input_name: ClassVar[str] = "input_ids"
    input_modalities: ClassVar[tuple[str, ...]] = ("text",)
    output_modalities: ClassVar[tuple[str, ...]] = ("text",)
    supports_gradient_checkpointing: ClassVar[bool] = True
    _keys_to_ignore_on_save: ClassVar[None] = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As in PyTorch, with one exception: transformers' feature-extraction pipeline gets a tuple, since it
        takes the first item of a result by position."""
        result = super().__call__(*arguments, **options)
        if torch.compiler.is_compiling() or _asking() != "transformers.pipelines.feature_extraction":
            return result
        return result.to_tuple()

    @property
    def base_model_prefix(self) -> str:
        """The name of the base model within a model with a head: "bert"."""
        return self.family.prefixes[0].rstrip(".")

    def _prepare_generation_config(self, generation_config: Any = None, **options: Any) -> tuple[Any, Any]:
        """For transformers' pipelines: a generation configuration with those of the options that it has, and
        the remaining options."""
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        return config, config.update(**options)

    def unfuse(self) -> Any:
        """Give the modules the checkpoint's names, with separate linear layers for query, key, value, gate
        and up, in place (`minilm.weights.unfused`). Libraries that look for modules by name need this; PEFT
        calls it by itself. Parameters are new objects, so create the optimizer afterwards. The native passes
        do not run until `fuse` is called. Raises ValueError for a quantised model. Returns the model."""
        from .weights import unfuse_modules

        unfuse_modules(self)
        return self

    def fuse(self) -> Any:
        """Reverse `unfuse`; parameters are new objects again. Raises ValueError if the model contains an
        adapter. Returns the model."""
        from .weights import fuse_modules

        fuse_modules(self)
        return self

    @property
    def is_unfused(self) -> bool:
        """Whether the modules have the checkpoint's names at present."""
        return UNFUSED in self.__dict__

    @property
    def peft_config(self) -> Any:
        """The configurations of PEFT's adapters in the model; raises AttributeError if there are none.

        PEFT's tuners read this attribute before they look for modules, so a read by PEFT unfuses the model.
        They delete it after they have removed their modules, which fuses the model again.
        """
        if "_peft_config" in self.__dict__:
            return self.__dict__["_peft_config"]
        if _asking().startswith("peft.tuners."):
            self.unfuse()
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        self.__dict__["_peft_config"] = value

    @peft_config.deleter
    def peft_config(self) -> None:
        if self.__dict__.pop("_peft_config", None) is None:
            raise AttributeError("peft_config")
        if self.is_unfused:
            from .weights import foreign

            if foreign(self) is None:
                self.fuse()

    @property
    def _tied_weights_keys(self) -> dict[str, str] | None:
        """For PEFT: the names of the tensors that are tied to the token table."""
        from .weights import tied_names

        return tied_names(self)

    @property
    def prepare_inputs_for_generation(self) -> Any:
        """For PEFT, which reads and may replace this method of a decoder (prompt tuning does). minilm's
        `generate` does not call it, so replacing it raises ValueError."""
        if not self.can_generate():
            raise AttributeError("prepare_inputs_for_generation")
        return self._inputs_for_generation

    @prepare_inputs_for_generation.setter
    def prepare_inputs_for_generation(self, value: Any) -> None:
        if value != self._inputs_for_generation:
            raise ValueError(
                "minilm's generate does not call prepare_inputs_for_generation, which PEFT's prompt and "
                "prefix tuning need: generate with the model of transformers, which loads the same folder"
            )

    def _inputs_for_generation(self, input_ids: Tensor, **options: Any) -> dict[str, Any]:
        """The arguments of `forward` for these prompts."""
        return {"input_ids": input_ids, **options}

    @property
    def whole_pooler(self) -> Any:
        """The pooler; not its layer alone, which may have that name in an unfused model (ALBERT)."""
        return self.__dict__.get(POOLER) or getattr(self, "pooler", None)

    def get_submodule(self, target: str) -> nn.Module:
        """As in PyTorch. The output matrix of an unfused model is returned as a linear layer."""
        if not self.is_unfused or not target:
            return super().get_submodule(target)
        from .weights import OutputMatrix, walk

        found: Any = walk(self, tuple(target.split(".")))  # the tree's `head` (ModernBERT), not minilm's
        return found.as_linear() if isinstance(found, OutputMatrix) else found

    def train(self, mode: bool = True) -> Any:
        """As in PyTorch."""
        super().train(mode)
        if self.is_unfused:
            for name in ("body", "head"):
                if name in self.__dict__:
                    self.__dict__[name].train(mode)
        return self

    def as_fused(self) -> Any:
        """The model itself, or a fused copy if it is unfused. Raises ValueError if it contains an adapter."""
        return copy.deepcopy(self).fuse() if self.is_unfused else self

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """The parameters under transformers' names, for ``theirs.load_state_dict``. They are views, so
        writing to them writes to the model (copies, if the model is unfused). `state_dict` has the names of
        minilm's modules."""
        if self.is_unfused:
            fused: dict[str, Tensor] = self.as_fused().checkpoint_state_dict()
            return fused
        family, head = self.family, self.head_kind
        tensors = stored_tensors(self, family.rules(head), family.prefix(head), {})
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def config_to_save(self) -> PretrainedConfig:
        """The configuration as it is saved in config.json."""
        options = self.config.to_dict()
        options.pop("quantization_config", None)
        config = type(self.config).from_dict(options)
        config.architectures = [self.family.class_name(self.head_kind)]
        config.dtype = self.dtype
        return config

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As in PyTorch. transformers' Trainer saves a state dict without a config.json: when it calls this,
        the configuration is added as a tensor of bytes, `minilm.config`, which ``from_pretrained`` reads."""
        found = super().state_dict(*arguments, **options)
        if _asking() == "transformers.trainer":
            found[CONFIG_KEY] = config_tensor(self.config_to_save().to_json_string())
            for name in self._tied_weights_keys or ():  # the same tensor, which safetensors writes once
                del found[name]
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state_dict.pop(prefix + CONFIG_KEY, None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in PyTorch; also accepts a state dict of transformers' model, which is copied into the
        parameters (`assign` is refused for it). An unfused model expects the names of its own state dict."""
        if self.is_unfused or not state_dict or any(name.startswith("body.") for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        places = self.checkpoint_state_dict()
        if any(name.startswith("head.") and name not in places for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)  # ModernBERT's names begin so, too
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
            problems.append("assign=True cannot split or fuse matrices: leave it out")
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
        """The name here for `name`, whose body prefix (that of a model with a head) is optional."""
        for other in (name, prefix + name, *(name.removeprefix(p) for p in self.family.prefixes)):
            if other in places:
                return other
        return name

    def _is_known(self, name: str) -> bool:
        """Whether the family knows this name but the model does not need it, such as a tied matrix."""
        short = next((name.removeprefix(p) for p in self.family.prefixes if name.startswith(p)), name)
        rules = self.family.rules(self.head_kind)
        return any(rule.match_key(key) is not None for rule in rules for key in (name, short))

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, including the elements of quantised matrices."""
        layers = (getattr(m, "named", m) for m in self.body.embeddings.children())
        left_out = {id(p) for layer in layers for p in layer.parameters()} if exclude_embeddings else set()
        counts = [
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        ]
        if not only_trainable:
            modules = ((n, m) for n, m in self.named_modules() if hasattr(m, "quantized"))
            counts += [
                math.prod(module.quantized.shape)
                for name, module in modules
                if not (exclude_embeddings and name.startswith("body.embeddings."))
            ]
        return sum(counts)

    def get_memory_footprint(self) -> int:
        """Bytes of the parameters and the quantised matrices."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Grow or shrink the vocabulary to `new_num_tokens` (None: unchanged), rounded up to a multiple.

        Output matrices and biases are resized too; new rows are sampled near the mean of the old ones, or at
        random without `mean_resizing`.
        """
        if self.is_unfused:
            raise ValueError(
                "the model is unfused, as PEFT needs it: call resize_token_embeddings before get_peft_model"
            )
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

    def get_input_embeddings(self) -> Any:
        """The token table."""
        tokens = self.body.embeddings.tokens
        table = getattr(tokens, "named", tokens)  # of an unfused model
        return _PaddedTable(self.body, table) if _asking() == "transformers.integrations.neftune" else table

    def get_output_embeddings(self) -> nn.Module | None:
        """The output matrix, if it is separate from the token table; None if they are tied or there is
        none."""
        found = getattr(getattr(self, "head", None), "decoder", None)
        found = getattr(found, "named", found)
        return found if isinstance(found, nn.Module) else None

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script before anything else; raises RuntimeError."""
        raise RuntimeError(
            "torch.jit.script cannot compile a model of minilm, whose code uses Python that TorchScript "
            "does not support: use torch.jit.trace(model, example) or torch.export.export(model, example)"
        )

    def tie_weights(self, **_: Any) -> None:
        """Does nothing: in minilm a tied matrix is the token table itself."""

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score of each generated token: `sequences` int64 [B, S] and `scores`, one [B, V] a step, of
        ``generate(..., return_dict_in_generate=True, output_scores=True)`` -> [B, steps]; log probabilities
        with `normalize_logits`. `beam_indices` int [B, steps], of beam search: the row of `scores` that each
        token is from; negative after the end of a text, where the result is 0."""
        steps = torch.stack(tuple(scores), 1)
        steps = steps.log_softmax(-1) if normalize_logits else steps
        if beam_indices is None:
            drawn = sequences[:, sequences.shape[1] - steps.shape[1] :]
            return steps.gather(2, drawn[..., None]).squeeze(2)
        if beam_indices.dim() != 2 or len(beam_indices) != len(sequences):
            raise ValueError(
                f"beam_indices must be [sequences, steps] = [{len(sequences)}, ...], and is "
                f"{list(beam_indices.shape)}"
            )
        count = int((beam_indices >= 0).sum(-1).max())
        rows = beam_indices[:, :count].long()
        drawn = sequences[:, sequences.shape[1] - count :]
        found = steps[rows.clamp(min=0), torch.arange(count, device=steps.device), drawn]
        return found.masked_fill(rows < 0, 0.0)

    @property
    def loss_type(self) -> str | None:
        """For transformers' Trainer, which uses it to count the labels of a batch (shifted for causal
        models)."""
        return "ForCausalLM" if self.head_kind == "causal-lm" else None

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return self.head_kind == "causal-lm"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass instead of storing their activations."""
        return bool(getattr(self.body, "gradient_checkpointing", False))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Store only the inputs of each block for the backward pass, which recomputes the rest (Chen et al.
        2016, arXiv:1604.06174). Options of transformers are accepted with these values: use_reentrant=False,
        every_n_layers=1, offload=False."""
        asked = {"use_reentrant": False, "every_n_layers": 1, "offload": False}
        given = {**options, **(gradient_checkpointing_kwargs or {})}
        for name, value in given.items():
            if name not in asked or value not in (None, asked[name]):
                raise ValueError(f"gradient checkpointing supports {asked}, and got {name}={value!r}")
        self.body.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Store all activations again."""
        self.body.gradient_checkpointing = False

    def enable_input_require_grads(self) -> None:
        """Does nothing: only reentrant checkpointing of adapters needs it, and minilm's is not reentrant."""

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> Any:
        """Save to a folder and upload it with huggingface_hub, which has the credentials; options are those
        of `HfApi.upload_folder` (commit_message, revision, create_pr, token). Returns its result."""
        return upload(self, repo_id, private, options)


class _PaddedTable:
    """The token table for the hook by which transformers' Trainer adds noise (NEFTune): vectors reach it as
    [B, S, C], since its noise is smaller for longer texts. Here the table is given packed tokens."""

    body: nn.Module
    table: nn.Module

    def __init__(self, body: nn.Module, table: nn.Module) -> None:
        self.__dict__.update(body=body, table=table)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.table, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.table, name)

    def register_forward_hook(self, hook: Any) -> Any:
        """The hook, and one of the body, which is called with the batch; `remove` of the result removes
        both."""
        packed: Any = None

        def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal packed
            packed = arguments[0].packed

        def padded(table: nn.Module, arguments: tuple[Any, ...], vectors: Tensor) -> Any:
            return packed.pack(hook(table, arguments, packed.pad(vectors)))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        handles = (self.body.register_forward_pre_hook(begin), self.table.register_forward_hook(padded))
        return SimpleNamespace(remove=remove)


def upload(saved: Any, repo_id: str, private: bool | None, options: dict[str, Any]) -> Any:
    """Save what has `save_pretrained` to a folder, and upload it; see `Companion.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=url.repo_id, folder_path=folder, **options)


def _asking() -> str:
    """The name of the module that called the method which calls this."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def check_save_options(options: dict[str, Any]) -> None:
    """Accept options of transformers' `save_pretrained` that have no effect or ask for what is done anyway;
    raise TypeError or ValueError for others. `state_dict`, `save_function` and `is_main_process` come from
    accelerate: the model writes its own parameters."""
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
    """Raise RuntimeError within `torch.vmap`: packing reads the lengths of a batch, which it does not
    allow."""
    if in_graph():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(
            "torch.vmap cannot run a minilm model, which reads the values of the ids: pass the whole "
            "batch, [batch, tokens], to the model, and run several models one after the other"
        )
