"""Using a pre-trained model without training it: cloze, label scoring, embeddings, few-shot prompts.

Each file is one method, and names its paper.
"""

from .cloze import ClozeClassifier
from .embedding import EmbeddingClassifier
from .entities import PromptedEntities
from .few_shot import FewShotTemplate
from .labels import LabelScorer
from .pseudo import next_sentence_scores, pseudo_log_likelihoods, pseudo_perplexity
from .templates import Template

__all__ = [
    "ClozeClassifier",
    "EmbeddingClassifier",
    "FewShotTemplate",
    "LabelScorer",
    "PromptedEntities",
    "Template",
    "next_sentence_scores",
    "pseudo_log_likelihoods",
    "pseudo_perplexity",
]
