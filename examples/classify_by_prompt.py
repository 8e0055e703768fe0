"""Classify texts without training: which label does a small language model expect next? Takes 6 seconds.

The labels are not generated: the model gives the probability of each as the continuation of the prompt. It
changes with examples in the prompt, and by calibration with the model's answers to empty texts.
"""

import argparse

from minilm.prompting import FewShotTemplate, LabelScorer

REVIEWS = [
    "I laughed from beginning to end.",
    "Two hours that I will never get back.",
    "The actors do what they can, and the story is beautiful.",
    "Dull, loud and far too long.",
]
EXAMPLES = [
    ("A joy for young and old.", " positive"),
    ("The plot makes no sense at all.", " negative"),
    ("Go and see it twice.", " positive"),
    ("I left before the end.", " negative"),
]
PROMPT = "Review: {text}\nSentiment:"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct")
labels = ["positive", "negative"]

zero_shot = LabelScorer(parser.parse_args().model, PROMPT, labels)
model, tokenizer = zero_shot.model, zero_shot.tokenizer
methods = {
    "zero-shot": zero_shot,
    "zero-shot, calibrated": LabelScorer(model, PROMPT, labels, tokenizer=tokenizer, calibrate=True),
    "four examples": LabelScorer(model, FewShotTemplate(PROMPT, EXAMPLES), labels, tokenizer=tokenizer),
}
for name, scorer in methods.items():
    print(name)
    for text, row in zip(REVIEWS, scorer.probabilities(REVIEWS).tolist(), strict=True):
        print(f"    {row[0]:4.0%} positive  {text}")
