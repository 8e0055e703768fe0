"""`SearchIndex`: texts and their vectors in a folder, for search by meaning.

    index = SearchIndex.build("all-MiniLM-L6-v2", ["Cats purr.", "Rain falls."], "animals.index")
    [hit] = index.search("Which animals are there?", top_k=1)      # Hit(id=0, score=..., text="Cats purr.")
    index.add(["Dogs bark."])
    SearchIndex.open("animals.index").search(["pets", "weather"])  # a list for each query

The search is exact: a query is compared with every vector. The vectors stay on disk, mapped into memory, and
are read in blocks, so an index may be larger than the memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..files import FileError, has_file, saving, settle
from ..sentence import SentenceEncoder, check_batch_size, chunks, in_order
from .nearest import Block, nearest
from .store import DTYPES, LIST, Listing, Segment, Writer, line_of, writing

_CHUNK = 1024
"""Number of texts that are encoded and written together."""
_PROBES = ("The museum opens at nine.", "How do I reset my password?", "Rain is expected in the north.")
_SAME = 0.98
"""Least cosine between two vectors of a probe by the same model. Measured on all-MiniLM-L6-v2: weights of
8 bits give 0.9987 and more; those of 4 bits give 0.96, which is too far off."""

Progress = Callable[[int], None]
"""Called with the number of texts that were just encoded."""


@dataclass(frozen=True)
class Hit:
    """A text that was found. `id`: its number in the order in which texts were added, from 0."""

    id: int
    score: float
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class SearchIndex:
    """An index of texts in a folder. Made by `build`, opened by `open`.

    The folder keeps the vectors of a few fixed texts, by which it recognises its model: another one is an
    error; the same model under another name, or with its weights in another dtype, is not. It also keeps the
    prompts for queries and documents that it was built with, and searches with them.
    """

    def __init__(self, folder: Path, encoder: SentenceEncoder | str | os.PathLike[str] | None = None) -> None:
        self.folder = folder
        self._load()
        self._given = self.model if encoder is None else encoder
        self._encoder: SentenceEncoder | None = None
        if isinstance(encoder, SentenceEncoder):
            self.encoder  # noqa: B018 - checks it now

    def _load(self) -> None:
        """Read the list and map the segments. If another process replaces them meanwhile, start again."""
        if not self.folder.is_dir():
            raise FileError(f"{self.folder}: no such folder, expected that of a search index")
        settle(self.folder)
        if not has_file(self.folder / LIST):
            raise FileError(f"{self.folder}: has no {LIST}, so it is not a search index")
        while True:
            self._list = Listing.read(self.folder)
            one = self._list
            try:
                self._segments = [Segment(self.folder, e, one.dimension, one.dtype) for e in one.segments]
                return
            except FileError:
                settle(self.folder)
                if Listing.read(self.folder) == one:
                    raise

    # What it is
    @property
    def model(self) -> str:
        """The name or path of the model that it was built with."""
        return self._list.model

    @property
    def dimension(self) -> int:
        """D, the size of the vectors."""
        return self._list.dimension

    @property
    def dtype(self) -> str:
        """float32, float16 or int8."""
        return self._list.dtype

    @property
    def similarity(self) -> str:
        """cosine, dot, euclidean or manhattan."""
        return self._list.similarity

    @property
    def prompts(self) -> dict[str, str]:
        """The texts that are put before a "query" and a "document"."""
        return dict(self._list.prompts)

    @property
    def encoder(self) -> SentenceEncoder:
        """The model; loaded at first use. Raises ValueError if it is not that of the index."""
        if self._encoder is None:
            given = self._given
            if given == "":
                raise ValueError(f"{self.folder}: was built with a model without a name: give the encoder")
            found = given if isinstance(given, SentenceEncoder) else SentenceEncoder(given)
            self._check(found)
            self._encoder = found
        return self._encoder

    def __len__(self) -> int:
        return self._list.rows

    def __repr__(self) -> str:
        return f"<SearchIndex of {len(self)} texts by {self.model} in {self.folder}>"

    def __getitem__(self, number: int) -> tuple[str, dict[str, Any]]:
        """Text and metadata of the text with this id. Raises IndexError."""
        segment, row = self._place(number)
        return segment.record(row)

    def vectors(self, start: int = 0, end: int | None = None) -> Tensor:
        """The stored vectors of the texts `start` to `end`, float32 [N, D]; for cosine of length 1, up to the
        rounding of the dtype."""
        end = len(self) if end is None else end
        if not 0 <= start <= end <= len(self):
            raise IndexError(f"the index has {len(self)} texts, and {start} to {end} were asked for")
        parts, first = [torch.zeros(0, self.dimension)], 0
        for segment in self._segments:
            low, high = max(start - first, 0), min(end - first, segment.entry.rows)
            parts += [segment.block(low, high).scaled()] if low < high else []
            first += segment.entry.rows
        return torch.cat(parts)

    def _place(self, number: int) -> tuple[Segment, int]:
        row = number
        for segment in self._segments:
            if 0 <= row < segment.entry.rows:
                return segment, row
            row -= segment.entry.rows
        raise IndexError(f"the index has {len(self)} texts, and none with the id {number}")

    # Making it
    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        encoder: SentenceEncoder | str | os.PathLike[str] | None = None,
    ) -> SearchIndex:
        """Open an index. `encoder`: the model or its name; None: the one that it was built with. A name is
        loaded when it is first needed.

        Takes the same time for a thousand texts as for a million. Raises FileError for a folder that is not
        an index, or whose files do not fit together.
        """
        return cls(Path(folder), encoder)

    @classmethod
    def build(
        cls,
        encoder: SentenceEncoder | str | os.PathLike[str],
        texts: Iterable[str],
        folder: str | os.PathLike[str],
        *,
        metadata: Iterable[Mapping[str, Any]] | None = None,
        dtype: str = "float32",
        similarity: str | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        name: str | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> SearchIndex:
        """Encode texts and write an index to `folder`, in place of an index that is there.

        Args:
            texts: read as they are needed, so a generator may give more than fit into memory. May be empty.
                Equal texts are kept, each with its id.
            metadata: for each text a dict of values that JSON can hold.
            dtype: of the vectors; float16 and int8 (a scale per vector) take half and a quarter of the space.
            similarity: cosine, dot, euclidean or manhattan; None: that of the model.
            query_prompt, document_prompt: texts to put before each; None: the model's prompts `query` and
                `document`.
            name: of the model, by which `open` loads it again; None: the one given as `encoder`, or where it
                was loaded from. Of a folder, the absolute path is kept.
            batch_size, progress: texts that go through the model at once; called after each chunk of texts.

        A process that is killed leaves the old index, or none. Raises FileError if the folder has files but
        is no index, TypeError or ValueError for a text or metadata that cannot be kept.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, and is {dtype!r}")
        if name is None:
            loaded = encoder if isinstance(encoder, SentenceEncoder) else None
            name = str(encoder) if loaded is None else loaded.transformer.model.name_or_path
        if name and Path(name).expanduser().exists():
            name = str(Path(name).expanduser().absolute())
        model = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)
        similarity = similarity or model.similarity_fn_name
        if similarity not in ("cosine", "dot", "euclidean", "manhattan"):
            raise ValueError(f"similarity must be cosine, dot, euclidean or manhattan, and is {similarity!r}")
        prompts = {
            kind: (model.prompts.get(kind) or "") if text is None else text
            for kind, text in (("query", query_prompt), ("document", document_prompt))
        }
        probe = _encoded(model, _PROBES, prompts["document"], check_batch_size(batch_size))
        made = Listing(probe.shape[1], dtype, similarity, name or "", prompts, probe.tolist())
        with writing(folder):
            if folder.is_dir():
                settle(folder)
                if not has_file(folder / LIST) and any(not p.name.startswith(".") for p in folder.iterdir()):
                    raise FileError(
                        f"{folder}: has files, but no {LIST}: expected a search index or an empty folder"
                    )
            old = ("vectors-*.npy", "scales-*.npy", "places-*.npy", "texts-*.jsonl")
            with saving(folder, replaces=old) as new:
                with Writer(new, made.dimension, dtype) as writer:
                    _fill(writer, model, made, texts, metadata, batch_size, progress)
                made = replace(made, segments=writer.entries())
                made.write(new)
        return cls(folder, model)

    def add(
        self,
        texts: Iterable[str],
        *,
        metadata: Iterable[Mapping[str, Any]] | None = None,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> range:
        """Append texts; returns their ids. What other processes have added since is kept. Options as in
        `build`.

        If the process is killed, either all of the texts are in the index or none.
        """
        model = self.encoder
        check_batch_size(batch_size)
        with writing(self.folder):
            self._load()
            self._check(model)
            before = self._list
            with saving(self.folder) as new:
                with Writer(new, before.dimension, before.dtype) as writer:
                    _fill(writer, model, before, texts, metadata, batch_size, progress)
                added, entries = writer.rows, writer.entries()
                # Segments no larger than what follows them are merged with it, so there are few of them.
                merged: list[Segment] = []
                for last in reversed(self._segments if added else []):
                    if last.entry.rows > added + sum(one.entry.rows for one in merged):
                        break
                    merged.insert(0, last)
                if merged:
                    parts = [*merged, Segment(new, entries[0], before.dimension, before.dtype)]
                    with Writer(new, before.dimension, before.dtype) as joined:
                        for part in parts:
                            joined.merge(part)
                    writer.discard()
                    entries = joined.entries()
                kept = before.segments[: len(before.segments) - len(merged)]
                gone = [file for one in merged for file in one.entry.files(before.dtype)]
                with saving(new, replaces=gone):  # part of the outer one
                    replace(before, segments=(*kept, *entries)).write(new)
            self._load()
        return range(before.rows, before.rows + added)

    # Searching
    def search(self, queries: Any, top_k: int = 10, *, batch_size: int = 32) -> Any:
        """The `top_k` most similar texts, best first; of equal scores, lower ids first.

        Args:
            queries: a text, or a vector [D]: a list of `Hit`s; several texts, or vectors [N, D]: a list of
                such lists.
            top_k: if the index has fewer texts, all of them are returned.

        The scores are those of `minilm.util.semantic_search` with the stored vectors, computed in float64.
        Raises ValueError for vectors of another size, for NaN, and for a model that is not that of the index.
        """
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise ValueError(f"top_k must be a positive integer, and is {top_k!r}")
        vectors, single = self._vectors(queries, batch_size)
        found = nearest(vectors, self._blocks(), top_k, self.similarity)
        hits = [
            [Hit(row, score, *self[row]) for row, score in zip(rows, scores, strict=True)]
            for rows, scores in found
        ]
        return hits[0] if single else hits

    def _vectors(self, queries: Any, batch_size: int) -> tuple[Tensor, bool]:
        """Queries as [N, D], and whether there was a single one."""
        if isinstance(queries, str):
            return _encoded(self.encoder, [queries], self._list.prompts["query"], batch_size), True
        if not isinstance(queries, Tensor) and getattr(queries, "ndim", 1) == 1:
            listed = list(in_order(queries, "expected a text, texts or vectors, got"))
            if all(isinstance(query, str) for query in listed):
                return _encoded(self.encoder, listed, self._list.prompts["query"], batch_size), False
            queries = listed if not isinstance(queries, (list, tuple)) else queries
            if any(isinstance(query, str) for query in listed):
                raise TypeError("the queries must all be texts or all be vectors")
        try:
            if isinstance(queries, (list, tuple)) and isinstance(queries[0], (Tensor, np.ndarray)):
                queries = torch.stack([torch.as_tensor(row) for row in queries])
            found = torch.as_tensor(queries).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError) as problem:
            raise TypeError(f"the queries must be texts or vectors [N, D]: {problem}") from None
        if found.dim() not in (1, 2) or found.shape[-1] != self.dimension:
            raise ValueError(f"expected vectors [N, {self.dimension}], got {list(found.shape)}")
        if not bool(found.isfinite().all()):
            raise ValueError("a query has values that are not finite")
        return found.reshape(-1, self.dimension), found.dim() == 1

    def _blocks(self) -> Iterator[Block]:
        """All vectors; for cosine of about the length 1."""
        first = 0
        for segment in self._segments:
            yield from (block._replace(first=first + block.first) for block in segment.blocks())
            first += segment.entry.rows

    def _check(self, model: SentenceEncoder) -> None:
        """Raise ValueError if the vectors of `model` are not like those of the index."""
        named = model.transformer.model.name_or_path or "this model"
        told = f"{self.folder}: the index was built with {self.model}"
        size = model.get_embedding_dimension()
        if size != self.dimension:
            raise ValueError(
                f"{told}, whose vectors have {self.dimension} dimensions; those of {named} have {size}"
            )
        found = _encoded(model, _PROBES, self._list.prompts["document"], 32)
        like = float(torch.cosine_similarity(found, torch.tensor(self._list.probe), dim=-1).min())
        if not like >= _SAME:
            raise ValueError(
                f"{told}, and {named} gives other vectors (cosine {like:.3f} for the same text, expected "
                f"{_SAME} or more): search with the model of the index, or build the index anew"
            )


def _encoded(model: SentenceEncoder, texts: Iterable[str], prompt: str, batch_size: int) -> Tensor:
    """float32 [N, D] on the CPU."""
    vectors: Tensor = model.encode(
        list(texts), batch_size, prompt=prompt, convert_to_tensor=True, show_progress_bar=False
    )
    return vectors.float().cpu()


_MISSING: Any = object()


def _pairs(texts: Any, metadata: Any) -> Iterator[tuple[Any, Any]]:
    """Texts with their metadata. Raises TypeError or ValueError if they do not fit together."""
    if isinstance(texts, str):
        raise TypeError("expected several texts, [text, ...], and got one text")
    listed = in_order(texts, "expected texts, got")
    if metadata is None:
        yield from zip(listed, repeat({}))
        return
    values = chain(in_order(metadata, "expected the metadata of each text, got"), repeat(_MISSING))
    number = -1
    for number, (text, value) in enumerate(zip(listed, values)):  # noqa: B905 - the second one is endless
        if value is _MISSING:
            raise ValueError(f"text {number} has no metadata: there must be one dict for each text")
        yield text, value
    if next(values) is not _MISSING:
        raise ValueError(f"there are {number + 1} texts, and more metadata than that")


def _fill(
    writer: Writer,
    model: SentenceEncoder,
    made: Listing,
    texts: Iterable[str],
    metadata: Iterable[Mapping[str, Any]] | None,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Encode texts and write them. Equal texts of a chunk are encoded once."""
    done = 0
    for chunk in chunks(_pairs(texts, metadata), _CHUNK):
        for number, (text, _) in enumerate(chunk, start=done):
            if not isinstance(text, str):
                raise TypeError(f"expected texts, but number {number} is {type(text).__name__}: {text!r:.60}")
        lines = [line_of(text, values, number) for number, (text, values) in enumerate(chunk, start=done)]
        places = {text: place for place, text in enumerate(dict.fromkeys(text for text, _ in chunk))}
        vectors = _encoded(model, places, made.prompts["document"], batch_size)
        if not bool(vectors.isfinite().all()):
            bad = int((~vectors.isfinite().all(-1)).nonzero()[0])
            raise ValueError(f"the vector of the text {list(places)[bad]!r:.60} is not finite")
        vectors = normalize(vectors, dim=-1) if made.similarity == "cosine" else vectors
        rows = vectors[torch.tensor([places[text] for text, _ in chunk])]
        writer.append(rows, lines, unit=made.similarity == "cosine")
        done += len(chunk)
        if progress is not None:
            progress(len(chunk))
