"""`LLM`: text generation for many prompts at a time, with vLLM's names, on the decoding loop of
`minilm.generation.engine`.

    llm = LLM("SmolLM2-135M-Instruct")
    for output in llm.generate(["The sea is", "A list:"], SamplingParams(temperature=0, max_tokens=20)):
        print(output.outputs[0].text)
    for piece in llm.stream_chat([{"role": "user", "content": "Why is the sky blue?"}]):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..model import AutoModelForCausalLM
from ..substitutes import with_effect
from .engine import Engine, Request, Sample, check_length, context_window
from .outputs import BeamSearchOutput as BeamSearchOutput
from .outputs import CompletionOutput as CompletionOutput
from .outputs import Logprob as Logprob
from .outputs import RequestOutput as RequestOutput
from .params import BeamSearchParams as BeamSearchParams
from .params import SamplingParams as SamplingParams
from .stopping import GrowingText
from .values import in_vocabulary, is_whole, plain, token_ids, whole

Message = dict[str, Any]
Prompt = str | dict[str, Any] | list[int]
"""A text, {"prompt": text}, {"prompt_token_ids": ids}, or ids."""

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "async_scheduling": (None, False),
    "disable_log_stats": (None, True),
    "enable_chunked_prefill": (None, True),
    "enforce_eager": (None, True, False),
    "gpu_memory_utilization": (None,),
    "swap_space": (None, 0),
    "tokenizer_mode": (None, "auto"),
    "trust_remote_code": (None, False),
}
"""Options of vLLM's `LLM` that are accepted and have no effect -> the values that need no warning, because
they ask for what minilm does anyway."""
CACHE_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""`kv_cache_dtype` -> dtype of stored keys and values; "auto": the model's dtype."""


@dataclass(eq=False)
class _Job:
    """A request in the engine, with the text of each sample."""

    number: int
    prompt: str | None
    params: SamplingParams
    request: Request
    texts: list[GrowingText] = field(default_factory=list)


class LLM:
    """A decoder with its tokenizer and one engine, which calls from several threads share.

    `model`: a name, a folder, a GGUF file, or a loaded model. `tokenizer`: another name, or a loaded one.
    `dtype`: of the weights, by default the checkpoint's. `weights`: quantises them ("q4", "q8"), or keeps
    those of a GGUF file ("gguf"); see `AutoModelForCausalLM.from_pretrained`. `device`: by default a GPU if
    there is one. `seed`: makes the sampled texts of a program reproducible (without it they depend on torch's
    global generator). `max_model_len`: a smaller window. `kv_cache_dtype`: dtype of stored keys and values,
    one of `CACHE_DTYPES`; "int8", with one scale per token and head, takes a quarter of float32.
    `enable_prefix_caching`: up to `max_model_len` tokens of texts that have ended stay in the cache, and a
    prompt that begins like one of them is read from where they differ, as in a conversation; logits may
    differ in their last bits (call `reset_prefix_cache` after a change of weights). `max_num_seqs`,
    `max_num_batched_tokens`: see `Engine`. Other options go to `from_pretrained`; a warning names options of
    vLLM that minilm does not support (`swap_space`).
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | AutoModelForCausalLM,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        weights: str | None = None,
        device: torch.device | str | int | None = None,
        seed: int | None = None,
        max_model_len: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        tensor_parallel_size: int = 1,
        **options: Any,
    ) -> None:
        if seed is not None and not (is_whole(seed) and -(2**63) <= seed < 2**64):
            raise ValueError(f"seed must be a whole number of 64 bits, and is {seed!r}")
        if max_model_len is not None:
            max_model_len = whole("max_model_len", max_model_len, 1)
        if tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size must be 1, and is {tensor_parallel_size}")
        if kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, and is {kv_cache_dtype!r}"
            )
        options = with_effect(options, NO_EFFECT)
        if isinstance(model, AutoModelForCausalLM):
            if weights is not None:
                raise ValueError("weights= applies to loading: give the model's name, not a loaded model")
            given = {"dtype": dtype, "device": device, **options}
            late = [f"{name}=" for name, value in given.items() if value is not None]
            if late:
                raise ValueError(
                    f"{', '.join(late)}: only for loading, so give the model's name, not a loaded model"
                )
            self.model = model
        else:
            if device is None:
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, weights=weights, device=device, **options
            )
        self.tokenizer = self._tokenizer(tokenizer, model, options)
        window = context_window(self.model.spec)
        if max_model_len is not None and window is not None and not 1 <= max_model_len <= window:
            raise ValueError(
                f"max_model_len must be from 1 to the model's window of {window}, and is {max_model_len}"
            )
        rope = self.model.spec.rope
        dynamic = int(self.model.spec.max_positions * (rope.factor if rope is not None else 1))
        self.max_model_len: int = max_model_len or window or dynamic
        """The longest sequence, prompt and new tokens together."""
        if enable_prefix_caching and rope is not None and rope.type == "dynamic":
            raise ValueError(
                "enable_prefix_caching: keys of a model with dynamic rope depend on the length of the text"
            )
        cache = self.model.new_cache(dtype=CACHE_DTYPES[kv_cache_dtype])
        self.kv_cache_dtype: torch.dtype = cache.dtype
        """Dtype of stored keys and values."""
        self._engine = Engine(
            self.model,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            cache=cache,
            keep_prefixes=self.max_model_len if enable_prefix_caching else 0,
        )
        self._lock = threading.RLock()
        self._generator = None if seed is None else torch.Generator().manual_seed(int(seed))
        self._numbers = itertools.count()

    def _tokenizer(self, tokenizer: Any, model: Any, options: dict[str, Any]) -> Any:
        if tokenizer is None and isinstance(model, AutoModelForCausalLM):
            raise ValueError("a loaded model has no tokenizer: give tokenizer= too")
        if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike):
            return tokenizer
        from ..model import HUB_OPTIONS
        from ..text import AutoTokenizer

        hub = {name: value for name, value in options.items() if name in HUB_OPTIONS and tokenizer is None}
        return AutoTokenizer.from_pretrained(model if tokenizer is None else tokenizer, **hub)

    def get_tokenizer(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    def reset_prefix_cache(self) -> bool:
        """Drop the texts that `enable_prefix_caching` keeps; True, as in vLLM."""
        with self._lock:
            if self._engine.prefixes is not None:
                self._engine.prefixes.clear()
        return True

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults of `SamplingParams`, overridden by the checkpoint's generation_config.json."""
        stored = getattr(self.model, "generation_config", None)
        found = {} if stored is None else stored.to_dict()
        names = {"max_new_tokens": "max_tokens"} | {
            name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        }
        return SamplingParams(**{names[name]: value for name, value in found.items() if name in names})

    # Public API
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts; returns one result per prompt, in order.

        `sampling_params`: one for all, or one per prompt; None: the checkpoint's defaults. Raises ValueError,
        before anything runs, for a prompt that is empty or leaves no room in the window.
        """
        return self._generate(self._prompts(prompts), sampling_params, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best texts of each prompt, by vLLM's rules; see `minilm.generation.llm_beams`.

        `concurrency_limit`: how many prompts to search at a time; None: as many as `max_num_seqs` beams hold.
        Raises ValueError, before anything runs, for a prompt that is empty or leaves no room in the window.
        """
        from .beams import check_penalty
        from .llm_beams import Search, run
        from .rows import BeamRows

        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, and is {type(params).__name__}")
        found = self._prompts(prompts)
        searches = [Search.of(ids, min(self._room(ids), params.max_tokens)) for _, ids in found]
        check_penalty(params.length_penalty, max((len(s.prompt) + s.most for s in searches), default=1))
        if concurrency_limit is None:
            concurrency_limit = max(1, self._engine.max_num_seqs // params.beam_width)
        together = whole("concurrency_limit", concurrency_limit, 1)
        ends = frozenset(in_vocabulary("eos_token_id", self._eos(), self.model.spec.vocab_size))
        pieces: dict[int, str] = {}

        def decode(token: int) -> str:
            if token not in pieces:
                pieces[token] = self.tokenizer.decode([token])
            return pieces[token]

        groups: Any = [searches[start : start + together] for start in range(0, len(searches), together)]
        if use_tqdm:
            from tqdm import tqdm

            groups = tqdm(groups, desc="Beam search")
        for group in groups:
            rows = BeamRows(self.model, self._engine.cache)
            run(rows, group, params, ends, self._engine.max_num_batched_tokens, self._lock, decode)
        outputs = [BeamSearchOutput(search.result(params, ends)) for search in searches]
        for sequence in (sequence for output in outputs for sequence in output.sequences):
            sequence.text = self.tokenizer.decode(sequence.tokens)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several: lists of {"role": ..., "content": ...}.

        `template`: chat_template, add_generation_prompt (default True), continue_final_message, tools and
        chat_template_kwargs, for the tokenizer's `apply_chat_template`.
        """
        one = bool(messages) and isinstance(messages[0], dict)
        conversations: Any = [messages] if one else messages
        return self._generate([self._render(c, template) for c in conversations], sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> TextStream:
        """Continue one prompt, yielding the text piece by piece, each as soon as it is final."""
        return TextStream(self, self._job(*self._encode(prompt), sampling_params))

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **template: Any
    ) -> TextStream:
        """Answer one conversation, piece by piece; see `chat` and `stream`."""
        return TextStream(self, self._job(*self._render(messages, template), sampling_params))

    # From prompts to jobs
    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if not isinstance(prompt, dict):
            prompt = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None and isinstance(text, str):
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        if ids is not None and hasattr(ids, "tolist"):
            ids = ids.tolist()
        ids = [plain(token) for token in ids] if isinstance(ids, list | tuple) else None
        if ids is None or not all(map(is_whole, ids)):
            raise ValueError(
                "a prompt must be a text, token ids, or a dict with prompt or prompt_token_ids, and is "
                f"{prompt!r:.80}"
            )
        return text, [int(token) for token in ids]

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[str | None, list[int]]]:
        """One prompt or several -> the text and the tokens of each."""
        if hasattr(prompts, "tolist"):
            prompts = prompts.tolist()
        one = (
            isinstance(prompts, str | dict)
            or not isinstance(prompts, Sequence)
            or (len(prompts) > 0 and is_whole(plain(prompts[0])))
        )
        several: Any = [prompts] if one else prompts
        return [self._encode(prompt) for prompt in several]

    def _room(self, ids: list[int]) -> int:
        """How many new tokens the window has room for; ValueError if the prompt cannot be continued."""
        vocabulary = self.model.spec.vocab_size
        if not ids:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"the prompt holds token {wrong}, and the vocabulary has {vocabulary} (0 to {vocabulary - 1})"
            )
        check_length(len(ids), 1, self.max_model_len)
        return self.max_model_len - len(ids)

    def _render(self, messages: Sequence[Message], template: dict[str, Any]) -> tuple[str, list[int]]:
        options = {"add_generation_prompt": not template.get("continue_final_message"), **template}
        options |= options.pop("chat_template_kwargs", None) or {}
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        return text, self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _job(self, prompt: str | None, ids: list[int], params: SamplingParams | None) -> _Job:
        params = self.get_default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, and is {type(params).__name__}")
        vocabulary = self.model.spec.vocab_size
        room = self._room(ids)
        own = token_ids("stop_token_ids", params.stop_token_ids)
        ends = frozenset(
            [
                *(() if params.ignore_eos else in_vocabulary("eos_token_id", self._eos(), vocabulary)),
                *in_vocabulary("stop_token_ids", own, vocabulary),
            ]
        )
        with self._lock:
            seed = (
                int(torch.randint(2**62, (), generator=self._generator))
                if params.seed is None
                else params.seed
            )
            number = next(self._numbers)
        logprobs = vocabulary if params.logprobs == -1 else params.logprobs
        new = room if params.max_tokens is None else min(room, params.max_tokens)
        sampling = params.sampling(ends, seed, lambda token: self.tokenizer.decode([token]))
        job = _Job(number, prompt, params, Request(ids, sampling, new, ends, params.n, logprobs))
        if params.detokenize:
            for sample in job.request.samples:
                text = GrowingText(
                    self.tokenizer,
                    params.stop or (),
                    include_stop=params.include_stop_str_in_output,
                    min_tokens=params.min_tokens,
                    prompt_ids=ids,
                    skip_special_tokens=params.skip_special_tokens,
                )
                job.texts.append(text)
                sample.watch = text.push
        return job

    def _eos(self) -> list[int]:
        """The model's end tokens, that of the tokenizer first."""
        stored = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        found = token_ids("eos_token_id", stored)
        own = self.tokenizer.eos_token_id
        return found if own is None else [own, *found]

    # Running
    def _generate(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts and {len(each)} sampling_params")
        jobs = [self._job(*prompt, own) for prompt, own in zip(prompts, each, strict=True)]
        for job in jobs:
            job.request.at_once = True
        bar = None
        if use_tqdm:
            from tqdm import tqdm

            bar = tqdm(total=len(jobs), desc="Processed prompts")
        for _ in self._run(jobs):
            done = sum(job.request.finished for job in jobs)
            if bar is not None and done > bar.n:
                bar.update(done - bar.n)
        if bar is not None:
            bar.close()
        return [self._output(job) for job in jobs]

    def _run(self, jobs: list[_Job]) -> Generator[None, None, None]:
        """Step the engine until these jobs are done, yielding after each step; removes them in any case."""
        try:
            with self._lock:
                for job in jobs:
                    self._engine.add(job.request)
            while not all(job.request.finished for job in jobs):
                with self._lock:
                    self._step(jobs)
                yield
        finally:
            with self._lock:
                for job in jobs:
                    self._engine.abort(job.request)

    def _step(self, jobs: list[_Job]) -> None:
        """One step of the engine. It advances the jobs of all threads, as their steps advance these jobs."""
        if all(job.request.finished for job in jobs):
            return
        if any(job.request.given_up for job in jobs):
            raise RuntimeError("the request was dropped after an error in another call")
        self._engine.step()

    def _output(self, job: _Job) -> RequestOutput:
        """The job's state, finished or not."""
        return RequestOutput(
            request_id=str(job.number),
            prompt=job.prompt,
            prompt_token_ids=job.request.prompt,
            outputs=[self._completion(job, sample) for sample in job.request.samples],
            finished=job.request.finished,
            num_cached_tokens=job.request.reused,
        )

    def _completion(self, job: _Job, sample: Sample) -> CompletionOutput:
        text = ""
        if job.texts:
            growing = job.texts[sample.index]
            text = self._finish(job, sample) if sample.finish_reason else growing.text
        logprobs = cumulative = None
        if job.params.logprobs is not None:
            cumulative = sum(
                step[token][0] for token, step in zip(sample.tokens, sample.logprobs, strict=True)
            )
            logprobs = [
                {
                    token: Logprob(value, rank, self.tokenizer.decode([token]))
                    for token, (value, rank) in step.items()
                }
                for step in sample.logprobs
            ]
        reason = sample.stop_reason
        return CompletionOutput(
            index=sample.index,
            text=text,
            token_ids=list(sample.tokens),
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=None if reason == self.tokenizer.eos_token_id else reason,
        )

    @staticmethod
    def _finish(job: _Job, sample: Sample) -> str:
        """The whole text of a finished sample; the token that ended it is included only if requested."""
        by_token = sample.finish_reason == "stop" and isinstance(sample.stop_reason, int)
        with_end = by_token and job.params.include_stop_str_in_output
        return job.texts[sample.index].finish(sample.tokens[-1:] if with_end else ())


class TextStream(Iterator[str]):
    """An iterator over the pieces of one text. `output` is the text so far and why it ended; `close` cancels.

    No piece is lost, even if a concurrent call on the same `LLM` runs the steps that generate it. Several
    threads may read one stream; each piece goes to one of them.
    """

    def __init__(self, llm: LLM, job: _Job) -> None:
        if job.params.n != 1 or not job.params.detokenize:
            raise ValueError("a stream yields one text: n must be 1, and detokenize True")
        self._llm = llm
        self._job = job
        self._state = "new"

    def __next__(self) -> str:
        llm, job = self._llm, self._job
        (text,), (sample,) = job.texts, job.request.samples
        while True:
            with llm._lock:  # another thread's step may be appending
                if self._state == "over":
                    raise StopIteration
                try:
                    if self._state == "new":
                        llm._engine.add(job.request)
                        self._state = "open"
                    piece = text.piece()
                    if not piece and sample.finish_reason is None:
                        llm._step([job])
                        piece = text.piece()
                    if not piece and sample.finish_reason is not None:
                        llm._finish(job, sample)
                        piece = text.piece()
                        if not piece:
                            self.close()
                except BaseException:
                    self.close()
                    raise
            if piece:
                return piece

    def close(self) -> None:
        """Cancel the request."""
        with self._llm._lock:
            self._state = "over"
            self._llm._engine.abort(self._job.request)

    def __del__(self) -> None:
        if getattr(self, "_state", "over") != "open":
            return
        # A garbage collection may call this at any point, so it must not block.
        if self._llm._lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._llm._lock.release()
        else:
            self._llm._engine.abort_later(self._job.request)

    @property
    def output(self) -> RequestOutput:
        """The text so far, with its token ids and, once it has ended, the reason."""
        with self._llm._lock:
            return self._llm._output(self._job)
