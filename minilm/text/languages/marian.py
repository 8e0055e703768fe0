"""Marian's tokenizers (OPUS-MT): texts are split by source.spm, targets by target.spm."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import FileError, saving
from ..output import BatchEncoding
from ..save import LEFT_OVER, settings_to_save
from ..tokenizer import Tokenizer
from ..vocabulary import Parts, TokenizerError


class MarianTokenizer(Tokenizer):
    """A `Tokenizer` for texts, and for their translations as `text_target`.

    Models that write several languages need the code of one at the beginning of each text, >>fr<<;
    `supported_language_codes` has them. A code that the model does not have is a TokenizerError. Places of
    tokens in the text are not known, as in transformers."""

    saved_class = "MarianTokenizer"
    is_fast = False
    _marian: Any
    _writes: bool
    """Whether the texts are targets."""

    def _set_up(self, parts: Parts, name: str) -> None:
        if parts.more is None:
            raise TokenizerError(
                f"{name}: a MarianTokenizer needs source.spm, target.spm and vocab.json; AutoTokenizer reads "
                "other files"
            )
        self._marian, self._writes = parts.more, False
        parts.settings["model_max_length"] = parts.settings.get("model_max_length") or 512
        super()._set_up(parts, name)

    @property
    def supported_language_codes(self) -> list[str]:
        """The codes that may begin a text, such as >>fr<<."""
        return list(self._marian.languages)

    def targets(self) -> MarianTokenizer:
        """The same tokenizer, for translations."""
        view = copy.copy(self)
        view._writes = True
        return view

    def __call__(self, *arguments: Any, **options: Any) -> BatchEncoding:
        """See `Tokenizer`; return_offsets_mapping is an error."""
        if options.get("return_offsets_mapping"):
            raise TokenizerError(
                "a Marian tokenizer has no return_offsets_mapping: its pieces have no places"
            )
        return super().__call__(*arguments, **options)

    def tokenize(self, text: Any, pair: Any = None, add_special_tokens: bool = False, **options: Any) -> Any:
        """The pieces of a text as strings."""
        if add_special_tokens or options or not isinstance(text, str) or not isinstance(pair, str | None):
            return super().tokenize(text, pair, add_special_tokens, **options)
        return [*self._pieces(text), *([] if pair is None else self._pieces(pair))]

    def _encode_batch(
        self, inputs: Sequence[Any], add_special_tokens: bool, split: bool, **options: Any
    ) -> Any:
        def pieces(item: Any) -> Any:
            if isinstance(item, tuple):
                return tuple(map(pieces, item))
            return [piece for word in (item if split else [item]) for piece in self._pieces(word)]

        return super()._encode_batch([pieces(item) for item in inputs], add_special_tokens, True, **options)

    def _pieces(self, text: str) -> list[str]:
        """The code at the beginning, special tokens, and the pieces between them."""
        code = self._marian.code(text)
        found, text = [code] if code else [], text[len(code) :]
        whole = [] if self.split_special_tokens else sorted(self.added_tokens_encoder, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, whole))})", text) if whole else [text]
        splitter = self._marian.target if self._writes else self._marian.source
        for part, pieces in zip(parts, splitter(parts), strict=True):
            found += [part] if part in whole else pieces
        return found

    def decode(self, token_ids: Any, *arguments: Any, **options: Any) -> Any:
        """The text of token ids, or a list of texts, without spaces around it."""
        found = super().decode(token_ids, *arguments, **options)
        return found.strip() if isinstance(found, str) else found

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write source.spm, target.spm, vocab.json and tokenizer_config.json into a folder."""
        folder = Path(save_directory)
        settings = settings_to_save(self)
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        settings["added_tokens_decoder"] = {
            str(index): {name: getattr(token, name) for name in names}
            for index, token in self.added_tokens_decoder.items()
        }
        config = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        files = {**self._marian.files, "tokenizer_config.json": config.encode()}
        try:
            with saving(folder, replaces=(*LEFT_OVER, "tokenizer.json")) as new:
                for name, content in files.items():
                    (new / name).write_bytes(content)
        except (OSError, FileError) as problem:
            raise TokenizerError(f"{folder}: cannot save the tokenizer: {problem}") from problem
        return tuple(str(folder / name) for name in files)
