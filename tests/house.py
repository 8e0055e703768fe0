"""The folders and files of minilm/, as they stand on each other."""

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
        "text",
        "chat_template",
        "model",
        "native",
        "generation",
    ),
    *("sentence", "pipelines", "training", "peft", "evaluation", "interpret", "conversion", "serving"),
    *("integrations", "doctor", "cli", "__main__", ""),
)
"""The folders and files of minilm/ as they stand on each other, and as a person reads them: each may import
those before it. The last is the package itself."""
