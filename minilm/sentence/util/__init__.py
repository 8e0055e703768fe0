"""The functions of sentence_transformers.util under the same names: similarity, search, mining."""

from ..similarity import (
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pairwise_euclidean_sim,
    pairwise_manhattan_sim,
    quantize_embeddings,
    semantic_search,
)
from ..similarity import cos_sim as pytorch_cos_sim
from .communities import community_detection
from .hard_negatives import mine_hard_negatives
from .paraphrases import paraphrase_mining, paraphrase_mining_embeddings
from .tensors import SimilarityFunction, batch_to_device, normalize_embeddings, truncate_embeddings

__all__ = [
    "SimilarityFunction",
    "batch_to_device",
    "community_detection",
    "cos_sim",
    "dot_score",
    "euclidean_sim",
    "manhattan_sim",
    "mine_hard_negatives",
    "normalize_embeddings",
    "pairwise_cos_sim",
    "pairwise_dot_score",
    "pairwise_euclidean_sim",
    "pairwise_manhattan_sim",
    "paraphrase_mining",
    "paraphrase_mining_embeddings",
    "pytorch_cos_sim",
    "quantize_embeddings",
    "semantic_search",
    "truncate_embeddings",
]
