"""Chat templates by themselves: `render` makes a text of a template and messages."""

from .text import ChatTemplateError, render

__all__ = ["ChatTemplateError", "render"]
