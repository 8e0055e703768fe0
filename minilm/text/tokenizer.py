"""`Tokenizer`: texts to token ids and back, with transformers' arguments and results.

    tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
    batch = tokenizer(["a text", "another"], padding=True, truncation=True, return_tensors="pt")
    tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)

There is one class for all families. The checkpoint's files determine the pipeline of the `tokenizers` library
(`minilm.text.vocabulary`), and the pipeline does the work.
"""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..files import TOKENIZER_FILES, has_file, resolve
from . import chat_template as chat
from .encode import UNLIMITED, TextEncoder
from .output import BatchEncoding as BatchEncoding
from .pad import pad
from .save import save
from .vocabulary import FAMILIES, SPECIAL_TOKENS, Parts, adds, backend_errors, from_object, load, set_frame
from .vocabulary import TokenizerError as TokenizerError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

_SETTINGS = {
    *SPECIAL_TOKENS, "extra_special_tokens", "additional_special_tokens", "add_bos_token", "add_eos_token",
    "model_max_length", "max_len", "padding_side", "truncation_side", "model_input_names", "chat_template",
    "clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space", "trim_offsets", "legacy",
    "do_lower_case", "strip_accents", "tokenize_chinese_chars", "src_lang", "tgt_lang", "extra_ids",
}  # fmt: skip
# Arguments of transformers that ask for what minilm does anyway.
_NO_EFFECT = {
    "use_fast", "trust_remote_code", "force_download", "resume_download", "proxies", "verbose", "config",
    "tokenizer_type", "from_slow", "do_basic_tokenize", "never_split", "errors",
}  # fmt: skip


class Tokenizer(TextEncoder):
    """See the top of this file. `from_pretrained` loads a checkpoint's tokenizer; the constructor creates one
    from a `tokenizers.Tokenizer` (or its file), or from the vocabulary files of a class (`vocab_file`,
    `merges_file`).

    Settings, from the files or as arguments: special tokens (`pad_token="[PAD]"`), `model_max_length`,
    `padding_side`, `truncation_side`, `model_input_names`, `clean_up_tokenization_spaces`, `chat_template`,
    `add_bos_token`, `add_eos_token`, and, for the tokenizers that have them, `add_prefix_space`,
    `do_lower_case`, `strip_accents`, `tokenize_chinese_chars`, `legacy`.

    Objects can be pickled, copied, and used by several threads.
    """

    class_name: str | None = None
    """The transformers class whose rules apply (set in subclasses from `tokenizer_class`); None: decided by
    the files."""
    is_fast = True
    own_class: ClassVar[Callable[[str], type[Tokenizer]]]
    """Name of a family -> the class of its tokenizers; `minilm.text` gives it."""

    def __init__(
        self,
        tokenizer_object: Backend | str | os.PathLike[str] | None = None,
        *,
        tokenizer_file: str | os.PathLike[str] | None = None,
        vocab_file: str | os.PathLike[str] | None = None,
        merges_file: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(tokenizer_object, (str, os.PathLike)):  # BertTokenizer("vocab.txt")
            vocab_file, tokenizer_object = tokenizer_object, None
        settings = _checked(settings)
        file = tokenizer_file or vocab_file
        if tokenizer_object is not None:
            parts = from_object(tokenizer_object, settings, self.class_name)
        elif file is None:
            raise TokenizerError(
                "expected tokenizer_object=, tokenizer_file= or vocab_file=, or from_pretrained"
            )
        elif not has_file(Path(file), error=TokenizerError):
            raise TokenizerError(f"{file}: no such file")
        else:
            parts = load(Path(file), overrides=settings, class_name=self.class_name, merges_file=merges_file)
        self._set_up(parts, "" if file is None else os.fspath(file))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        gguf_file: str | None = None,
        subfolder: str = "",
        **settings: Any,
    ) -> Tokenizer:
        """Load the tokenizer of a local folder, a file, or a name on the hub (for the first arguments see
        `minilm.files.resolve`).

        Raises HubError if nothing has that name, TokenizerError if it has no valid tokenizer.
        """
        settings = _checked(settings)
        files: Any = [f"{subfolder}/{name}" for name in TOKENIZER_FILES] if subfolder else "tokenizer"
        path = resolve(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            files=files,
            gguf_file=gguf_file,
        )
        if subfolder:
            path = path / subfolder
        parts = load(path, overrides=settings, class_name=cls.class_name)
        kind = cls.own_class(parts.family.name)
        kind = cls if issubclass(cls, kind) else kind
        tokenizer = kind.__new__(kind)
        tokenizer._set_up(parts, os.fspath(pretrained_model_name_or_path))
        return tokenizer

    def _set_up(self, parts: Parts, name: str) -> None:
        settings = dict(parts.settings)

        def take(key: str, default: Any, kind: Any, *allowed: Any) -> Any:
            value = settings.pop(key, None)
            value = default if value is None else value
            if not isinstance(value, kind) or (allowed and value not in allowed):
                wanted = " or ".join(map(repr, allowed)) or getattr(kind, "__name__", str(kind))
                raise TokenizerError(f"{name}: {key} is {value!r:.60}, expected {wanted}")
            return value

        self.backend_tokenizer = parts.backend
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.name_or_path = name
        self._special = {
            key: settings.pop(key)
            for key in list(settings)
            if key.endswith("_token") and isinstance(settings[key], str)
        }
        self._extra_special = take("extra_special_tokens", [], list)
        longest = settings.pop("max_len", None)
        self.model_max_length = int(take("model_max_length", longest or UNLIMITED, (int, float)))
        self.padding_side = take("padding_side", parts.family.padding_side, str, "right", "left")
        self.truncation_side = take("truncation_side", "right", str, "right", "left")
        self.model_input_names = list(take("model_input_names", parts.family.input_names, (list, tuple)))
        self.clean_up_tokenization_spaces = take("clean_up_tokenization_spaces", False, bool)
        self.split_special_tokens = take("split_special_tokens", False, bool)
        self.chat_template = chat.read(take("chat_template", "", (str, list, dict)), name)
        self.init_kwargs = settings  # other settings in the files; saved again
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    # -- ids to texts

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
    ) -> Any:
        """The text of token ids, or a list of texts for several sequences. Accepts tensors and arrays.

        An id without a token is left out, with a warning; a negative id is an error.
        `spaces_between_special_tokens` has no effect, as with transformers' fast tokenizers.
        """
        ids = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        if isinstance(ids, (str, bytes)) or not isinstance(ids, (int, Iterable)):
            raise TokenizerError(f"expected token ids as integers, got {ids!r:.60}")
        numbers = [self._valid_id(index) for index in ([ids] if isinstance(ids, int) else ids)]
        if numbers and max(numbers) >= len(self):
            self._warn_once(
                "id", "token id %d is left out, there are only %d tokens", max(numbers), len(self)
            )
        with backend_errors("decoding"):
            text = self.backend_tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens)
        clean_up = (
            self.clean_up_tokenization_spaces
            if clean_up_tokenization_spaces is None
            else clean_up_tokenization_spaces
        )
        # Not for BPE, whose spaces are already right; transformers 5 refuses it too.
        if clean_up and type(self.backend_tokenizer.model).__name__ != "BPE":
            text = self.clean_up_tokenization(text)
        return text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """The texts of several sequences of ids."""
        texts = self.decode(sequences, skip_special_tokens, **options)
        return [texts] if isinstance(texts, str) else list(texts)

    def pad(self, encoded_inputs: Any, padding: bool | str = True, **options: Any) -> BatchEncoding:
        """Pad encoded texts: a BatchEncoding, or a list of them as from a data loader.
        `options`: `max_length`, `pad_to_multiple_of`, `padding_side`, `return_attention_mask`,
        `return_tensors`."""
        return pad(self, encoded_inputs, padding, **options)

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """Remove the spaces that WordPiece leaves before punctuation and English contractions."""
        for spaced in (" .", " ?", " !", " ,"):
            text = text.replace(spaced, spaced[1:])
        text = text.replace(" ' ", "'")
        for spaced in (" n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(spaced, spaced[1:])
        return text

    # -- chat

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Format messages ({"role": ..., "content": ...}), or a list of conversations, with the model's chat
        template.

        Returns a BatchEncoding like `__call__`, only `input_ids` with `return_dict=False`, or the text with
        `tokenize=False`. `variables` are passed to the template. Raises ChatTemplateError if the template
        fails."""
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise chat.ChatTemplateError(
                "return_assistant_tokens_mask needs return_dict=True and tokenize=True"
            )
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise chat.ChatTemplateError(
                "continue_final_message cannot be combined with add_generation_prompt or assistant masks"
            )
        template = self.get_chat_template(chat_template, tools)
        batched, conversations = chat.conversations(conversation)
        rendered = [
            chat.render(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                mark_generation=return_assistant_tokens_mask,
                variables={**self.special_tokens_map, **variables},
            )
            for messages in conversations
        ]
        texts: Any = [text for text, _ in rendered] if batched else rendered[0][0]
        if not tokenize:
            return texts
        out = self(
            texts,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        if return_assistant_tokens_mask:
            nested = batched or return_tensors or "overflow_to_sample_mapping" in out
            rows = out.encodings or []
            whose = out.get("overflow_to_sample_mapping", range(len(rows)))
            masks = [_mask_of(row, rendered[int(i)][1]) for row, i in zip(rows, whose, strict=True)]
            out["assistant_masks"] = masks if nested else masks[0]
            out.convert_to_tensors(return_tensors)
        return out if return_dict else out["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template that `apply_chat_template` uses: `chat_template`, as text or name, or the tokenizer's
        own."""
        return chat.choose(self.chat_template, chat_template, tools)

    @contextmanager
    def as_target_tokenizer(self) -> Iterator[None]:
        """Texts within the block are encoded as `text_target`, which is the newer way."""
        before = dict(self.__dict__)
        self.__dict__.update(self.targets().__dict__)
        try:
            yield
        finally:
            self.__dict__.update(before)

    # -- files

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and the chat template into a folder, which transformers
        and minilm load. Returns the files. Each is written completely or not at all."""
        return save(self, Path(save_directory))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> Any:
        """Save to a folder and upload it with huggingface_hub, as `push_to_hub` of models does."""
        from ..companions import upload  # which imports PyTorch

        return upload(self, repo_id, private, options)

    # -- the post-processor

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` is added before each text. Can be set."""
        with self._lock:
            return adds(self.backend_tokenizer, self.bos_token, 0)

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._frame(value, self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` is added after each text. Can be set."""
        with self._lock:
            return adds(self.backend_tokenizer, self.eos_token, -1)

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._frame(self.add_bos_token, value)

    def update_post_processor(self) -> None:
        """Call this after changing `bos_token` or `eos_token`, so that texts are encoded with the new one."""
        self._frame(bool(self.init_kwargs.get("add_bos_token")), bool(self.init_kwargs.get("add_eos_token")))

    def _frame(self, bos: bool, eos: bool) -> None:
        flags = {"add_bos_token": bool(bos), "add_eos_token": bool(eos)}
        set_frame(self.backend_tokenizer, "bos-eos", {**self._special, **flags})
        self.init_kwargs.update(flags)

    # -- the object

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The object's class; to transformers' Trainer its own class of tokenizers, for it decides by
        isinstance whether rows are padded, and special tokens compared with the model's."""
        if sys._getframe(1).f_globals.get("__name__") == "transformers.trainer":
            return sys.modules["transformers"].PreTrainedTokenizerBase
        return type(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        limit = "unlimited" if self.model_max_length >= UNLIMITED else self.model_max_length
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"len={len(self)}, model_max_length={limit}, padding_side={self.padding_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )


AutoTokenizer = Tokenizer


def tokenizer_class(name: str) -> type[Tokenizer] | None:
    """The class for the name of a transformers tokenizer (BertTokenizer, GPT2TokenizerFast, ...): a Tokenizer
    with that family's rules. None for an unknown name."""
    if name in ("AutoTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerFast"):
        return Tokenizer
    if name.removesuffix("Fast") not in FAMILIES:
        return None
    kind = Tokenizer.own_class(name.removesuffix("Fast"))
    return type(name, (kind,), {"class_name": name, "__module__": "minilm", "__doc__": kind.__doc__})


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name in settings:
        if name not in _SETTINGS and name not in _NO_EFFECT and not name.endswith("_token"):
            raise TokenizerError(f"{name}={settings[name]!r:.60}: a tokenizer has no such setting")
    return {name: value for name, value in settings.items() if name not in _NO_EFFECT}


def _mask_of(row: Encoding, spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for tokens that have a character in `spans`. A token without characters (pipelines exclude white
    space from offsets, so a token of only white space has an empty span) is assigned by its end."""
    kept = sorted((first, last) for first, last in spans if first < last)
    lasts = [last for _, last in kept]
    mask = [0] * len(row.ids)
    for index, (start, end) in enumerate(row.offsets):
        at = bisect_right(lasts, start) if start < end else bisect_left(lasts, end)
        mask[index] = int(at < len(kept) and kept[at][0] < end)
    return mask
