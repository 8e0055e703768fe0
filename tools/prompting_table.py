"""Accuracy of prompting methods with small models, at telling good reviews from bad:
benchmarks/results/prompting.md.

    python tools/prompting_table.py               1,000 sentences, some minutes on two cores
    python tools/prompting_table.py --sentences 200 --output -

The sentences are those of movie reviews in the source package of vaderSentiment 3.3.2 (Hutto and Gilbert
2014), each with the mean of some twenty people's ratings from -4 to 4; the package is fetched with pip.
Sentences rated between -0.5 and 0.5 are left out. Equal numbers of good and bad sentences are sampled; the
examples of few-shot prompts are sampled from the others. Nothing is trained, and no prompt was chosen by its
result.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minilm import SentenceEncoder
from minilm.files import DEFAULT_DECODER, DEFAULT_ENCODER
from minilm.prompting import FewShotTemplate, LabelScorer

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "benchmarks" / "results" / "prompting.md"
PACKAGE = "vaderSentiment==3.3.2"
FILE = "movieReviewSnippets_GroundTruth.txt"
LABELS = ["positive", "negative"]
PROMPT = "Review: {text}\nSentiment:"
QUESTION = (
    "Is the sentiment of this movie review positive or negative? Answer with one word.\n\nReview: {text}"
)
POOL = 400
"""Sentences from which examples are chosen."""


def sentences() -> list[tuple[str, str]]:
    """(text, label) of all clearly rated sentences."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, PACKAGE], check=True)
        [source] = Path(folder).glob("*.tar.gz")
        outer = _member(source.read_bytes(), "hutto_ICWSM_2014.tar.gz")
        lines = _member(outer, FILE).decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines]
    return [
        (text.strip(), LABELS[float(score) < 0])
        for _, score, text in (row for row in rows if len(row) == 3)
        if abs(float(score)) >= 0.5 and text.strip()
    ]


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        [member] = [m for m in tar.getmembers() if Path(m.name).name == name and m.isfile()]
        stream = tar.extractfile(member)
        assert stream is not None
        return stream.read()


def drawn(all_: list[tuple[str, str]], count: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences to classify, and sentences for examples; in each, both labels are equally frequent, in random
    order."""
    shuffled = random.Random(0).sample(all_, len(all_))
    of = {label: [pair for pair in shuffled if pair[1] == label] for label in LABELS}
    judged = [pair for label in LABELS for pair in of[label][: count // 2]]
    pool = [pair for label in LABELS for pair in of[label][count // 2 : (count + POOL) // 2]]
    return judged, random.Random(1).sample(pool, len(pool))


def methods(
    decoder: str, encoder: SentenceEncoder, pool: list[tuple[str, str]]
) -> dict[str, Callable[[list[str]], list[str]]]:
    """The methods in the table."""
    examples = [(text, " " + label) for text, label in pool]
    first = LabelScorer(decoder, PROMPT, LABELS)
    model, tokenizer = first.model, first.tokenizer

    def scorer(template: str | FewShotTemplate, **options: bool) -> Callable[[list[str]], list[str]]:
        return LabelScorer(model, template, LABELS, tokenizer=tokenizer, **options).predict  # type: ignore[arg-type]

    def by_vectors(texts: list[str]) -> list[str]:
        hypotheses = [f"This movie review is {label}." for label in LABELS]
        nearest = (_vectors(encoder, texts) @ _vectors(encoder, hypotheses).T).argmax(-1)
        return [LABELS[i] for i in nearest.tolist()]

    def by_neighbours(texts: list[str]) -> list[str]:
        near = (_vectors(encoder, texts) @ _vectors(encoder, [text for text, _ in pool]).T).topk(9).indices
        good = torch.tensor([label == LABELS[0] for _, label in pool])
        return [LABELS[int(votes < 5)] for votes in good[near].sum(-1).tolist()]

    return {
        "label scoring": scorer(PROMPT),
        "label scoring, calibrated": scorer(PROMPT, calibrate=True),
        "label scoring, chat template": scorer(QUESTION, chat=True),
        "label scoring, chat template, calibrated": scorer(QUESTION, chat=True, calibrate=True),
        "few-shot, 4 of the pool": scorer(FewShotTemplate(PROMPT, examples, k=4)),
        "few-shot, 4 of the pool, calibrated": scorer(FewShotTemplate(PROMPT, examples, k=4), calibrate=True),
        "few-shot, the 4 nearest": scorer(FewShotTemplate(PROMPT, examples, k=4, encoder=encoder)),
        "few-shot, the 4 nearest, calibrated": scorer(
            FewShotTemplate(PROMPT, examples, k=4, encoder=encoder), calibrate=True
        ),
        "the nearer of two label sentences (embeddings)": by_vectors,
        "the labels of the 9 nearest sentences (embeddings)": by_neighbours,
    }


def _vectors(encoder: SentenceEncoder, texts: Sequence[str]) -> torch.Tensor:
    found: torch.Tensor = encoder.encode(
        list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    )
    return found


def table(decoder: str, encoder_name: str, count: int) -> str:
    """The page."""
    everything = sentences()
    judged, pool = drawn(everything, count)
    texts, truth = [text for text, _ in judged], [label for _, label in judged]
    encoder = SentenceEncoder(encoder_name, device="cpu")
    lines = [
        "# Prompting a small model, without training",
        "",
        f"{len(judged):,} sentences of movie reviews, half of them good, of {len(everything):,} that people "
        f"rated clearly. Label scoring and few-shot: {decoder}; embeddings: {encoder_name}. Guessing gives "
        "50 %. The interval is of 95 % (Wilson). Made by `python tools/prompting_table.py`.",
        "",
        "| method | accuracy | interval | says positive |",
        "|---|---|---|---|",
    ]
    for name, predict in methods(decoder, encoder, pool).items():
        found = predict(texts)
        right = sum(map(str.__eq__, found, truth))
        low, high = wilson(right, len(truth))
        said = found.count(LABELS[0]) / len(found)
        row = f"| {name} | {right / len(truth):.1%} | {low:.1%} to {high:.1%} | {said:.0%} |"
        print(row, file=sys.stderr, flush=True)
        lines.append(row)
    return "\n".join(lines) + "\n"


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion (Wilson 1927)."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return middle - half, middle + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--decoder", default=DEFAULT_DECODER)
    parser.add_argument("--encoder", default=DEFAULT_ENCODER)
    parser.add_argument("--output", default=str(TARGET), help="a file, or - for the terminal")
    options = parser.parse_args()
    page = table(options.decoder, options.encoder, options.sentences)
    if options.output == "-":
        print(page)
    else:
        Path(options.output).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
