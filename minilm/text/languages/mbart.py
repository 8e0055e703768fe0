"""mBART's and mBART-50's tokenizers: a token of the language stands after or before each text."""

from __future__ import annotations

import copy
import os
import re
import threading
from typing import Any

from ..tokenizer import Tokenizer
from ..vocabulary import Parts, TokenizerError, set_frame

_CODE = re.compile(r"[a-z]{2,3}_[A-Z]{2,4}")


class MBartTokenizer(Tokenizer):
    """A `Tokenizer` whose texts are in `src_lang` (default: en_XX), and its targets (`text_target`) in
    `tgt_lang` (default: the same). Both can be set: ``tokenizer.src_lang = "fr_XX"``. A code that the
    tokenizer does not have is a TokenizerError."""

    _frame_name: str
    _language: str | None
    """Of the texts that are encoded; None: as the file says."""
    _source: str | None
    _target: str | None

    def _set_up(self, parts: Parts, name: str) -> None:
        super()._set_up(parts, name)
        source, target = (self.init_kwargs.pop(key, None) for key in ("src_lang", "tgt_lang"))
        self._lock = threading.RLock()  # type: ignore[assignment]
        self._frame_name = parts.family.frame
        self.saved_class = parts.family.name
        default = "en_XX" if "en_XX" in self.lang_code_to_id else None
        self._source = default if source is None else self._known("src_lang", source)
        self._target = None if target is None else self._known("tgt_lang", target)
        self._language = self._source

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        """The language codes that the tokenizer has, and their ids."""
        known = self.added_tokens_encoder.items()
        return {code: index for code, index in known if _CODE.fullmatch(code)}

    def _known(self, name: str, code: Any) -> str:
        if not isinstance(code, str) or code not in self.lang_code_to_id:
            raise TokenizerError(
                f"{name} is {code!r}, and the tokenizer has only the languages "
                f"{', '.join(self.lang_code_to_id) or '(none)'}"
            )
        return code

    @property
    def src_lang(self) -> str | None:
        """The language of the texts."""
        return self._source

    @src_lang.setter
    def src_lang(self, code: str) -> None:
        self._source = self._language = self._known("src_lang", code)

    @property
    def tgt_lang(self) -> str | None:
        """The language of the targets; None: that of the texts."""
        return self._target

    @tgt_lang.setter
    def tgt_lang(self, code: str | None) -> None:
        self._target = None if code is None else self._known("tgt_lang", code)

    def set_src_lang_special_tokens(self, src_lang: str) -> None:
        """As setting `src_lang`, for the next texts only: `src_lang` stays."""
        self._language = self._known("src_lang", src_lang)

    def set_tgt_lang_special_tokens(self, lang: str) -> None:
        """The next texts are in the target's language `lang`."""
        self._language = self._known("tgt_lang", lang)

    def targets(self) -> MBartTokenizer:
        """The same tokenizer, for texts in `tgt_lang`."""
        code = self._target or self._source
        return self if code is None else self.reading(code)

    def reading(self, code: str) -> MBartTokenizer:
        """The same tokenizer, for texts in one language."""
        view = copy.copy(self)
        view._lock = self._lock
        view._language = self._known("src_lang", code)
        return view

    def _encode_batch(self, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            if self._language is not None:
                settings = {**self._special, "language": self._language}
                set_frame(self.backend_tokenizer, self._frame_name, settings)
            return super()._encode_batch(*arguments, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """As `Tokenizer.save_pretrained`, with `src_lang` and `tgt_lang`."""
        self.init_kwargs.update(src_lang=self._source, tgt_lang=self._target)
        return super().save_pretrained(save_directory)
