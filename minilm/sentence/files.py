"""Loading the modules of a sentence-transformers model from its files."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from ..differences import renamed
from ..files import MOST_CONFIG, FileError, has_file, is_bundled, read_json, read_json_value, resolve
from .modules import KINDS, Pooling
from .transformer import Transformer

logger = logging.getLogger(__name__)

_WITHOUT_OWNER = (
    *("bert-base-", "bert-large-", "distilbert-base-", "roberta-base", "roberta-large", "xlm-roberta-"),
    *("gpt2", "distilgpt2", "distilroberta-base"),
)
"""Prefixes of hub names without an owner that do not belong to sentence-transformers."""


_OLDER = {
    "tokenizer_kwargs": "processor_kwargs",
    "tokenizer_args": "processor_kwargs",
    "automodel_args": "model_kwargs",
    "model_args": "model_kwargs",
    "config_args": "config_kwargs",
    "cache_dir": "cache_folder",
    "use_auth_token": "token",
}
"""Older names of constructor options in sentence-transformers -> current names."""


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hub_options(
    name_or_path: str | os.PathLike[str], owner: str, options: dict[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The full name of a model (with `owner`, if it has none), and the constructor options for the hub, for
    the model and for the tokenizer. Raises TypeError for unknown options."""
    name = os.fspath(name_or_path)
    hub = renamed("SentenceEncoder" if owner == "sentence-transformers" else "CrossEncoder", options, _OLDER)
    model_options = {**(hub.pop("config_kwargs", None) or {}), **(hub.pop("model_kwargs", None) or {})}
    tokenizer_options = hub.pop("processor_kwargs", None) or {}
    hub.pop("trust_remote_code", None)  # a model's own code is never run
    if "cache_folder" in hub:
        hub["cache_dir"] = hub.pop("cache_folder")
    if hub.pop("backend", "torch") != "torch":
        raise ValueError("the only backend is torch")
    unknown = set(hub) - {"revision", "cache_dir", "token", "local_files_only"}
    if unknown:
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
    canonical = name.startswith(_WITHOUT_OWNER) and "-nli-" not in name
    hub["asked"] = name
    if "/" not in name and not (canonical or is_bundled(name) or Path(name).exists()):
        name = f"{owner}/{name}"
    return name, hub, dict(model_options), dict(tokenizer_options)


def load(
    name_or_path: str | os.PathLike[str],
    device: str | int | torch.device,
    dtype: torch.dtype | str | None,
    options: dict[str, Any],
) -> tuple[list[nn.Module], dict[str, Any]]:
    """The modules of a model, and its config_sentence_transformers.json; `options` as in SentenceEncoder."""
    name, hub, model_options, tokenizer_options = hub_options(name_or_path, "sentence-transformers", options)
    model_options = {"dtype": dtype, **model_options}
    path = resolve(name, **hub)

    if not has_file(path / "modules.json"):
        transformer = Transformer.load(path, "", device, model_options, tokenizer_options)
        architecture = str((transformer.model.config.get("architectures") or [""])[0])
        causal = transformer.model.spec.causal
        decoder = causal and (architecture.endswith("ForCausalLM") or path.is_file())
        if causal and architecture.endswith("Model") and "LMHead" not in architecture:
            raise FileError(
                f"{path} has no modules.json, and a {architecture} whose tokens see only earlier ones may be "
                "pooled by its last token or by their mean: SentenceEncoder(modules=[transformer, "
                "Pooling(size, 'lasttoken')]) of minilm.sentence says which"
            )
        pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken" if decoder else "mean")
        logger.warning("%s has no modules.json: using %s pooling", name, pooling.modes[0])
        return [transformer, pooling], {}
    file = path / "config_sentence_transformers.json"
    stored = read_json(file, limit=MOST_CONFIG) if has_file(file) else {}
    kind = stored.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise FileError(f"{file}: the model is a {kind}, expected a SentenceTransformer")
    check_settings(file, stored)
    modules: list[nn.Module] = []
    for place, kind in listed_modules(path / "modules.json"):
        if kind == "Transformer":
            modules.append(Transformer.load(path, place, device, model_options, tokenizer_options))
        else:
            modules.append(KINDS[kind].load(path / place))
    return modules, stored


def check_settings(file: Path, stored: dict[str, Any]) -> None:
    """Raise FileError if a setting in config_sentence_transformers.json has a wrong type."""
    prompts, dimensions = stored.get("prompts") or {}, stored.get("truncate_dim")
    if not isinstance(prompts, dict) or not all(
        isinstance(text, (str, type(None))) for text in prompts.values()
    ):
        raise FileError(f"{file}: prompts must be names and texts, and are {prompts!r:.60}")
    for name in ("default_prompt_name", "similarity_fn_name"):
        if not isinstance(stored.get(name), (str, type(None))):
            raise FileError(f"{file}: {name} must be a text, and is {stored[name]!r:.60}")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise FileError(f"{file}: truncate_dim must be a number from 1, and is {dimensions!r:.60}")


def listed_modules(file: Path, *also: str) -> list[tuple[str, str]]:
    """The folder and the kind of each module in modules.json; `also`: kinds that only this caller has."""
    try:
        listed = read_json_value(file, limit=MOST_CONFIG)
        found = [(str(entry["path"]), str(entry["type"])) for entry in listed]
    except (KeyError, TypeError) as problem:
        raise FileError(f"{file}: expected a list of modules with path and type: {problem}") from problem
    modules = []
    for index, (place, name) in enumerate(found):
        package, _, kind = name.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers":
            raise FileError(f"{file}: the module {name} is the model's own code, which is never run")
        if kind not in (*KINDS, *also, "Transformer"):
            supported = ", ".join(("Transformer", *KINDS, *also))
            raise FileError(f"{file}: the module {name} is not supported; supported are {supported}")
        if (kind == "Transformer") != (index == 0):
            raise FileError(
                f"{file}: expected one Transformer, as the first module, but number {index} is {kind}"
            )
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise FileError(f"{file}: the path {place!r} leads out of the model's folder")
        modules.append((place, kind))
    if not modules:
        raise FileError(f"{file}: lists no modules")
    return modules
