"""From a name to a model: finding the files, reading the configuration, building the class, filling it, and
writing it back."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..config import ConfigError
from ..families import PretrainedConfig, families
from ..files import read_json, resolve
from ..weights import Checkpoint, LoadReport, WeightError, load_weights, open_checkpoint, save_weights
from .heads import MODELS
from .pretrained import PreTrainedModel, initialise
from .quantization import describe, install, quantized_matrices, wanted_formats

Model = TypeVar("Model", bound=PreTrainedModel)

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "gguf_file")
WITHOUT_EFFECT = frozenset(
    {
        "adapter_kwargs",
        "attn_implementation",
        "force_download",
        "low_cpu_mem_usage",
        "proxies",
        "resume_download",
        "trust_remote_code",
        "use_auth_token",
        "use_fast",
        "use_safetensors",
        "weights_only",
    }
)
"""Options of transformers' `from_pretrained` that programs pass and that ask for nothing here."""


class AutoConfig:
    """Configurations by name: ``AutoConfig.from_pretrained(name, num_labels=3)``."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> PretrainedConfig:
        """The configuration of a checkpoint, with overrides. Errors: see `minilm.files.resolve` and
        `ConfigError`."""
        hub = {k: options.pop(k) for k in HUB_OPTIONS if k in options}
        options = {k: v for k, v in options.items() if k not in WITHOUT_EFFECT}
        return read_config(resolve(pretrained_model_name_or_path, files="config", **hub), **options)

    @classmethod
    def for_model(cls, model_type: str, **options: Any) -> PretrainedConfig:
        """A configuration from scratch: ``AutoConfig.for_model("gpt2", n_layer=2)``."""
        return PretrainedConfig(model_type=model_type, **options)


def read_config(path: Path, **overrides: Any) -> PretrainedConfig:
    """config.json of a folder, or the equivalent in a GGUF file."""
    gguf = _gguf_file(path)
    if gguf is not None:
        from ..files import GGUFCheckpoint

        with GGUFCheckpoint(gguf) as checkpoint:
            return PretrainedConfig.from_dict(checkpoint.hf_config(), **overrides)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path} has no config.json, so the kind of the model is not known")
    try:
        return PretrainedConfig.from_dict(read_json(file, error=ConfigError), **overrides)
    except ConfigError as error:
        raise ConfigError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise ConfigError(
            f"{path} has several GGUF files ({names}): name the one to load, as path or with gguf_file="
        )
    return found[0] if found else None


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch.float16, "float16" or "torch.float16" -> torch.float16; None and "auto" -> None."""
    if dtype is None or dtype == "auto":
        return None
    found = (
        dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    )
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        raise ValueError(
            f"dtype must be a floating-point dtype such as float32, bfloat16 or float16, and is {dtype!r}"
        )
    return found


def as_device(device: torch.device | str | int | None, device_map: Any) -> torch.device:
    """Where to load to: `device`, or transformers' `device_map` when it names a single device."""
    if device is None and device_map is not None:
        if isinstance(device_map, dict):
            if set(device_map) != {""}:
                raise ValueError(f"device_map must name one device for the whole model, and is {device_map}")
            device_map = device_map[""]
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device_map == "auto" else device_map
    found = torch.device("cpu" if device is None else device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(found)!r} was asked for, and this PyTorch sees no CUDA device")
    return found


def from_pretrained(
    cls: type[Model],
    name_or_path: str | os.PathLike[str],
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    ignore_mismatched_sizes: bool = False,
    progress: bool | None = None,
    add_pooling_layer: bool = True,
    weights: str | None = None,
    **options: Any,
) -> Model:
    """Load a checkpoint: a folder, a GGUF file, or a name on the hub. The model comes back in evaluation
    mode.

    `dtype`: of the weights; None takes what the checkpoint says of itself (GGUF: float32). `device`: where to
    load to, the CPU if not said. `config` replaces the checkpoint's; options that a configuration has
    (``num_labels=2``) override its own. `revision`, `cache_dir`, `token`, `local_files_only`, `gguf_file` are
    for the hub. A head that the checkpoint lacks is initialised, and a warning names its parameters;
    `ignore_mismatched_sizes` does the same for one of another shape.

    `weights`: int8, q8_0 (q8), q4_0 or q4_1 (q4) quantises the linear layers, and a decoder's token table,
    as they are read; "gguf" keeps the Q8_0, Q4_0 and Q4_1 matrices of a GGUF file as they are, which are
    dequantised otherwise; a folder that minilm quantised needs neither, and "float" dequantises it. `dtype`
    is then that of activations and of what stays floating. On a CPU, layers round what they read to 8 bits
    as well, with a scale for each 192 numbers of a token (int8) or for each 32, from the least to the
    largest of them (in 4 bits: from minus to plus the largest magnitude). A quantised model is for
    inference: its parameters take no gradients. `load_report` says what was quantised, and what could not
    be.

    Raises HubError (no such model), ConfigError (an option that is not supported), WeightError (tensors that
    do not fit).
    """
    hub = {k: options.pop(k) for k in HUB_OPTIONS if k in options}
    overrides = {k: v for k, v in options.items() if k not in WITHOUT_EFFECT}
    path = resolve(name_or_path, **hub)
    if config is None:
        config = read_config(path)
        _override(config, overrides)
    elif overrides:
        config = PretrainedConfig.from_dict(config.to_dict())
        _override(config, overrides)
    target = as_device(device, device_map)
    heading = {} if add_pooling_layer else {"add_pooling_layer": False}
    with torch.device("meta"):
        model = cls(config, **heading)
    std = float(config.get("initializer_range", 0.02))
    source = _gguf_file(path) or path
    with open_checkpoint(source) as checkpoint:
        if model.spec.tie_word_embeddings and _stored_untied(model, checkpoint):
            config.tie_word_embeddings = False
            with torch.device("meta"):
                model = cls(config, **heading)
        formats = wanted_formats(
            model,
            weights,
            stored=_stored_format(config, checkpoint),
            gguf=source.suffix == ".gguf",
            path=source,
        )
        wanted = as_dtype(dtype if dtype is not None else torch_dtype) or _stored_dtype(config, checkpoint)
        report: LoadReport = load_weights(
            model,
            checkpoint,
            model.family.rules(model.head_kind),
            model.family.prefixes,
            dtype=wanted,
            device=target,
            init=lambda name, parameter: initialise(name, parameter, std),
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            progress=progress,
            formats=formats,
            install=install,
        )
    config.dtype = wanted
    if report.quantised:
        model.requires_grad_(False)
    if report.quantised or "quantization_config" in config:
        config.quantization_config = describe(model)
    model.load_report = report
    model.name_or_path = str(name_or_path)
    _read_generation_config(model, path)
    return model.eval()


def _stored_untied(model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint of a model that ties its output matrix to the token table has both, and they
    differ.

    A copy of the table is common. Another matrix means that the configuration is wrong: the model was
    trained with it.
    """
    rules, tensors = model.family.rules(model.head_kind), checkpoint.tensors
    output = [rule.sources[0] for rule in rules if rule.transform == "tied" and rule.sources[0] in tensors]
    name = next(rule.sources[0] for rule in rules if rule.target == "body.embeddings.tokens.weight")
    table = [prefix + name for prefix in ("", *model.family.prefixes) if prefix + name in tensors]
    if not output or not table or tensors[output[0]].shape != tensors[table[0]].shape:
        return False
    values = []
    for key in (output[0], table[0]):
        values.append(torch.empty(tensors[key].shape, dtype=tensors[key].dtype))
        checkpoint.read_into(key, values[-1])
    if torch.equal(*values):
        return False
    warnings.warn(
        f"{checkpoint.path}: tie_word_embeddings is true, but {output[0]} and {table[0]} differ; both are "
        "used, as if it were false",
        stacklevel=4,
    )
    return True


def _stored_format(config: PretrainedConfig, checkpoint: Checkpoint) -> str | None:
    """The format of a checkpoint whose matrices are quantised as minilm computes with them; None if they are
    not."""
    named: dict[str, Any] = config.get("quantization_config", {})
    if any(info.format for info in checkpoint.tensors.values()):
        return str(named.get("format", "mixed"))
    if named:
        raise WeightError(
            f"{checkpoint.path}: config.json says that the weights are quantised ({named}), and none is"
        )
    return None


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    unknown = [name for name in overrides if name not in config and name != "num_labels"]
    if unknown:
        raise TypeError(
            f"from_pretrained got {', '.join(unknown)}, which is neither an option of loading nor of a "
            f"{config.model_type} configuration"
        )
    for name in ("num_labels", *overrides):  # before id2label, which says more
        if name in overrides:
            setattr(config, name, overrides[name])


def _stored_dtype(config: PretrainedConfig, checkpoint: Any) -> torch.dtype:
    if config.dtype is not None:
        return as_dtype(config.dtype) or torch.float32
    kinds = (info.dtype for info in checkpoint.tensors.values())
    return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), torch.float32)


def _read_generation_config(model: PreTrainedModel, path: Path) -> None:
    if model.head_kind != "causal-lm":
        return
    from ..generation import GenerationConfig

    file = path / "generation_config.json" if path.is_dir() else None
    stored = read_json(file, error=ConfigError) if file is not None and file.is_file() else {}
    model.generation_config = GenerationConfig.from_checkpoint(stored, model.config)


def save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *, max_shard_size: str = "5GB"
) -> None:
    """Write config.json, the weights and the generation defaults; see `PreTrainedModel.save_pretrained`."""
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; save_pretrained writes a folder")
    folder.mkdir(parents=True, exist_ok=True)
    options = model.config.to_dict()
    options.pop("quantization_config", None)
    config = PretrainedConfig.from_dict(options)
    quantization = describe(model)
    if quantization is not None:
        config.quantization_config = quantization
    config.architectures = [model.family.class_name(model.head_kind)]
    config.dtype = model.dtype
    family, head = model.family, model.head_kind
    save_weights(
        model,
        folder,
        family.rules(head),
        family.prefix(head),
        max_shard_size=max_shard_size,
        matrices=quantized_matrices(model),
    )
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def alias(name: str) -> Any:
    """The class that a name of transformers stands for: BertModel, GPT2LMHeadModel, LlamaConfig,
    RobertaTokenizerFast, ..."""
    for family in families():
        if not name.startswith(family.class_prefix):
            continue
        for head in ("base", *family.heads):
            if name == family.class_name(head):
                return MODELS[head]
        if name == f"{family.class_prefix}Config":
            return type(name, (PretrainedConfig,), {"model_type": family.model_type, "__module__": "minilm"})
        if name in (f"{family.class_prefix}Tokenizer", f"{family.class_prefix}TokenizerFast"):
            from ..text import AutoTokenizer, tokenizer_class

            return tokenizer_class(name) or AutoTokenizer
    return None


def alias_names() -> list[str]:
    """All names that `alias` knows."""
    names = []
    for family in families():
        names += [family.class_name(head) for head in ("base", *family.heads)]
        names += [f"{family.class_prefix}{what}" for what in ("Config", "Tokenizer", "TokenizerFast")]
    return names
