"""transformers' Trainer, saving checkpoints that transformers loads too."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..model import PreTrainedModel


@cache
def trainer_class() -> Any:
    """The class `Trainer`, created at first use, since transformers is imported for it."""
    from transformers import Trainer as TheirTrainer
    from transformers.trainer import TRAINING_ARGS_NAME

    class Trainer(TheirTrainer):  # type: ignore[misc]
        """Trains a model of minilm, and saves it as a folder that minilm and transformers load.

        The Trainer of transformers also trains, evaluates and resumes a model of minilm, but saves models of
        other classes without a config.json and with the parameter names of the modules. minilm's
        ``from_pretrained(folder)`` reads such a folder; that of transformers does not.
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
