"""The version of minilm. Nothing else states it: pyproject.toml, the wheel and `minilm.__version__` read it here."""

__version__ = "0.1.0"
