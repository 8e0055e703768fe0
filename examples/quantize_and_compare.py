"""Quantise weights to 8 and 4 bits, and compare size, speed and embeddings. Takes 8 seconds."""

import argparse
import time

from minilm import SentenceEncoder

TEXTS = [
    "A man eats.",
    "Someone has lunch.",
    "The sky is blue.",
    "Clouds are rare today.",
    "Rust is a language.",
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="all-MiniLM-L6-v2")
name = parser.parse_args().model


def size(model: SentenceEncoder) -> float:
    """Size of the weights in MB."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


original = SentenceEncoder(name, device="cpu")
expected = original.encode(TEXTS)
print(f"{'weights':<8} {'MB':>6} {'lowest cosine to the original':>32} {'texts/s':>8}")
for weights in (None, "int8", "q8_0", "q4_1", "q4_0"):
    model = original if weights is None else SentenceEncoder(name, device="cpu", weights=weights)
    found = model.encode(TEXTS)
    start = time.perf_counter()
    model.encode(TEXTS * 20)
    seconds = time.perf_counter() - start
    cosine = original.similarity_pairwise(found, expected).min()
    label = weights or str(model.dtype).removeprefix("torch.")
    print(f"{label:<8} {size(model):6.1f} {cosine:32.5f} {len(TEXTS) * 20 / seconds:8.0f}")
