"""Generate texts one by one and as one batch, and compare the speed. Takes 15 seconds."""

import argparse
import time

from minilm import LLM, SamplingParams

THINGS = ["sea", "winter", "bicycle", "library", "old bridge", "first snow", "night train", "garden"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct")
parser.add_argument("--max-tokens", type=int, default=40)
arguments = parser.parse_args()

llm = LLM(arguments.model)
prompts = [f"The {thing} is" for thing in THINGS]
params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, ignore_eos=True)
llm.generate(prompts[:1], params, use_tqdm=False)  # warm-up: packs the weights

start = time.perf_counter()
single = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]
between = time.perf_counter()
together = llm.generate(prompts, params, use_tqdm=False)
end = time.perf_counter()

for prompt, output in zip(prompts, together, strict=True):
    print(f"{prompt}{output.outputs[0].text.splitlines()[0] if output.outputs[0].text else ''}")
written = sum(len(output.outputs[0].token_ids) for output in together)
same = sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(single, together, strict=True))
print(f"\none by one {written / (between - start):5.0f} tokens/s")
print(f"together   {written / (end - between):5.0f} tokens/s; {same} of {len(prompts)} texts are the same")
