"""Chat templates on their own: `render` turns a template and messages into text."""

from .text import ChatTemplateError, render

__all__ = ["ChatTemplateError", "render"]
