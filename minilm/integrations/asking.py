"""What the wrappers of LLM for LangChain and LlamaIndex have in common: a model, and how it is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..generation import LLM, SamplingParams
from ..sentence import CrossEncoder, SentenceEncoder

MOST_TOKENS = 256
"""Of an answer, unless the program says another number."""

SAMPLING = tuple(field.name for field in fields(SamplingParams))
TEMPLATE = (
    *("add_generation_prompt", "continue_final_message"),
    *("chat_template", "chat_template_kwargs", "tools"),
)
"""Options of a single call: for `SamplingParams`, and for the chat template."""

OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Options that a wrapper is made with, beside max_tokens; None: as the checkpoint recommends."""


def options_of(wrapper: Any) -> dict[str, Any]:
    """Those that were given, by their names in `SamplingParams`."""
    found = {name: getattr(wrapper, name) for name in OPTIONS if getattr(wrapper, name) is not None}
    return {"max_tokens": wrapper.max_tokens, **found}


def loaded(kind: Any, model: Any, options: Mapping[str, Any]) -> Any:
    """`model` if it is a `kind` (LLM, SentenceEncoder, CrossEncoder), or else the one of that name.

    Raises ValueError for options of a model that is loaded already, TypeError for a model of another kind.
    """
    if isinstance(model, kind):
        if options:
            raise ValueError(
                f"{', '.join(options)} would change how a model is loaded, and this one is: give its name"
            )
        return model
    if isinstance(model, (LLM, SentenceEncoder, CrossEncoder)):
        raise TypeError(f"expected a name or {kind.__name__}, got {type(model).__name__}")
    return kind(model, **options)


def name_of(model: Any, llm: LLM) -> str:
    """The name that `model` was given by, or that it was loaded by before, or what tells it from others."""
    given = llm.model.name_or_path if isinstance(model, LLM) else str(model)
    return given or f"{type(llm.model).__name__} at {id(llm.model):#x}"


def asked(
    who: str, llm: LLM, own: Mapping[str, Any], call: Mapping[str, Any], stop: Any = None, chat: bool = True
) -> tuple[SamplingParams, dict[str, Any]]:
    """(how to sample, options of the chat template) for one call.

    What the checkpoint recommends, over that `own`, what the wrapper was made with, over that what the `call`
    says. `stop`, if there are any, takes the place of the wrapper's. Raises TypeError
    for an option that there is not, ValueError for values that make no sense.
    """
    known = (*SAMPLING, *(TEMPLATE if chat else ()))
    wrong = sorted(set(call) - set(known))
    if wrong:
        raise TypeError(f"{who} has no option {', '.join(wrong)}; there are {', '.join(known)}")
    said = {**own, **{name: value for name, value in call.items() if name in SAMPLING}}
    if stop:
        said["stop"] = stop
    params = replace(llm.get_default_sampling_params(), **said)
    return params, {name: value for name, value in call.items() if name in TEMPLATE}
