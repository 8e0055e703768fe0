"""Recommend books by their contents: from those that a reader likes to others, with reasons. Takes 3 seconds.

A book's vector is that of its description; a reader's is the mean of the liked books'. For the figure at the
end each liked book is hidden once: is it among the first five recommendations from the others?
"""

import argparse
import json
from pathlib import Path

from minilm import SentenceEncoder
from minilm.util import cos_sim, semantic_search

DATA = Path(__file__).parent / "data"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--likes", nargs="*", default=["Carmilla", "The Hound of the Baskervilles"])
parser.add_argument("--model", default="all-MiniLM-L6-v2")
arguments = parser.parse_args()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


books, encoder = rows("books.jsonl"), SentenceEncoder(arguments.model)
titles = [book["title"] for book in books]
vectors = encoder.encode([f"{book['title']}: {book['about']}" for book in books], convert_to_tensor=True)


def recommended(likes: list[int], count: int) -> list[int]:
    [hits] = semantic_search(vectors[likes].mean(0), vectors, top_k=count + len(likes))
    return [hit["corpus_id"] for hit in hits if hit["corpus_id"] not in likes][:count]


unknown = [title for title in arguments.likes if title not in titles]
if unknown or not arguments.likes:
    parser.error(f"--likes: expected titles of data/books.jsonl, got {', '.join(unknown) or 'none'}")
likes = [titles.index(title) for title in arguments.likes]
for number in recommended(likes, 5):
    alike = cos_sim(vectors[number], vectors[likes])[0]
    because = titles[likes[int(alike.argmax())]]
    print(f"{titles[number]}\n    because you like {because} ({float(alike.max()):.2f})")

readers = [[titles.index(title) for title in reader["likes"]] for reader in rows("readers.jsonl")]
tests = [([other for other in liked if other != hidden], hidden) for liked in readers for hidden in liked]
hits = sum(hidden in recommended(rest, 5) for rest, hidden in tests)
chance = 5 / (len(books) - len(tests[0][0]))
print(f"{hits} of {len(tests)} hidden books are among the first five; by chance {chance * len(tests):.1f}")
