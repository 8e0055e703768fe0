"""Looking inside a model: its attention probabilities."""

from .attention import attention_probs

__all__ = ["attention_probs"]
