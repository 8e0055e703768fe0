"""Hard negatives for training: texts that are similar to a query and do not answer it."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import torch
from torch import Tensor

from ...differences import renamed
from ..similarity import check_sizes, nearest
from .tables import COLUMNS, Anchor, Pairs, read, report

if TYPE_CHECKING:
    from ..cross_encoder import CrossEncoder
    from ..encoder import SentenceEncoder

_CORPUS_CHUNK = 100_000


def mine_hard_negatives(
    dataset: Any,
    model: SentenceEncoder,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: Iterable[str] | None = None,
    cross_encoder: CrossEncoder | None = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: Literal["random", "top"] = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    include_positives: bool = False,
    output_format: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    faiss_batch_size: int = 512,
    use_faiss: bool = False,
    use_multi_process: bool | Sequence[str] = False,
    verbose: bool = True,
    **older: Any,
) -> Any:
    """Find hard negatives: for each pair (anchor, positive), the most similar texts among all positives.

    Args:
        dataset: a `datasets.Dataset` or a list of dicts; the result is of the same type. An anchor may occur
            in several rows, each with one of its positives.
        model: finds the candidates, with its prompts for queries and documents.
        anchor_column_name, positive_column_name: default: the first column, and the first of the others.
        corpus: texts that are candidates in addition to the positives.
        cross_encoder: scores candidates and positives again, for the margins, `max_score` and `min_score`.
        range_min, range_max: after filtering, only candidates of rank range_min (0 is the best) up to, but
            not including, range_max are used. Default: enough ranks for `num_negatives`.
        max_score, min_score: candidates must score at most, at least this.
        absolute_margin: candidates must score lower than the anchor's worst positive by this much.
        relative_margin: the same, as a fraction of the absolute score of that positive.
        num_negatives: maximum per anchor; "n-tuple" leaves out anchors with fewer.
        sampling_strategy: "top": the best; "random": sampled with Python's `random`.
        query_prompt, query_prompt_name, corpus_prompt, corpus_prompt_name: see `SentenceEncoder.encode`.
        include_positives: positives may be candidates too, for a full ranking; the format is then "n-tuple".
        output_format: the columns after the anchor's:
            "triplet": positive, "negative"; one row per negative;
            "n-tuple": positive, "negative_1", ...;
            "labeled-pair": positive or negative, "label" (1 or 0);
            "labeled-list": a list of both, "labels".
        output_scores: add a column "scores"; in the formats with labels, "score" or "scores" replaces the
            labels.
        batch_size: texts per batch of the models.
        faiss_batch_size: anchors that are compared with the corpus at once; does not change the result.
        use_faiss, use_multi_process: have no effect (a warning says so): the search is exact and runs in this
            process.
        verbose: print how many were found, and their scores.
        older: accepts the older arguments `margin` (absolute_margin) and `as_triplets`.

    Candidates of equal score are ranked in the order of the corpus. Raises ValueError and TypeError for
    invalid arguments before anything is encoded.
    """
    older = renamed(
        "mine_hard_negatives", {**older, "absolute_margin": absolute_margin}, {"margin": "absolute_margin"}
    )
    absolute_margin = older.pop("absolute_margin")
    triplets = older.pop("as_triplets", None)
    if older.pop("cache_folder", None) is not None:
        raise ValueError(
            "cache_folder is not supported, since minilm does not store embeddings in files: leave it out"
        )
    if older:
        raise TypeError(f"mine_hard_negatives has no argument {', '.join(sorted(older))}")
    if triplets is not None:
        output_format = "triplet" if triplets else "n-tuple"
    if output_format not in COLUMNS:
        raise ValueError(f"output_format must be one of {', '.join(COLUMNS)}, and is {output_format!r}")
    if sampling_strategy not in ("top", "random"):
        raise ValueError(f"sampling_strategy must be top or random, and is {sampling_strategy!r}")
    if include_positives and output_format != "n-tuple":
        if output_format != "triplet":  # the default
            _say(f"include_positives gives a ranking, whose format is n-tuple, not {output_format}")
        output_format = "n-tuple"
    limits = _Limits(max_score, min_score, absolute_margin, relative_margin)
    if cross_encoder is not None and not limits.any:
        _say(
            "cross_encoder is not used: it only scores for max_score, min_score and the margins, and none "
            "of them is given"
        )
        cross_encoder = None
    if use_faiss or use_multi_process:
        _say("use_faiss and use_multi_process have no effect: the search is exact and runs in this process")
    check_sizes(num_negatives=num_negatives, faiss_batch_size=faiss_batch_size, batch_size=batch_size)
    table = read(dataset, anchor_column_name, positive_column_name)
    pairs = Pairs.of(table, corpus)
    most = max(pairs.rows)
    if range_max is None:
        several = (
            limits.margin or max_score is not None or (cross_encoder is not None and min_score is not None)
        )
        range_max = range_min + num_negatives * (10 if several else 1) + most
        if verbose:
            print(f"range_max is {range_max}")
    _check_range(range_min, range_max, num_negatives)

    COLUMNS[output_format]([], table, [], num_negatives, output_scores)  # checks the column names
    values, found, positive_scores = _search(
        pairs,
        model,
        (query_prompt_name, query_prompt),
        (corpus_prompt_name, corpus_prompt),
        range_max + most,
        (batch_size, faiss_batch_size),
        verbose,
    )
    if cross_encoder is not None:
        values, positive_scores = _rescored(pairs, found, cross_encoder, batch_size)
    sizes = [len(places) for places in pairs.positives]
    of_query = torch.split(positive_scores, sizes)
    if not include_positives:
        taken = [
            torch.isin(row, torch.tensor(places)) for row, places in zip(found, pairs.positives, strict=True)
        ]
        values = values.masked_fill(torch.stack(taken), -torch.inf)
    worst = torch.stack([scores.min() for scores in of_query])
    values, left_out = limits.apply(values, worst)
    values, order = values.sort(dim=1, descending=True, stable=True)
    values, found = values[:, range_min:range_max], found.gather(1, order)[:, range_min:range_max]
    negatives = [
        _chosen(row.tolist(), scores[~scores.isneginf()].tolist(), num_negatives, sampling_strategy)
        for row, scores in zip(found, values, strict=True)
    ]
    anchors = [
        Anchor(text, list(zip(places, scores.tolist(), strict=True)), some)
        for text, places, scores, some in zip(
            pairs.queries, pairs.positives, of_query, negatives, strict=True
        )
    ]
    columns = COLUMNS[output_format](anchors, table, pairs.corpus, num_negatives, output_scores)
    if verbose:
        report(anchors, left_out, num_negatives)
    return table.build(columns)


def _search(
    pairs: Pairs,
    model: SentenceEncoder,
    query_prompt: tuple[str | None, str | None],
    corpus_prompt: tuple[str | None, str | None],
    count: int,
    sizes: tuple[int, int],
    verbose: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [Q, K], places in the corpus [Q, K], scores of all positives [P]), in float32 on the CPU."""
    how = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": verbose}
    name, prompt = corpus_prompt
    documents = model.encode_document(pairs.corpus, sizes[0], prompt_name=name, prompt=prompt, **how)
    name, prompt = query_prompt
    queries = model.encode_query(pairs.queries, sizes[0], prompt_name=name, prompt=prompt, **how)
    values, found = nearest(queries, documents, sizes[1], _CORPUS_CHUNK, count, model.similarity)
    owners, own = pairs.listed()
    return values.float(), found, model.similarity_pairwise(queries[owners], documents[own]).float().cpu()


def _rescored(
    pairs: Pairs, found: Tensor, cross_encoder: CrossEncoder, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The cross-encoder's scores of the candidates [Q, K], and of all positives [P]."""
    owners, own = pairs.listed()
    texts = [(pairs.queries[q], pairs.corpus[d]) for q, row in enumerate(found.tolist()) for d in row]
    texts += [(pairs.queries[q], pairs.corpus[d]) for q, d in zip(owners, own, strict=True)]
    scores = cross_encoder.predict(texts, batch_size=batch_size, convert_to_tensor=True).float().cpu()
    if scores.dim() != 1:
        raise ValueError(f"cross_encoder must give one score per pair, and gives {scores.shape[1]}")
    return scores[: found.numel()].view(found.shape), scores[found.numel() :]


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=3)


# Choosing the negatives


@dataclass(frozen=True)
class _Limits:
    """Which candidates may be negatives."""

    max_score: float | None
    min_score: float | None
    absolute_margin: float | None
    relative_margin: float | None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, SupportsFloat) or math.isnan(value)
            ):
                raise ValueError(f"{name} must be a number, and is {value!r}")

    @property
    def margin(self) -> bool:
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def any(self) -> bool:
        return self.margin or self.max_score is not None or self.min_score is not None

    def apply(self, values: Tensor, worst: Tensor) -> tuple[Tensor, dict[str, int]]:
        """The scores [Q, K], set to -inf where they are beyond a limit, and how many candidates each limit
        removed. `worst`: the lowest score of each query's positives, [Q]."""
        left_out: dict[str, int] = {}
        tests: dict[str, Callable[[Tensor, float], Tensor]] = {
            "absolute_margin": lambda v, limit: v + limit > worst[:, None],
            "relative_margin": lambda v, limit: v > (worst - worst.abs() * limit)[:, None],
            "max_score": lambda v, limit: v > limit,
            "min_score": lambda v, limit: v < limit,
        }
        for name, test in tests.items():
            limit = getattr(self, name)
            if limit is not None:
                out = test(values, limit) & ~values.isneginf()
                left_out[f"{name}={limit}"] = int(out.sum())
                values = values.masked_fill(out, -torch.inf)
        return values, left_out


def _check_range(low: int, high: int, count: int) -> None:
    for name, value in (("range_min", low), ("range_max", high)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, and is {value!r}")
    if high - low < count:
        raise ValueError(
            f"num_negatives={count} do not fit between range_min={low} and range_max={high}: "
            "raise range_max, or lower one of the others"
        )


def _chosen(places: list[int], scores: list[float], count: int, how: str) -> list[tuple[int, float]]:
    """(place, score) of `count` candidates, best first; `scores` belong to the candidates that are left."""
    numbers = list(range(min(count, len(scores))))
    if how == "random":  # the same random numbers as in sentence-transformers
        drawn = random.sample(range(max(count, len(scores))), k=count)
        numbers = sorted(number for number in drawn if number < len(scores))
    return [(places[number], scores[number]) for number in numbers]
