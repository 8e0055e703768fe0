"""Using a pre-trained model without training it: cloze, label scoring, few-shot prompts, pseudo-perplexity.

Each file is one method, and names its paper.
"""

from .cloze import ClozeClassifier
from .entities import PromptedEntities
from .few_shot import FewShotTemplate
from .labels import LabelScorer
from .pseudo import next_sentence_scores, pseudo_log_likelihoods, pseudo_perplexity
from .templates import Template

__all__ = [
    "ClozeClassifier",
    "FewShotTemplate",
    "LabelScorer",
    "PromptedEntities",
    "Template",
    "next_sentence_scores",
    "pseudo_log_likelihoods",
    "pseudo_perplexity",
]
