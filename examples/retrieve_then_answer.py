"""Answer questions from documents: find passages, and let a language model read them. Takes 40 seconds.

The documents are about an island that does not exist, so the model cannot know the answers. A question whose
best passage is less similar than --least is not answered. The end counts right answers with and without.
"""

import argparse
import json
import tempfile
from pathlib import Path

from minilm import LLM, SamplingParams, SearchIndex

DATA = Path(__file__).parent / "data"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct")
parser.add_argument("--encoder", default="all-MiniLM-L6-v2")
parser.add_argument("--passages", type=int, default=1, help="number of passages to read")
parser.add_argument("--least", type=float, default=0.4, help="least similarity; 0.4 suits the data here")
arguments = parser.parse_args()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def answers(prompts: list[str]) -> list[str]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [output.outputs[0].text.strip() for output in llm.chat(chats, GREEDY)]


GREEDY = SamplingParams(temperature=0, max_tokens=40)
llm, asked = LLM(arguments.model), rows("island_questions.jsonl")
questions = [row["question"] for row in asked]
with tempfile.TemporaryDirectory() as folder:
    index = SearchIndex.build(arguments.encoder, (row["text"] for row in rows("island.jsonl")), folder)
    found = index.search(questions, top_k=arguments.passages)
facts = ["\n".join(hit.text for hit in hits) for hits in found]
prompts = [f"{fact}\n\nAnswer from this text: {q}" for fact, q in zip(facts, questions, strict=True)]
known = [hits[0].score >= arguments.least for hits in found]
with_facts, without = answers(prompts), answers(questions)

for question, hits, sure, text in zip(questions, found, known, with_facts, strict=True):
    print(f"{question}\n    {hits[0].score:.2f}  {text if sure else '(not in the documents)'}")
real = [n for n, row in enumerate(asked) if row["answers"]]
for name, texts, given in (("with passages", with_facts, known), ("without", without, [True] * len(asked))):
    right = sum(given[n] and any(answer in texts[n] for answer in asked[n]["answers"]) for n in real)
    print(f"{name}: {right} of {len(real)} answers are right")
refused = sum(not sure for row, sure in zip(asked, known, strict=True) if not row["answers"])
print(f"not in the documents: {refused} of {len(asked) - len(real)} recognised")
