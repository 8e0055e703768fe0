"""Loading and saving models: find the files, read the configuration, create the model, load its weights, and
write them back."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from ..companions import Companion, check_save_options
from ..config import ConfigError, ModelConfig
from ..families import Family, Head, PretrainedConfig
from ..files import MOST_CONFIG, has_file, open_checkpoint, read_json, resolve, saving
from ..quantized import describe, install, quantized_matrices, wanted_formats
from ..substitutes import OPTIONS, WITHOUT_EFFECT, instead, with_effect
from ..weights import (
    CONFIG_RULE,
    LoadReport,
    check_format,
    initialise,
    load_weights,
    own_rules,
    save_weights,
    stored_config,
    stored_format,
    stored_untied,
)

Model = TypeVar("Model", bound="Checkpointed")

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "gguf_file")


def read_config(path: Path, **overrides: Any) -> PretrainedConfig:
    """config.json of a folder, or the equivalent in a GGUF file."""
    gguf = _gguf_file(path)
    if gguf is not None:
        from ..files import GGUFCheckpoint

        with GGUFCheckpoint(gguf) as checkpoint:
            return PretrainedConfig.from_dict(checkpoint.hf_config(), **overrides)
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        path = path.parent  # a file of weights: its config.json is in the same folder
    file = path / "config.json" if path.is_dir() else path
    if not has_file(file, error=ConfigError):
        carried = stored_config(path)  # by what transformers' Trainer writes
        if carried is not None:
            return PretrainedConfig.from_dict(carried, **overrides)
        if has_file(path / "adapter_config.json", error=ConfigError):
            raise ConfigError(
                f"{path} holds an adapter of PEFT and no model: load the model that it is for, and "
                f"peft.PeftModel.from_pretrained(model, {str(path)!r}) puts it in"
            )
        raise ConfigError(
            f"{path} has no config.json, so the model type is not known: "
            "from_pretrained(..., config=model.config) takes that of another"
        )
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
            f"{path} has several GGUF files ({names}): choose one, by its path or with gguf_file="
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
    """The device to load to: `device`, or transformers' `device_map` if it names a single device."""
    if device is None and device_map is not None:
        if isinstance(device_map, dict):
            if set(device_map) != {""}:
                raise ValueError(f"device_map must name one device for the whole model, and is {device_map}")
            device_map = device_map[""]
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device_map == "auto" else device_map
    found = torch.device("cpu" if device is None else device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(found)!r}, and this PyTorch sees no CUDA device")
    return found


class Checkpointed(Companion):
    """Loading, random initialisation and saving of a model."""

    head_kind: ClassVar[Head] = "base"
    config: PretrainedConfig
    spec: ModelConfig
    """The configuration, translated by its family."""
    family: Family
    name_or_path: str
    load_report: LoadReport | None
    """Which tensors were loaded, initialised or skipped, with the reasons."""

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

        `dtype`: of the weights; None: the checkpoint's own (GGUF: float32). `device`: where to load to; by
        default the CPU. `config` replaces the checkpoint's; configuration options (``num_labels=2``)
        override its values. `revision`, `cache_dir`, `token`, `local_files_only` and `gguf_file` are for the
        hub. If the checkpoint lacks the head, the head is initialised at random and a warning names its
        parameters; `ignore_mismatched_sizes` does the same for a head of another shape.

        `weights`: int8, q8_0 (q8), q4_0 or q4_1 (q4) quantises the linear layers, and a decoder's token
        table, while loading; "gguf" keeps the Q8_0, Q4_0 and Q4_1 matrices of a GGUF file, which are
        dequantised otherwise; a folder that minilm quantised needs neither, and "float" dequantises it.
        `dtype` then applies to activations and unquantised weights. On a CPU, layers quantise their inputs
        to 8 bits as well, with one scale per 192 numbers of a token (int8) or per 32, over the range from the
        least to the largest of them (4 bits: from minus to plus the largest magnitude). A quantised model is
        for inference: its parameters take no gradients. `load_report` lists what was quantised, and what
        could not be.

        Raises HubError (no such model), ConfigError (unsupported option), WeightError (tensors that do not
        match the model).
        """
        hub = {k: options.pop(k) for k in HUB_OPTIONS if k in options}
        overrides = with_effect(options, WITHOUT_EFFECT)
        path = resolve(pretrained_model_name_or_path, **hub)
        config = read_config(path) if config is None else deepcopy(config) if overrides else config
        _override(config, overrides)
        target = as_device(device, device_map)
        heading = {} if add_pooling_layer else {"add_pooling_layer": False}
        with torch.device("meta"):
            model = cls(config, **heading)
        std = float(config.get("initializer_range", 0.02))
        source = _gguf_file(path) or path
        with open_checkpoint(source) as checkpoint:
            if model.spec.tie_word_embeddings and stored_untied(model, checkpoint):
                config.tie_word_embeddings = False
                with torch.device("meta"):
                    model = cls(config, **heading)
            formats = wanted_formats(
                model,
                model.spec,
                weights,
                stored=stored_format(config, checkpoint),
                gguf=source.suffix == ".gguf",
                path=source,
            )
            wanted = as_dtype(dtype if dtype is not None else torch_dtype) or _stored_dtype(
                config, checkpoint
            )
            report: LoadReport = load_weights(
                model,
                checkpoint,
                (*(own_rules(model, checkpoint) or model.family.rules(model.head_kind)), CONFIG_RULE),
                model.family.prefixes,
                dtype=wanted,
                device=target,
                init=lambda name, parameter: initialise(
                    name, parameter, std, plus_one=model.spec.norm_plus_one
                ),
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                progress=progress,
                formats=formats,
                install=install,
            )
        config.dtype = wanted
        if report.quantised:
            model.requires_grad_(False)
        if weights is None and report.quantised:
            check_format(source, config, describe(model))
        if report.quantised or "quantization_config" in config:
            config.quantization_config = describe(model)
        model.load_report = report
        model.name_or_path = str(pretrained_model_name_or_path)
        model.read_beside_weights(path if path.is_dir() or path.suffix == ".gguf" else path.parent)
        return model.eval()

    def read_beside_weights(self, folder: Path) -> None:
        """Load other files of the model's folder; subclasses override it."""

    @classmethod
    def from_config(
        cls: type[Model],
        config: PretrainedConfig,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """A model with random weights, in training mode like transformers' `from_config`."""
        with torch.device("meta"):
            model = cls(config)
        model.to(as_dtype(dtype) or torch.get_default_dtype())
        here = torch.nn.LayerNorm(1).weight.device  # also meta, within init_empty_weights of accelerate
        model.to_empty(device=torch.device(device or here))
        model.initialise()
        return model

    def initialise(self) -> None:
        """Initialise all parameters at random (on the meta device: do nothing). Constructors call it."""
        std, plus_one = float(self.config.get("initializer_range", 0.02)), self.spec.norm_plus_one
        if self.device.type != "meta":
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    initialise(name, parameter, std, plus_one=plus_one)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        max_shard_size: str = "5GB",
        **options: Any,
    ) -> None:
        """Write config.json, safetensors and the generation defaults, as transformers loads them.

        They replace an earlier model in the folder atomically: if the process is killed, the folder has
        either the old or the new model (`minilm.files.saving`). Other files stay.
        """
        check_save_options(options)
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained writes a folder")
        if self.is_unfused:
            self.as_fused().save_pretrained(folder, max_shard_size=max_shard_size)
            return
        config = self.config_to_save()
        quantization = describe(self)
        if quantization is not None:
            config.quantization_config = quantization
        family, head = self.family, self.head_kind
        generation = getattr(self, "generation_config", None)
        # A model without a generation config must not pick up one that an earlier model left in the folder.
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


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    unknown = [name for name in overrides if name not in config and name != "num_labels"]
    if unknown:
        raise TypeError(
            f"from_pretrained got {', '.join(unknown)}, which is neither one of its own options nor one "
            f"of a {config.model_type} configuration{instead(OPTIONS, unknown)}"
        )
    config.override(overrides)


def _stored_dtype(config: PretrainedConfig, checkpoint: Any) -> torch.dtype:
    if config.dtype is not None:
        return as_dtype(config.dtype) or torch.float32
    kinds = (info.dtype for info in checkpoint.tensors.values())
    return next((kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1), torch.float32)
