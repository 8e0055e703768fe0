"""Results of `LLM.generate` and `LLM.beam_search`, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Logprob:
    """A token at one step: the log of the model's probability, its rank (1 is the best), its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One generated text."""

    index: int
    text: str
    token_ids: list[int]
    """Including the token that ended the text."""
    cumulative_logprob: float | None = None
    """Sum of the log-probabilities of `token_ids`, if `logprobs` were requested."""
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """"stop" (an end token or a stop string), "length", or None while it is generated."""
    stop_reason: int | str | None = None
    """The stop string, or the token of `stop_token_ids`; None for the model's end token."""

    def finished(self) -> bool:
        """Whether the text has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and the texts generated for it."""

    request_id: str
    prompt: str | None
    """None if token ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    """How many tokens of the prompt were read before, with a text that begins in the same way."""


@dataclass
class BeamSearchSequence:
    """One text that beam search found."""

    tokens: list[int]
    """Prompt included, and the end token, if one ended the text."""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    """Per new token: the best tokens of that step."""
    cum_logprob: float = 0.0
    """Sum of the log-probabilities of the new tokens."""
    text: str | None = None
    """Of all `tokens`, special ones included."""
    finish_reason: str | None = None
    """"stop" (an end token) or "length"."""
    stop_reason: int | str | None = None
    """The end token."""


@dataclass
class BeamSearchOutput:
    """The texts for one prompt, best first."""

    sequences: list[BeamSearchSequence]
