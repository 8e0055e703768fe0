"""Random sentence-transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from tiny_models import save_model


def build(
    folder: Path, *modules: Any, family: str = "bert", max_seq_length: int = 40, **options: Any
) -> SentenceTransformer:
    """A random model with these modules after the Transformer, saved in `folder`."""
    backbone = save_model(folder / "backbone", family)
    torch.manual_seed(5)
    made = [module if isinstance(module, torch.nn.Module) else module() for module in modules]
    for module in made:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    first = Transformer(str(backbone), max_seq_length=max_seq_length)
    model = SentenceTransformer(modules=[first, *made], device="cpu", **options)
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return SentenceTransformer(str(folder / "model"), device="cpu")
