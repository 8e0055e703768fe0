"""Find groups of similar sentences, without knowing their number. Takes 3 seconds.

python examples/cluster_sentences.py sentences.txt --threshold 0.4
"""

import argparse
from pathlib import Path

from minilm import SentenceEncoder
from minilm.util import community_detection

SENTENCES = """The parcel has not arrived yet.
Where is my order?
I was charged twice for one purchase.
My delivery is a week late.
How can I change my password?
The invoice shows the wrong amount.
I cannot log in to my account.
When will my package be delivered?
Please refund the second payment.
The reset link for my password does not work.
Do you have an office in Lisbon?"""

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", nargs="?", help="a file with one sentence per line; default: questions to a shop")
parser.add_argument("--model", default="all-MiniLM-L6-v2")
parser.add_argument(
    "--threshold", type=float, default=0.4, help="minimum cosine similarity to the centre of a group"
)
arguments = parser.parse_args()

text = Path(arguments.file).read_text(encoding="utf-8") if arguments.file else SENTENCES
sentences = [line.strip() for line in text.splitlines() if line.strip()]
embeddings = SentenceEncoder(arguments.model).encode(sentences)
groups = community_detection(embeddings, threshold=arguments.threshold, min_community_size=2)

for number, group in enumerate(groups, start=1):
    print(f"Group {number}, around: {sentences[group[0]]}")
    for row in group[1:]:
        print(f"    {sentences[row]}")
alone = set(range(len(sentences))) - {row for group in groups for row in group}
print(f"In no group: {'; '.join(sentences[row] for row in sorted(alone)) or 'none'}")
