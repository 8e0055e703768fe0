"""Shared by the LangChain and LlamaIndex wrappers of `LLM`: loading a model, and the options of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..generation import LLM, SamplingParams
from ..sentence import CrossEncoder, SentenceEncoder

MOST_TOKENS = 256
"""Maximum tokens of an answer, if the program sets no other number."""

SAMPLING = tuple(field.name for field in fields(SamplingParams))
TEMPLATE = (
    *("add_generation_prompt", "continue_final_message"),
    *("chat_template", "chat_template_kwargs", "tools"),
)
"""Options of a single call: those of `SamplingParams`, and those of the chat template."""

OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Options that a wrapper is created with, in addition to max_tokens. None: as the checkpoint recommends."""


def options_of(wrapper: Any) -> dict[str, Any]:
    """The options that were given, by their names in `SamplingParams`."""
    found = {name: getattr(wrapper, name) for name in OPTIONS if getattr(wrapper, name) is not None}
    return {"max_tokens": wrapper.max_tokens, **found}


def loaded(kind: Any, model: Any, options: Mapping[str, Any]) -> Any:
    """`model` itself if it is a `kind` (LLM, SentenceEncoder, CrossEncoder), otherwise the model of that
    name.

    Raises ValueError if there are loading options for a model that is already loaded, TypeError for a model
    of another kind.
    """
    if isinstance(model, kind):
        if options:
            raise ValueError(
                f"{', '.join(options)}: only for loading, so give the model's name, not a loaded model"
            )
        return model
    if isinstance(model, (LLM, SentenceEncoder, CrossEncoder)):
        raise TypeError(f"expected a name or {kind.__name__}, got {type(model).__name__}")
    return kind(model, **options)


def name_of(model: Any, llm: LLM) -> str:
    """The name that `model` was given by or loaded from, or else a text that identifies it."""
    given = llm.model.name_or_path if isinstance(model, LLM) else str(model)
    return given or f"{type(llm.model).__name__} at {id(llm.model):#x}"


def asked(
    who: str, llm: LLM, own: Mapping[str, Any], call: Mapping[str, Any], stop: Any = None, chat: bool = True
) -> tuple[SamplingParams, dict[str, Any]]:
    """(sampling parameters, options of the chat template) for one call.

    Later ones take precedence: the checkpoint's recommendation, `own` (the wrapper's options), the options of
    the `call`. If `stop` is not empty, it replaces the wrapper's stop texts. Raises TypeError for an unknown
    option, ValueError for invalid values.
    """
    known = (*SAMPLING, *(TEMPLATE if chat else ()))
    wrong = sorted(set(call) - set(known))
    if wrong:
        raise TypeError(f"{who} has no option {', '.join(wrong)}; its options are {', '.join(known)}")
    said = {**own, **{name: value for name, value in call.items() if name in SAMPLING}}
    if stop:
        said["stop"] = stop
    params = replace(llm.get_default_sampling_params(), **said)
    return params, {name: value for name, value in call.items() if name in TEMPLATE}
