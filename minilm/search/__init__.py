"""Semantic search: an index of texts and their vectors on disk, and the most similar ones to a query."""

from .index import Hit, SearchIndex

__all__ = ["Hit", "SearchIndex"]
