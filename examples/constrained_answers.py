"""Constrain the answers of a small model: to one of several words, or up to a stop text. Takes 6 seconds.

At each step, a function returns the tokens that may come next: those that continue one of the words.
"""

import argparse

import torch

from minilm import LLM, SamplingParams

QUESTIONS = {
    "Is the sun a star? Answer yes or no.": ["yes", "no"],
    "What do people drink: tea, stones or chairs?": ["tea", "stones", "chairs"],
    "Is the review 'I loved every minute of it' positive or negative?": ["positive", "negative"],
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct")
llm = LLM(parser.parse_args().model)
tokenizer, model = llm.get_tokenizer(), llm.model


def choose(question: str, words: list[str]) -> str:
    """The word among `words` that the model answers with."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    end = tokenizer.eos_token_id
    spelled = [[*tokenizer(word, add_special_tokens=False)["input_ids"], end] for word in words]

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        written = ids[prompt.shape[1] :].tolist()
        return [word[len(written)] for word in spelled if word[: len(written)] == written] or [end]

    ids = model.generate(
        prompt, prefix_allowed_tokens_fn=allowed, do_sample=False, max_new_tokens=12, eos_token_id=end
    )
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


for question, words in QUESTIONS.items():
    print(f"{question}  ->  {choose(question, words)}")

prompt = "Three fruits:\n1. Apples\n2."
output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=20, stop=["\n"]), use_tqdm=False)[0]
print(f"\n{prompt}{output.outputs[0].text}   (ended by {output.outputs[0].stop_reason!r})")
