"""`generate` of encoder-decoders: greedy decoding, sampling and beam search, with transformers' arguments and
results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..generation import (
    DEFAULTS,
    OPTIONS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    BeamExtras,
    BeamOptions,
    BeamPrompts,
    GenerateBeamEncoderDecoderOutput,
    GenerationConfig,
    Sampling,
    beam_noise,
    draw,
    draw_rows,
    generate_beams,
    in_vocabulary,
    process,
    rules_of,
    token_ids,
    unsupported,
    whole,
)
from ..model import ModelOutput, integers
from .cache import EncoderDecoderCache
from .pretrained import Seq2SeqModel

OWN = frozenset({"decoder_start_token_id"})
"""Options of encoder-decoders beside those of every `generate`."""
HARMLESS = (WITHOUT_EFFECT - OWN) | {"synced_gpus", "trust_remote_code", "return_dict", "labels"}
"""Options without effect; transformers' Seq2SeqTrainer gives labels."""
FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
NOT_YET = ("stop_strings", "max_time", "prefill_chunk_size")
"""Options of `generate` that only decoders have here."""


@dataclass
class GenerateEncoderDecoderOutput(ModelOutput):
    """sequences int64 [B, 1 + new]; scores and logits: one float32 [B, V] per step, after and before
    processing, zeros for rows that had ended."""

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: EncoderDecoderCache | None = None


class Decoding:
    """A batch of texts in the making: the source is encoded and its keys are in the cache.

    What chooses tokens, greedy, sampling or beam search, calls `step` and `reorder` and nothing else.
    """

    def __init__(self, model: Seq2SeqModel, encoder_outputs: Any, mask: Tensor | None) -> None:
        self.model, self.mask, self.encoder_outputs = model, mask, encoder_outputs
        self.cache: EncoderDecoderCache | None = None
        hidden = encoder_outputs[0] if not isinstance(encoder_outputs, Tensor) else encoder_outputs
        self.order = list(range(len(hidden)))

    def step(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feed tokens int64 [B, new], and return the logits of the last, float32 [B, V]."""
        if self.cache is None:
            output = self.model(
                encoder_outputs=self.encoder_outputs,
                attention_mask=self.mask,
                decoder_input_ids=tokens,
                decoder_attention_mask=mask,
                use_cache=True,
                return_dict=True,
                output_attentions=False,
                output_hidden_states=False,
            )
            self.cache = output.past_key_values
        else:
            output = self.model(
                decoder_input_ids=tokens,
                past_key_values=self.cache,
                return_dict=True,
                output_attentions=False,
                output_hidden_states=False,
            )
        logits: Tensor = output.logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float()

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes a copy of row ``rows[b]``; rows may be left out and repeated. Not before a step."""
        assert self.cache is not None, "the first step makes the cache"
        self.cache.reorder(rows)

    def fork(self, count: int) -> None:
        """Repeat each row `count` times, next to each other. After the first step."""
        assert self.cache is not None, "the first step makes the cache"
        self.cache.fork(count)


def generate(
    model: Seq2SeqModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_outputs: Any = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    **options: Any,
) -> Tensor | GenerateEncoderDecoderOutput | Any:
    """Write a text for each source. Arguments, defaults and results are those of transformers' `generate`.

    `inputs` (or `input_ids`) int64 [B, S]: the sources, padded on either side; attention_mask [B, S],
    inferred from the padding token as transformers does; or `encoder_outputs` of `encode`, with their mask.
    The text begins with `decoder_input_ids` int64 [B, T], by default with decoder_start_token_id.
    Options: as of `minilm.generation.generate` without stop_strings, max_time, prefill_chunk_size; num_beams
    too. forced_bos_token_id is the first token after the start, forced_eos_token_id the last that max_length
    allows; encoder_repetition_penalty and encoder_no_repeat_ngram_size are about the source. max_length and
    min_length count the start.

    `logits_processor`, `stopping_criteria` (functions of the texts so far and the scores) and
    `prefix_allowed_tokens_fn` (row, text -> tokens) are called at each step with the whole batch.

    Returns int64 [B * num_return_sequences, T + new], after the end pad_token_id; or, with
    return_dict_in_generate, a `GenerateEncoderDecoderOutput`.

    Raises ValueError for sources that are empty or too long and for unsupported options, TypeError for
    unknown ones.
    """
    settings, asked = _settings(model, generation_config, options)
    if generator is not None and settings["seed"] is not None:
        raise ValueError("give a seed or a generator, not both")
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are the same argument: give one of them")
    ids = input_ids if inputs is None else inputs
    functions = _functions(logits_processor), _functions(stopping_criteria), prefix_allowed_tokens_fn
    beams = whole("num_beams", settings["num_beams"], 1, 100_000)
    if beams > 1 and streamer is not None:
        raise ValueError(f"a streamer needs num_beams=1, and num_beams is {beams}")
    with torch.inference_mode():
        vocabulary = model.spec.vocab_size
        ends = in_vocabulary("eos_token_id", token_ids("eos_token_id", settings["eos_token_id"]), vocabulary)
        pads = in_vocabulary("pad_token_id", token_ids("pad_token_id", settings["pad_token_id"]), vocabulary)
        pad = pads[0] if pads else ends[0] if ends else 0
        if encoder_outputs is None:
            if ids is not None and attention_mask is None and pads and pads[0] not in ends:
                attention_mask = (integers("input_ids", ids) != pads[0]).long()
            encoder_outputs = model.encode(
                ids, attention_mask, inputs_embeds, return_dict=True, output_attentions=False
            )
        elif ids is not None or inputs_embeds is not None:
            raise ValueError("give the sources or their encoder_outputs, not both")
        hidden = encoder_outputs if isinstance(encoder_outputs, Tensor) else encoder_outputs[0]
        start = _start(model, settings, decoder_input_ids, len(hidden), hidden.device)
        count = whole("num_return_sequences", settings["num_return_sequences"], 1, 100_000)
        if count > 1 and beams == 1 and not settings["do_sample"]:
            raise ValueError(
                f"num_return_sequences={count} needs do_sample=True or num_beams={count}: greedy decoding "
                "gives one text per source"
            )
        sources = _sources(settings, ids, attention_mask)
        most = _length(model, settings, asked, start.shape[1])
        texts = start if beams > 1 else start.repeat_interleave(count, 0)
        run = _Run(model, settings, texts, most, ends, pad, functions, generator, sources)
        if decoder_attention_mask is not None and not bool((decoder_attention_mask != 0).all()):
            raise ValueError("generate needs decoder_input_ids without padding, and their mask has zeros")
        decoding = Decoding(model, encoder_outputs, attention_mask)
        if beams > 1:
            return _beams(run, decoding, start, beams, count)
        sequences = run(decoding, start, count, streamer)
    if not settings["return_dict_in_generate"]:
        return sequences.clone()
    return GenerateEncoderDecoderOutput(
        sequences=sequences.clone(),
        scores=tuple(run.scores) if settings["output_scores"] else None,
        logits=tuple(run.logits) if settings["output_logits"] else None,
        past_key_values=decoding.cache if settings["use_cache"] else None,
    )


class _Run:
    """The loop. Rows that have ended leave the batch, unless functions of the caller want to see all."""

    def __init__(
        self,
        model: Seq2SeqModel,
        settings: dict[str, Any],
        texts: Tensor,
        most: int,
        ends: list[int],
        pad: int,
        functions: tuple[list[Any], list[Any], Any],
        generator: torch.Generator | None,
        sources: list[list[int]] | None,
    ) -> None:
        self.sources = sources
        self.model, self.settings, self.texts, self.most = model, settings, texts, most
        self.ends, self.pad, self.generator = ends, pad, generator
        self.processors, self.criteria, self.prefix = functions
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.first = texts.shape[1]
        sampled = bool(settings["do_sample"])
        filters = {name: settings[name] for name in FILTERS}
        at_least = max(
            whole("min_length", settings["min_length"] or 0, 0) - self.first,
            whole("min_new_tokens", settings["min_new_tokens"] or 0, 0),
        )
        self.rule = Sampling(
            do_sample=sampled,
            repetition_penalty=_or(settings["repetition_penalty"], 1.0),
            no_repeat_ngram_size=_or(settings["no_repeat_ngram_size"], 0),
            min_new_tokens=max(0, at_least),
            ends=frozenset(ends),
            rules=rules_of(
                settings,
                vocabulary=model.spec.vocab_size,
                ends=ends,
                columns=self.first,
                new=most - self.first,
            ),
            renormalize=bool(settings["renormalize_logits"]),
            keep=1 + len(set(ends)) if settings["num_beams"] > 1 else 1,
            seed=settings["seed"],
            **({k: v for k, v in filters.items() if v is not None} if sampled else {}),
        )

    def __call__(self, decoding: Decoding, start: Tensor, count: int, streamer: Any) -> Tensor:
        """The finished texts, [B, columns]."""
        rows = list(range(len(self.texts)))  # of the result, for each row of the batch
        ended = torch.zeros(len(rows), dtype=torch.bool, device=start.device)
        whole_batch = bool(self.processors or self.criteria or self.prefix)
        if streamer is not None:
            streamer.put(self.texts.cpu())
        logits = decoding.step(start)
        if count > 1:
            decoding.fork(count)
            logits = logits.repeat_interleave(count, 0)
        while True:
            tokens = self._choose(logits, rows)
            column = self.texts.new_full((len(self.texts), 1), self.pad)
            index = torch.tensor(rows, device=column.device)
            column[index, 0] = torch.where(ended[index], self.pad, tokens)
            self.texts = torch.cat((self.texts, column), 1)
            if streamer is not None:
                streamer.put(column[:, 0].cpu())
            if self.ends:
                ended |= torch.isin(column[:, 0], torch.tensor(self.ends, device=column.device))
            for criterion in self.criteria:
                ended |= torch.as_tensor(criterion(self.texts, None), device=ended.device).expand_as(ended)
            if self.texts.shape[1] >= self.most or bool(ended.all()):
                break
            alive = [place for place, row in enumerate(rows) if whole_batch or not bool(ended[row])]
            if len(alive) < len(rows):
                decoding.reorder(alive)
                rows = [rows[place] for place in alive]
            logits = decoding.step(self.texts[torch.tensor(rows, device=column.device), -1:])
        if streamer is not None:
            streamer.end()
        return self.texts

    def _choose(self, logits: Tensor, rows: list[int]) -> Tensor:
        """The next token of each row, int64 [rows]."""
        texts = self.texts[torch.tensor(rows, device=self.texts.device)]
        histories = texts.tolist()
        scores = process(
            logits,
            [self.rule] * len(rows),
            [text[: self.first] for text in histories],
            [text[self.first :] for text in histories],
            self._processor(texts),
            allowed=self._allowed(texts),
            sources=None if self.sources is None else [self.sources[row // self.each] for row in rows],
        )
        for kept, new, name in (
            (self.logits, logits, "output_logits"),
            (self.scores, scores, "output_scores"),
        ):
            if self.settings["return_dict_in_generate"] and self.settings[name]:
                full = new.new_zeros(len(self.texts), new.shape[1])
                full[torch.tensor(rows, device=new.device)] = new
                kept.append(full)
        if not self.rule.do_sample:
            return scores.argmax(-1)
        if self.rule.seed is not None:
            each, step = self.settings["num_return_sequences"], texts.shape[1] - self.first
            return draw(scores, [(self.rule.seed, row % each, step) for row in rows])
        return draw_rows(scores, rows, len(self.texts), self.generator)

    @property
    def each(self) -> int:
        """Texts per source."""
        return int(self.settings["num_return_sequences"])

    def _allowed(self, texts: Tensor) -> Callable[[Tensor], Tensor] | None:
        """prefix_allowed_tokens_fn, before tokens are forced."""
        if self.prefix is None:
            return None

        def run(scores: Tensor) -> Tensor:
            allowed = torch.full_like(scores, -torch.inf)
            for row, text in enumerate(texts):
                allowed[row, self.prefix(row // self.each, text)] = 0
            return scores + allowed

        return run

    def _processor(self, texts: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The caller's functions, between penalties and filters."""
        if not self.processors:
            return None

        def run(scores: Tensor) -> Tensor:
            for processor in self.processors:
                scores = processor(texts, scores)
            return scores

        return run


def _beams(run: _Run, decoding: Decoding, start: Tensor, beams: int, count: int) -> Any:
    """Beam search: a row of the cache is a beam."""
    settings = run.settings
    options = BeamOptions(
        beams,
        run.most - run.first,
        frozenset(run.ends),
        settings["length_penalty"],
        settings["early_stopping"],
        bool(settings["do_sample"]),
    )
    if count > beams:
        raise ValueError(
            f"num_return_sequences={count} is more than num_beams={beams}: a search finds as many texts as "
            "it has beams"
        )

    def step(tokens: Tensor, parents: Sequence[int]) -> Tensor:
        decoding.reorder(parents)
        return decoding.step(tokens[:, None])

    noise = beam_noise(settings["seed"], run.generator, len(start), start.device)
    return generate_beams(
        lambda: (decoding.step(start), step),
        BeamPrompts(start, start.tolist(), [run.rule] * len(start), run.pad, run.sources),
        options,
        BeamExtras(run.processors, run.criteria, run.prefix),
        count=count,
        noise=noise if options.do_sample else None,
        result=GenerateBeamEncoderDecoderOutput if settings["return_dict_in_generate"] else None,
        output_scores=bool(settings["output_scores"]),
        output_logits=bool(settings["output_logits"]),
    )


def _sources(settings: dict[str, Any], ids: Tensor | None, mask: Tensor | None) -> list[list[int]] | None:
    """The tokens of each source, if an option is about them."""
    name = "encoder_no_repeat_ngram_size"
    if settings["encoder_repetition_penalty"] not in (None, 1):
        name = "encoder_repetition_penalty"
    elif not settings[name]:
        return None
    if ids is None:
        raise ValueError(f"{name}={settings[name]!r} needs the sources: give input_ids, not encoder_outputs")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    return [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _functions(given: Any) -> list[Any]:
    """A function, a list of functions, or transformers' list of them."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _settings(
    model: Seq2SeqModel, given: GenerationConfig | None, options: dict[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """All options with their values, and the names of those that this call sets."""
    for name in options:
        if name not in OPTIONS and name not in UNSUPPORTED and name not in OWN and name not in HARMLESS:
            raise TypeError(f"generate has no argument {name!r}")
    of_call = {} if given is None else {k: v for k, v in given.to_dict().items() if v is not None}
    of_call.update(options)
    settings = {**dict.fromkeys((*OPTIONS, *OWN)), **DEFAULTS, "max_length": None}
    settings.update({k: v for k, v in model.generation_config.to_dict().items() if v is not None})
    settings.update(of_call)
    for name in (*UNSUPPORTED, *NOT_YET):
        value, harmless = settings.get(name), UNSUPPORTED.get(name, ())
        if name not in OWN and value is not None and value not in harmless:
            where = "" if name in of_call else ", which the checkpoint's generation config sets"
            raise unsupported(name, value, f" for encoder-decoders{where}")
    return settings, {name for name, value in of_call.items() if value is not None}


def _start(
    model: Seq2SeqModel, settings: dict[str, Any], given: Tensor | None, batch: int, device: Any
) -> Tensor:
    """The tokens that the texts begin with, int64 [B, T]."""
    vocabulary = model.spec.vocab_size
    if given is None:
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = settings[name] if settings[name] is not None else model.config.get(name)
            if value is not None:
                start = whole(name, value, 0, vocabulary - 1)
                return torch.full((batch, 1), start, dtype=torch.int64, device=device)
        raise ValueError(
            "the text has no beginning: give decoder_input_ids, decoder_start_token_id or bos_token_id"
        )
    given = integers("decoder_input_ids", given).to(device)
    if given.dim() != 2 or given.shape[0] != batch or given.shape[1] == 0:
        raise ValueError(
            f"decoder_input_ids must be [batch, tokens] = [{batch}, at least 1], and is {list(given.shape)}"
        )
    return given


def _length(model: Seq2SeqModel, settings: dict[str, Any], asked: set[str], start: int) -> int:
    """The longest text, its beginning included."""
    if settings["max_new_tokens"] is not None and not (
        "max_length" in asked and "max_new_tokens" not in asked
    ):
        most = start + whole("max_new_tokens", settings["max_new_tokens"], 1)
    elif settings["max_length"] is not None:
        most = whole("max_length", settings["max_length"], 1)
        if most <= start:
            raise ValueError(
                f"max_length={most} leaves no room after the {start} tokens of decoder_input_ids"
            )
    else:
        most = start + 20
    if not model.both.buckets and most - 1 > model.spec.max_positions:
        if "max_length" in asked or "max_new_tokens" in asked:
            raise ValueError(
                f"the text may reach {most - 1} positions, and the model has only {model.spec.max_positions}"
            )
        most = model.spec.max_positions + 1
    return most
