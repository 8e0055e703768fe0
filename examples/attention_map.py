"""Print the attention map of one head: which tokens each token of a sentence attends to. Takes 3 seconds.

python examples/attention_map.py "The cat sat, because it was tired." --layer 2 --head 5 --picture map.png
"""

import argparse

import torch

import minilm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text", nargs="?", default="The cat did not cross the street because it was too tired.")
parser.add_argument("--model", default="all-MiniLM-L6-v2")
parser.add_argument("--layer", type=int, default=2)
parser.add_argument("--head", type=int, default=1)
parser.add_argument("--picture", help="a file to draw the map in (needs matplotlib)")
arguments = parser.parse_args()

tokenizer = minilm.AutoTokenizer.from_pretrained(arguments.model)
model = minilm.AutoModel.from_pretrained(arguments.model).eval()
batch = tokenizer([arguments.text], return_tensors="pt")
with torch.no_grad():
    [seen] = minilm.attention_probs(model, **batch, layer=arguments.layer, head=arguments.head)
tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
width = max(map(len, tokens))

print(f"Layer {arguments.layer}, head {arguments.head}: rows attend to columns; darker means more\n")
for token, row in zip(tokens, seen, strict=True):
    shades = "".join(" ░▒▓█"[min(4, int(5 * p / row.max()))] * 2 for p in row)
    best = row.argmax()
    print(f"{token:>{width}} |{shades}| {100 * row[best]:3.0f} % {tokens[best]}")

if arguments.picture:
    from matplotlib import pyplot

    pyplot.imshow(seen, cmap="Blues")
    pyplot.xticks(range(len(tokens)), tokens, rotation=90)
    pyplot.yticks(range(len(tokens)), tokens)
    pyplot.tight_layout()
    pyplot.savefig(arguments.picture)
    print(f"\nwritten to {arguments.picture}")
