"""Fine-tune a classifier with transformers' Trainer, save it, and load it. Takes 20 seconds.

Needs transformers and accelerate (pip install transformers accelerate).
"""

import argparse
import tempfile

from transformers import TrainingArguments

from minilm import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from minilm.integrations.transformers import Trainer

WEATHER = "It will rain.|Snow falls in the hills.|A sunny day.|The wind is strong.|Fog at dawn."
SPORTS = "They won the match.|She ran a marathon.|The goal came late.|A new record.|He serves well."

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="all-MiniLM-L6-v2")
parser.add_argument("--epochs", type=int, default=8)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForSequenceClassification.from_pretrained(
    arguments.model, id2label={0: "weather", 1: "sports"}, label2id={"weather": 0, "sports": 1}
)
rows = [(text, label) for label, texts in enumerate((WEATHER, SPORTS)) for text in texts.split("|")]


def collate(batch: list[tuple[str, int]]) -> dict:
    """Texts to a padded batch with labels."""
    texts, labels = zip(*batch, strict=True)
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    encoded["labels"] = encoded["input_ids"].new_tensor(labels)
    return dict(encoded)


with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder, num_train_epochs=arguments.epochs, learning_rate=2e-4, use_cpu=True, seed=1, logging_steps=4
    )
    options.remove_unused_columns, options.disable_tqdm = False, True
    trainer = Trainer(model=model, args=options, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)
    classify = pipeline("text-classification", model=folder)

for text in ("Thunder and lightning tonight.", "The team scored twice."):
    [found] = classify([text])
    print(f"{text}  ->  {found['label']} ({found['score']:.2f})")
