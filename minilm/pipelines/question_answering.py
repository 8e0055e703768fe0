"""question-answering: finds the span of a text that answers a question.

transformers had this pipeline until version 4; arguments, results and scores follow its last release.
Long texts are read in overlapping windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..differences import once
from ..model import AutoModelForQuestionAnswering
from ..sentence import Ran, Tokens, window
from .base import Pipeline, Work, split

if TYPE_CHECKING:
    from tokenizers import Encoding

Answer = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """Options of transformers' pipeline.

    top_k: number of answers. max_answer_len: maximum length of an answer, in tokens.
    max_seq_len: length of a window, in tokens; None: 384, or the model's maximum if less. doc_stride: number
        of tokens by which windows overlap; None: half a window, at most 128.
    max_question_len: longer questions are cut to this many tokens; None: never.
    handle_impossible_answer: allow "" as an answer. align_to_words: extend answers to whole words.
    """

    top_k: int = 1
    max_answer_len: int = 15
    max_seq_len: int | None = None
    doc_stride: int | None = None
    max_question_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    padding: Any = None

    def __post_init__(self) -> None:
        for name in ("top_k", "max_answer_len", "max_seq_len", "max_question_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer, and is {value!r}")
        if self.doc_stride is not None and (not isinstance(self.doc_stride, int) or self.doc_stride < 0):
            raise ValueError(f"doc_stride must be a number of tokens, and is {self.doc_stride!r}")


@dataclass
class _Question:
    """A question's context, its windows, and whether the context is the first or second text of a window."""

    context: str
    encodings: list[Encoding]
    sequence: int


class QuestionAnsweringPipeline(Pipeline[Options]):
    """`question=` and `context=` (texts, or lists of them), or {"question": ..., "context": ...} ->
    {"score", "start", "end", "answer"}, or a list of them with `top_k`. `start` and `end` are characters of
    the context.

    The score is the probability of the answer's first token times that of its last. If the same text occurs
    several times among a window's best candidates (2 `top_k` + 10, as in transformers), their scores are
    added; if several windows give the same answer, the highest score counts, so overlaps do not count twice
    and no score exceeds 1. `start` and `end` are those of the most probable occurrence in that window.
    """

    task = "question-answering"
    model_class = AutoModelForQuestionAnswering
    options_class = Options
    older_names: ClassVar[Mapping[str, str]] = {"topk": "top_k"}

    def __call__(
        self,
        *args: Any,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Any:
        """Answer one question, or several. A list of one gives a single result, as in transformers. `data`
        and `X` are older names for the examples."""
        for name in ("data", "X"):
            if name in options:
                once(
                    f"{self.task}({name}=)",
                    f"{self.task}: {name}= is now the first positional argument",
                    FutureWarning,
                )
                args = (*args, options.pop(name))
        inputs = _inputs(args, question, context)
        if isinstance(inputs, (list, tuple)) and len(inputs) == 1:
            inputs = inputs[0]
        return super().__call__(inputs, batch_size=batch_size, **options)

    def prepare(self, item: Any, options: Options) -> Work:
        """Split the context into windows."""
        question, context = self._texts(item)
        if options.max_question_len is not None:
            question = self._shortened(question, options.max_question_len)
        longest = window(self.model, self.tokenizer)
        limit = min(options.max_seq_len or 384, longest)
        first = self.tokenizer.padding_side == "right"  # whether the question is the first text
        taken = len(self.tokenizer.encode(question, add_special_tokens=False))
        room = limit - taken - self.tokenizer.num_special_tokens_to_add(pair=True)
        stride = options.doc_stride
        if stride is None:
            stride = max(0, min(limit // 2, 128, room - 1))
        if room < 1 or stride >= room:
            raise ValueError(
                f"windows of {limit} tokens with a question of {taken} have room for {max(room, 0)} tokens "
                f"of the context, too few for a doc_stride of {stride}"
            )
        encoded = self.tokenizer(
            [question if first else context],
            [context if first else question],
            truncation="only_second" if first else "only_first",
            max_length=limit,
            stride=stride,
            return_overflowing_tokens=True,
        )
        types = encoded.get("token_type_ids") or [None] * len(encoded["input_ids"])
        windows = [Tokens(ids, kinds) for ids, kinds in zip(encoded["input_ids"], types, strict=True)]
        return Work(windows, _Question(context, encoded.encodings or [], 1 if first else 0))

    def _texts(self, item: Any) -> tuple[str, str]:
        if not isinstance(item, Mapping) or not {"question", "context"} <= set(item):
            raise ValueError(f'expected {{"question": ..., "context": ...}}, got {item!r:.80}')
        for name in ("question", "context"):
            if not self.text(item[name]):
                raise ValueError(f"the {name} is empty")
        return item["question"], item["context"]

    def _shortened(self, question: str, tokens: int) -> str:
        offsets = self.tokenizer([question], add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ][0]
        return question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Logits [tokens, 2] of each window: for the first and for the last token of the answer."""
        assert isinstance(self.model, AutoModelForQuestionAnswering)
        return split(self.model.head(result.hidden), result.batch)

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """The best answers of all windows together."""
        asked: _Question = work.state
        answers: dict[str, Answer] = {}
        nothing = 1.0
        for encoding, logits in zip(asked.encodings, outputs, strict=True):
            start, end, none = self._probabilities(encoding, logits, asked.sequence)
            nothing = min(nothing, none)
            for key, answer in self._in_window(asked, encoding, start, end, options).items():
                if key not in answers or answer["score"] > answers[key]["score"]:
                    answers[key] = answer
        listed = list(answers.values())
        if options.handle_impossible_answer or not listed:
            listed.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        best = sorted(listed, key=lambda answer: -answer["score"])[: options.top_k]
        return best[0] if options.top_k == 1 else best

    def _in_window(
        self, asked: _Question, encoding: Encoding, start: Floats, end: Floats, options: Options
    ) -> dict[str, Answer]:
        """The answers of one window, by their text in lower case."""
        # More candidates than answers, since different tokens may give the same words. If they give too few
        # different answers, further candidates are considered, but only for new answers.
        count = options.top_k * 2 + 10 if options.align_to_words else options.top_k
        places: dict[str, dict[tuple[int, int], float]] = {}
        done = 0
        while True:
            spans = _spans(start, end, count, options.max_answer_len)
            for first, last, score in spans[done:]:
                a, b = _characters(encoding, first, last, asked.sequence, options.align_to_words)
                key = asked.context[a:b].lower()
                if not done or key not in places:
                    found = places.setdefault(key, {})
                    found[a, b] = found.get((a, b), 0.0) + score
            if len(places) >= options.top_k or len(spans) < count:
                break
            done, count = count, 2 * count
        answers = {}
        for key, scores in places.items():
            a, b = max(scores, key=lambda place: scores[place])
            total = min(1.0, sum(scores.values()))  # at most 1, except for rounding
            answers[key] = {"score": total, "start": a, "end": b, "answer": asked.context[a:b]}
        return answers

    def _probabilities(
        self, encoding: Encoding, logits: Tensor, sequence: int
    ) -> tuple[Floats, Floats, float]:
        """Probabilities of each token to be the answer's first and last, over the context and [CLS] (which
        means no answer), 0 elsewhere; and the probability of no answer (0 without a [CLS])."""
        inside = np.array([s == sequence for s in encoding.sequence_ids])
        columns = zip(encoding.special_tokens_mask, encoding.ids, strict=True)
        none = [i for i, (special, t) in enumerate(columns) if special and t == self.tokenizer.cls_token_id][
            :1
        ]
        allowed = inside.copy()
        allowed[none] = True
        values = np.where(allowed[:, None], logits.double().numpy(), -10000.0)
        weights = np.exp(values - values.max(axis=0))
        start, end = (weights / weights.sum(axis=0)).T
        nothing = float(start[none[0]] * end[none[0]]) if none else 0.0
        return start * inside, end * inside, nothing


def _spans(start: Floats, end: Floats, count: int, longest: int) -> list[tuple[int, int, float]]:
    """The `count` most probable (first, last, probability) with first <= last < first + longest."""
    n = len(start)
    scores = np.triu(np.tril(np.outer(start, end), longest - 1)).ravel()
    order = np.argsort(-scores, kind="stable")[:count]
    return [(int(i // n), int(i % n), float(scores[i])) for i in order if scores[i] > 0]


def _characters(
    encoding: Encoding, first: int, last: int, sequence: int, whole_words: bool
) -> tuple[int, int]:
    """The span of characters in the context of tokens `first` to `last`, or of their whole words."""
    if whole_words:
        words = encoding.word_ids[first], encoding.word_ids[last]
        spans = [None if word is None else encoding.word_to_chars(word, sequence) for word in words]
        if spans[0] is not None and spans[1] is not None:
            return spans[0][0], spans[1][1]
    return encoding.offsets[first][0], encoding.offsets[last][1]


def _inputs(args: tuple[Any, ...], question: Any, context: Any) -> Any:
    """The input of a call: an example, a list of examples, or an iterator."""
    if args:
        if question is not None or context is not None:
            raise TypeError("give either examples or question= and context=")
        if len(args) == 2 and all(isinstance(arg, str) for arg in args):
            return {"question": args[0], "context": args[1]}
        given = args[0] if len(args) == 1 else list(args)
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"question-answering takes question= and context=, and got {given!r:.80}")
        return given
    if question is None or context is None:
        raise TypeError("question-answering takes question= and context=")
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    questions = [question] if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise ValueError(f"there are {len(questions)} questions and {len(contexts)} contexts")
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
