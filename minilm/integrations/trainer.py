"""transformers' Trainer, with checkpoints that load."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..model import PreTrainedModel


@cache
def trainer_class() -> Any:
    """`Trainer`, made when it is first asked for: transformers is imported for it."""
    from transformers import Trainer as TheirTrainer
    from transformers.trainer import TRAINING_ARGS_NAME

    class Trainer(TheirTrainer):  # type: ignore[misc]
        """Trains a model of minilm, and saves it as a folder that both libraries load by name.

        transformers' own Trainer trains, evaluates and resumes a model of minilm as well, but knows only its
        own classes' way to save: what it writes has no config.json, and the parameters' names are those of
        minilm's modules. minilm's ``from_pretrained(folder)`` reads that, and transformers' does not.
        """

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if not isinstance(model, PreTrainedModel):
                super()._save(output_dir, state_dict)
                return
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    return Trainer
