"""What goes on inside a model."""

from .attention import attention_probs

__all__ = ["attention_probs"]
