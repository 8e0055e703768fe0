"""Records outputs of transformers' question-answering pipeline, which version 5 no longer has, for the tests.

    pip install --target OLD --no-deps transformers==4.57.6 "huggingface_hub<1" "tokenizers<0.23"
    PYTHONPATH=OLD python tools/make_golden_question_answering.py

Writes tests/golden/question_answering/FAMILY/: a tiny random model (BERT, RoBERTa) with its tokenizer, and
expected.json: a list of [question, context, options, result].
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402
from tiny_models import CORPUS, save_model  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "question_answering"

QUESTIONS = ["Who lives in Paris?", "Where was Anna?", "北京?", "What is the green tea?"]
CONTEXTS = [
    CORPUS[0],
    CORPUS[3],
    "anna",
    "Mary Smithers' unhappy old man - who lived (in Greenland) - was in Parisland, and  Éric in Nürnberg.",
    " ".join(CORPUS),
    " ".join(CORPUS * 4),
    " London, london LONDON. ".join(CORPUS),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_k": 4, "max_answer_len": 2},
    {"top_k": 3, "align_to_words": False},
    {"handle_impossible_answer": True},
    {"handle_impossible_answer": True, "top_k": 5},
    {"max_seq_len": 40, "doc_stride": 5, "top_k": 2},
    {"max_seq_len": 50, "doc_stride": 0, "max_answer_len": 30},
]


def rounded(value: Any) -> Any:
    """Round scores to their significant digits."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {**value, "score": round(float(value["score"]), 7)}


def main() -> None:
    if not transformers.__version__.startswith("4."):
        sys.exit(
            f"transformers {transformers.__version__} has no question-answering pipeline; see the docstring"
        )
    warnings.simplefilter("ignore")
    for family in ("bert", "roberta"):
        folder = GOLDEN / family
        shutil.rmtree(folder, ignore_errors=True)
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
        save_model(folder, family, "ForQuestionAnswering", positions=96, seed=1, **sizes)
        for file in folder.iterdir():  # one form of the tokenizer is enough
            if file.name in ("special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt"):
                file.unlink()
        answer = transformers.pipeline("question-answering", model=str(folder), device=-1)
        cases = []
        pairs = [(question, context) for question in QUESTIONS for context in CONTEXTS]
        for number, (question, context) in enumerate(pairs):
            for options in (OPTIONS[(number + shift) % len(OPTIONS)] for shift in (0, 3, 5)):
                result = rounded(answer(question=question, context=context, **options))
                cases.append([question, context, options, result])
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
        (folder / "expected.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{folder}: {len(cases)} cases, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
