"""minilm's sentence models for LangChain: embeddings, and rerankers of documents; see
`minilm.integrations.langchain`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..sentence import CrossEncoder, SentenceEncoder
from .asking import loaded


@cache
def classes() -> dict[str, Any]:
    """The classes by name, created at first use, since LangChain is imported for it."""
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import Document
    from langchain_core.documents.compressor import BaseDocumentCompressor
    from langchain_core.embeddings import Embeddings
    from pydantic import ConfigDict, Field, PrivateAttr

    class MinilmEmbeddings(Embeddings):  # type: ignore[misc]
        """Embeddings from a SentenceEncoder, with its prompts for queries and for documents.

        Args:
            model: a name, a folder, or a loaded SentenceEncoder. `model_name` is another name of this
                argument.
            model_kwargs: options of SentenceEncoder, if the model is given by name: device, weights, ...
            encode_kwargs: options of `encode` for documents, and for queries if query_encode_kwargs is None:
                batch_size, normalize_embeddings, prompt, truncate_dim, ...
            show_progress: show a progress bar over the batches.
        """

        __module__ = "minilm.integrations.langchain"
        __qualname__ = "MinilmEmbeddings"

        def __init__(
            self,
            model: Any = None,
            *,
            model_name: Any = None,
            model_kwargs: dict[str, Any] | None = None,
            encode_kwargs: dict[str, Any] | None = None,
            query_encode_kwargs: dict[str, Any] | None = None,
            show_progress: bool = False,
        ) -> None:
            if (model is None) == (model_name is None):
                raise ValueError("model and model_name are the same argument: give one of them")
            self.model = loaded(
                SentenceEncoder, model if model_name is None else model_name, model_kwargs or {}
            )
            self.encode_kwargs = dict(encode_kwargs or {})
            self.query_encode_kwargs = (
                self.encode_kwargs if query_encode_kwargs is None else dict(query_encode_kwargs)
            )
            for name in {*self.encode_kwargs, *self.query_encode_kwargs} & {
                "convert_to_tensor",
                "output_value",
            }:
                raise ValueError(
                    f"{name} is not supported, since embeddings are returned as lists: leave it out"
                )
            self.show_progress = show_progress

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            """One vector per text."""
            options = {"show_progress_bar": self.show_progress, **self.encode_kwargs}
            found: list[list[float]] = self.model.encode_document(list(texts), **options).tolist()
            return found

        def embed_query(self, text: str) -> list[float]:
            """The vector of a query."""
            options = {"show_progress_bar": self.show_progress, **self.query_encode_kwargs}
            found: list[float] = self.model.encode_query(text, **options).tolist()
            return found

    class MinilmCrossEncoder(BaseCrossEncoder):  # type: ignore[misc]
        """Scores of pairs from a CrossEncoder: a name, a folder or a loaded one. `options`: those of
        CrossEncoder."""

        __module__ = "minilm.integrations.langchain"
        __qualname__ = "MinilmCrossEncoder"

        def __init__(self, model: Any, **options: Any) -> None:
            self.model = loaded(CrossEncoder, model, options)

        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
            """One score per pair."""
            found: list[float] = self.model.predict(list(text_pairs), show_progress_bar=False).tolist()
            return found

    class MinilmReranker(BaseDocumentCompressor):  # type: ignore[misc]
        """The `top_n` documents (None: all) that are most relevant to the query by a CrossEncoder, best
        first.

        Each is a copy with its score in `metadata["relevance_score"]`.
        """

        __module__ = "minilm.integrations.langchain"
        __qualname__ = "MinilmReranker"
        model_config = ConfigDict(extra="forbid", protected_namespaces=())

        model: Any = Field(repr=False)
        """A name, a folder, or a loaded CrossEncoder."""
        model_kwargs: dict[str, Any] = Field(default_factory=dict)
        """Options of CrossEncoder, if the model is given by name."""
        top_n: int | None = Field(default=3, ge=1)
        batch_size: int = Field(default=32, ge=1)
        _encoder: Any = PrivateAttr(default=None)

        def model_post_init(self, context: Any) -> None:
            self._encoder = loaded(CrossEncoder, self.model, self.model_kwargs)

        def compress_documents(
            self, documents: Sequence[Document], query: str, callbacks: Any = None
        ) -> Sequence[Document]:
            """The most relevant documents for this query."""
            texts = [document.page_content for document in documents]
            ranked = self._encoder.rank(
                query, texts, self.top_n, batch_size=self.batch_size, show_progress_bar=False
            )
            return [
                documents[hit["corpus_id"]].model_copy(
                    update={
                        "metadata": {**documents[hit["corpus_id"]].metadata, "relevance_score": hit["score"]}
                    }
                )
                for hit in ranked
            ]

    return {
        "MinilmCrossEncoder": MinilmCrossEncoder,
        "MinilmEmbeddings": MinilmEmbeddings,
        "MinilmReranker": MinilmReranker,
    }
