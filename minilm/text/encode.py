"""Texts to token ids: `Tokenizer.__call__`.

The `tokenizers` library does the work. This file has transformers' argument names, the checks before the
library is called (it panics, or computes negative lengths, on bad input), and the selection of results.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .output import BatchEncoding
from .special import Vocabulary
from .truncate import lengths, many_windows, read, shorten
from .vocabulary import TokenizerError, backend_errors

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

UNLIMITED = int(1e30)
"""`model_max_length` of a tokenizer without a limit, as in transformers."""

_TEXTS = ("self", "text", "text_pair", "text_target", "text_pair_target")
_PADDING = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
_TRUNCATION = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}


class TextEncoder(Vocabulary):
    """Encodes texts with a vocabulary."""

    model_max_length: int
    model_input_names: list[str]
    padding_side: str
    truncation_side: str
    split_special_tokens: bool
    clean_up_tokenization_spaces: bool
    chat_template: str | dict[str, str] | None
    init_kwargs: dict[str, Any]
    saved_class = "PreTrainedTokenizerFast"
    """In tokenizer_config.json: with this one, transformers 4 and 5 both use tokenizer.json unchanged."""
    _lock: threading.Lock
    _warned: set[str]

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        return_truncated: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encode a text, a list of texts, or pairs of texts.

        Args:
            text, text_pair: strings or lists of strings; a list may also hold pairs. With
                `is_split_into_words`, a list of words in place of each string.
            text_target, text_pair_target: texts that the model is to write; their ids are the "labels", or,
                without `text`, the input_ids.
            padding: True or "longest", "max_length", or False. On `padding_side`, to a `pad_to_multiple_of`.
            truncation: True or "longest_first", "only_first", "only_second", or False. A `max_length` alone
                also turns truncation on.
            max_length: in tokens, including special tokens; None: `model_max_length`.
            stride: number of tokens by which successive windows overlap, with `return_overflowing_tokens`,
                which gives long texts several rows; "overflow_to_sample_mapping" has the text of each row.
            return_tensors: "pt", "np", or None for lists.
            return_*: which further values to return; token types and attention mask by default if the model
                takes them. `return_truncated` (not in transformers) tells for each text whether it was cut.

        Returns lists for one text and lists of lists for several; tensors are [B, S] in both cases.
        """
        if text_target is not None:
            options = {name: value for name, value in locals().items() if name not in _TEXTS}
            labels = self.targets()(text_target, text_pair_target, **options)
            if text is None:
                return labels
            found = self(text, text_pair, **options)
            found["labels"] = labels["input_ids"]
            return found
        padding, truncation, max_length = self._strategies(
            padding, truncation, max_length, pad_to_multiple_of, verbose
        )
        batched, inputs = _inputs(text, text_pair, is_split_into_words)
        paired = any(isinstance(item, tuple) for item in inputs)
        if is_split_into_words:
            _check_words(self.backend_tokenizer, inputs)
        if truncation != "do_not_truncate":
            self._check_room(max_length, stride, paired, add_special_tokens)
        encodings, cut = self._encode_batch(
            inputs,
            add_special_tokens,
            is_split_into_words,
            truncation={
                "max_length": max_length,
                "stride": stride if return_overflowing_tokens else 0,  # only used for several windows
                "strategy": truncation,
            },
            padding={
                "length": max_length if padding == "max_length" else None,
                "direction": padding_side or self.padding_side,
                "pad_to_multiple_of": pad_to_multiple_of,
            }
            if padding != "do_not_pad"
            else None,
            split_special_tokens=self.split_special_tokens
            if split_special_tokens is None
            else split_special_tokens,
            overflow=return_overflowing_tokens and truncation != "do_not_truncate",
            tell=return_truncated,
        )
        rows: list[Encoding] = []
        sample: list[int] = []
        for index, encoding in enumerate(encodings):
            more = encoding.overflowing if return_overflowing_tokens else []
            rows += [encoding, *more]
            sample += [index] * (1 + len(more))

        data: dict[str, list[Any]] = {"input_ids": [row.ids for row in rows]}
        if _asked(return_token_type_ids, "token_type_ids" in self.model_input_names):
            data["token_type_ids"] = [
                _type_ids(row, encodings[index]) for row, index in zip(rows, sample, strict=True)
            ]
        if _asked(return_attention_mask, "attention_mask" in self.model_input_names):
            data["attention_mask"] = [row.attention_mask for row in rows]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for row in rows]
        if return_length:
            data["length"] = [len(row.ids) for row in rows]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = sample
        if return_truncated:
            data["truncated"] = [cut[index] for index in sample]
        if max_length is None and verbose:
            self._warn_too_long(max((len(row.ids) for row in rows), default=0))
        if not batched and return_tensors is None and not return_overflowing_tokens:
            single = {key: value[0] if isinstance(value[0], list) else value for key, value in data.items()}
            return BatchEncoding(single, rows)
        return BatchEncoding(data, rows, return_tensors)

    encode_plus = batch_encode_plus = __call__  # older names, used in many tutorials

    def targets(self) -> TextEncoder:
        """The tokenizer of the texts that the model is to write: the same, except for translation."""
        return self

    def encode(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        """The `input_ids` of `__call__`."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(
        self, text: Any, pair: Any = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text as strings."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of special tokens that are added to a text (or a pair)."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def _strategies(
        self,
        padding: Any,
        truncation: Any,
        max_length: int | None,
        multiple: int | None = None,
        verbose: bool = True,
    ) -> tuple[str, str, int | None]:
        """`padding` and `truncation` by their full names, and their target length."""
        if max_length is not None and padding is False and truncation is None:
            truncation = "longest_first"
        pads = _name(padding, _PADDING, ("longest", "max_length", "do_not_pad"), "padding")
        cuts = _name(
            truncation,
            _TRUNCATION,
            ("longest_first", "only_first", "only_second", "do_not_truncate"),
            "truncation",
        )
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", multiple)):
            if value is not None and (type(value) is not int or value < (name != "max_length")):
                raise TokenizerError(f"{name}={value!r}: expected a number of tokens")
        if pads == "longest" and max_length is not None and cuts == "do_not_truncate" and verbose:
            warnings.warn("max_length has no effect with padding=True and no truncation", stacklevel=3)
        if max_length is None and (pads == "max_length" or cuts != "do_not_truncate"):
            if self.model_max_length < UNLIMITED // 10**10:
                max_length = self.model_max_length
            else:  # no limit is known, so there is no length to pad or cut to
                pads = "do_not_pad" if pads == "max_length" else pads
                cuts = "do_not_truncate"
        if pads != "do_not_pad" and (self.pad_token is None or self.pad_token_id is None):
            raise TokenizerError(
                "cannot pad without a padding token: set tokenizer.pad_token = tokenizer.eos_token "
                "or add one with tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
            )
        if pads != "do_not_pad" and cuts != "do_not_truncate" and multiple and (max_length or 0) % multiple:
            raise TokenizerError(
                f"max_length={max_length} is not a multiple of pad_to_multiple_of={multiple}"
            )
        return pads, cuts, max_length

    def _check_room(self, max_length: int | None, stride: int, paired: bool, special: bool) -> None:
        """Raise TokenizerError if special tokens or the stride leave no room; the backend would panic or
        compute negative lengths."""
        around = self.num_special_tokens_to_add(paired) if special else 0
        room = (max_length or 0) - around
        if type(stride) is not int or stride < 0:
            raise TokenizerError(f"stride={stride!r}: expected a number of tokens")
        if room < 0:
            raise TokenizerError(
                f"max_length={max_length} is less than the {around} special tokens around a text"
            )
        if stride and stride >= room:
            raise TokenizerError(
                f"stride={stride} does not fit into max_length={max_length} with {around} special tokens"
            )

    def _encode_batch(
        self,
        inputs: Sequence[Any],
        add_special_tokens: bool,
        split: bool,
        *,
        truncation: Mapping[str, Any],
        padding: Mapping[str, Any] | None,
        split_special_tokens: bool,
        overflow: bool = False,
        tell: bool = False,
    ) -> tuple[list[Encoding], list[bool]]:
        """The encodings, and with `tell` whether each text was cut. The backend stores truncation and padding
        as state; the lock makes them arguments of this call.

        With `overflow` or `tell`, texts are tokenized to their end before they are cut, since tokenizers 0.23
        stops at the truncation and loses the rest (huggingface/tokenizers#2091). So are pairs of long texts,
        which are cut here unless all windows are requested."""
        backend = self.backend_tokenizer
        whole: list[tuple[Encoding, Encoding | None]] = []
        most, strategy = truncation["max_length"], truncation["strategy"]
        cuts = strategy != "do_not_truncate"
        apart = overflow or (cuts and (tell or any(many_windows(item, most, strategy) for item in inputs)))
        cut = [False] * len(inputs)
        found: list[Encoding]
        with self._lock:
            try:
                with backend_errors("encoding"):
                    if backend.encode_special_tokens != split_special_tokens:
                        backend.encode_special_tokens = split_special_tokens
                    if apart:
                        whole = _whole(backend, inputs, split)
                        rooms = [
                            most - (backend.num_special_tokens_to_add(pair) if add_special_tokens else 0)
                            for pair in (False, True)
                        ]
                        for index, (a, b) in enumerate(whole):
                            cut[index] = len(a) + (0 if b is None else len(b)) > rooms[b is not None]
                            if cut[index] and b is not None and not overflow:
                                side = self.truncation_side
                                kept = len(a), len(b)
                                if strategy == "longest_first":
                                    kept = read(a, most, side), read(b, most, side)
                                kept = lengths(*kept, rooms[True], strategy)
                                whole[index] = shorten(a, kept[0], side), shorten(b, kept[1], side)
                    if cuts:
                        backend.enable_truncation(direction=self.truncation_side, **truncation)
                    token: dict[str, Any] = {
                        "pad_id": self.pad_token_id,
                        "pad_token": self.pad_token,
                        "pad_type_id": self.pad_token_type_id,
                    }
                    if apart:
                        found = [backend.post_process(a, b, add_special_tokens) for a, b in whole]
                        if padding is not None:
                            _pad(found, {**token, **padding}, overflow)
                        return found, cut
                    if padding is not None:
                        backend.enable_padding(**token, **padding)
                    found = backend.encode_batch(
                        inputs, is_pretokenized=split, add_special_tokens=add_special_tokens
                    )
                    return found, cut
            except TokenizerError:
                _blame(inputs)
                raise
            finally:
                backend.no_truncation()
                backend.no_padding()

    def _warn_too_long(self, length: int) -> None:
        if length > self.model_max_length > 0:
            self._warn_once(
                "long",
                "a text of %d tokens is longer than the model's limit of %d; pass truncation=True",
                length,
                self.model_max_length,
            )

    def _warn_once(self, key: str, message: str, *values: Any) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning(message, *values)


def _type_ids(row: Encoding, first: Encoding) -> list[int]:
    """Token types of a window, taken from the first window of its text; the backend sets only that one's."""
    if row is first:
        return row.type_ids
    types = dict(zip(first.sequence_ids, first.type_ids, strict=True))
    return [t if s is None else types.get(s, t) for s, t in zip(row.sequence_ids, row.type_ids, strict=True)]


def _whole(backend: Backend, inputs: Sequence[Any], split: bool) -> list[tuple[Encoding, Encoding | None]]:
    """The tokens of each text, or of both texts of a pair, before truncation and special tokens."""
    pairs = [item if isinstance(item, tuple) else (item, None) for item in inputs]
    processor, backend.post_processor = backend.post_processor, None
    try:
        firsts = backend.encode_batch([a for a, _ in pairs], is_pretokenized=split)
        seconds = iter(backend.encode_batch([b for _, b in pairs if b is not None], is_pretokenized=split))
    finally:
        backend.post_processor = processor
    return [(a, None if b is None else next(seconds)) for a, (_, b) in zip(firsts, pairs, strict=True)]


def _pad(encodings: Sequence[Encoding], padding: dict[str, Any], overflow: bool) -> None:
    """Pad all to one length, including further windows; the library pads only what it gets in one call."""
    length, multiple = padding.pop("length"), padding.pop("pad_to_multiple_of")
    if length is None:
        rows = (row for first in encodings for row in (first, *(first.overflowing if overflow else ())))
        length = max(map(len, rows), default=0)
    if multiple:
        length = -(-length // multiple) * multiple
    for encoding in encodings:
        encoding.pad(length, **padding)


def _asked(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _name(value: Any, short: Mapping[Any, str], allowed: Sequence[str], what: str) -> str:
    value = getattr(value, "value", value)  # transformers has enums for these
    if isinstance(value, str) and value in allowed:
        return value
    if value is None or isinstance(value, bool):
        return short[value]
    raise TokenizerError(f"{what}={value!r}: expected True, False, {', '.join(map(repr, allowed))}")


def _as_list(texts: Any) -> Any:
    """A column of texts (of datasets, pandas or NumPy) as a list; anything else as it is."""
    if isinstance(texts, (str, bytes, list, tuple)):
        return texts
    if callable(getattr(texts, "tolist", None)):
        return texts.tolist()
    return list(texts) if isinstance(texts, Sequence) else texts


def _inputs(text: Any, pair: Any, split: bool) -> tuple[bool, list[Any]]:
    """Whether there are several texts, and each in the backend's form: a text, or a tuple of two."""
    words = (list, tuple)
    text, pair = _as_list(text), _as_list(pair)
    batched = isinstance(text, words) and (not split or bool(text and isinstance(text[0], words)))

    def check(item: Any, where: str) -> Any:
        if split and isinstance(item, words):
            for word in item:
                if not isinstance(word, str):
                    raise TokenizerError(f"{where}: expected words as strings, got {word!r:.60}")
            return list(item)
        if not split and isinstance(item, str):
            return item
        wanted = "a list of words" if split else "a string"
        hint = (
            ""
            if split or not isinstance(item, words)
            else " (a list of words needs is_split_into_words=True)"
        )
        raise TokenizerError(f"{where}: expected {wanted}, got {item!r:.60}{hint}")

    if not batched:
        if not pair:
            return False, [check(text, "text")]
        return False, [(check(text, "text"), check(pair, "text_pair"))]
    if pair is not None:
        if not isinstance(pair, words) or len(pair) != len(text):
            found = f"{len(pair)}" if isinstance(pair, words) else type(pair).__name__
            raise TokenizerError(f"text_pair: expected a list of {len(text)} as text is, got {found}")
        return True, [
            (check(a, f"text[{i}]"), check(b, f"text_pair[{i}]"))
            for i, (a, b) in enumerate(zip(text, pair, strict=True))
        ]
    rows: list[Any] = []
    for i, item in enumerate(text):
        is_pair = isinstance(item, words) and len(item) == 2 and (not split or isinstance(item[0], words))
        rows.append(
            tuple(check(part, f"text[{i}]") for part in item) if is_pair else check(item, f"text[{i}]")
        )
    return True, rows


def _check_words(backend: Backend, inputs: Sequence[Any]) -> None:
    """Raise TokenizerError for a tokenizer whose tokens include spaces but that adds none before a word,
    unless the words include their spaces: it would silently read a list of words as one word."""
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer

    def seen(text: str) -> str:
        """The part of a text that its tokens represent."""
        text = text if normalizer is None else normalizer.normalize_str(text)
        pieces = [(text, (0, 0))] if pre_tokenizer is None else pre_tokenizer.pre_tokenize_str(text)
        return "".join(piece for piece, _ in pieces)

    lone = seen("b")
    if any(mark in seen("a b") and mark not in lone for mark in (" ", "\u0120", "\u2581")):
        for index, item in enumerate(inputs):
            for words in item if isinstance(item, tuple) else (item,):
                glued = next((word for word in words[1:] if word[:1].strip()), None)
                if glued is not None:
                    raise TokenizerError(
                        f"text[{index}]: this tokenizer would read the word {glued!r:.60} without the space "
                        "before it: load it with add_prefix_space=True, or give the words with their spaces"
                    )


def _blame(inputs: Sequence[Any]) -> None:
    """Raise TokenizerError for the invalid text: half of a surrogate pair cannot be encoded as UTF-8."""
    for index, item in enumerate(inputs):
        for part in item if isinstance(item, tuple) else (item,):
            for word in part if isinstance(part, list) else (part,):
                try:
                    word.encode()
                except UnicodeEncodeError as problem:
                    raise TokenizerError(
                        f"text[{index}] is not valid Unicode: {problem.reason} at character {problem.start}"
                    ) from None
