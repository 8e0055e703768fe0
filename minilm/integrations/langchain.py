"""minilm's models for LangChain (langchain-core 1.0 or later).

    from minilm.integrations.langchain import ChatMinilm, MinilmEmbeddings

    chat = ChatMinilm(model="SmolLM2-135M-Instruct", temperature=0, max_tokens=60)
    chat.invoke("Why is the sky blue?").content
    MinilmEmbeddings("all-MiniLM-L6-v2").embed_query("a text")

`ChatMinilm` answers messages, `MinilmLLM` continues texts. `MinilmEmbeddings`, `MinilmReranker` and
`MinilmCrossEncoder` are defined in `minilm.integrations.langchain_search` and can be imported from here too.
LangChain is imported when one of these classes is first used. Concurrent calls from several threads, which
LangChain's `batch` and asynchronous methods make, are run as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from ..generation import LLM
from .asking import MOST_TOKENS, asked, loaded, name_of, options_of

SEARCH = ("MinilmCrossEncoder", "MinilmEmbeddings", "MinilmReranker")


def __getattr__(name: str) -> Any:
    if name in ("ChatMinilm", "MinilmLLM"):
        return classes()[name]
    if name in SEARCH:
        from .langchain_search import classes as search

        return search()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def classes() -> dict[str, Any]:
    """The classes by name, created at first use, since LangChain is imported for it."""
    from langchain_core.language_models import BaseChatModel, BaseLLM
    from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_openai_messages
    from langchain_core.outputs import (
        ChatGeneration,
        ChatGenerationChunk,
        ChatResult,
        Generation,
        GenerationChunk,
        LLMResult,
    )
    from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

    class Asked(BaseModel):  # type: ignore[misc]
        """Options of both classes."""

        model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

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

        def __getstate__(self) -> dict[Any, Any]:
            if isinstance(self.model, LLM):
                raise TypeError(
                    f"a loaded LLM cannot be pickled: create {type(self).__name__} with the model's name"
                )
            state = super().__getstate__()
            return {**state, "__pydantic_private__": {**state["__pydantic_private__"], "_llm": None}}

        def __setstate__(self, state: dict[Any, Any]) -> None:
            super().__setstate__(state)
            self._llm = loaded(LLM, self.model, self.model_kwargs)

        def __deepcopy__(self, memo: Any = None) -> Any:
            return self.model_copy()  # the model is shared

        def get_token_ids(self, text: str) -> list[int]:
            """The ids of a text in the model's vocabulary, without special tokens."""
            ids: list[int] = self._llm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        @property
        def _identifying_params(self) -> dict[str, Any]:
            return {"model": name_of(self.model, self._llm), **self.model_kwargs, **options_of(self)}

    def plain(messages: Any) -> list[dict[str, Any]]:
        """Messages as dicts whose content is text. Raises TypeError for other content."""
        found: list[dict[str, Any]] = convert_to_openai_messages(messages)
        for message in found:
            for block in message["content"] if isinstance(message["content"], list) else ():
                kind = block.get("type") if isinstance(block, dict) else type(block).__name__
                if kind != "text":
                    raise TypeError(f"minilm reads text only, and a {message['role']} message holds {kind}")
        return found

    class ChatMinilm(Asked, BaseChatModel):  # type: ignore[misc]
        """A chat model: answers a list of messages with a message. Options of a call (`bind`, `invoke`) are
        those of `SamplingParams`, and those of the chat template (`tools`, `chat_template_kwargs`, ...). An
        answer has the numbers of tokens (`usage_metadata`), and the reason why the text ended."""

        __qualname__ = "ChatMinilm"
        model_config = ConfigDict(extra="forbid", protected_namespaces=())

        @property
        def _llm_type(self) -> str:
            return "minilm-chat"

        def _generate(
            self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any
        ) -> ChatResult:
            params, template = asked("ChatMinilm", self._llm, options_of(self), options, stop)
            [answer] = self._llm.chat(plain(messages), params, use_tqdm=False, **template)
            found = []
            for number, text in enumerate(answer.outputs):
                # If there are several texts, count the prompt for the first only.
                usage = _usage(0 if number else len(answer.prompt_token_ids), len(text.token_ids))
                message = AIMessage(text.text, usage_metadata=usage, response_metadata=self._metadata(text))
                found.append(ChatGeneration(message=message))
            return ChatResult(generations=found)

        def _stream(
            self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any
        ) -> Iterator[ChatGenerationChunk]:
            params, template = asked("ChatMinilm", self._llm, options_of(self), options, stop)
            stream = self._llm.stream_chat(plain(messages), params, **template)
            try:
                for piece in stream:
                    chunk = ChatGenerationChunk(message=AIMessageChunk(piece))
                    if run_manager is not None:
                        run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
            finally:  # the caller may have stopped reading
                stream.close()
            [text] = stream.output.outputs
            usage = _usage(len(stream.output.prompt_token_ids), len(text.token_ids))
            end = {"response_metadata": self._metadata(text), "chunk_position": "last"}
            yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=usage, **end))

        def _metadata(self, text: Any) -> dict[str, Any]:
            return {"model_name": name_of(self.model, self._llm), "finish_reason": text.finish_reason}

    class MinilmLLM(Asked, BaseLLM):  # type: ignore[misc]
        """A language model: continues texts. `batch` generates all texts as one batch."""

        __qualname__ = "MinilmLLM"
        model_config = ConfigDict(extra="forbid", protected_namespaces=())

        @property
        def _llm_type(self) -> str:
            return "minilm"

        def _generate(
            self, prompts: list[str], stop: Any = None, run_manager: Any = None, **options: Any
        ) -> LLMResult:
            params, _ = asked("MinilmLLM", self._llm, options_of(self), options, stop, chat=False)
            answers = self._llm.generate(prompts, params, use_tqdm=False)
            read = sum(len(answer.prompt_token_ids) for answer in answers)
            written = sum(len(text.token_ids) for answer in answers for text in answer.outputs)
            texts = [
                [
                    Generation(text=text.text, generation_info={"finish_reason": text.finish_reason})
                    for text in answer.outputs
                ]
                for answer in answers
            ]
            said = {"token_usage": _usage(read, written), "model_name": name_of(self.model, self._llm)}
            return LLMResult(generations=texts, llm_output=said)

        def _stream(
            self, prompt: str, stop: Any = None, run_manager: Any = None, **options: Any
        ) -> Iterator[GenerationChunk]:
            params, _ = asked("MinilmLLM", self._llm, options_of(self), options, stop, chat=False)
            stream = self._llm.stream(prompt, params)
            try:
                for piece in stream:
                    chunk = GenerationChunk(text=piece)
                    if run_manager is not None:
                        run_manager.on_llm_new_token(piece, chunk=chunk)
                    yield chunk
            finally:
                stream.close()
            reason = stream.output.outputs[0].finish_reason
            yield GenerationChunk(text="", generation_info={"finish_reason": reason})

    return {"ChatMinilm": ChatMinilm, "MinilmLLM": MinilmLLM}


def _usage(read: int, written: int) -> Any:
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
