"""Search a text by meaning: the paragraphs of a file that best match a question. Takes 3 seconds.

python examples/semantic_search.py README.md "Which models can it load?"
"""

import argparse
from pathlib import Path

from minilm import SentenceEncoder
from minilm.util import semantic_search

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", nargs="?", default=str(Path(__file__).parent.parent / "README.md"))
parser.add_argument("question", nargs="?", default="Do I need a graphics card?")
parser.add_argument("--model", default="all-MiniLM-L6-v2")
arguments = parser.parse_args()

text = Path(arguments.file).read_text(encoding="utf-8")
paragraphs = [part for part in text.split("\n\n") if len(part.split()) > 8 and part[0] not in "|` "]
encoder = SentenceEncoder(arguments.model)
[hits] = semantic_search(
    encoder.encode_query([arguments.question]),
    encoder.encode_document(paragraphs),
    top_k=3,
)

print(f"{arguments.question}\n({len(paragraphs)} paragraphs of {Path(arguments.file).name})")
for hit in hits:
    print(f"\n{hit['score']:.3f}  {paragraphs[hit['corpus_id']][:400]}")
