"""minilm's sentence models for LlamaIndex: embeddings, and a reranker of nodes; see
`minilm.integrations.llama_index`."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from ..sentence import CrossEncoder, SentenceEncoder
from .asking import loaded


@cache
def classes() -> dict[str, Any]:
    """The classes by name, created at first use, since LlamaIndex is imported for it."""
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore
    from pydantic import ConfigDict, Field, PrivateAttr, field_serializer

    class MinilmEmbedding(BaseEmbedding):  # type: ignore[misc]
        """Embeddings from a SentenceEncoder, with its prompts for queries and for documents."""

        __module__ = "minilm.integrations.llama_index"
        __qualname__ = "MinilmEmbedding"
        model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

        model: Any = Field(repr=False)
        """A name, a folder, or a loaded SentenceEncoder."""
        model_kwargs: dict[str, Any] = Field(default_factory=dict)
        """Options of SentenceEncoder, if the model is given by name: device, weights, ..."""
        encode_kwargs: dict[str, Any] = Field(default_factory=dict)
        """Options of `encode`: batch_size, normalize_embeddings, truncate_dim, ..."""
        embed_batch_size: int = Field(default=256, gt=0)
        """Texts per call of the encoder."""
        _encoder: Any = PrivateAttr(default=None)

        def model_post_init(self, context: Any) -> None:
            super().model_post_init(context)
            self._encoder = loaded(SentenceEncoder, self.model, self.model_kwargs)
            if "model_name" not in self.model_fields_set:
                self.model_name = self._name(self.model)

        @field_serializer("model")  # type: ignore[untyped-decorator]
        def _name(self, model: Any) -> str:
            loaded_by = self._encoder.transformer.model.name_or_path
            return str(loaded_by if isinstance(model, SentenceEncoder) else model)

        @classmethod
        def class_name(cls) -> str:
            return "MinilmEmbedding"

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            options = {"show_progress_bar": False, **self.encode_kwargs}
            found: list[list[float]] = self._encoder.encode_document(texts, **options).tolist()
            return found

        def _get_text_embedding(self, text: str) -> list[float]:
            return self._get_text_embeddings([text])[0]

        def _get_query_embedding(self, query: str) -> list[float]:
            options = {"show_progress_bar": False, **self.encode_kwargs}
            found: list[float] = self._encoder.encode_query(query, **options).tolist()
            return found

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return await asyncio.to_thread(self._get_query_embedding, query)

        async def _aget_text_embedding(self, text: str) -> list[float]:
            return await asyncio.to_thread(self._get_text_embedding, text)

        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return await asyncio.to_thread(self._get_text_embeddings, texts)

    class MinilmRerank(BaseNodePostprocessor):  # type: ignore[misc]
        """The `top_n` nodes that are most relevant to the query by a CrossEncoder, best first, with its
        scores."""

        __module__ = "minilm.integrations.llama_index"
        __qualname__ = "MinilmRerank"
        model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

        model: Any = Field(repr=False)
        """A name, a folder, or a loaded CrossEncoder."""
        model_kwargs: dict[str, Any] = Field(default_factory=dict)
        """Options of CrossEncoder, if the model is given by name."""
        top_n: int = Field(default=2, ge=1)
        keep_retrieval_score: bool = False
        """Keep the earlier score in the node's metadata, as "retrieval_score"."""
        _encoder: Any = PrivateAttr(default=None)

        def model_post_init(self, context: Any) -> None:
            super().model_post_init(context)
            self._encoder = loaded(CrossEncoder, self.model, self.model_kwargs)

        @field_serializer("model")  # type: ignore[untyped-decorator]
        def _name(self, model: Any) -> str:
            return str(model.model.name_or_path if isinstance(model, CrossEncoder) else model)

        @classmethod
        def class_name(cls) -> str:
            return "MinilmRerank"

        def _postprocess_nodes(
            self, nodes: list[NodeWithScore], query_bundle: Any = None
        ) -> list[NodeWithScore]:
            if query_bundle is None:
                raise ValueError("there is no query to rank the nodes by: give query_str or query_bundle")
            texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
            ranked = self._encoder.rank(query_bundle.query_str, texts, self.top_n, show_progress_bar=False)
            found = []
            for hit in ranked:
                before = nodes[hit["corpus_id"]]
                node = before.node
                if self.keep_retrieval_score:  # in a copy, since the index holds the node
                    more = {**node.metadata, "retrieval_score": before.score}
                    node = node.model_copy(update={"metadata": more})
                found.append(NodeWithScore(node=node, score=hit["score"]))
            return found

    return {"MinilmEmbedding": MinilmEmbedding, "MinilmRerank": MinilmRerank}
