"""Task pipelines under transformers' names: one file per task, and `pipeline` to create them."""

from .base import Pipeline
from .factory import ALIASES, DEFAULT_MODELS, TASKS, pipeline
from .feature_extraction import FeatureExtractionPipeline, SentenceSimilarityPipeline
from .fill_mask import FillMaskPipeline
from .question_answering import QuestionAnsweringPipeline
from .text_classification import TextClassificationPipeline, TextRankingPipeline
from .text_generation import TextGenerationPipeline
from .token_classification import TokenClassificationPipeline
from .zero_shot import ZeroShotClassificationPipeline

__all__ = [
    "ALIASES",
    "DEFAULT_MODELS",
    "TASKS",
    "FeatureExtractionPipeline",
    "FillMaskPipeline",
    "Pipeline",
    "QuestionAnsweringPipeline",
    "SentenceSimilarityPipeline",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TextRankingPipeline",
    "TokenClassificationPipeline",
    "ZeroShotClassificationPipeline",
    "pipeline",
]
