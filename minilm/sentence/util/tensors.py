"""Helpers for embeddings and batches."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..similarity import SIMILARITIES, check_sizes, tensor

B = TypeVar("B", bound=MutableMapping[str, Any])


class SimilarityFunction(Enum):
    """The names of the similarity functions, for programs that use ``SimilarityFunction.COSINE``. Plain names
    (``"cosine"``) are accepted too."""

    COSINE = "cosine"
    DOT_PRODUCT = "dot"
    DOT = "dot"  # noqa: PIE796 - another name of the same
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"

    @staticmethod
    def to_similarity_fn(similarity_function: str | SimilarityFunction) -> Callable[[Any, Any], Tensor]:
        """The function that compares all rows with all rows. Raises ValueError for an unknown name."""
        return SIMILARITIES[SimilarityFunction(similarity_function).value][0]

    @staticmethod
    def to_similarity_pairwise_fn(
        similarity_function: str | SimilarityFunction,
    ) -> Callable[[Any, Any], Tensor]:
        """The function that compares row i with row i. Raises ValueError for an unknown name."""
        return SIMILARITIES[SimilarityFunction(similarity_function).value][1]

    @staticmethod
    def possible_values() -> list[str]:
        """cosine, dot, euclidean, manhattan."""
        return list(SIMILARITIES)

    @classmethod
    def _missing_(cls, value: object) -> None:
        known = ", ".join(cls.possible_values())
        raise ValueError(f"a similarity function must be one of {known}, and is {value!r}")


def normalize_embeddings(embeddings: Any) -> Any:
    """Scale vectors to length 1; zero vectors stay zero. [..., D] -> [..., D].

    Returns an array for an array, a tensor (dense or sparse) for a tensor, in the dtype of the input (float32
    for integers and lists). float16 is computed in float32, so that the length of a long vector does not
    overflow.
    """
    wide = tensor(embeddings)
    found = normalize(wide if wide.is_floating_point() else wide.double(), dim=-1)
    if isinstance(embeddings, np.ndarray):
        fits = np.issubdtype(embeddings.dtype, np.floating)
        return found.numpy().astype(embeddings.dtype if fits else np.float32)
    if not isinstance(embeddings, Tensor):
        return found.float()
    found = found.to(embeddings.dtype if embeddings.is_floating_point() else torch.float32)
    return found.to_sparse() if embeddings.is_sparse else found


def truncate_embeddings(embeddings: Any, truncate_dim: int | None) -> Any:
    """The first `truncate_dim` values of each vector, as a view; None: all. [..., D] -> [..., d].

    Raises ValueError for a size below 1. A size above D changes nothing, as in the encoder.
    """
    if truncate_dim is not None:
        check_sizes(truncate_dim=truncate_dim)
    if not isinstance(embeddings, (Tensor, np.ndarray)):
        embeddings = tensor(embeddings)
    if isinstance(embeddings, Tensor) and embeddings.is_sparse:
        embeddings = embeddings.to_dense()
    return embeddings[..., :truncate_dim]


def batch_to_device(batch: B, target_device: torch.device | str | int) -> B:
    """Move the tensors of a batch to a device, in place; other values are not changed. Returns the batch."""
    for key, value in list(batch.items()):
        if isinstance(value, Tensor):
            batch[key] = value.to(target_device)
    return batch
