"""`generate` and `chat`: text from decoders."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import CommandError, note
from ..options import DECODER, Decoder, Runtime, command
from ..progress import counting
from ..results import Output, Record
from ..texts import Texts, chunks, read_items

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...generation import LLM, SamplingParams, TextStream

PANEL = "Decoders"
CHUNK = 256
"""Prompts that are read before the first result is written."""


KVCacheDtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16", "int8"] | None,
    typer.Option(
        "--kv-cache",
        metavar="DTYPE",
        help="How keys and values are stored: float32, float16, bfloat16, int8, or auto, the model's dtype. "
        "Not given: auto; in a conversation with quantised weights float16.",
    ),
]


Beams = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Search for the most probable text with N beams. It does not sample, and goes with --max-tokens "
        "alone.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(
        app,
        "generate",
        panel=PANEL,
        examples="""
            minilm generate "The three laws of robotics are" --max-tokens 100
            minilm generate --file prompts.txt --temperature 0.8 --seed 1 --output texts.jsonl
            minilm generate "The three laws of robotics are" --beams 4
            """,
    )(generate)
    command(
        app,
        "chat",
        panel=PANEL,
        examples="""
            minilm chat
            minilm chat "Why is the sky blue?" --max-tokens 100
            minilm chat --model models/my-llama --system "Answer in one sentence."
            """,
    )(chat)


@dataclass
class Sampling:
    """Sampling options; names as in vLLM."""

    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Maximum number of new tokens.")] = 256
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="T",
            help="0: always the most probable token; 1: sample from the model's distribution.",
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample from the most probable tokens with total probability P."),
    ] = 1.0
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Sample from the K most probable tokens; 0: from all.")
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(metavar="P", help="Exclude tokens less probable than P times the most probable one."),
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: make tokens that already occur less probable.")
    ] = 1.0
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text. Repeatable.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the random numbers, for reproducible samples.")
    ] = None

    def params(self) -> SamplingParams:
        """As `minilm.LLM` takes them."""
        from ...generation import SamplingParams

        return SamplingParams(**asdict(self))

    def check_beams(self, beams: int) -> None:
        """Raise CommandError for an option that beam search has no use for."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "max_tokens" and value != each.default:
                raise CommandError(
                    f"--beams {beams} searches for the most probable text, and goes with --max-tokens alone: "
                    f"leave out --{each.name.replace('_', '-')} {value}"
                )


MILD = {
    "temperature": 0.7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.3,
    "max_same_sentence": 2,
}
"""Sampling options of a conversation if the model's files recommend none: small models repeat themselves
otherwise."""


@dataclass
class ChatSampling:
    """Sampling options. Default: as the model's generation_config.json recommends, otherwise `MILD`."""

    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens per answer.")
    ] = 256
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="T",
            help="0: always the most probable token; 1: sample from the model's distribution. Default: 0 "
            "for one question; in a conversation as the model's files recommend, otherwise 0.7.",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample from the most probable tokens with total probability P."),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Sample from the K most probable tokens; 0: from all.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Exclude tokens less probable than P times the most probable one."),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1: make tokens that already occur less probable.")
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text. Repeatable.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the random numbers, for reproducible samples.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def params(self, llm: LLM | None = None) -> SamplingParams:
        """As `minilm.LLM` takes them: for a conversation with a model, or for one question."""
        from ...generation import SamplingParams

        if llm is None:
            return SamplingParams(**{"temperature": 0.0, **self.given()})
        stored = getattr(llm.model, "generation_config", None)
        if getattr(stored, "do_sample", None):
            return replace(llm.get_default_sampling_params(), **self.given())
        return SamplingParams(**{**MILD, **self.given()})


def generate(
    *,
    source: Texts,
    model: Decoder = DECODER,
    sampling: Sampling,
    beams: Beams = None,
    kv_cache: KVCacheDtype = None,
    out: Output,
    run: Runtime,
) -> None:
    """Continue prompts. No chat template is applied: for questions use `minilm chat`.

    On a terminal, the text for a single prompt appears while it is generated. Several prompts are run as one
    batch, with the same results as one by one.
    """
    out.check()
    items = source.read()
    params = sampling.params()
    if beams is not None:
        sampling.check_beams(beams)
    with run.running(model) as device:
        llm = _llm(model, device, run, kv_cache)
        if beams is not None:
            with out.writer(_text_table) as write, counting("prompts") as done:
                for chunk in chunks(items, CHUNK):
                    found = _search(llm, [item.text for item in chunk], beams, params.max_tokens)
                    for item, best in zip(chunk, found, strict=True):
                        write({**item.record, "prompt": item.text, **best})
                    done(len(chunk))
            return
        single = source.texts if out.for_people and not source.file else None
        if single is not None and len(single) == 1 and single[0] != "-":
            typer.echo(single[0], nl=False)
            _show(llm.stream(single[0], params))
            return
        with out.writer(_text_table) as write, counting("prompts") as done:
            for chunk in chunks(items, CHUNK):
                answers = llm.generate([item.text for item in chunk], params, use_tqdm=False)
                for item, answer in zip(chunk, answers, strict=True):
                    write({**item.record, "prompt": item.text, **_completion(answer)})
                done(len(chunk))


def chat(
    *,
    question: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTION",
            help="A question to answer once; read from standard input if "
            "that is piped, or with -. Without one, a conversation "
            "starts.",
        ),
    ] = None,
    model: Decoder = DECODER,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message: instructions for the model.")
    ] = None,
    sampling: ChatSampling,
    kv_cache: KVCacheDtype = None,
    out: Output,
    run: Runtime,
) -> None:
    """Chat with a model; answers appear while they are generated.

    In a conversation, /reset starts a new one, /retry repeats the last answer, /set changes sampling options,
    /save writes it to a file, /quit or Ctrl-D ends it, and Ctrl-C stops an answer. The weights of a GGUF file
    keep their format. With --json or --output, the answer to a question is one JSON object.
    """
    out.check()
    params = sampling.params()
    conversing = not question and sys.stdin is not None and sys.stdin.isatty()
    if conversing and (out.output is not None or out.json):
        raise CommandError("a conversation cannot be written as JSON: give a question")
    asked = (
        ""
        if conversing
        else " ".join(i.text for i in read_items(question or [], [], None, whole=True)).strip()
    )
    if not conversing and not asked:
        raise CommandError("the question is empty")
    with run.running(model) as device:
        llm = _llm(model, device, run, kv_cache, conversing=conversing)
        if conversing:
            from .conversation import Conversation, describe

            params = sampling.params(llm)
            kept = str(llm.kv_cache_dtype).removeprefix("torch.")
            note(f"{describe(params)}; answers of up to {params.max_tokens} tokens; KV cache in {kept}")
            Conversation(llm.stream_chat, params, system, llm.reset_prefix_cache).run()
            return
        messages = [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": asked},
        ]
        if out.output is None and not out.json:
            _show(llm.stream_chat(messages, params))
            return
        (answer,) = llm.chat(messages, params, use_tqdm=False)
        with out.writer(_text_table) as write:
            write({"messages": messages, **_completion(answer)})


def _llm(model: str, device: Any, run: Runtime, kv_cache: str | None, *, conversing: bool = False) -> LLM:
    """The model. A conversation grows long: there the weights of a GGUF file stay as they are stored, and
    beside quantised weights, float32 keys and values would soon take most of the memory."""
    import torch

    from ...files import resolve
    from ...generation import LLM
    from ...model import AutoModelForCausalLM
    from ...ops.backends import packed
    from ...quantized import QuantizedLinear

    if conversing:
        packed.trim(code=True)  # what the imports have touched
    weights = run.weights
    if conversing and weights is None and run.dtype is None and resolve(model).suffix == ".gguf":
        weights = "gguf"
    loaded = AutoModelForCausalLM.from_pretrained(model, device=device, dtype=run.dtype, weights=weights)
    if kv_cache is None:
        quantised = any(isinstance(module, QuantizedLinear) for module in loaded.modules())
        kv_cache = "float16" if conversing and quantised and loaded.dtype == torch.float32 else "auto"
    rope = loaded.spec.rope
    again = conversing and (rope is None or rope.type != "dynamic")
    return LLM(loaded, tokenizer=model, kv_cache_dtype=kv_cache, enable_prefix_caching=again)


def _search(llm: LLM, prompts: list[str], beams: int, max_tokens: int | None) -> list[Record]:
    """The best text for each prompt."""
    from ...generation import BeamSearchParams
    from ...text import continuation

    found = []
    params = BeamSearchParams(beam_width=beams, max_tokens=max_tokens or llm.max_model_len)
    for output in llm.beam_search(prompts, params):
        best = output.sequences[0]
        prompt = len(best.tokens) - len(best.logprobs)
        new = best.tokens[prompt:]
        decode = partial(llm.tokenizer.decode, skip_special_tokens=True)
        found.append(
            {
                "text": continuation(decode, best.tokens[:prompt], new),
                "token_ids": new,
                "prompt_tokens": prompt,
                "finish_reason": best.finish_reason,
                "cumulative_logprob": best.cum_logprob,
            }
        )
    return found


def _completion(answer: Any) -> Record:
    text = answer.outputs[0]
    return {
        "text": text.text,
        "token_ids": list(text.token_ids),
        "prompt_tokens": len(answer.prompt_token_ids),
        "finish_reason": text.finish_reason,
    }


def _show(stream: TextStream) -> None:
    """Print the pieces as they are generated; on a terminal, report their number and speed."""
    start = time.perf_counter()
    with closing(stream):
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.perf_counter() - start
    count = len(stream.output.outputs[0].token_ids)
    note(f"({count} tokens in {seconds:.1f} s, {count / seconds:.1f} per second, including the prompt)")


def _text_table(records: list[Record]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_lines=True)
    table.add_column("prompt", style="cyan", overflow="fold", ratio=1)
    table.add_column("text", overflow="fold", ratio=2)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("ended by", no_wrap=True)
    for record in records:
        table.add_row(
            record["prompt"], record["text"], str(len(record["token_ids"])), str(record["finish_reason"])
        )
    return table
