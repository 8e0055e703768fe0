"""Saving a tokenizer as files that minilm and transformers load."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..files import FileError, saving
from .vocabulary import TokenizerError, backend_errors

if TYPE_CHECKING:
    from .encode import TextEncoder

# tokenizer.json already adds bos and eos; transformers would take these two settings as changes to it.
_NOT_SAVED = (
    "add_bos_token",
    "add_eos_token",
    "auto_map",
    "init_inputs",
    "processor_class",
    "backend",
    "is_local",
)

LEFT_OVER = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Files that are read in addition to tokenizer.json and tokenizer_config.json: left over from another
tokenizer, they would change this one."""


def save(tokenizer: TextEncoder, folder: Path) -> tuple[str, ...]:
    """See `Tokenizer.save_pretrained`. All files are replaced together, and leftover files of an earlier
    tokenizer that would change this one are removed."""
    if folder.exists() and not folder.is_dir():
        raise TokenizerError(f"{folder}: expected a folder to save into, this is a file")
    with backend_errors("saving the tokenizer"):
        files = {"tokenizer.json": tokenizer.backend_tokenizer.to_str(pretty=True)}
    files["tokenizer_config.json"] = (
        json.dumps(settings_to_save(tokenizer), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    )
    templates = tokenizer.chat_template
    for name, text in ({"default": templates} if isinstance(templates, str) else templates or {}).items():
        if name == "default":
            files["chat_template.jinja"] = text
            continue
        if PurePosixPath(name).name != name or "\\" in name:
            raise TokenizerError(f"the chat template {name!r} cannot be saved: its name is not a file name")
        files[f"additional_chat_templates/{name}.jinja"] = text

    try:
        with saving(folder, replaces=LEFT_OVER) as new:
            for name, text in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(text, encoding="utf-8", newline="")
    except (OSError, FileError) as problem:
        raise TokenizerError(f"{folder}: cannot save the tokenizer: {problem}") from problem
    return tuple(str(folder / name) for name in files)


def settings_to_save(tokenizer: TextEncoder) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    config = {key: value for key, value in tokenizer.init_kwargs.items() if key not in _NOT_SAVED}
    config.update(tokenizer.special_tokens_map)
    if tokenizer.extra_special_tokens:
        config["extra_special_tokens"] = tokenizer.extra_special_tokens
    config.update(
        tokenizer_class=tokenizer.saved_class,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        split_special_tokens=tokenizer.split_special_tokens,
    )
    return config
