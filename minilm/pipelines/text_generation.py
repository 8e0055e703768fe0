"""text-generation: a decoder continues a text, or answers in a chat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from ..generation import GenerationConfig, context_window
from ..model import AutoModelForCausalLM
from ..sentence import Ran, Tokens, chunks
from ..text import continuation
from .base import Pipeline, Work

SAMPLED = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
"""Defaults of transformers' pipeline, unless the checkpoint or the call sets them."""

_SAYS = {"content", "tool_calls", "function_call"}


@dataclass(frozen=True)
class Options:
    """Options of transformers' pipeline; all others go to `model.generate`.

    return_full_text: return the prompt with the new text, or the whole chat (the default). return_tensors:
        return token ids instead of text.
    prefix: added before every text. add_special_tokens, truncation, max_length, tokenizer_encode_kwargs: for
        the tokenizer.
    continue_final_message: continue the last message of a chat; None: if it is the assistant's.
    tools, documents: for the chat template. handle_long_generation: "hole" drops the start of a prompt that
        leaves too little room for new tokens.
    stop_sequence: a text; each of its tokens ends the generation.
    """

    return_full_text: bool | None = None
    return_tensors: bool | None = None
    return_text: bool | None = None
    clean_up_tokenization_spaces: bool = True
    skip_special_tokens: bool | None = None
    prefix: str = ""
    add_special_tokens: bool | None = None
    truncation: bool | str | None = None
    padding: Any = None
    max_length: int | None = None
    tokenizer_encode_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    handle_long_generation: str | None = None
    stop_sequence: str | None = None
    generate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.return_full_text is not None and (
            self.return_text is not None or self.return_tensors is not None
        ):
            raise ValueError("return_full_text cannot be combined with return_text or return_tensors")
        if self.return_text is not None and self.return_tensors is not None:
            raise ValueError("return_text and return_tensors exclude each other")
        if self.handle_long_generation not in (None, "hole"):
            raise ValueError(
                f"handle_long_generation must be None or 'hole', and is {self.handle_long_generation!r}"
            )


class TextGenerationPipeline(Pipeline[Options]):
    """A text -> [{"generated_text": ...}], one for each of `num_return_sequences`; a chat (a list of
    {"role", "content"}) -> the same with the messages and the answer as `generated_text`.

    Prompts are continued one by one unless `batch_size` is set. Sampling gives the same tokens as
    transformers after the same torch.manual_seed.
    """

    task = "text-generation"
    model_class = AutoModelForCausalLM
    options_class = Options
    default_batch_size = 1

    def __call__(self, inputs: Any = None, *, batch_size: int | None = None, **options: Any) -> Any:
        """As in `Pipeline`; `text_inputs` is transformers' name for the texts."""
        if "text_inputs" in options:
            if inputs is not None:
                raise TypeError("text-generation got both texts and text_inputs: they are the same argument")
            inputs = options.pop("text_inputs")
        return super().__call__(inputs, batch_size=batch_size, **options)

    def is_single(self, inputs: Any) -> bool:
        """Whether `inputs` is a text or a chat."""
        return isinstance(inputs, str) or _is_chat(inputs)

    def parse(self, options: dict[str, Any]) -> Options:
        """Options that are not in `Options` go to `model.generate`, which checks them."""
        ours = {f.name for f in fields(Options)} - {"generate"}
        own = {name: value for name, value in options.items() if name in ours}
        for_generate = {name: value for name, value in options.items() if name not in ours}
        prefix = self._task_params().get("prefix", self.model.config.get("prefix"))
        if isinstance(prefix, str):
            own.setdefault("prefix", prefix)
        if own.get("max_length") is not None:
            for_generate["max_length"] = own["max_length"]
        return Options(**own, generate=for_generate)

    def prepare(self, item: Any, options: Options) -> Work:
        """The tokens of the prompt."""
        own = {name: getattr(options, name) for name in ("add_special_tokens", "truncation", "max_length")}
        asked: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        asked.update(options.tokenizer_encode_kwargs or {})
        if _is_chat(item):
            asked.pop("add_special_tokens", None)  # the template adds them
            goes_on = _goes_on(item, options)
            encoded = self.tokenizer.apply_chat_template(
                list(item),
                tools=options.tools,
                documents=options.documents,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                **asked,
            )
        else:
            encoded = self.tokenizer(options.prefix + self.text(item), verbose=False, **asked)
        ids = list(encoded["input_ids"])
        if options.handle_long_generation == "hole":
            ids = ids[-self._room(len(ids), options) :]
        return Work([Tokens(ids)], item)

    def _room(self, prompt: int, options: Options) -> int:
        """Maximum number of prompt tokens that leave room for the new ones."""
        longest = context_window(self.model.spec)
        new = self._settings(options, prompt).get("max_new_tokens")
        if longest is None or new is None:
            return prompt
        if new >= longest:
            raise ValueError(
                f"max_new_tokens={new} leaves no room for a prompt in the window of {longest} tokens"
            )
        return longest - int(new)

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Any]:
        """Not used: `results` generates."""
        raise NotImplementedError

    def results(
        self, items: Iterable[Any], options: Options, batch_size: int, slab: int = 1
    ) -> Iterator[Any]:
        """Generate for `batch_size` prompts at a time."""
        for chunk in chunks(items, batch_size):
            works = [self.prepare(item, options) for item in chunk]
            for work, rows in zip(works, self._generate(works, options), strict=True):
                yield self.finish(work, rows, options)

    def _task_params(self) -> dict[str, Any]:
        """Options for this task in config.json (in older checkpoints, such as GPT-2's)."""
        tasks = self.model.config.get("task_specific_params")
        found = tasks.get(self.task) if isinstance(tasks, Mapping) else None
        return dict(found) if isinstance(found, Mapping) else {}

    def _settings(self, options: Options, longest: int) -> dict[str, Any]:
        """Options of `generate`: those of the call, then defaults for what the checkpoint does not set."""
        asked = dict(options.generate)
        stored = asked.get("generation_config") or getattr(self.model, "generation_config", None)
        for name, value in SAMPLED.items():
            if asked.get(name) is None and getattr(stored, name, None) is None:
                asked[name] = value
        if options.generate.get("max_new_tokens") is None:
            longer = getattr(stored, "max_length", None)
            if options.generate.get("max_length") or longer not in (None, 20):
                asked.pop("max_new_tokens", None)
        if options.generate.get("generation_config") is None:
            of_task = self._task_params()
            unknown = GenerationConfig().update(**of_task)
            for name, value in of_task.items():  # precedence: call, task, checkpoint
                if name not in unknown and options.generate.get(name) is None:
                    asked[name] = value
        if options.generate.get("max_new_tokens") is None:
            limit = context_window(self.model.spec)
            if limit is not None and isinstance(
                asked.get("max_new_tokens"), int
            ):  # a default that does not fit is not an error
                asked["max_new_tokens"] = max(1, min(asked["max_new_tokens"], limit - longest))
        if (
            getattr(stored, "pad_token_id", None) is None
            and asked.get("pad_token_id") is None
            and self.tokenizer.pad_token_id is not None
        ):
            asked["pad_token_id"] = self.tokenizer.pad_token_id
        if options.stop_sequence is not None:
            asked["eos_token_id"] = self.tokenizer.encode(options.stop_sequence, add_special_tokens=False)
        if asked.get("stop_strings"):
            asked.setdefault("tokenizer", self.tokenizer)
        return asked

    def _generate(self, works: list[Work], options: Options) -> list[list[Any]]:
        """The new tokens of each sequence, per prompt."""
        assert isinstance(self.model, AutoModelForCausalLM)
        prompts = [work.windows[0].ids for work in works]
        columns = max(len(prompt) for prompt in prompts)
        settings = self._settings(options, columns)
        if columns == 0 and len(prompts) == 1:  # an empty text: generation starts from the bos token
            sequences = self.model.generate(**settings)
        else:
            ids = torch.zeros(len(prompts), columns, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, columns - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
                mask[row, columns - len(prompt) :] = 1
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            sequences = self.model.generate(ids, attention_mask=mask, **settings)
        new = sequences[:, columns:].tolist()
        each = len(new) // len(works)
        ends = settings.get("eos_token_id")
        if ends is None:
            ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = set(torch.as_tensor([] if ends is None else ends).flatten().tolist())
        groups = [new[i * each : (i + 1) * each] for i in range(len(works))]
        return [_trimmed(group, listed) if len(works) > 1 else group for group in groups]

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """One dict per sequence."""
        return [self._record(work, tokens, options) for tokens in outputs]

    def _record(self, work: Work, tokens: list[int], options: Options) -> dict[str, Any]:
        if options.return_tensors:
            return {"generated_token_ids": [*work.windows[0].ids, *tokens]}
        decode = partial(
            self.tokenizer.decode,
            skip_special_tokens=options.skip_special_tokens is not False,
            clean_up_tokenization_spaces=options.clean_up_tokenization_spaces,
        )
        text = continuation(decode, work.windows[0].ids, tokens)
        prompt = work.state
        if options.return_full_text is False:
            return {"generated_text": text}
        if isinstance(prompt, str):
            return {"generated_text": prompt + text}
        messages = [dict(message) for message in prompt]
        if _goes_on(prompt, options):
            last = {**messages[-1], "content": _longer(messages[-1]["content"], text)}
            return {"generated_text": [*messages[:-1], last]}
        return {"generated_text": [*messages, {"role": "assistant", "content": text}]}


def _is_chat(item: Any) -> bool:
    """Whether it is a list of messages, each with content or tool calls."""
    is_list = isinstance(item, (list, tuple)) and len(item) > 0
    return is_list and all(
        isinstance(message, Mapping) and "role" in message and not message.keys().isdisjoint(_SAYS)
        for message in item
    )


def _goes_on(messages: Sequence[Mapping[str, Any]], options: Options) -> bool:
    """Whether the model continues the last message instead of answering it."""
    asked, last = options.continue_final_message, messages[-1]
    return last["role"] == "assistant" and last.get("content") is not None if asked is None else asked


def _longer(content: Any, text: str) -> Any:
    """The content of a message, a text or a list of parts, with `text` appended to its last text."""
    if isinstance(content, str):
        return content + text
    parts = list(content)
    at = max(index for index, part in enumerate(parts) if "text" in part)
    parts[at] = {**parts[at], "text": parts[at]["text"] + text}
    return parts


def _trimmed(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    """The rows of one prompt, without the padding added for longer rows of other prompts."""
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[: max(lengths)] for row in rows]
