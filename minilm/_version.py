"""The version of minilm: the one place that pyproject.toml, the wheel and `minilm.__version__` read."""

__version__ = "0.1.0"
