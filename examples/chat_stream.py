"""Print an answer while it is generated, with the numbers of tokens and the speed. Takes 6 seconds.

python examples/chat_stream.py "Why is the sky blue?"
"""

import argparse
import time

from minilm import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="Why is the sky blue? Answer in two sentences.")
parser.add_argument("--model", default="SmolLM2-135M-Instruct")
parser.add_argument("--max-tokens", type=int, default=80)
arguments = parser.parse_args()

llm = LLM(arguments.model)
messages = [{"role": "user", "content": arguments.question}]
stream = llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=arguments.max_tokens))
print(arguments.question)
start = first = time.perf_counter()
for number, piece in enumerate(stream):
    if number == 0:
        first = time.perf_counter()
    print(piece, end="", flush=True)
end = time.perf_counter()

read, written = len(stream.output.prompt_token_ids), len(stream.output.outputs[0].token_ids)
reason = {"stop": "it was done", "length": "it was cut"}[stream.output.outputs[0].finish_reason]
print(f"\n\n{read} tokens read in {first - start:.2f} s, then {written} written, ", end="")
print(f"{(written - 1) / max(end - first, 1e-9):.0f} a second; {reason}")
