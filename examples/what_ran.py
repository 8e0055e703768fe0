"""Show which implementation of each op ran, and how the choice changes speed and result. Takes 8 seconds."""

import argparse
import time

import minilm

TEXTS = [f"Sentence number {number}, which is as long as many others are." for number in range(64)]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="all-MiniLM-L6-v2")
encoder = minilm.SentenceEncoder(parser.parse_args().model, device="cpu")

with minilm.backend("reference"):  # the formulas in plain PyTorch
    expected = encoder.encode(TEXTS)
for name in ("auto", "native", "torch", "reference"):
    minilm.explain(reset=True)
    try:
        with minilm.backend(*([name] if name in ("auto", "reference") else [name, "reference"])):
            encoder.encode(TEXTS)
            start = time.perf_counter()
            embeddings = encoder.encode(TEXTS)
            seconds = time.perf_counter() - start
    except minilm.BackendError as problem:
        print(f"{name}: {problem}")
        continue
    print(f"{name:<10} {len(TEXTS) / seconds:6.0f} texts/s, ", end="")
    print(f"at most {abs(embeddings - expected).max():.1e} from the reference")
    for decision in minilm.explain().decisions:
        print(f"           {decision.op}: {decision.chosen.backend}, {decision.calls} calls")

minilm.explain(reset=True)
encoder.encode(TEXTS[:1])
print(f"\nFor one text, with reasons:\n{minilm.explain()}")
