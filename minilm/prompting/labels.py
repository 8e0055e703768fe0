"""Classification by a causal language model: which label does the model continue the prompt with?

    classify = LabelScorer(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Review: {text}\nThe review is", ["positive", "negative"]
    )
    classify.predict(["A waste of time."])   # ["negative"]

No text is generated: the score of a label is its probability as the continuation of the prompt (Brown et al.
2020, arXiv:2005.14165). Each prompt is read once; then one more pass scores all labels of all prompts of a
batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..cache import KVCache
from ..model import AutoModelForCausalLM, Packed
from ..sentence import by_length, check_batch_size, window
from ..text import AutoTokenizer, Tokenizer
from .classifier import PromptClassifier
from .few_shot import FewShotTemplate
from .templates import Item, Template, shortened

Length = Literal["mean", "sum"]

_ROWS = 256
"""Number of positions whose logits are computed at once."""
_COPIED = 8192
"""Number of prompt tokens that are copied at once, for labels of several tokens."""


class _Prompt(NamedTuple):
    """The tokens of a prompt, and those of each label after it."""

    ids: list[int]
    labels: list[list[int]]

    @property
    def size(self) -> int:
        """Number of tokens of the prompt with its longest label."""
        return len(self.ids) + max(map(len, self.labels))


class LabelScorer(PromptClassifier):
    """A causal language model that chooses among labels as continuations of a prompt.

    Args:
        model: a folder, a name on the hub, a GGUF file, or a loaded model (which needs `tokenizer`).
        template: a prompt with fields, "Review: {text}\\nThe review is", or a `FewShotTemplate`. The label
            follows the end.
        labels: the labels, or label -> its text. A space is put before a text if neither the text begins nor
            the prompt ends with white space.
        length: how the log probabilities of the tokens of a label are combined: their "sum" is that of the
            label; their "mean" does not favour short labels.
        calibrate: divide by the probabilities of items without content (`calibration`).
        chat: send the prompt as a user message, in the model's chat template; the label begins the answer.
        batch_size: prompts that are read at once; it does not change the results.

    If a prompt is too long, the end of the longest text in it is cut, never the template, with a warning.
    """

    model: AutoModelForCausalLM

    def __init__(
        self,
        model: AutoModelForCausalLM | str | os.PathLike[str],
        template: str | FewShotTemplate,
        labels: Sequence[str] | Mapping[str, str],
        *,
        tokenizer: Tokenizer | None = None,
        length: Length = "mean",
        calibrate: bool = False,
        chat: bool = False,
        batch_size: int = 16,
    ) -> None:
        self.template = Template(template) if isinstance(template, str) else template
        if isinstance(self.template, Template) and self.template.has_mask:
            raise ValueError("the label follows the end of the prompt, so the template must not have {mask}")
        if isinstance(labels, str) or len(labels) < 2:
            raise ValueError(f"labels must be two or more texts, and are {labels!r:.80}")
        texts = dict(labels) if isinstance(labels, Mapping) else {label: label for label in labels}
        if len(texts) < len(labels) or len(set(texts.values())) < len(texts) or not all(texts.values()):
            raise ValueError(f"labels must be different texts, none of them empty, and are {labels!r:.80}")
        if length not in ("mean", "sum"):
            raise ValueError(f'length must be "mean" or "sum", and is {length!r}')
        self.texts, self.labels = texts, list(texts)
        self.length, self.calibrate, self.chat = length, calibrate, chat
        self.batch_size = check_batch_size(batch_size)
        if isinstance(model, AutoModelForCausalLM):
            if tokenizer is None:
                raise ValueError("a loaded model needs its tokenizer=")
            self.model, self.tokenizer = model.eval(), tokenizer
        else:
            self.model = AutoModelForCausalLM.from_pretrained(model)
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        empty: list[int] = self.tokenizer("", add_special_tokens=not chat, verbose=False)["input_ids"]
        self._ends_with_eos = bool(empty) and empty[-1] == self.tokenizer.eos_token_id

    def scores(self, items: Iterable[Item]) -> Tensor:
        """log P(label | prompt), the sum or the mean over its tokens, float32 [items, labels]."""
        prompts, cut = [], 0
        for item in self._check(items):
            prompt, was_cut = self._prompt(item)
            prompts.append(prompt)
            cut += was_cut
        self._warn_of_cuts(cut, len(prompts))
        scores = torch.zeros(len(prompts), len(self.labels))
        with torch.inference_mode():
            for chosen in by_length([len(prompt.ids) for prompt in prompts], self.batch_size):
                scores[chosen] = self._scores([prompts[i] for i in chosen])
        return scores

    def prompt(self, item: Item) -> str:
        """The text that the model reads for an item, without a label."""
        return self._in_chat(self.template.render(item))

    def _in_chat(self, text: str) -> str:
        if not self.chat:
            return text
        messages = [{"role": "user", "content": text}]
        found: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return found

    def _prompt(self, item: Item) -> tuple[_Prompt, bool]:
        longest = window(self.model, self.tokenizer)
        template, fields, cut = self.template, self.template.fields(item), False
        while True:
            prompt = self._tokens(self._in_chat(template.render(fields)))
            if prompt.size <= longest:
                return prompt, cut
            if isinstance(template, FewShotTemplate) and template.k:
                template = template.with_fewer()
            else:
                fields, cut = shortened(fields, prompt.size - longest, self._spans), True

    def _tokens(self, text: str) -> _Prompt:
        """The tokens of the prompt and of the labels. The prompt ends where the texts with the different
        labels begin to differ: if a label changes the last token of the prompt, that token counts as part of
        the label."""
        between = "" if text[-1:].isspace() or self.chat else " "
        wholes = [text + (label if label[0].isspace() else between + label) for label in self.texts.values()]
        rows: list[list[int]] = self.tokenizer(
            [text, *wholes], add_special_tokens=not self.chat, verbose=False
        )["input_ids"]
        if self._ends_with_eos and rows[0][-1:] == [self.tokenizer.eos_token_id]:
            rows = [row[:-1] for row in rows]  # tokenizers that append an end token
        for label, row in zip(self.labels, rows[1:], strict=True):
            if row == rows[0]:
                raise ValueError(f"the label {label!r} has no token after the prompt {text!r:.60}")
        shared = _shared(rows)
        if any(len(row) == shared for row in rows[1:]):
            shared -= 1  # the label merged with the last token of the prompt
        if shared < 1:
            raise ValueError(f"the prompt {text!r:.60} has no token: the model needs one to start from")
        return _Prompt(rows[0][:shared], [row[shared:] for row in rows[1:]])

    def _scores(self, prompts: list[_Prompt]) -> Tensor:
        """[prompts, labels]."""
        cache = self.model.new_cache(len(prompts))
        rows = cache.rows
        lengths = [len(prompt.ids) for prompt in prompts]
        hidden = self._read([prompt.ids for prompt in prompts], [0] * len(prompts), cache, rows)
        first = self._logs(hidden[torch.tensor(lengths).cumsum(0) - 1])
        sums = torch.stack([first[i, [label[0] for label in p.labels]] for i, p in enumerate(prompts)])
        longer = [(i, j) for i, p in enumerate(prompts) for j, label in enumerate(p.labels) if len(label) > 1]
        while longer:
            group = _first_group(longer, lengths)
            del longer[: len(group)]
            labels = [prompts[i].labels[j] for i, j in group]
            forks = [cache.fork(rows[i]) for i, _ in group]
            starts = [lengths[i] for i, _ in group]
            hidden = self._read([label[:-1] for label in labels], starts, cache, forks)
            following = torch.tensor([token for label in labels for token in label[1:]])
            logs = torch.cat(
                [
                    self._logs(part).gather(1, tokens[:, None]).squeeze(1)
                    for part, tokens in zip(
                        torch.split(hidden, _ROWS), torch.split(following, _ROWS), strict=True
                    )
                ]
            )
            for (i, j), log in zip(
                group, torch.split(logs, [len(label) - 1 for label in labels]), strict=True
            ):
                sums[i, j] += log.sum()
            for fork in forks:
                cache.free_row(fork)
        if self.length == "mean":
            sums /= torch.tensor([[len(label) for label in p.labels] for p in prompts])
        return sums

    def _read(self, texts: list[list[int]], starts: list[int], cache: KVCache, rows: list[int]) -> Tensor:
        """Hidden states [T, C] of texts that continue these rows of the cache at these positions."""
        lengths, device = [len(text) for text in texts], self.model.device
        packed = Packed(
            len(texts),
            max(lengths),
            None,
            lengths,
            torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
            torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).to(device),
        )
        tokens = torch.tensor([token for text in texts for token in text], device=device)
        return self.model.run_packed(tokens, packed, cache=cache, rows=rows)

    def _logs(self, hidden: Tensor) -> Tensor:
        """[T, C] -> log probabilities [T, V] on the CPU."""
        return self.model.logits(hidden).float().log_softmax(-1).cpu()


def _shared(rows: list[list[int]]) -> int:
    """The number of tokens that all rows have in common at their start."""
    for place, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(map(len, rows))


def _first_group(labels: list[tuple[int, int]], lengths: list[int]) -> list[tuple[int, int]]:
    """Groups of labels, (prompt, label) each, small enough that the copies of their prompts fit."""
    room, group = _COPIED, list[tuple[int, int]]()
    for i, j in labels:
        room -= lengths[i]
        if group and room < 0:
            break
        group.append((i, j))
    return group
