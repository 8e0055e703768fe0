"""minilm's models for LlamaIndex (llama-index-core 0.14 or later).

    from minilm.integrations.llama_index import MinilmEmbedding, MinilmLLM

    Settings.embed_model = MinilmEmbedding(model="all-MiniLM-L6-v2")
    Settings.llm = MinilmLLM(model="SmolLM2-135M-Instruct", temperature=0)

`MinilmLLM` completes texts and answers messages. `MinilmEmbedding` and `MinilmRerank` are defined in
`minilm.integrations.llama_index_search` and can be imported from here too. LlamaIndex is imported when one of
these classes is first used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from ..generation import LLM
from .asking import MOST_TOKENS, asked, loaded, name_of, options_of

SEARCH = ("MinilmEmbedding", "MinilmRerank")


def __getattr__(name: str) -> Any:
    if name == "MinilmLLM":
        return llm_class()
    if name in SEARCH:
        from .llama_index_search import classes

        return classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def llm_class() -> Any:
    """`MinilmLLM`, created at first use, since LlamaIndex is imported for it."""
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        CompletionResponse,
        LLMMetadata,
        MessageRole,
        TextBlock,
    )
    from llama_index.core.llms import CustomLLM
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from pydantic import ConfigDict, Field, PrivateAttr, field_serializer

    class MinilmLLM(CustomLLM):  # type: ignore[misc]
        """A decoder: continues texts (`complete`) and answers messages (`chat`), also as streams.

        Options of a call are those of `SamplingParams`, and those of the chat template (`tools`,
        `chat_template_kwargs`, ...). In an answer, `additional_kwargs` has the numbers of tokens, and `raw`
        the reason why the text ended.
        """

        __qualname__ = "MinilmLLM"
        model_config = ConfigDict(extra="forbid", protected_namespaces=())

        model: Any = Field(repr=False)
        """A name, a folder, a GGUF file, or a loaded `minilm.LLM`."""
        model_kwargs: dict[str, Any] = Field(default_factory=dict)
        """Options of `minilm.LLM`, if the model is given by name: weights, device, dtype, ..."""
        max_tokens: int | None = MOST_TOKENS
        """None: up to the model's window."""
        temperature: float | None = None
        """None, also below: as the checkpoint recommends."""
        top_p: float | None = None
        top_k: int | None = None
        min_p: float | None = None
        presence_penalty: float | None = None
        frequency_penalty: float | None = None
        repetition_penalty: float | None = None
        seed: int | None = None
        stop: str | list[str] | None = None
        """Used by calls that give no `stop`."""
        _llm: Any = PrivateAttr(default=None)

        def model_post_init(self, context: Any) -> None:
            super().model_post_init(context)
            self._llm = loaded(LLM, self.model, self.model_kwargs)

        def __getstate__(self) -> dict[str, Any]:
            if isinstance(self.model, LLM):
                raise TypeError("a loaded LLM cannot be pickled: create MinilmLLM with the model's name")
            return {name: getattr(self, name) for name in self.model_fields_set}

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.__init__(**state)  # type: ignore[misc]

        def __deepcopy__(self, memo: Any = None) -> Any:
            return self.model_copy()  # the model is shared

        @field_serializer("model")  # type: ignore[untyped-decorator]
        def _name(self, model: Any) -> str:
            return name_of(model, self._llm)

        @classmethod
        def class_name(cls) -> str:
            return "MinilmLLM"

        @property
        def metadata(self) -> LLMMetadata:
            """The window, the maximum length of answers, whether there is a chat template, the model's
            name."""
            return LLMMetadata(
                context_window=self._llm.max_model_len,
                num_output=self.max_tokens or self._llm.max_model_len,
                is_chat_model=self._llm.tokenizer.chat_template is not None,
                model_name=name_of(self.model, self._llm),
            )

        def _messages(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
            for message in messages:
                for block in message.blocks:
                    if not isinstance(block, TextBlock):
                        kind = type(block).__name__
                        raise TypeError(
                            f"minilm reads text only, and a {message.role.value} message holds {kind}"
                        )
            return [{"role": message.role.value, "content": message.content or ""} for message in messages]

        def _how(self, options: dict[str, Any], chat: bool) -> tuple[Any, dict[str, Any]]:
            return asked("MinilmLLM", self._llm, options_of(self), options, chat=chat)

        @llm_completion_callback()  # type: ignore[untyped-decorator]
        def complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:
            """Continue the prompt."""
            params, _ = self._how(options, chat=False)
            prompt = prompt if formatted else self.completion_to_prompt(prompt)
            [answer] = self._llm.generate([prompt], params, use_tqdm=False)
            return CompletionResponse(text=answer.outputs[0].text, **_said(answer))

        @llm_completion_callback()  # type: ignore[untyped-decorator]
        def stream_complete(
            self, prompt: str, formatted: bool = False, **options: Any
        ) -> Iterator[CompletionResponse]:
            """Continue the prompt, yielding the text so far and the new piece."""
            params, _ = self._how(options, chat=False)
            prompt = prompt if formatted else self.completion_to_prompt(prompt)
            return _pieces(
                self._llm.stream(prompt, params),
                lambda text, piece, said: CompletionResponse(text=text, delta=piece, **said),
            )

        @llm_chat_callback()  # type: ignore[untyped-decorator]
        def chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
            """Answer a conversation."""
            params, template = self._how(options, chat=True)
            [answer] = self._llm.chat(self._messages(messages), params, use_tqdm=False, **template)
            message = ChatMessage(role=MessageRole.ASSISTANT, content=answer.outputs[0].text)
            return ChatResponse(message=message, **_said(answer))

        @llm_chat_callback()  # type: ignore[untyped-decorator]
        def stream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> Iterator[ChatResponse]:
            """Answer a conversation, yielding the message so far and the new piece."""
            params, template = self._how(options, chat=True)
            return _pieces(
                self._llm.stream_chat(self._messages(messages), params, **template),
                lambda text, piece, said: ChatResponse(
                    message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece, **said
                ),
            )

        async def acomplete(self, prompt: str, formatted: bool = False, **options: Any) -> Any:
            """`complete` in a thread, without blocking the event loop."""
            return await asyncio.to_thread(self.complete, prompt, formatted=formatted, **options)

        async def achat(self, messages: Sequence[ChatMessage], **options: Any) -> Any:
            """`chat` in a thread, without blocking the event loop."""
            return await asyncio.to_thread(self.chat, messages, **options)

    return MinilmLLM


def _said(answer: Any) -> dict[str, Any]:
    """The reason why a text ended, and the numbers of tokens."""
    read, written = len(answer.prompt_token_ids), len(answer.outputs[0].token_ids)
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"raw": {"finish_reason": answer.outputs[0].finish_reason}, "additional_kwargs": counts}


def _pieces(stream: Any, response: Callable[[str, str, dict[str, Any]], Any]) -> Iterator[Any]:
    """One response per piece. The last has no new piece, but the whole text with its numbers of tokens."""
    text = ""
    try:
        for piece in stream:
            text += piece
            yield response(text, piece, {})
    finally:  # the caller may have stopped reading
        stream.close()
    yield response(text, "", _said(stream.output))
