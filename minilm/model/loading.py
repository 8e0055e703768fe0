"""From a name to a model and back: finding the files, reading the configuration, building the class, filling
it, and writing it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..config import ConfigError, ModelConfig
from ..families import Family, Head, PretrainedConfig
from ..files import (
    MOST_CONFIG,
    Checkpoint,
    WeightError,
    has_file,
    open_checkpoint,
    read_json,
    resolve,
    saving,
)
from ..weights import LoadReport, load_weights, save_weights
from .quantized import describe, install, quantized_matrices, wanted_formats

Model = TypeVar("Model", bound="Checkpointed")

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "gguf_file")
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "adapter_kwargs": (None, {}),
    "attn_implementation": (None,),
    "force_download": (None, False),
    "low_cpu_mem_usage": (None, True),
    "proxies": (None, {}),
    "resume_download": (None, False),
    "trust_remote_code": (None, False),
    "use_auth_token": (None,),
    "use_fast": (None, True),
    "use_safetensors": (None, True),
    "weights_only": (None, True),
}
"""Options of transformers' `from_pretrained` that programs pass and that change nothing here -> the values
that ask for what is done anyway."""


def with_effect(options: dict[str, Any], table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The options that are not in `table`; one warning names those that are and ask for something else than
    is done."""
    idle = [f"{k}={v!r}" for k, v in options.items() if k in table and not any(v == w for w in table[k])]
    if idle:
        verb = "has" if len(idle) == 1 else "have"
        warnings.warn(f"{', '.join(idle)} {verb} no effect in minilm", UserWarning, stacklevel=3)
    return {name: value for name, value in options.items() if name not in table}


def read_config(path: Path, **overrides: Any) -> PretrainedConfig:
    """config.json of a folder, or the equivalent in a GGUF file."""
    gguf = _gguf_file(path)
    if gguf is not None:
        from ..files import GGUFCheckpoint

        with GGUFCheckpoint(gguf) as checkpoint:
            return PretrainedConfig.from_dict(checkpoint.hf_config(), **overrides)
    file = path / "config.json" if path.is_dir() else path
    if not has_file(file, error=ConfigError):
        raise ConfigError(f"{path} has no config.json, so the kind of the model is not known")
    try:
        return PretrainedConfig.from_dict(read_json(file, limit=MOST_CONFIG, error=ConfigError), **overrides)
    except ConfigError as error:
        raise ConfigError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if has_file(path / "config.json", error=ConfigError):
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


class Checkpointed(nn.Module):
    """A model as its checkpoint sees it: it is loaded from files, or filled at random, and saved."""

    head_kind: ClassVar[Head] = "base"
    config: PretrainedConfig
    spec: ModelConfig
    """What minilm made of the configuration."""
    family: Family
    name_or_path: str
    load_report: LoadReport | None
    """What loading did: tensors read, initialised, skipped with the reason."""

    if TYPE_CHECKING:

        @property
        def dtype(self) -> torch.dtype: ...

        @property
        def device(self) -> torch.device: ...

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
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

        `dtype`: of the weights; None takes what the checkpoint says of itself (GGUF: float32). `device`:
        where to load to, the CPU if not said. `config` replaces the checkpoint's; options that a
        configuration has (``num_labels=2``) override its own. `revision`, `cache_dir`, `token`,
        `local_files_only`, `gguf_file` are for the hub. A head that the checkpoint lacks is initialised, and
        a warning names its parameters; `ignore_mismatched_sizes` does the same for one of another shape.

        `weights`: int8, q8_0 (q8), q4_0 or q4_1 (q4) quantises the linear layers, and a decoder's token
        table, as they are read; "gguf" keeps the Q8_0, Q4_0 and Q4_1 matrices of a GGUF file as they are,
        which are dequantised otherwise; a folder that minilm quantised needs neither, and "float" dequantises
        it. `dtype` is then that of activations and of what stays floating. On a CPU, layers round what they
        read to 8 bits as well, with a scale for each 192 numbers of a token (int8) or for each 32, from the
        least to the largest of them (in 4 bits: from minus to plus the largest magnitude). A quantised model
        is for
        inference: its parameters take no gradients. `load_report` says what was quantised, and what could not
        be.

        Raises HubError (no such model), ConfigError (an option that is not supported), WeightError (tensors
        that do not fit).
        """
        hub = {k: options.pop(k) for k in HUB_OPTIONS if k in options}
        overrides = with_effect(options, WITHOUT_EFFECT)
        path = resolve(pretrained_model_name_or_path, **hub)
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
                model.spec,
                weights,
                stored=_stored_format(config, checkpoint),
                gguf=source.suffix == ".gguf",
                path=source,
            )
            wanted = as_dtype(dtype if dtype is not None else torch_dtype) or _stored_dtype(
                config, checkpoint
            )
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
        if weights is None and report.quantised:
            _check_format(source, config, describe(model))
        if report.quantised or "quantization_config" in config:
            config.quantization_config = describe(model)
        model.load_report = report
        model.name_or_path = str(pretrained_model_name_or_path)
        model.read_beside_weights(path)
        return model.eval()

    def read_beside_weights(self, folder: Path) -> None:
        """Whatever else the model takes from its folder."""

    @classmethod
    def from_config(
        cls: type[Model],
        config: PretrainedConfig,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """A model with random weights, in training mode, as transformers' `from_config` leaves it."""
        with torch.device("meta"):
            model = cls(config)
        model.to(as_dtype(dtype) or torch.get_default_dtype())
        model.to_empty(device=torch.device(device or "cpu"))
        model.initialise()
        return model

    def initialise(self) -> None:
        """Fill all parameters at random (nothing on the meta device). Heads call it when they are made."""
        std = float(self.config.get("initializer_range", 0.02))
        if self.device.type != "meta":
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    initialise(name, parameter, std)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, max_shard_size: str = "5GB") -> None:
        """Write config.json, safetensors and the generation defaults into a folder that transformers loads.

        They take the place of an earlier model there together: whenever the process ends, the folder has the
        one or the other (`minilm.files.saving`). Other files stay.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained writes a folder")
        options = self.config.to_dict()
        options.pop("quantization_config", None)
        config = PretrainedConfig.from_dict(options)
        quantization = describe(self)
        if quantization is not None:
            config.quantization_config = quantization
        config.architectures = [self.family.class_name(self.head_kind)]
        config.dtype = self.dtype
        family, head = self.family, self.head_kind
        generation = getattr(self, "generation_config", None)
        # Without one of its own, a model goes by its config.json, and not by what another has left.
        with saving(folder, replaces=("generation_config.json",)) as new:
            save_weights(
                self,
                new,
                family.rules(head),
                family.prefix(head),
                max_shard_size=max_shard_size,
                matrices=quantized_matrices(self),
            )
            config.save_pretrained(new)
            if generation is not None:
                generation.save_pretrained(new)


def initialise(name: str, parameter: Tensor, std: float) -> None:
    """Fill a fresh parameter: norms are the identity, biases zero, all else normal with mean 0."""
    if name.endswith("bias"):
        parameter.zero_()
    elif "norm" in name.split(".")[-2:][0] and name.endswith("weight"):
        parameter.fill_(1.0)
    else:
        parameter.normal_(0.0, std)


@torch.no_grad()
def resized(name: str, old: Tensor, rows: int, near_mean: bool, std: float) -> Tensor:
    """`old` with fewer or more rows: fresh ones, or `near_mean` drawn around the mean of the old, with 1e-9
    of their covariance (transformers' `mean_resizing`)."""
    new, kept = old.new_empty(rows, *old.shape[1:]), min(len(old), rows)
    initialise(name, new, std)
    if near_mean and rows > kept and old.device.type != "meta":
        mean = old.float().mean(0)
        some = old[torch.randperm(len(old), device=old.device)[:1024]].float() - mean
        noise = torch.randn(rows - kept, len(some), device=old.device) @ some
        new[kept:] = (mean + noise * (1e-9 / len(some)) ** 0.5).to(old.dtype)
    new[:kept] = old[:kept]
    return new


def _stored_untied(model: Checkpointed, checkpoint: Checkpoint) -> bool:
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


def _check_format(path: Path, config: PretrainedConfig, found: dict[str, str] | None) -> None:
    """A plane that is lost makes another format of a matrix; what was saved says which it was."""
    named = config.get("quantization_config", {}).get("format")
    if named is not None and found is not None and named != found["format"]:
        raise WeightError(
            f"{path}: config.json says that the weights are quantised as {named!r}, and the tensors are "
            f"those of {found['format']!r}: the two do not belong together, or tensors are missing"
        )


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
