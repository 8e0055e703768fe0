"""The folders and files of minilm/, in the order of their imports."""

from __future__ import annotations

ORDER = (
    *(
        "_version",
        "differences",
        "substitutes",
        "config",
        "ops",
        "cache",
        "graphs",
        "files",
        "weights",
        "families",
        "companions",
        "quantized",
        "text",
        "chat_template",
        "distances",
        "model",
        "pretraining",
        "native",
        "generation",
        "seq2seq",
    ),
    *("sentence", "util", "search", "prompting", "pipelines", "training", "peft", "evaluation", "interpret"),
    "conversion",
    *("serving", "integrations", "doctor", "cli", "__main__", ""),
)
"""The folders and files of minilm/ in reading order: each may import only those before it. The last entry is
the package itself."""
