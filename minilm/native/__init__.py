"""Whole passes of a model as one call of the native extension, behind the dispatch table; the model knows nothing of it."""
