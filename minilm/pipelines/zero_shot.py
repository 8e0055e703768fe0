"""zero-shot-classification: labels that the model was not trained for.

A model trained on natural language inference (NLI: whether one text follows from another) tests each label as
a hypothesis about the text (Yin et al. 2019, arXiv:1909.00161). A sentence encoder compares the text with the
labels, and a causal language model scores them as its continuation (`minilm.prompting`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import AutoModelForCausalLM, AutoModelForSequenceClassification
from ..sentence import Ran, SentenceEncoder, Tokens, chunks
from .base import Pipeline, Work


@dataclass(frozen=True)
class Options:
    """`candidate_labels`: a list, or one text with commas between the labels. `hypothesis_template`: has
    ``{}`` at the label. `multi_label`: several labels may be true, so each is scored alone, entailment
    against contradiction; otherwise exactly one of several is true, and their scores sum to 1. `entailment`:
    the name of the model's class for "follows"; default: the one that begins with "entail"."""

    candidate_labels: str | Sequence[str] | None = None
    hypothesis_template: str = "This example is {}."
    multi_label: bool = False
    entailment: str | None = None

    @property
    def labels(self) -> list[str]:
        """The labels. Raises ValueError if there are none, or one occurs twice."""
        given = self.candidate_labels
        found = [label.strip() for label in given.split(",")] if isinstance(given, str) else list(given or [])
        found = [label for label in found if label or not isinstance(given, str)]
        if not found or not all(isinstance(label, str) and label for label in found):
            raise ValueError(f"candidate_labels must be one or more texts, and are {given!r:.80}")
        if len(set(found)) < len(found):
            twice = next(label for label in found if found.count(label) > 1)
            raise ValueError(f"candidate_labels has {twice!r} twice")
        return found

    def hypotheses(self) -> list[str]:
        """The hypothesis of each label. Raises ValueError for a template without a place for the label."""
        template, labels = self.hypothesis_template, self.labels
        try:
            made = [template.format(label) for label in labels]
        except (IndexError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"hypothesis_template must have one {{}}, and is {template!r:.80}") from error
        if made[0] == template:
            raise ValueError(f"hypothesis_template must have one {{}} for the label, and is {template!r:.80}")
        return made


class ZeroShotClassificationPipeline(Pipeline[Options]):
    """A text -> {"sequence", "labels", "scores"}, the most probable label first.

        classify = pipeline("zero-shot-classification", model="cross-encoder/nli-MiniLM2-L6-H768")
        classify("The striker scored twice.", ["sport", "politics"])

    All labels of all texts go through the model in batches of similar length.
    """

    task = "zero-shot-classification"
    model_class = AutoModelForSequenceClassification
    options_class = Options
    older_names: ClassVar[Mapping[str, str]] = {"multi_class": "multi_label"}

    def __call__(self, inputs: Any, *labels: Any, batch_size: int | None = None, **options: Any) -> Any:
        """The result for one text, or the results for several; `candidate_labels` may be the second
        argument."""
        if len(labels) > 1 or (labels and "candidate_labels" in options):
            raise TypeError(f"{self.task} takes texts and candidate_labels, and got {labels!r:.80}")
        if labels:
            options["candidate_labels"] = labels[0]
        return super().__call__(inputs, batch_size=batch_size, **options)

    def prepare(self, item: Any, options: Options) -> Work:
        """One pair per label: the text and the hypothesis."""
        text = self.text(item)
        if not text.strip():
            raise ValueError(f"{self.task} needs a text, and got {item!r}")
        works = [self.encode(text, hypothesis) for hypothesis in options.hypotheses()]
        return Work([window for work in works for window in work.windows], text, any(w.cut for w in works))

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Tensor]:
        """Logits [num_labels] of each window."""
        logits: Tensor = self.model.answer(result.hidden, result.batch, None)["logits"]
        return list(logits.float().cpu())

    def finish(self, work: Work, outputs: list[Any], options: Options) -> Any:
        """The labels, sorted by their scores."""
        logits, labels = torch.stack(outputs), options.labels
        entailment, contradiction = self._classes(options)
        if options.multi_label or len(labels) == 1:
            scores = logits[:, [contradiction, entailment]].softmax(-1)[:, 1]
        else:
            scores = logits[:, entailment].softmax(-1)
        order = sorted(range(len(labels)), key=lambda i: -float(scores[i]))
        found = scores.tolist()
        return {
            "sequence": work.state,
            "labels": [labels[i] for i in order],
            "scores": [found[i] for i in order],
        }

    def _classes(self, options: Options) -> tuple[int, int]:
        """The numbers of the classes for "follows" and "contradicts". If no class has such a name, the second
        is class 0, or the last class if class 0 means "follows"."""
        names = {name.lower(): number for name, number in self.model.config.label2id.items()}
        wanted = options.entailment
        if wanted is None:
            found = [number for name, number in names.items() if name.startswith("entail")]
        else:
            found = [names[wanted.lower()]] if wanted.lower() in names else []
        if not found or len(names) < 2:
            which = "none of them begins with 'entail'" if wanted is None else f"none is {wanted!r}"
            raise ValueError(
                f"{self.task} needs a model trained on NLI: its classes are "
                f"{', '.join(self.model.config.id2label.values())}, and {which}; name the class with "
                "entailment="
            )
        against = [number for name, number in names.items() if name.startswith(("contra", "not"))]
        return found[0], against[0] if against else (len(names) - 1 if found[0] == 0 else 0)


class PromptedZeroShotPipeline(ZeroShotClassificationPipeline):
    """A text -> {"sequence", "labels", "scores"}, the most probable label first; the scores sum to 1.

        classify = pipeline("zero-shot-classification", model="all-MiniLM-L6-v2")
        classify("The striker scored twice.", ["sport", "politics"])

    A sentence encoder compares the text with ``hypothesis_template`` for each label. A causal language model
    reads the text, a line break, and the template up to ``{}``, and each label is scored as what follows;
    after ``{}`` there may only be a full stop.

    `multi_label` and `entailment` are refused: these models score labels against each other.
    """

    model: Any

    def __init__(
        self,
        model: SentenceEncoder | AutoModelForCausalLM,
        tokenizer: Any = None,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self._classifier: tuple[Any, Any] = ((), None)
        tokenizer = model.tokenizer if isinstance(model, SentenceEncoder) else tokenizer
        super().__init__(model, tokenizer, batch_size=batch_size, **options)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<{self.task} pipeline of a {type(self.model).__name__} on {self.device}>"

    def parse(self, options: dict[str, Any]) -> Options:
        """Options by name. Raises ValueError for those that only models trained on NLI have."""
        parsed = super().parse(options)
        if parsed.multi_label or parsed.entailment is not None:
            wrong = "multi_label" if parsed.multi_label else "entailment"
            raise ValueError(
                f"{wrong} needs a model trained on NLI, and this is a {type(self.model).__name__}"
            )
        return parsed

    def prepare(self, item: Any, options: Options) -> Work:
        """Only the text."""
        text = self.text(item)
        if not text.strip():
            raise ValueError(f"{self.task} needs a text, and got {item!r}")
        return Work([], text)

    def head(self, result: Ran, windows: Sequence[Tokens]) -> Sequence[Any]:
        """Not used: the classifier runs in `results`."""
        raise NotImplementedError

    def results(
        self, items: Iterable[Any], options: Options, batch_size: int, slab: int = 16
    ) -> Iterator[Any]:
        """The results, in the order of the inputs."""
        classify = self._by(options, batch_size)
        for chunk in chunks(items, batch_size * slab):
            texts = [self.prepare(item, options).state for item in chunk]
            for text, row in zip(texts, classify.probabilities(texts).tolist(), strict=True):
                order = sorted(range(len(row)), key=lambda i: -row[i])
                yield {
                    "sequence": text,
                    "labels": [options.labels[i] for i in order],
                    "scores": [row[i] for i in order],
                }

    def _by(self, options: Options, batch_size: int) -> Any:
        """The classifier for these labels; kept for the next call."""
        labels, template = options.labels, options.hypothesis_template
        if template.count("{}") != 1:
            raise ValueError(f"hypothesis_template must have one {{}} for the label, and is {template!r:.80}")
        if len(labels) < 2:
            raise ValueError(
                f"a {type(self.model).__name__} needs two or more candidate_labels, to score them against "
                f"each other, and got {labels!r:.80}"
            )
        key = (tuple(labels), template, batch_size)
        if self._classifier[0] != key:
            self._classifier = (key, self._made(labels, template, batch_size))
        return self._classifier[1]

    def _made(self, labels: list[str], template: str, batch_size: int) -> Any:
        from ..prompting import EmbeddingClassifier, LabelScorer  # only this way of classifying needs them

        if isinstance(self.model, SentenceEncoder):
            return EmbeddingClassifier(self.model, labels, hypothesis=template, batch_size=batch_size)
        before, _, after = template.partition("{}")
        if after.strip(" .!?"):
            raise ValueError(
                f"for a causal language model hypothesis_template must end with {{}}, and is {template!r:.70}"
            )
        prompt = "{text}\n" + before.rstrip().replace("{", "{{").replace("}", "}}")
        return LabelScorer(self.model, prompt, labels, tokenizer=self.tokenizer, batch_size=batch_size)
