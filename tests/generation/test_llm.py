"""`LLM`: texts against `generate`, streams against whole texts, parameters as in vLLM, what is refused."""

from __future__ import annotations

import math
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from strategies import LATER, examples
from tiny_decoders import CHAT, EOS, VOCABULARY, WINDOW, decoder, prompts

import minilm
from minilm import LLM, SamplingParams
from minilm.files.gguf import GGUFCheckpoint
from minilm.files.hub import resolve

TEXTS = ["The cat", "once upon a time", "In the year 1984", "User: what is this?", "北京"]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def llm(family: str = "llama", **options: Any) -> LLM:
    d = decoder(family)
    return LLM(d.ours, tokenizer=d.tokenizer, **options)


def ids_of(outputs: list[minilm.RequestOutput]) -> list[list[list[int]]]:
    return [[text.token_ids for text in output.outputs] for output in outputs]


def generated(model: LLM, prompts: Any, params: Any = None) -> list[minilm.RequestOutput]:
    """`generate` without its progress bar, after which the engine must be empty."""
    outputs = model.generate(prompts, params, use_tqdm=False)
    cache = model._engine.cache
    assert cache.rows == []
    assert len(cache._free) == cache._pages
    return outputs


# Texts


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3", *LATER])
def test_greedy_texts_are_those_of_generate(family: str) -> None:
    d, model = decoder(family), llm(family, max_num_seqs=2)
    outputs = generated(model, TEXTS, GREEDY)
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = d.tokenizer(text)["input_ids"]
        expected = d.ours.generate(torch.tensor([ids]), max_new_tokens=20, eos_token_id=None)[0, len(ids) :]
        (found,) = output.outputs
        assert found.token_ids == expected.tolist()
        assert found.text == d.tokenizer.decode(ids + found.token_ids, skip_special_tokens=True)[
            len(text) :
        ].rstrip("\ufffd")
        assert (output.prompt, output.prompt_token_ids, output.finished) == (text, ids, True)
        assert (found.index, found.finish_reason, found.stop_reason, found.finished()) == (
            0,
            "length",
            None,
            True,
        )
    assert len({output.request_id for output in outputs}) == len(TEXTS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_dtype_of_the_cache(dtype: str) -> None:
    d = decoder("qwen2")
    expected = ids_of(generated(llm("qwen2"), TEXTS, GREEDY))
    model = LLM(d.ours, tokenizer=d.tokenizer, kv_cache_dtype=dtype)
    found = ids_of(generated(model, TEXTS, GREEDY))
    assert str(model._engine.cache.dtype) == f"torch.{dtype}"
    assert [row[0][:1] for row in found] == [row[0][:1] for row in expected], "the first token sees no cache"
    if dtype == "float32":
        assert found == expected
    with pytest.raises(ValueError, match=r"kv_cache_dtype must be one of auto, float32, .*'fp8'"):
        LLM(d.ours, tokenizer=d.tokenizer, kv_cache_dtype="fp8")


def test_a_model_is_loaded_by_folder_or_by_name() -> None:
    d = decoder("qwen2")
    expected = ids_of(generated(llm("qwen2"), TEXTS, GREEDY))
    model = LLM(str(d.folder), gpu_memory_utilization=0.5)
    assert model.model.dtype == torch.float32
    assert ids_of(generated(model, TEXTS, GREEDY)) == expected
    assert (
        ids_of(generated(LLM(d.folder, tokenizer=str(d.folder), dtype="float32"), TEXTS[0], GREEDY))
        == expected[:1]
    )
    half = LLM(d.folder, dtype="bfloat16", device="cpu")
    assert half.model.dtype == half._engine.cache.dtype == torch.bfloat16
    assert len(generated(half, TEXTS[0], GREEDY)[0].outputs[0].token_ids) == 20
    assert generated(half, TEXTS[0], SamplingParams(seed=1, top_p=0.9))[0].finished


def test_prompts_come_in_several_forms() -> None:
    model = llm()
    ids = decoder("llama").tokenizer("The cat")["input_ids"]
    forms: list[Any] = [
        "The cat",
        ["The cat"],
        {"prompt": "The cat"},
        ids,
        [ids],
        [{"prompt_token_ids": ids}],
    ]
    outputs = [generated(model, form, GREEDY) for form in forms]
    assert all(ids_of(output) == ids_of(outputs[0]) for output in outputs)
    assert [output[0].prompt for output in outputs] == ["The cat"] * 3 + [None] * 3
    assert generated(model, []) == []
    both = generated(model, {"prompt": "shown", "prompt_token_ids": ids}, GREEDY)
    assert (both[0].prompt, both[0].prompt_token_ids) == ("shown", ids)


# Sampling


def test_a_sampled_text_depends_on_seed_and_prompt_only() -> None:
    params = [
        SamplingParams(temperature=2.0, seed=3, max_tokens=15, top_p=0.9),
        SamplingParams(temperature=1.5, seed=3, max_tokens=5, n=3, top_k=50),
        SamplingParams(temperature=0, max_tokens=9),
        SamplingParams(temperature=2.5, seed=4, max_tokens=15, presence_penalty=1.0, frequency_penalty=-0.5),
        SamplingParams(temperature=2.5, seed=4, max_tokens=15, min_p=0.05, repetition_penalty=1.3),
    ]
    together = generated(llm(max_num_seqs=2, seed=9), TEXTS, params)
    other = llm(max_num_batched_tokens=4)
    for text, own, output in zip(TEXTS, params, together, strict=True):
        torch.manual_seed(0)
        alone = generated(other, text, own)
        assert ids_of(alone) == ids_of([output])
        assert alone[0].outputs == output.outputs
    several = together[1].outputs
    assert [text.index for text in several] == [0, 1, 2]
    assert len({tuple(text.token_ids) for text in several}) == 3
    assert ids_of(
        generated(other, TEXTS[1], SamplingParams(temperature=1.5, seed=3, max_tokens=5, top_k=50))
    )[0] == [several[0].token_ids]


def test_without_a_seed_the_llms_seed_or_the_global_generator_decides() -> None:
    params = SamplingParams(temperature=3.0, max_tokens=10)

    def run(**options: Any) -> list[Any]:
        model = llm(**options)
        return [ids_of(generated(model, TEXTS[:2], params)), ids_of(generated(model, TEXTS[:2], params))]

    first = run(seed=1)
    assert first == run(seed=1, max_num_seqs=1)
    assert first[0] != first[1]
    assert first != run(seed=2)
    torch.manual_seed(5)
    free = run()
    torch.manual_seed(5)
    assert run(max_num_seqs=1) == free
    assert run() != free


def test_penalties_and_filters_reach_the_engine() -> None:
    model = llm()
    (plain,) = ids_of(
        generated(model, TEXTS[0], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    )[0]
    never = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0
    )
    assert len(plain) == 40
    (varied,) = ids_of(generated(model, TEXTS[0], never))[0]
    assert varied != plain
    narrow = SamplingParams(temperature=5.0, top_k=1, max_tokens=40, ignore_eos=True)
    assert ids_of(generated(model, TEXTS[0], narrow))[0] == [plain]


def test_defaults_come_from_the_checkpoint(tmp_path: Any) -> None:
    d = decoder("llama")
    model = minilm.AutoModelForCausalLM.from_pretrained(d.folder)
    model.generation_config.update(temperature=0.3, top_k=9, max_new_tokens=4, do_sample=True)
    model.save_pretrained(tmp_path)
    d.tokenizer.save_pretrained(tmp_path)
    loaded = LLM(tmp_path)
    assert loaded.get_default_sampling_params() == SamplingParams(temperature=0.3, top_k=9, max_tokens=4)
    torch.manual_seed(0)
    found = generated(loaded, TEXTS)
    torch.manual_seed(0)
    assert ids_of(found) == ids_of(
        generated(loaded, TEXTS, SamplingParams(temperature=0.3, top_k=9, max_tokens=4))
    )
    assert llm().get_default_sampling_params() == SamplingParams()


# Ends


def test_a_text_ends_before_its_stop_string() -> None:
    model = llm("gpt2")
    whole = generated(model, TEXTS[1], GREEDY)[0].outputs[0]
    at = next(i for i in range(6, len(whole.text)) if whole.text[i : i + 2].isascii())
    stop = whole.text[at : at + 2]
    first = whole.text.index(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            stop=["nowhere", stop],
            include_stop_str_in_output=include,
        )
        (found,) = generated(model, TEXTS[1], params)[0].outputs
        assert found.text == whole.text[: first + 2 * include]
        assert (found.finish_reason, found.stop_reason) == ("stop", stop)
        assert whole.token_ids[: len(found.token_ids)] == found.token_ids
        assert "".join(model.stream(TEXTS[1], params)) == found.text
    assert (
        generated(model, TEXTS[1], SamplingParams(temperature=0, max_tokens=20, stop=stop))[0]
        .outputs[0]
        .stop_reason
        == stop
    )


def test_a_text_ends_at_end_tokens() -> None:
    model = llm()
    free = generated(model, TEXTS[0], GREEDY)[0].outputs[0].token_ids
    end = free[7]
    count = free.index(end) + 1
    params = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "stop_token_ids": [end]}
    (found,) = generated(model, TEXTS[0], SamplingParams(**params))[0].outputs
    assert found.token_ids == free[:count]
    assert (found.finish_reason, found.stop_reason) == ("stop", end)
    tokenizer, ids = decoder("llama").tokenizer, decoder("llama").tokenizer(TEXTS[0])["input_ids"]
    assert TEXTS[0] + found.text == tokenizer.decode(ids + free[: count - 1]).rstrip("\ufffd")
    (found,) = generated(model, TEXTS[0], SamplingParams(**params, include_stop_str_in_output=True))[
        0
    ].outputs
    assert TEXTS[0] + found.text == tokenizer.decode(ids + free[:count]).rstrip("\ufffd")
    (found,) = generated(model, TEXTS[0], SamplingParams(**params, min_tokens=15))[0].outputs
    assert end not in found.token_ids[:15]
    assert len(found.token_ids) >= 15


def test_the_models_own_end_token_gives_no_reason() -> None:
    d = decoder("llama")
    free = generated(llm(), TEXTS[0], GREEDY)[0].outputs[0].token_ids
    (end,) = d.tokenizer.convert_ids_to_tokens([free[3]])
    model = LLM(d.ours, tokenizer=minilm.AutoTokenizer.from_pretrained(d.folder, eos_token=end))
    assert model._eos() == [free[3], EOS]
    (found,) = generated(model, TEXTS[0], SamplingParams(temperature=0, max_tokens=20))[0].outputs
    assert (found.finish_reason, found.stop_reason) == ("stop", None)
    assert found.token_ids == free[: free.index(free[3]) + 1]


def test_end_tokens_are_those_of_tokenizer_and_checkpoint() -> None:
    model = llm()
    assert set(model._eos()) == {EOS}
    assert model._job("x", [5], SamplingParams(stop_token_ids=[9])).request.ends == {EOS, 9}
    assert model._job("x", [5], SamplingParams(stop_token_ids=[9], ignore_eos=True)).request.ends == {9}


def test_the_window_ends_a_text() -> None:
    model = llm(max_model_len=50)
    (row,) = prompts([45])
    (found,) = generated(model, [row], SamplingParams(temperature=0, max_tokens=99, ignore_eos=True))[
        0
    ].outputs
    assert (len(found.token_ids), found.finish_reason) == (5, "length")
    (found,) = generated(model, [row], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[
        0
    ].outputs
    assert len(found.token_ids) == 5
    with pytest.raises(ValueError, match=r"50 tokens.*51.*window is 50"):
        model.generate(prompts([3, 50]), GREEDY)
    with pytest.raises(ValueError, match=f"window of {WINDOW}, and is {WINDOW + 1}"):
        llm(max_model_len=WINDOW + 1)


# Streams


@examples(15)
@given(
    st.sampled_from(TEXTS),
    st.integers(0, 10**6),
    st.lists(st.text("abt .e", min_size=1, max_size=2), max_size=2),
)
def test_a_stream_is_the_text_in_pieces(prompt: str, seed: int, stop: list[str]) -> None:
    model = llm("qwen3")
    params = SamplingParams(temperature=1.5, seed=seed, stop=stop, max_tokens=25)
    whole = generated(model, prompt, params)[0]
    stream = model.stream(prompt, params)
    pieces = list(stream)
    assert "".join(pieces) == whole.outputs[0].text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in whole.outputs[0].text
    assert stream.output.outputs == whole.outputs
    assert stream.output.finished


def test_a_stream_that_is_left_leaves_nothing_behind() -> None:
    model = llm()
    stream = model.stream(TEXTS[0], GREEDY)
    assert next(stream)
    assert not stream.output.finished
    others = model.generate(
        TEXTS, GREEDY, use_tqdm=False
    )  # the stream goes on meanwhile, and keeps its pieces
    assert stream.output.outputs[0].text == others[0].outputs[0].text
    stream.close()
    assert model._engine.cache.rows == []
    del stream
    unread = model.stream(TEXTS[0], GREEDY)
    assert not model._engine.busy
    del unread
    for piece in model.stream(TEXTS[1], GREEDY):
        assert piece
        break
    assert ids_of(generated(model, TEXTS, GREEDY)) == ids_of(others)


def test_threads_share_the_engine() -> None:
    model = llm(max_num_seqs=3)
    expected = ids_of(generated(model, TEXTS, GREEDY))
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = [ids_of(model.generate(TEXTS[i], GREEDY, use_tqdm=False))[0] for _ in range(8)]

    threads = [Thread(target=work, args=(i,)) for i in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [expected[i]] * 8 for i in range(len(TEXTS))}


# Chat


def test_a_conversation_is_rendered_by_the_template() -> None:
    model = llm()
    messages = [{"role": "user", "content": "what is this?"}]
    (output,) = model.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<|user|>what is this?\n<|assistant|>"
    ids = decoder("llama").tokenizer(output.prompt, add_special_tokens=False)["input_ids"]
    assert output.prompt_token_ids == ids
    assert ids_of([output]) == ids_of(generated(model, [ids], GREEDY))
    both = model.chat([messages, messages * 2], GREEDY, use_tqdm=False)
    assert ids_of(both)[0] == ids_of([output])[0]
    assert both[1].prompt == "<|user|>what is this?\n" * 2 + "<|assistant|>"
    assert "".join(model.stream_chat(messages, GREEDY)) == output.outputs[0].text
    bare = model.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert bare[0].prompt == "<|user|>what is this?\n"
    template = CHAT.replace("user", "user") + "{{ extra }}"
    other = model.chat(messages, GREEDY, False, chat_template=template, chat_template_kwargs={"extra": "!"})
    assert other[0].prompt == "<|user|>what is this?\n<|assistant|>!"
    answer = [*messages, {"role": "assistant", "content": "It is"}]
    continued = model.chat(answer, GREEDY, use_tqdm=False, continue_final_message=True)
    assert continued[0].prompt == "<|user|>what is this?\n<|assistant|>It is"


# Log-probabilities


def test_logprobs() -> None:
    model = llm()
    params = SamplingParams(
        temperature=2.0, seed=1, max_tokens=6, logprobs=3, repetition_penalty=1.5, ignore_eos=True
    )
    output = generated(model, TEXTS[0], params)[0]
    (found,) = output.outputs
    whole = torch.tensor([output.prompt_token_ids + found.token_ids])
    logs = (
        decoder("llama")
        .theirs(whole)
        .logits[0]
        .detach()
        .log_softmax(-1)[len(output.prompt_token_ids) - 1 : -1]
    )
    assert found.logprobs is not None
    assert found.cumulative_logprob is not None
    total = 0.0
    for step, token, row in zip(found.logprobs, found.token_ids, logs, strict=True):
        best = row.topk(3).indices.tolist()
        assert set(step) == {*best, token}
        assert [step[index].rank for index in best] == [1, 2, 3]
        for index, entry in step.items():
            assert entry.logprob == pytest.approx(float(row[index]), abs=1e-3)
            assert entry.decoded_token == model.tokenizer.decode([index])
        total += float(row[token])
    assert found.cumulative_logprob == pytest.approx(total, abs=1e-2)
    (everything,) = generated(model, TEXTS[0], SamplingParams(temperature=0, max_tokens=2, logprobs=-1))[
        0
    ].outputs
    assert everything.logprobs is not None
    assert len(everything.logprobs[0]) == VOCABULARY
    assert math.fsum(math.exp(entry.logprob) for entry in everything.logprobs[0].values()) == pytest.approx(1)
    assert generated(model, TEXTS[0], GREEDY)[0].outputs[0].logprobs is None


def test_tokens_without_text() -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    (found,) = generated(llm(), TEXTS[0], params)[0].outputs
    assert found.text == ""
    assert [[found.token_ids]] == ids_of(generated(llm(), TEXTS[0], GREEDY))


# What it refuses


def test_unknown_parameters_are_named() -> None:
    with pytest.raises(TypeError, match="logit_bias"):
        SamplingParams(logit_bias={})  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="speculative_model"):
        LLM(decoder("llama").folder, speculative_model="x")


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ("", GREEDY, ValueError, "prompt is empty"),
        ([{"prompt_token_ids": []}], GREEDY, ValueError, "prompt is empty"),
        ([3.5], GREEDY, ValueError, "a prompt must be"),
        ({"text": "x"}, GREEDY, ValueError, "a prompt must be"),
        ([[1, VOCABULARY]], GREEDY, ValueError, f"token {VOCABULARY}.*{VOCABULARY}"),
        ([[1, -4]], GREEDY, ValueError, "token -4"),
        (["a", "b"], [GREEDY], ValueError, "2 prompts and 1 sampling_params"),
        ("a", {"temperature": 0}, TypeError, "must be SamplingParams, and is dict"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_say_what_is_wrong(prompt: Any, params: Any, error: type[Exception], words: str) -> None:
    model = llm()
    with pytest.raises(error, match=words):
        model.generate(prompt, params)
    assert not model._engine.busy


def test_what_cannot_be_streamed_or_loaded() -> None:
    model = llm()
    with pytest.raises(ValueError, match="n must be 1"):
        model.stream("a", SamplingParams(n=2))
    with pytest.raises(ValueError, match="tokenizer"):
        LLM(decoder("llama").ours)
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1, and is 2"):
        LLM(decoder("llama").folder, tensor_parallel_size=2)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    llm().generate(TEXTS, GREEDY)
    assert "5/5" in capsys.readouterr().err


# The real model


@pytest.mark.slow
def test_the_real_model_writes_what_transformers_writes_with_its_weights() -> None:
    model = LLM("SmolLM2-135M-Instruct")
    with GGUFCheckpoint(resolve("SmolLM2-135M-Instruct")) as checkpoint:
        config = transformers.LlamaConfig(**checkpoint.hf_config())
        reference = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in reference.named_parameters():  # the output matrix is the token table, once
            checkpoint.read_into(name, parameter.data)

    question = [{"role": "user", "content": "What is the capital of France?"}]
    greedy = SamplingParams(temperature=0, max_tokens=30)
    (answer,) = model.chat(question, greedy, use_tqdm=False)
    assert answer.outputs[0].text == "The capital of France is Paris."
    assert (answer.outputs[0].finish_reason, answer.outputs[0].stop_reason) == ("stop", None)
    assert "".join(model.stream_chat(question, greedy)) == answer.outputs[0].text
    story = generated(model, "Once upon a time, in a land far away,", greedy)[0]
    for output in (answer, story):
        prompt = torch.tensor([output.prompt_token_ids])
        expected = reference.generate(
            prompt, max_new_tokens=30, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        assert output.outputs[0].token_ids == expected[0, prompt.shape[1] :].tolist()
