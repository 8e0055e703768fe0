"""`CrossEncoder`: scores pairs of texts; same API as sentence_transformers.CrossEncoder.

    model = CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2")
    model.predict([("Who lives in Berlin?", "Berlin has 3.5 million inhabitants.")])      # float32 [1]
    model.rank("Who lives in Berlin?", ["Paris is old.", "Berlin has 3.5 million inhabitants."])

It reads both texts together, which is slower than comparing embeddings of a `SentenceEncoder`, but more
accurate. It is typically used to rerank the results of a search by embeddings. A causal language model
(Qwen3-Reranker) scores by its next token, see `minilm.sentence.reranker`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import MOST_CONFIG, FileError, has_file, read_json, resolve, saving
from ..model import AutoModelForCausalLM, AutoModelForSequenceClassification, read_config
from ..text import AutoTokenizer
from .batching import (
    Ran,
    Tokens,
    by_length,
    check_batch_size,
    chunks,
    in_order,
    progress_bar,
    run,
    tokenise,
    window,
)
from .files import check_settings, default_device, hub_options, listed_modules
from .modules import activation, write_json
from .names import answering_to

if TYPE_CHECKING:
    from .reranker import Judge

logger = logging.getLogger(__name__)

_SLAB = 256
"""Number of batches that are tokenised and sorted by length together."""


_OPTIONS = (
    *("batch_size", "show_progress_bar", "activation_fn", "apply_softmax", "convert_to_numpy"),
    "convert_to_tensor",
)


def _order(values: Sequence[Any]) -> Sequence[str]:
    """The order of positional options of `predict` and `rank`: that of sentence-transformers 6 (prompts
    first), of 4 and 5, or of 3 (with the number of workers)."""
    if not isinstance(values[0], int):
        return ("prompt_name", "prompt", *_OPTIONS)
    workers = len(values) > 2 and isinstance(values[2], int)
    return (*_OPTIONS[:2], "num_workers", *_OPTIONS[2:]) if workers else _OPTIONS


class CrossEncoder(nn.Module):
    """Scores pairs of texts.

    Args:
        model_name_or_path: a folder, or a name on the hub (without an owner: of the owner cross-encoder).
        num_labels: number of scores per pair; None: the checkpoint's, or 1 if it has no such head.
        max_length: maximum tokens of a pair; longer ones are cut. None: the tokenizer's limit.
        device: None: the GPU if there is one.
        dtype: of the weights; None: the checkpoint's.
        weights: quantises them, see `AutoModel.from_pretrained`.
        activation_fn: converts logits to scores; None: the model's own, or else the sigmoid for one label and
            none for several.
        prompts, default_prompt_name: as in `SentenceEncoder`; a prompt stands before the first text, or is
            the system message of a reranker with a chat template.
        options: `revision`, `cache_folder`, `token`, `local_files_only` for the hub; `model_kwargs`,
            `config_kwargs` and `processor_kwargs` for `from_pretrained` of the model, of its configuration
            and of the tokenizer.

    The constructor and the methods also accept argument names and orders of older sentence-transformers
    releases (`automodel_args`, `default_activation_function`, `activation_fct`, ...); each name warns once.
    """

    @answering_to(
        older={
            "model_name": "model_name_or_path",
            "default_activation_function": "activation_fn",
        },
        order=lambda values: ("num_labels", "max_length", "activation_fn", "device"),
    )
    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        *,
        num_labels: int | None = None,
        max_length: int | None = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        weights: str | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if "classifier_dropout" in options:
            dropout = {"classifier_dropout": options.pop("classifier_dropout")}
            options["config_kwargs"] = {**dropout, **(options.get("config_kwargs") or {})}
        name, hub, model_options, tokenizer_options = hub_options(
            model_name_or_path, "cross-encoder", options
        )
        path = resolve(name, **hub)
        place = score = None
        if has_file(path / "modules.json"):
            (place, _), *rest = listed_modules(path / "modules.json", "LogitScore")
            if [kind for _, kind in rest] not in ([], ["LogitScore"]) or (place and not rest):
                kinds = ", ".join(kind for _, kind in ((place, "Transformer"), *rest))
                raise FileError(
                    f"{path / 'modules.json'}: expected only a Transformer, or a Transformer and LogitScore, "
                    f"and it lists {kinds}"
                )
            score = rest[0][0] if rest else None
        file = path / "config_sentence_transformers.json"
        stored = read_json(file, limit=MOST_CONFIG) if has_file(file) else {}
        check_settings(file, stored)
        self.prompts: dict[str, str] = {**(stored.get("prompts") or {}), **(prompts or {})}
        self.default_prompt_name: str | None = default_prompt_name or stored.get("default_prompt_name")
        self._prompt(None, self.default_prompt_name)
        root, path = path, path / (place or "")
        config = read_config(path)
        num_labels = model_options.pop("num_labels", None) if num_labels is None else num_labels
        architecture = str((config.get("architectures") or [""])[0])
        trained = architecture.endswith("ForSequenceClassification")
        judges = score is not None or (place is None and architecture.endswith("ForCausalLM"))
        if judges and num_labels not in (None, 1):
            raise ValueError(
                f"num_labels is {num_labels}, and a causal language model gives one score: a model for "
                f"sequence classification can have more; {path} is a {architecture or config.model_type}"
            )
        if num_labels is None and not trained:
            num_labels = 1
        if num_labels is not None and not judges:
            model_options["num_labels"] = num_labels
        kind: Any = AutoModelForCausalLM if judges else AutoModelForSequenceClassification
        self.model: AutoModelForCausalLM | AutoModelForSequenceClassification = kind.from_pretrained(
            path,
            device=default_device() if device is None else device,
            **{"dtype": dtype, "weights": weights, **model_options},
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path, **tokenizer_options)
        self._judge: Judge | None = None
        if judges:
            from .reranker import Judge, Settings

            size = self.model.spec.vocab_size
            made = (
                Settings.of_tokenizer(self.tokenizer, name)
                if score is None
                else Settings.load(path, root / score, size)
            )
            self._judge = Judge(self.model, made)
            max_length = made.max_length if max_length is None else max_length
        if max_length is not None:
            self.tokenizer.model_max_length = max_length
        named = (config.get("sentence_transformers") or {}).get("activation_fn")
        named = named or config.get("sbert_ce_default_activation_function")
        named = named or stored.get("activation_fn")
        if activation_fn is not None:
            self.activation_fn = activation_fn
        elif named is not None:
            self.activation_fn = activation(named, path)
        else:
            self.activation_fn = nn.Sigmoid() if self.num_labels == 1 else nn.Identity()

    @property
    def num_labels(self) -> int:
        """Number of scores per pair."""
        return 1 if self._judge is not None else int(self.model.config.num_labels)

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens of a pair; the rest is cut. Can be set."""
        return window(self.model, self.tokenizer)

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.model_max_length = value

    max_length = max_seq_length

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @property
    def default_activation_function(self) -> Callable[[Tensor], Tensor]:
        """Older name of `activation_fn`."""
        return self.activation_fn

    @answering_to(
        older={"activation_fct": "activation_fn"},
        also={"inputs": "sentences"},
        order=_order,
        without_effect=("num_workers",),
    )
    def predict(
        self,
        sentences: Sequence[str] | Iterable[Sequence[str]],
        batch_size: int = 32,
        *,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> Any:
        """The scores of pairs of texts: a numpy array [N], or [N, num_labels]; for a single pair one row of
        it.

        `apply_softmax`: apply softmax over several labels. `activation_fn`, `convert_to_numpy` and
        `convert_to_tensor`: as in the constructor and in `SentenceEncoder.encode`. `prompt`, `prompt_name`: a
        text, or the name of one in `prompts`. Raises TypeError for inputs that are not pairs of texts.
        """
        check_batch_size(batch_size)
        pairs, single = _pairs(sentences)
        prompt = self._prompt(prompt, prompt_name or self.default_prompt_name)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        scores = torch.empty(len(pairs), self.num_labels, device=self.device)
        cut = 0
        with torch.inference_mode(), progress_bar(-(-len(pairs) // batch_size), show_progress_bar) as bar:
            for start, slab in enumerate(chunks(pairs, _SLAB * batch_size)):
                texts = [a for a, _ in slab], [b for _, b in slab]
                tokens, too_long = self._tokens(*texts, prompt)
                cut += too_long
                for batch in by_length([len(t) for t in tokens], batch_size):
                    ran = run(self.model, [tokens[i] for i in batch])
                    rows = torch.tensor(batch, device=self.device) + start * _SLAB * batch_size
                    scores[rows] = self._scores(ran).float()
                    bar.update()
            scores = (activation_fn or self.activation_fn)(scores)
            if apply_softmax and self.num_labels > 1:
                scores = scores.softmax(-1)
        if cut:
            message = f"{cut} of {len(pairs)} pairs have more than {self.max_seq_length} tokens, and were cut"
            warnings.warn(message, stacklevel=3)
        scores = scores.squeeze(-1) if self.num_labels == 1 else scores
        found: Any = (
            scores if convert_to_tensor else scores.cpu().numpy() if convert_to_numpy else list(scores)
        )
        return found[0] if single else found

    @answering_to(
        older={"activation_fct": "activation_fn"},
        order=_order,
        places=4,
        without_effect=("num_workers", "apply_softmax", "convert_to_numpy", "convert_to_tensor"),
    )
    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int = 32,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Rank the documents by their scores with the query, best first: {"corpus_id": number, "score": ...},
        with `return_documents` also "text". `options` are those of `predict`."""
        if self.num_labels != 1:
            raise ValueError(
                f"rank needs a model with one score per pair, and this one has {self.num_labels}"
            )
        if not isinstance(query, str):
            raise TypeError(f"the query must be a text, and is {type(query).__name__}")
        options = {**options, "convert_to_tensor": True}
        scores = self.predict([(query, document) for document in documents], batch_size, **options).tolist()
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
        more = {i: {"text": documents[i]} if return_documents else {} for i in ranked}
        return [{"corpus_id": i, "score": scores[i], **more[i]} for i in ranked]

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None or name is None:
            return prompt or ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"there is no prompt {name!r}; the model has {known}")
        return self.prompts[name] or ""

    def _tokens(self, firsts: list[str], seconds: list[str], prompt: str) -> tuple[list[Tokens], int]:
        if self._judge is not None:
            return self._judge.tokenise(self.tokenizer, firsts, seconds, prompt, self.max_seq_length)
        return tokenise(self.tokenizer, [prompt + text for text in firsts], seconds, self.max_seq_length)

    def _scores(self, ran: Ran) -> Tensor:
        if self._judge is not None:
            return self._judge.scores(ran)
        scores: Tensor = self.model.answer(ran.hidden, ran.batch, None)["logits"]
        return scores

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that sentence-transformers, transformers and minilm load."""
        kind = type(self.activation_fn)
        if isinstance(self.activation_fn, nn.Module):
            self.model.config.sentence_transformers = {
                "activation_fn": f"{kind.__module__}.{kind.__qualname__}"
            }
        known = {"prompts": self.prompts, "default_prompt_name": self.default_prompt_name}
        # Files left by a sentence encoder would make this folder look like one.
        left = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
        with saving(path, replaces=left) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if self._judge is not None:
                self._judge.save(folder, self.tokenizer)
            if self._judge is not None or any(known.values()):
                activation = (self.model.config.sentence_transformers or {}).get("activation_fn")
                known |= {"model_type": "CrossEncoder", "activation_fn": activation}
                write_json(folder / "config_sentence_transformers.json", known)


def _pairs(sentences: Any) -> tuple[list[tuple[str, str]], bool]:
    """The pairs, and whether there was a single one."""
    expected = "expected a pair of texts or a list of pairs, got"
    if isinstance(sentences, str):
        raise TypeError(f"{expected} str")
    listed = list(in_order(sentences, expected))
    single = bool(listed) and isinstance(listed[0], str)
    pairs = [listed] if single else listed
    for index, pair in enumerate(pairs):
        fits = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not fits or not all(isinstance(text, str) for text in pair):
            raise TypeError(f"expected pairs of texts, but number {index} is {pair!r:.80}")
    return [(a, b) for a, b in pairs], single
