"""text2text-generation, summarization and translation: an encoder-decoder writes a text for a text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from ..generation import GenerationConfig
from ..model import PreTrainedModel
from ..sentence import Ran, Tokens, chunks, window
from ..seq2seq import AutoModelForSeq2SeqLM
from ..text import Tokenizer
from .base import Pipeline, Work

DEFAULTS = {"max_new_tokens": 256, "num_beams": 4}
"""Of transformers' pipelines, unless the checkpoint or the call sets them."""

_SENTENCES = re.compile(r"((?<=[.!?…])\s+|(?<=[。！？])\s*|\n+)")
_PAIR = re.compile(r"translation_(.+)_to_(.+)")


@dataclass(frozen=True)
class Options:
    """Options of transformers' pipelines; all others go to `model.generate`.

    return_tensors: return token ids (int64 [tokens]) instead of the text; return_text: the opposite, which is
        the default.
    truncation: cut texts that are longer than the window.
    stop_sequence: a text whose first token ends the generation.
    src_lang, tgt_lang: languages, for translation: codes of the tokenizer (mBART), or the names in the
        checkpoint's task_specific_params (T5).
    """

    return_tensors: bool | None = None
    return_text: bool | None = None
    clean_up_tokenization_spaces: bool = False
    truncation: bool | str | None = None
    stop_sequence: str | None = None
    src_lang: str | None = None
    tgt_lang: str | None = None
    generate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.return_text is not None and self.return_text == self.return_tensors:
            raise ValueError("return_text and return_tensors exclude each other")

    @property
    def ids(self) -> bool:
        """Whether the result is token ids."""
        return bool(self.return_tensors) or self.return_text is False


class Text2TextGenerationPipeline(Pipeline[Options]):
    """A text -> [{"generated_text": ...}], one for each of `num_return_sequences`; several texts -> a list of
    such dicts, or of such lists if there are several for a text.

    A text that is longer than the model's positions is an error, unless `truncation` cuts it; one that is
    longer than the tokenizer's limit gives a warning if the model has no such limit (T5). Texts are read one
    by one unless `batch_size` is set. Options for the task in config.json's task_specific_params apply, also
    its prefix.
    """

    task = "text2text-generation"
    model_class = AutoModelForSeq2SeqLM
    options_class = Options
    default_batch_size = 1
    key: ClassVar[str] = "generated"
    of_languages: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        task: str | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.asked_task = task or self.task
        super().__init__(model, tokenizer, batch_size=batch_size, **options)

    def is_single(self, inputs: Any) -> bool:
        """Whether `inputs` is a text."""
        return isinstance(inputs, str)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """The result for one text, or the results for several."""
        found = super().__call__(inputs, batch_size=batch_size, **options)
        if isinstance(inputs, (list, tuple)) and all(len(records) == 1 for records in found):
            return [records[0] for records in found]
        return found

    def parse(self, options: dict[str, Any]) -> Options:
        """Options that are not in `Options` go to `model.generate`, which checks them."""
        ours = {f.name for f in fields(Options)} - {"generate"}
        ours -= set() if self.of_languages else {"src_lang", "tgt_lang"}
        own = {name: value for name, value in options.items() if name in ours}
        return Options(**own, generate={k: v for k, v in options.items() if k not in ours})

    # -- reading

    def _task_params(self, options: Options) -> dict[str, Any]:
        """Options for this task in config.json."""
        tasks = self.model.config.get("task_specific_params")
        found = tasks.get(self.asked_task) if isinstance(tasks, Mapping) else None
        return dict(found) if isinstance(found, Mapping) else {}

    def _prefix(self, options: Options) -> str:
        prefix = self._task_params(options).get("prefix", self.model.config.get("prefix"))
        return prefix if isinstance(prefix, str) else ""

    def _tokenizer(self, options: Options) -> Tokenizer:
        return self.tokenizer

    def prepare(self, item: Any, options: Options) -> Work:
        """The tokens of the text, with the prefix."""
        text, prefix = self.text(item), self._prefix(options)
        longest = window(self.model, self.tokenizer)
        cuts = options.truncation not in (None, False, "do_not_truncate")
        encoded = self._tokenizer(options)(
            prefix + text,
            truncation=options.truncation if cuts else False,
            max_length=longest if cuts else None,
            verbose=False,
        )
        ids = list(encoded["input_ids"])
        if not ids:
            raise ValueError(f"{self.task} needs a text with at least one token, and {text!r:.60} has none")
        if len(ids) <= longest:
            return Work([Tokens(ids)], [""])
        return self._long(text, prefix, ids, longest, options)

    def _long(self, text: str, prefix: str, ids: list[int], longest: int, options: Options) -> Work:
        """A text that is longer than the window."""
        if len(ids) > self.model.spec.max_positions:
            raise ValueError(
                f"the text {text!r:.40} has {len(ids)} tokens, and the model reads at most {longest}: "
                "truncation=True cuts it"
            )
        return Work([Tokens(ids)], [""], cut=True)

    # -- writing

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Any]:
        """Not used: `results` generates."""
        raise NotImplementedError

    def results(
        self, items: Iterable[Any], options: Options, batch_size: int, slab: int = 1
    ) -> Iterator[Any]:
        """Generate for `batch_size` texts at a time."""
        settings = self._settings(options)
        long = 0
        for chunk in chunks(items, batch_size):
            works = [self.prepare(item, options) for item in chunk]
            long += sum(work.cut for work in works)
            for work in works:
                self.check(len(work.windows[0]), settings)
            windows = [tokens for work in works for tokens in work.windows]
            groups: Iterator[Any] = iter(
                [rows for part in chunks(windows, batch_size) for rows in self._generate(part, settings)]
            )
            for work in works:
                yield self.finish(work, [next(groups) for _ in work.windows], options)
        if long:
            most = window(self.model, self.tokenizer)
            warnings.warn(
                f"{long} texts have more than {most} tokens, for which the model was not trained; "
                "truncation=True cuts them",
                stacklevel=3,
            )

    def check(self, length: int, settings: Mapping[str, Any]) -> None:
        """Warn about lengths that make no sense for the task."""

    def _settings(self, options: Options) -> dict[str, Any]:
        """Options of `generate`: those of the call, then of the task, then defaults for what the checkpoint
        does not set."""
        asked = {name: value for name, value in options.generate.items() if value is not None}
        given = asked.get("generation_config")
        stored = given or getattr(self.model, "generation_config", None)
        if given is None:
            of_task = self._task_params(options)
            unknown = GenerationConfig().update(**of_task)
            for name, value in of_task.items():
                if name not in unknown:
                    asked.setdefault(name, value)
        length = asked.get("max_length") or getattr(stored, "max_length", None)
        for name, value in DEFAULTS.items():
            if name == "max_new_tokens" and length not in (None, 20):
                continue
            if getattr(stored, name, None) is None:
                asked.setdefault(name, value)
        if options.stop_sequence is not None:
            stop = self.tokenizer.encode(options.stop_sequence, add_special_tokens=False)
            if len(stop) != 1:
                warnings.warn(
                    f"stop_sequence {options.stop_sequence!r:.40} has {len(stop)} tokens, of which the first "
                    "ends the generation",
                    stacklevel=4,
                )
            asked["eos_token_id"] = stop[0]
        return asked

    def _generate(self, texts: Sequence[Tokens], settings: dict[str, Any]) -> list[list[list[int]]]:
        """The sequences for each text."""
        columns = max(map(len, texts))
        ids = torch.zeros(len(texts), columns, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens.ids)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        assert isinstance(self.model, AutoModelForSeq2SeqLM)
        found = self.model.generate(ids, attention_mask=mask, **settings).tolist()
        each = len(found) // len(texts)
        groups = [found[start : start + each] for start in range(0, len(found), each)]
        if len(texts) == 1:
            return groups
        ends = settings.get("eos_token_id")
        ends = self.model.generation_config.eos_token_id if ends is None else ends
        listed = set(torch.as_tensor([] if ends is None else ends).flatten().tolist())
        return [_trimmed(group, listed) for group in groups]

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """One dict per sequence; the parts of a text that was split are joined."""
        if options.ids:
            return [{f"{self.key}_token_ids": torch.tensor(row)} for row in outputs[0]]
        clean = options.clean_up_tokenization_spaces
        texts = [
            self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=clean)
            for rows in outputs
        ]
        return [
            {f"{self.key}_text": "".join(map("".join, zip(parts, work.state, strict=True)))}
            for parts in zip(*texts, strict=True)
        ]


class SummarizationPipeline(Text2TextGenerationPipeline):
    """A text -> [{"summary_text": ...}]; see `Text2TextGenerationPipeline`."""

    task = "summarization"
    key = "summary"

    def check(self, length: int, settings: Mapping[str, Any]) -> None:
        """Warn if min_length is more than max_length, or max_length more than the text's tokens."""
        most, least = _lengths(self.model, settings)
        if most is not None and least > most:
            warnings.warn(f"min_length={least} is more than max_length={most}", stacklevel=4)
        if most is not None and length < most and "max_length" in settings:
            warnings.warn(
                f"max_length={most} is more than the {length} tokens of the text: a summary is shorter",
                stacklevel=4,
            )


class TranslationPipeline(Text2TextGenerationPipeline):
    """A text -> [{"translation_text": ...}]; see `Text2TextGenerationPipeline`.

    The task "translation_en_to_fr" names the languages, as do `src_lang` and `tgt_lang`: codes of the
    tokenizer (mBART), which must be given unless it was loaded with them, or the names in T5's
    task_specific_params. A text that is longer than the window is translated in parts of whole sentences.
    """

    task = "translation"
    key = "translation"
    of_languages = True

    def parse(self, options: dict[str, Any]) -> Options:
        """As for the other tasks; languages that the model does not have are an error."""
        parsed = super().parse(options)
        source, target = parsed.src_lang, parsed.tgt_lang
        if self._known():
            self._codes(parsed)
        elif (source or target) and not self._task_params(parsed):
            codes = getattr(self.tokenizer, "supported_language_codes", [])
            way = f": a text begins with one of {', '.join(codes)}" if codes else ""
            tasks = self.model.config.get("task_specific_params")
            pairs = [task for task in (tasks or {}) if _PAIR.fullmatch(task)]
            way = f"; its task_specific_params have {', '.join(pairs)}" if pairs else way
            raise ValueError(f"src_lang={source!r} and tgt_lang={target!r} have no effect on this model{way}")
        return parsed

    def _known(self) -> dict[str, int]:
        """The language codes of the tokenizer; {}: its texts have no language."""
        return dict(getattr(self.tokenizer, "lang_code_to_id", {}))

    def _pair(self, options: Options) -> tuple[str | None, str | None]:
        if options.src_lang is not None or options.tgt_lang is not None:
            return options.src_lang, options.tgt_lang
        found = _PAIR.fullmatch(self.asked_task)
        return (found.group(1), found.group(2)) if found else (None, None)

    def _codes(self, options: Options) -> tuple[str, str]:
        known, codes = self._known(), []
        for name, code in zip(("src_lang", "tgt_lang"), self._pair(options), strict=True):
            code = getattr(self.tokenizer, name) if code is None else code
            if code is None:
                raise ValueError(
                    f"translation with this model needs src_lang= and tgt_lang=, and {name} is missing"
                )
            if code not in known:
                raise ValueError(
                    f"{name} is {code!r}, and the tokenizer has only the languages {', '.join(known)}"
                )
            codes.append(code)
        return codes[0], codes[1]

    def _task_params(self, options: Options) -> dict[str, Any]:
        tasks, (source, target) = self.model.config.get("task_specific_params"), self._pair(options)
        name = self.asked_task if source is None else f"translation_{source}_to_{target}"
        found = tasks.get(name) if isinstance(tasks, Mapping) else None
        return dict(found) if isinstance(found, Mapping) else {}

    def _tokenizer(self, options: Options) -> Tokenizer:
        if not self._known():
            return self.tokenizer
        reading: Tokenizer = self.tokenizer.reading(self._codes(options)[0])  # type: ignore[attr-defined]
        return reading

    def _settings(self, options: Options) -> dict[str, Any]:
        settings = super()._settings(options)
        if self._known():
            settings.setdefault("forced_bos_token_id", self._known()[self._codes(options)[1]])
        return settings

    def check(self, length: int, settings: Mapping[str, Any]) -> None:
        """Warn if the translation may be cut."""
        most, _ = _lengths(self.model, settings)
        if most is not None and length > 0.9 * most:
            warnings.warn(
                f"the text has {length} tokens, and its translation at most max_length={most}", stacklevel=4
            )

    def _long(self, text: str, prefix: str, ids: list[int], longest: int, options: Options) -> Work:
        """Parts of whole sentences."""
        if options.ids:
            return super()._long(text, prefix, ids, longest, options)
        code = _code(self.tokenizer, text)
        pieces = _SENTENCES.split(text[len(code) :])
        tokenizer, between = self._tokenizer(options), [""]
        parts: list[list[int]] = [[]]
        held = ""
        for sentence, space in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            whole = tokenizer(prefix + code + held + sentence, verbose=False)["input_ids"]
            if len(whole) > longest and held:
                parts.append([])
                between.append("")
                held = ""
                whole = tokenizer(prefix + code + sentence, verbose=False)["input_ids"]
            if len(whole) > longest:
                return super()._long(sentence, prefix, whole, longest, options)
            parts[-1], between[-1], held = whole, _space(space), held + sentence + space
        between[-1] = ""
        return Work([Tokens(part) for part in parts], between)


def _code(tokenizer: Tokenizer, text: str) -> str:
    """The language code at the beginning of the text (Marian), which all its parts need."""
    codes = getattr(tokenizer, "supported_language_codes", [])
    return next((code for code in codes if text.startswith(code)), "")


def _space(space: str) -> str:
    """What stands between two translated parts, for what stood between the sentences."""
    return space if "\n" in space else " " if space else ""


def _lengths(model: Any, settings: Mapping[str, Any]) -> tuple[int | None, int]:
    """max_length, unless max_new_tokens limits the text, and min_length."""
    stored = settings.get("generation_config") or model.generation_config
    most = settings.get("max_length") or getattr(stored, "max_length", None)
    new = settings.get("max_new_tokens") or getattr(stored, "max_new_tokens", None)
    return None if new else most, settings.get("min_length") or getattr(stored, "min_length", None) or 0


def _trimmed(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    """The rows of one text, without the padding added for longer rows of other texts. The first token of a
    row may be an end token."""
    lengths = [next((i + 1 for i, token in enumerate(row) if i and token in ends), len(row)) for row in rows]
    return [row[: max(lengths)] for row in rows]
