"""`SamplingParams` and `BeamSearchParams`: the options of `LLM.generate` and `LLM.beam_search`, with vLLM's
names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sampling import Sampling
from .stopping import stop_texts
from .values import MOST_TEXTS, is_whole, number, token_ids, whole

if TYPE_CHECKING:
    from .repeats import SameSentence

_GREEDY_BELOW = 1e-5


@dataclass
class SamplingParams:
    """Options of generation. Raises ValueError, which names the value, for invalid ones."""

    n: int = 1
    """Number of texts per prompt; they share its prefill."""
    presence_penalty: float = 0.0
    """-2 to 2, subtracted from the logits of tokens that are in the generated text."""
    frequency_penalty: float = 0.0
    """-2 to 2, subtracted from a token's logit for each time it is in the generated text."""
    repetition_penalty: float = 1.0
    """Above 0; logits of tokens in prompt and text are divided by it (multiplied if negative)."""
    max_same_sentence: int | None = None
    """How often the same sentence or line may stand in a generated text, blocks of code excepted; None: any
    number of times. (An option of minilm's own; see `minilm.generation.repeats`.)"""
    temperature: float = 1.0
    """0: greedy; 1: samples from the model's own distribution."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    seed: int | None = None
    """Sampling of text number i of a prompt depends only on (seed, i); None: on the seed of the LLM."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text; not part of it, unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the text, in addition to the model's end tokens."""
    ignore_eos: bool = False
    """Continue past the model's end tokens."""
    max_tokens: int | None = 16
    """None: up to the model's window."""
    min_tokens: int = 0
    """The text does not end before it has this many tokens."""
    logprobs: int | None = None
    """Return the log-probabilities of this many best tokens per step (-1: all), and of the chosen one."""
    detokenize: bool = True
    """False: return token ids only, no text."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Has no effect, as with fast tokenizers in vLLM."""
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self.n = whole("n", self.n, 1, MOST_TEXTS)
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, -2 <= self._number(name) <= 2, "between -2 and 2")
        self._check("repetition_penalty", self._number("repetition_penalty") > 0, "above 0")
        if self.max_same_sentence is not None:
            self._whole("max_same_sentence", 1)
        self._check("temperature", self._number("temperature") >= 0, "0 or above")
        self._check("top_p", 0 < self._number("top_p") <= 1, "above 0, and at most 1")
        self._whole("top_k", -1)
        self._check("min_p", 0 <= self._number("min_p") <= 1, "between 0 and 1")
        self._check("seed", self.seed is None or is_whole(self.seed), "a whole number")
        if self.max_tokens is not None:
            self._whole("max_tokens", 1)
        self._whole("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            self._whole("logprobs", -1)
        self.stop = stop_texts("stop", self.stop)
        self.stop_token_ids = token_ids("stop_token_ids", self.stop_token_ids)
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need the text: detokenize=False cannot be combined with stop")
        if self.greedy and self.n > 1:
            raise ValueError(f"n={self.n} texts with temperature 0 would all be the same: n must be 1")

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"{name} must be {expected}, and is {getattr(self, name)!r}")

    def _number(self, name: str) -> float:
        return number(name, getattr(self, name))

    def _whole(self, name: str, least: int) -> None:
        setattr(self, name, whole(name, getattr(self, name), least))

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy (no sampling)."""
        return self.temperature < _GREEDY_BELOW

    def sampling(self, ends: frozenset[int], seed: int, decode: Callable[[int], str]) -> Sampling:
        """The options for the decoding loop. `ends`: tokens that end the text; `seed`: used if none is set;
        `decode`: a token -> its text."""
        drawn = not self.greedy
        excluded: SameSentence | None = None
        if self.max_same_sentence is not None:
            from .repeats import SameSentence

            excluded = SameSentence(self.max_same_sentence, decode)
        return Sampling(
            do_sample=drawn,
            temperature=self.temperature if drawn else 1.0,
            top_k=max(0, self.top_k) if drawn else 0,
            top_p=self.top_p if drawn else 1.0,
            min_p=self.min_p if drawn else 0.0,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            excluded=excluded,
            min_new_tokens=self.min_tokens,
            ends=ends,
            seed=seed if self.seed is None else self.seed,
        )


@dataclass
class BeamSearchParams:
    """Options of beam search. Raises ValueError, which names the value, for invalid ones."""

    beam_width: int
    """Number of beams, and of texts per prompt."""
    max_tokens: int
    ignore_eos: bool = False
    """Continue past the model's end tokens."""
    temperature: float = 0.0
    """The logits are divided by it first; 0 and 1: the model's own distribution."""
    length_penalty: float = 1.0
    """A score is divided by the number of tokens, those of the prompt included, to this power."""
    include_stop_str_in_output: bool = False
    """Has no effect, as in vLLM: `tokens` and `text` hold the end token."""

    def __post_init__(self) -> None:
        self.beam_width = whole("beam_width", self.beam_width, 1, MOST_TEXTS)
        self.max_tokens = whole("max_tokens", self.max_tokens, 1)
        self.length_penalty = number("length_penalty", self.length_penalty)
        self.temperature = number("temperature", self.temperature)
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or above, and is {self.temperature!r}")
