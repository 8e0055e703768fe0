"""`model.generate` with transformers' arguments and results, on the decoding loop of
`minilm.generation.engine`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache import KVCache, Layout
from ..model import ModelOutput
from .callbacks import Callbacks, padded
from .config import DEFAULTS, OPTIONS, RULES, UNSUPPORTED, WITHOUT_EFFECT, unsupported
from .config import GenerationConfig as GenerationConfig
from .engine import Engine, Request, Sample, check_length, context_window, draw_by_seed
from .sampling import Sampling, draw_rows
from .stopping import GrowingText, stop_texts
from .streamers import Streamer
from .streamers import TextIteratorStreamer as TextIteratorStreamer
from .streamers import TextStreamer as TextStreamer
from .values import MOST_TEXTS, in_vocabulary, logger, number, token_ids, whole

if TYPE_CHECKING:
    from ..model import AutoModelForCausalLM
    from .beam_generate import GenerateBeamOutput

NOT_ARGUMENTS = frozenset(
    {
        "assistant_model",
        "assistant_tokenizer",
        "custom_generate",
        "inputs_embeds",
        "negative_prompt_attention_mask",
        "negative_prompt_ids",
        "position_ids",
    }
)
"""Arguments of transformers' `generate` that minilm does not support; None and empty values are accepted."""
FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Options that apply to sampling only."""
NO_EFFECT = WITHOUT_EFFECT | {"synced_gpus", "trust_remote_code", "logits_to_keep", "return_dict"}


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """sequences int64 [B, S + new]; scores and logits: one float32 [B, V] per step, after and before
    processing, zeros for rows that had ended; past_key_values: the cache, without the last token of each
    row."""

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: KVCache | None = None


def generate(
    model: AutoModelForCausalLM,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    past_key_values: KVCache | None = None,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    **options: Any,
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamOutput:
    """Continue prompts. Arguments, defaults and results are those of transformers' `generate`.

    `inputs` (or `input_ids`) int64 [B, S], prompts padded on either side; attention_mask [B, S], inferred
    from the padding token as transformers does. Options, in order of precedence: those given here, those of
    `generation_config`, those of `model.generation_config` (the checkpoint's), and
    `minilm.generation.config.DEFAULTS`:

    - length: max_new_tokens, or max_length (columns, prompt included; without either 20 new tokens),
      min_new_tokens, min_length (real tokens), max_time (seconds)
    - sampling: do_sample, temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, top_h,
      num_return_sequences, seed
    - beam search: num_beams above 1, length_penalty, early_stopping (True, False or "never"),
      num_return_sequences; with do_sample the candidates are sampled. See `minilm.generation.beams`
    - what may be written: repetition_penalty, no_repeat_ngram_size, bad_words_ids, sequence_bias,
      suppress_tokens, begin_suppress_tokens, forced_bos_token_id, forced_eos_token_id,
      exponential_decay_length_penalty, encoder_repetition_penalty and encoder_no_repeat_ngram_size (about the
      prompt), remove_invalid_values, renormalize_logits
    - end: eos_token_id (one or several), stop_strings (with `tokenizer`), pad_token_id
    - result: return_dict_in_generate, output_scores, output_logits; use_cache=False omits the cache from the
      result (the loop itself always uses one)

    Without `seed`, tokens are sampled with `generator`, or torch's global one, exactly as in transformers:
    after the same torch.manual_seed the tokens are the same. With `seed`, the sampling of a row depends only
    on (seed, index of the returned sequence of its prompt, step), not on the other rows.

    `past_key_values`: the cache of an earlier call with `return_dict_in_generate`. The prompts must start
    with the cached tokens, and only the rest is read. The cache is modified. `streamer` gets the prompts,
    then the new tokens [B] of each step.

    `logits_processor`, `stopping_criteria`: custom functions, or transformers' lists of them, called at each
    step with the whole batch; `prefix_allowed_tokens_fn`: restricts the next token (see
    `minilm.generation.callbacks.Callbacks`).

    Returns int64 [B * num_return_sequences, S + new]: the prompts' columns as passed, then the new tokens,
    then pad_token_id (or the first eos) in rows that ended before the others. If a prompt is padded on the
    right, the padding stays between its last token and the first new one; it does not affect the new tokens.
    Beam search returns the best texts of each prompt, best first, and with return_dict_in_generate a
    `GenerateBeamDecoderOnlyOutput`.

    Raises ValueError for prompts that are empty or too long and for unsupported options, TypeError for
    unknown ones.
    """
    try:
        return _generate(
            model,
            generation_config,
            (inputs, input_ids, attention_mask, token_type_ids),
            past_key_values,
            streamer,
            tokenizer,
            generator,
            (logits_processor, stopping_criteria, prefix_allowed_tokens_fn),
            options,
        )
    except BaseException as error:
        if isinstance(streamer, TextIteratorStreamer):
            streamer.fail(error)
        raise


def _generate(
    model: AutoModelForCausalLM,
    generation_config: GenerationConfig | None,
    given: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    past_key_values: KVCache | None,
    streamer: Streamer | None,
    tokenizer: Any,
    generator: torch.Generator | None,
    functions: tuple[Any, Any, Any],
    options: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput | GenerateBeamOutput:
    settings, asked = _settings(model, generation_config, options)
    _, stopping_criteria, _ = functions
    if generator is not None and settings["seed"] is not None:
        raise ValueError("give a seed or a generator, not both")
    ids, rows, columns = _prompts(model, *given, settings)
    eos, pad = _special_tokens(settings, model.spec.vocab_size)
    n = whole("num_return_sequences", settings["num_return_sequences"], 1, MOST_TEXTS)
    new = _new_tokens(model, max(map(len, rows)), ids.shape[1], settings, asked)
    stop = _stop_strings(settings["stop_strings"], tokenizer)
    if (stop or stopping_criteria) and pad is None and len(rows) * n > 1:
        raise ValueError(
            "stop_strings and stopping_criteria end rows at different lengths: give a pad_token_id to fill "
            "them with"
        )
    beams = whole("num_beams", settings["num_beams"], 1, MOST_TEXTS)
    rules = _rules(model, rows, ids.shape[1], new, eos, settings, 1 + len(set(eos)) if beams > 1 else 1)
    budget = sum(map(len, rows))
    if settings["prefill_chunk_size"] is not None:
        budget = len(rows) * _whole(settings, "prefill_chunk_size", 1)
    if beams > 1:
        for name, value in (("a streamer", streamer), ("past_key_values", past_key_values)):
            if value is not None:
                raise ValueError(f"{name} needs num_beams=1, and num_beams is {beams}")
        own = (*functions, stop, tokenizer, _deadline(settings))
        return _search(model, (ids, rows, rules, pad or 0), own, n, new, eos, budget, settings, generator)
    for name in ("length_penalty", "early_stopping"):
        if name in asked and settings[name] != DEFAULTS[name]:
            logger.warning("%s=%r has no effect: it needs num_beams above 1", name, settings[name])
    if n > 1 and not settings["do_sample"]:
        raise ValueError(
            f"num_return_sequences={n} needs do_sample=True or num_beams={n}: greedy decoding gives one text "
            "per prompt"
        )
    requests = [Request(row, rule, new, frozenset(eos), n) for row, rule in zip(rows, rules, strict=True)]
    _watch(requests, stop, tokenizer)
    samples = [sample for request in requests for sample in request.samples]
    as_dict = bool(settings["return_dict_in_generate"])
    keep = past_key_values is not None or (as_dict and bool(settings["use_cache"]))
    if past_key_values is not None:
        _continue(past_key_values, requests)
    wants_record = as_dict and (settings["output_scores"] or settings["output_logits"])
    record = _Record(samples) if wants_record else None
    callbacks = Callbacks(ids.repeat_interleave(n, dim=0), samples, pad or 0, *functions)
    if record is not None and settings["output_scores"]:
        callbacks.scores = record.scores
    places = {sample: place for place, sample in enumerate(samples)}

    def draw_together(logits: Tensor, drawn: Sequence[Sample]) -> Tensor:
        return draw_rows(logits, [places[sample] for sample in drawn], len(samples), generator)

    engine = Engine(
        model,
        max_num_seqs=len(samples),
        max_num_batched_tokens=budget,
        together=True,
        cache=past_key_values,
        keep_rows=keep,
        # Inference tensors could not be used with autograd later, nor be changed by custom functions.
        inference_mode=not (
            keep or as_dict or callbacks.processor or callbacks.allowed or callbacks.criterion
        ),
        drawer=draw_together if settings["seed"] is None else draw_by_seed,
        recorder=record,
        processor=callbacks.processor,
        allowed=callbacks.allowed,
        criterion=callbacks.criterion,
    )
    before = engine.cache.state()
    try:
        _run(engine, requests, settings, ids, pad or 0, streamer)
    except BaseException:
        if past_key_values is not None:
            past_key_values.restore(before)
        raise
    sequences = padded(ids.repeat_interleave(n, dim=0), [sample.tokens for sample in samples], pad or 0)
    if not as_dict:
        return sequences
    if keep:
        engine.cache.reorder([sample.row for sample in samples])
        _place(engine.cache, samples, columns, ids.shape[1])
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(record.scores) if record and settings["output_scores"] else None,
        logits=tuple(record.logits) if record and settings["output_logits"] else None,
        past_key_values=engine.cache if keep else None,
    )


def _run(
    engine: Engine,
    requests: list[Request],
    settings: dict[str, Any],
    ids: Tensor,
    pad: int,
    streamer: Streamer | None,
) -> None:
    """Step until all texts have ended, or max_time has passed."""
    samples = [sample for request in requests for sample in request.samples]
    places = {sample: place for place, sample in enumerate(samples)}
    for request in requests:
        request.at_once = streamer is None and settings["max_time"] is None
        engine.add(request)
    if streamer is not None:
        streamer.put(ids.repeat_interleave(len(samples) // len(ids), dim=0).cpu())
    deadline = _deadline(settings)
    while engine.busy:
        grown = engine.step()
        if streamer is not None:
            new = torch.full((len(samples),), pad)
            for sample in grown:
                new[places[sample]] = sample.tokens[-1]
            streamer.put(new)
        if deadline is not None and time.monotonic() > deadline:
            break
    if streamer is not None:
        streamer.end()


def _deadline(settings: dict[str, Any]) -> float | None:
    seconds = settings["max_time"]
    return None if seconds is None else time.monotonic() + number("max_time", seconds)


def _search(
    model: AutoModelForCausalLM,
    prompts: tuple[Tensor, list[list[int]], list[Sampling], int],
    own: tuple[Any, ...],
    count: int,
    new: int,
    eos: list[int],
    budget: int,
    settings: dict[str, Any],
    generator: torch.Generator | None,
) -> Tensor | GenerateBeamOutput:
    """`generate` with beams."""
    from .beam_generate import (
        BeamExtras,
        BeamPrompts,
        GenerateBeamDecoderOnlyOutput,
        beam_noise,
        generate_beams,
    )
    from .beams import BeamOptions
    from .rows import BeamRows

    options = BeamOptions(
        settings["num_beams"],
        new,
        frozenset(eos),
        settings["length_penalty"],
        settings["early_stopping"],
        bool(settings["do_sample"]),
    )
    if count > options.num_beams:
        raise ValueError(
            f"num_return_sequences={count} is more than num_beams={options.num_beams}: a search finds as "
            "many texts as it has beams"
        )
    drawn = beam_noise(settings["seed"], generator, len(prompts[1]), model.device)
    rows = BeamRows(model, model.new_cache())
    return generate_beams(
        lambda: (rows.read(prompts[1], budget), rows),
        BeamPrompts(*prompts),
        options,
        BeamExtras(*own),
        count=count,
        noise=drawn if options.do_sample else None,
        result=GenerateBeamDecoderOnlyOutput if settings["return_dict_in_generate"] else None,
        output_scores=bool(settings["output_scores"]),
        output_logits=bool(settings["output_logits"]),
    )


def _place(cache: KVCache, samples: list[Sample], columns: list[list[int]], width: int) -> None:
    """Record the columns of the result of the tokens in the cache; positions count tokens only."""
    each = len(samples) // len(columns)
    for place, sample in enumerate(samples):
        length, prompt = cache.lengths[sample.row], columns[place // each]
        new = range(width, width + length - len(prompt))
        stand = torch.tensor([*prompt, *new])
        cache.set_layout(sample.row, Layout(stand, width + len(new), width - len(prompt)))


def _settings(
    model: AutoModelForCausalLM, given: GenerationConfig | None, options: dict[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """All options with their values, and the names of those that this call (not the checkpoint) sets."""
    for name, value in options.items():
        if name in NOT_ARGUMENTS:
            if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                raise unsupported(name, value)
        elif name not in OPTIONS and name not in UNSUPPORTED and name not in NO_EFFECT:
            raise TypeError(f"generate has no argument {name!r}")
    stored = getattr(model, "generation_config", None)
    if stored is None:
        stored = GenerationConfig.from_model_config(model.config)
    of_call = {} if given is None else {k: v for k, v in given.to_dict().items() if v is not None}
    of_call.update({name: value for name, value in options.items() if name not in NOT_ARGUMENTS})
    settings = {**dict.fromkeys(OPTIONS), **DEFAULTS, "max_length": None}
    settings.update({k: v for k, v in stored.to_dict().items() if v is not None})
    settings.update(of_call)
    for name, harmless in UNSUPPORTED.items():
        value = settings.get(name)
        if value is not None and value not in harmless:
            where = "" if name in of_call else ", which the checkpoint's generation config sets"
            raise unsupported(name, value, where)
    return settings, {name for name, value in of_call.items() if value is not None}


def _prompts(
    model: AutoModelForCausalLM,
    inputs: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """The prompts as passed, int64 [B, S], the real tokens of each, and their columns."""
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are the same argument: give one of them")
    if token_type_ids is not None and (model.spec.type_vocab_size or model.spec.types_are_tokens):
        raise ValueError("generate does not support token_type_ids for a model that has token types")
    ids = input_ids if inputs is None else inputs
    if ids is None:
        if settings["bos_token_id"] is None:
            raise ValueError("there is no prompt: give input_ids, or a bos_token_id to start from")
        bos = whole("bos_token_id", settings["bos_token_id"], 0, model.spec.vocab_size - 1)
        ids = torch.tensor([[bos]])
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        what = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids must be a tensor of integers [batch, tokens], and is {what}")
    if 0 in ids.shape:
        raise ValueError(
            f"the prompts are empty: input_ids is {list(ids.shape)}, and needs at least one row and one token"
        )
    if attention_mask is None:
        attention_mask = _infer_mask(ids.long(), *_special_tokens(settings, model.spec.vocab_size))
    elif not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        is_tensor = isinstance(attention_mask, Tensor)
        what = str(list(attention_mask.shape)) if is_tensor else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be [batch, tokens] = {list(ids.shape)}, and is {what}")
    mask = (attention_mask != 0).tolist()
    rows = [
        [i for i, real in zip(row, m, strict=True) if real] for row, m in zip(ids.tolist(), mask, strict=True)
    ]
    for place, row in enumerate(rows):
        if not row:
            raise ValueError(f"the prompt in row {place} is empty: it is all padding")
        if min(row) < 0 or max(row) >= model.spec.vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(
                f"input_ids holds {wrong}, and the vocabulary has {model.spec.vocab_size} entries "
                f"(0 to {model.spec.vocab_size - 1})"
            )
    return ids.long(), rows, [[c for c, real in enumerate(m) if real] for m in mask]


def _infer_mask(ids: Tensor, eos: list[int], pad: int | None) -> Tensor:
    """Mask padding tokens, unless they are also end tokens, which may be part of the text."""
    if pad is None or pad in eos:
        return torch.ones_like(ids)
    return (ids != pad).long()


def _special_tokens(settings: dict[str, Any], vocabulary: int) -> tuple[list[int], int | None]:
    """eos_token_id as a list, and the token to pad with, without ids outside the vocabulary."""
    found = []
    for name in ("eos_token_id", "pad_token_id"):
        found.append(in_vocabulary(name, token_ids(name, settings[name]), vocabulary))
    ends, pads = found
    return ends, pads[0] if pads else ends[0] if ends else None


def _rules(
    model: AutoModelForCausalLM,
    rows: list[list[int]],
    columns: int,
    new: int,
    eos: list[int],
    settings: dict[str, Any],
    keep: int,
) -> list[Sampling]:
    """How the scores of each prompt are processed; filters `keep` at least so many tokens."""
    filters: dict[str, Any] = {}
    if sampled := bool(settings["do_sample"]):
        filters = {name: settings[name] for name in FILTERS if settings[name] is not None}
    rules = None
    if any(settings[name] is not None for name in RULES):
        from .processors import rules_of

        rules = rules_of(settings, vocabulary=model.spec.vocab_size, ends=eos, columns=columns, new=new)
    found = []
    for row in rows:
        shortest = settings["min_new_tokens"]
        if shortest is None:
            shortest = max(0, whole("min_length", _or(settings["min_length"], 0), 0) - len(row))
        sampling = Sampling(
            do_sample=sampled,
            repetition_penalty=_or(settings["repetition_penalty"], 1.0),
            no_repeat_ngram_size=_or(settings["no_repeat_ngram_size"], 0),
            min_new_tokens=shortest,
            ends=frozenset(eos),
            rules=rules,
            renormalize=bool(settings["renormalize_logits"]),
            keep=keep,
            seed=settings["seed"],
            **filters,
        )
        found.append(sampling)
    return found


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _whole(settings: dict[str, Any], name: str, least: int) -> int:
    return whole(name, settings[name], least)


def _new_tokens(
    model: AutoModelForCausalLM, longest: int, columns: int, settings: dict[str, Any], asked: set[str]
) -> int:
    """Maximum number of new tokens per row. A limit from the checkpoint is cut to the window, one from the
    call is not."""
    window = context_window(model.spec)
    if settings["max_new_tokens"] is not None:
        new, strict = _whole(settings, "max_new_tokens", 1), "max_new_tokens" in asked
    elif settings["max_length"] is not None:
        new, strict = _whole(settings, "max_length", 1) - columns, "max_length" in asked
        if new < 1:
            raise ValueError(
                f"the prompts have {columns} columns, and max_length={settings['max_length']} leaves no room "
                "for a new token: give max_new_tokens"
            )
    else:
        new, strict = DEFAULTS["max_length"], False
    if window is not None and not strict:
        new = max(1, min(new, window - longest))
    check_length(longest, new, window)
    return new


def _stop_strings(strings: str | Sequence[str] | None, tokenizer: Any) -> list[str]:
    stop = stop_texts("stop_strings", strings)
    if stop and tokenizer is None:
        raise ValueError("stop_strings need the tokenizer, to search the text: give tokenizer= too")
    return stop


def _watch(requests: list[Request], stop: list[str], tokenizer: Any) -> None:
    """Make each sample check for the stop strings."""
    for sample in (sample for request in requests if stop for sample in request.samples):
        sample.watch = GrowingText(
            tokenizer, stop, prompt_ids=sample.request.prompt, search_prompt=True, skip_special_tokens=False
        ).push


def _continue(cache: KVCache, requests: list[Request]) -> None:
    """Make each request continue from a row of the cache."""
    if not isinstance(cache, KVCache):
        raise ValueError(
            f"past_key_values must be the KVCache of an earlier call, and is {type(cache).__name__}"
        )
    if len(cache.rows) != len(requests):
        raise ValueError(
            f"past_key_values holds {len(cache.rows)} sequences, and there are {len(requests)} prompts"
        )
    for request, row in zip(requests, cache.rows, strict=True):
        if cache.lengths[row] >= len(request.prompt):
            raise ValueError(
                f"past_key_values holds {cache.lengths[row]} tokens of a prompt of {len(request.prompt)}: "
                "the prompts must start with the cached tokens, and have at least one more"
            )
        layout = cache.layout(row)
        if len(layout.columns) and int(layout.columns[-1]) - layout.origin >= len(layout.columns):
            raise ValueError(
                "past_key_values holds a row with padding between its tokens that counts as positions; "
                "generate counts only tokens: call it without past_key_values"
            )
        request.row = row


class _Record:
    """Records the logits of each step, in the order of the rows of the result."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.places = {sample: place for place, sample in enumerate(samples)}
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, samples: Sequence[Sample], logits: Tensor, scores: Tensor) -> None:
        index = torch.tensor([self.places[sample] for sample in samples], device=logits.device)
        for kept, new in ((self.logits, logits), (self.scores, scores)):
            full = new.new_zeros(len(self.places), new.shape[1])
            kept.append(full.index_copy_(0, index, new))
