"""Train a classifier of praise and complaints: an encoder with a new head, in a plain PyTorch loop.

Takes 15 seconds.
"""

import argparse

import torch

from minilm import AutoModelForSequenceClassification, AutoTokenizer

PRAISE = "great {0}|the {0} was wonderful|i loved the {0}|what a lovely {0}|a {0} to remember|best {0} ever"
COMPLAINT = "awful {0}|the {0} was terrible|i hated the {0}|what a dull {0}|a {0} to forget|worst {0} ever"
THINGS = ["film", "meal", "hotel", "book", "concert"]
UNSEEN = [
    "an excellent walk",
    "the service was horrible",
    "we enjoyed every minute",
    "never again, so boring",
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="all-MiniLM-L6-v2")
parser.add_argument("--steps", type=int, default=30)
arguments = parser.parse_args()
texts = [form.format(thing) for forms in (COMPLAINT, PRAISE) for form in forms.split("|") for thing in THINGS]
labels = torch.tensor([0] * (len(texts) // 2) + [1] * (len(texts) // 2))
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

model.train()
for step in range(arguments.steps):
    rows = torch.randperm(len(texts))[:16]
    batch = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
    loss = model(**batch, labels=labels[rows]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == arguments.steps - 1:
        print(f"step {step:3}  loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    batch = tokenizer(UNSEEN, padding=True, return_tensors="pt")
    praise = model(**batch).logits.softmax(-1)[:, 1]
print("\nTexts that were not in the training data:")
for text, probability in zip(UNSEEN, praise.tolist(), strict=True):
    print(f"{probability:.2f}  {'praise   ' if probability > 0.5 else 'complaint'}  {text}")
