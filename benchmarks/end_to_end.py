"""The end-to-end level: whole models, with each engine in a separate process, in turn.

Encoders: batches of token ids (1 x 16, 1 x 512, 32 x 128) and a corpus of 2,000 texts with tokenisation.
Decoders: time to the first token after 512, steps after 32 and after 1,024 tokens, eight sequences at once.
All: cold start (from process start to the first result) and its peak memory. Only real tokens are counted,
not padding."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minilm import doctor

from . import check, corpus, costs, harness, machine, models, peers, shapes
from .course import Course, Step
from .limits import Limits
from .peers.base import Assets
from .workers import Worker, WorkerError

TRUTH = "transformers eager"
"""The engine that the outputs of all others are compared with (float32)."""


LAST = (TRUTH, "minilm reference")
"""Engines that are loaded last: if memory is short, the more widely used ones get it."""


@dataclass(frozen=True)
class Workload:
    """One thing that is done with a model."""

    model: str
    name: str
    kind: str
    """ids, texts, prefill, decode, cold."""
    unit: str
    """The unit of the rate per second: sentences or tokens; "s" for a cold start."""
    request: dict[str, Any]
    units: float
    """The number of units per call."""
    calls: tuple[costs.Call, ...] = ()
    """The op calls of one model pass, for the limits (float32); of one step for decoding."""
    passes: int = 1
    """Model passes per call: for decoding, steps."""

    def cost(self, bytes_a_weight: float) -> costs.Cost:
        """The cost of one call with weights of that size."""
        adjusted = [
            replace(c, dims={**c.dims, "wb": bytes_a_weight}) if c.op == "linear" else c for c in self.calls
        ]
        return costs.total(adjusted) * self.passes


def encoder_workloads(model: str, assets: Assets | None, *, with_corpus: bool) -> list[Workload]:
    """Fixed shapes and, if the model has its real tokenizer, the corpus. Without `assets`: the same names and
    similar sizes."""
    spec = shapes.spec(model)
    found = []
    for regime in shapes.regimes(model):
        generator = random.Random(16)
        batches = [
            [[generator.randrange(5, spec.vocab_size) for _ in range(n)] for n in regime.lengths]
            for _ in range(8)
        ]
        calls = tuple(costs.forward(spec, regime.lengths))
        units = len(regime.lengths)
        found.append(Workload(model, regime.name, "ids", "sentences", {"batches": batches}, units, calls))
    if with_corpus:
        texts = corpus.sentences()
        lengths = token_counts(assets, texts) if assets is not None else [len(t.split()) + 4 for t in texts]
        calls = tuple(costs.forward(spec, lengths))
        name = f"{len(texts)} mixed sentences, tokenised"
        found.append(Workload(model, name, "texts", "sentences", {"texts": texts}, len(texts), calls))
    return found


def token_counts(assets: Assets, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included, cut at 256."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return [len(e.ids) for e in tokenizer.encode_batch(list(texts))]


def decoder_workloads(model: str, assets: Assets | None) -> list[Workload]:
    """Prefill, steps after a short and a long prompt, eight sequences at once. Without `assets`: the same
    names and sizes, with meaningless prompts."""
    spec = shapes.spec(model)
    folder = None if assets is None else assets.folder
    new = 4 if machine.tiny() else 32
    found = []
    for regime in shapes.regimes(model):
        if not regime.decoding:
            count = regime.tokens
            ids = _prompt(count + 64, spec.vocab_size, folder)
            prompts = [ids[i : i + count] for i in range(0, 64, 8)]
            calls = tuple(costs.forward(spec, regime.lengths, logits=1, cached=True))
            request = {"prompts": prompts}
            found.append(Workload(model, regime.name, "prefill", "tokens", request, count, calls))
            continue
        assert regime.contexts is not None
        count, batch = regime.contexts[0] - 1, len(regime.lengths)
        ids = _prompt(count + batch, spec.vocab_size, folder)
        prompts = [ids[i : i + count] for i in range(batch)]
        contexts = [count + 1 + new // 2] * batch  # of the step in the middle
        calls = tuple(costs.forward(spec, regime.lengths, contexts=contexts, logits=batch, cached=True))
        request = {"prompts": prompts, "new": new}
        found.append(Workload(model, regime.name, "decode", "tokens", request, new * batch, calls, new))
    return found


def _prompt(count: int, vocabulary: int, folder: Any) -> list[int]:
    return [0] * count if folder is None else models.prompt_ids(count, vocabulary, folder)


def sweep_workloads(model: str) -> list[Workload]:
    """One sequence of each length, and batches of each size at 128 tokens: the curves."""
    spec = shapes.spec(model)
    small = machine.tiny()
    lengths = (4, 8) if small else (8, 16, 32, 64, 128, 256, 512)
    batches = (1, 2) if small else (1, 2, 4, 8, 16, 32)
    length = 8 if small else 128
    found = []
    for count, n in [*((1, n) for n in lengths), *((b, length) for b in batches if b > 1)]:
        generator = random.Random(count * 1000 + n)
        sets = [
            [[generator.randrange(5, spec.vocab_size) for _ in range(n)] for _ in range(count)]
            for _ in range(4)
        ]
        calls = tuple(costs.forward(spec, [n] * count))
        found.append(
            Workload(model, f"sweep {count} x {n}", "ids", "sentences", {"batches": sets}, count, calls)
        )
    return found


def engines_for(model: str, device: str, wanted: Callable[[str], bool]) -> list[tuple[str, str | None]]:
    """(engine, None or the reason why it is left out) for each engine that runs models of this kind."""
    encoder = model in shapes.ENCODERS
    found: list[tuple[str, str | None]] = []
    for name in peers.ENGINES:
        kind = peers.engine_class(name)
        if not (kind.encoder if encoder else kind.decoder) or not wanted(name):
            continue
        reason = kind.unavailable(device)
        if reason is None and kind.only_real_models and not models.is_real(model):
            reason = "is run on the real models only"
        found.append((name, reason))
    return found


def check_prompt(model: str, folder: Any) -> list[int]:
    """A text twice, followed by the beginning of a third copy. The continuation is obvious in any precision,
    so that no engine is reported as wrong because of two almost equally probable tokens."""
    ids = models.prompt_ids(24 if machine.tiny() else 48, shapes.spec(model).vocab_size, folder)
    return [*ids, *ids, *ids[:8]]


CHECK_NEW = 16
CHECK_TEXTS = 40


def output(worker: Worker, model: str, assets: Assets) -> Any:
    """An engine's result for the check."""
    if model in shapes.ENCODERS:
        texts = corpus.sentences(CHECK_TEXTS)
        if not machine.tiny():
            texts = texts[:CHECK_TEXTS]
        return torch.tensor(worker.ask("embed", texts=texts))
    return worker.ask("tokens", prompts=[check_prompt(model, assets.folder)], new=CHECK_NEW)[0]


def judge(found: Any, truth: Any, precision: str) -> check.Verdict:
    """Compare embeddings by the cosine, tokens by equality."""
    if isinstance(truth, torch.Tensor):
        return check.cosines(found, truth, precision)
    return check.equal_tokens(found, truth, precision)


@dataclass
class Options:
    """The options of a run of this level."""

    settings: harness.Settings
    threads: int
    device: str
    wanted: Callable[[str], bool]
    chosen: Callable[[str], bool] = lambda name: True
    """Which workloads, by name."""
    say: Callable[[str], None] = lambda text: None
    cold_repeats: int = 3
    course: Course = field(default_factory=Course)

    def status(self, error: WorkerError) -> str:
        """The status and reason for an engine with this error: if the time is limited, slowness is not a
        failure."""
        skipped = error.kind == "unavailable" or (error.kind == "slow" and self.course.limited)
        return "skipped" if skipped else "failed"

    def worker(self, name: str) -> Worker:
        """An engine's process, with a timeout at the end of the run."""
        timeout = max(20.0, min(900.0, self.course.remaining()))
        return Worker(name, self.threads, timeout)


def run_model(
    model: str, workloads: Sequence[Workload], limits: Limits, options: Options, *, cold: bool = True
) -> Iterator[dict[str, Any]]:
    """Run all engines on all workloads of one model; yields one cell per pair."""
    course = options.course
    workloads = [w for w in workloads if options.chosen(f"{w.model} {w.name}")]
    candidates = engines_for(model, options.device, options.wanted)
    with ExitStack() as stack:
        ready, verdicts, refused = _start(stack, model, models.assets(model), candidates, options)
        reported = ready or any(reason != LATE for reason in refused.values())
        for workload in workloads if reported else ():
            name, guess = f"{model}: {workload.name}", workload_guess(workload, len(ready), options.settings)
            if course.begin("workload", name, guess):
                yield from _run(workload, ready, verdicts, refused, limits, options)
                course.end()
    names = [name for name in ready if verdicts[name].ok]
    wanted = cold and names and options.chosen(f"{model} cold start")
    if wanted and course.begin("cold", f"{model}: cold starts", cold_guess(len(names), options)):
        yield from _cold_starts(model, models.assets(model), names, options)
        course.end()


LOAD_SECONDS = 6.0
"""Seconds to start, load and check an engine on an idle machine."""
QUICK = ("minilm", "onnxruntime", "minilm int8", "sentence-transformers", "minilm q8_0")
"""The engines that run first if the time is limited."""


def workload_guess(workload: Workload, engines: int, settings: harness.Settings) -> float:
    """Seconds for all engines on a workload on an idle machine."""
    cost = workload.cost(4.0)
    call = 3 * max(cost.operations / 1e11, cost.bytes / 2e10)
    rounds = min(
        settings.rounds, max(settings.least_rounds, settings.budget_seconds / max(call * engines, 1e-3))
    )
    return engines * (0.3 + (2 + rounds) * call)


def cold_guess(engines: int, options: Options) -> float:
    """Seconds for the cold starts of a model."""
    return engines * (1 + options.cold_repeats) * 4.0


def steps(model: str, workloads: Sequence[Workload], options: Options, *, cold: bool) -> list[Step]:
    """Announce the steps of `run_model`."""
    found = [n for n, reason in engines_for(model, options.device, options.wanted) if reason is None]
    planned = [Step("engine", f"{model}: reference results by {TRUTH}", LOAD_SECONDS)]
    planned += [Step("engine", f"{model}: loading and checking {name}", LOAD_SECONDS) for name in found]
    for workload in workloads:
        if options.chosen(f"{model} {workload.name}"):
            guess = workload_guess(workload, len(found), options.settings)
            planned.append(Step("workload", f"{model}: {workload.name}", guess))
    if cold and options.chosen(f"{model} cold start"):
        planned.append(Step("cold", f"{model}: cold starts", cold_guess(len(found), options)))
    return planned


LATE = ("skipped", "left out for lack of time")
"""Status and reason of an engine that a time limit excludes."""


def _start(
    stack: ExitStack,
    model: str,
    assets: Assets,
    candidates: Sequence[tuple[str, str | None]],
    options: Options,
) -> tuple[dict[str, Worker], dict[str, check.Verdict], dict[str, tuple[str, str]]]:
    """Start, load and check every engine. Returns the running ones, verdicts, and (status, reason) of the
    others."""
    ready: dict[str, Worker] = {}
    verdicts: dict[str, check.Verdict] = {}
    refused: dict[str, tuple[str, str]] = {}
    course, at_start = options.course, options.course.remaining()
    truth_step = f"{model}: reference results by {TRUTH}"
    if not course.begin("engine", truth_step, LOAD_SECONDS, told=f"{model}: everything"):
        course.drop_all(f"{model}: ")
        return {}, {}, {name: LATE for name, _ in candidates}
    try:
        with ExitStack() as stays:
            reference = stays.enter_context(options.worker(TRUTH))
            reference.load(assets, options.device)
            truth = output(reference, model, assets)
            if course.limited and options.wanted(TRUTH):  # saves starting another process
                ready[TRUTH] = reference
                verdicts[TRUTH] = judge(truth, truth, precision_of(TRUTH, options.device)[0])
                reference.pause()
                stack.push(stays.pop_all())
                course.drop(f"{model}: loading and checking {TRUTH}")
    except WorkerError as error:
        if options.status(error) == "failed":
            raise
        course.drop_all(f"{model}: ")
        course.left_out.append(f"{model}: everything, since {TRUTH} was too slow")
        return {}, {}, {name: LATE for name, _ in candidates}
    finally:
        course.end()
    for name, reason in sorted(candidates, key=_order(course.limited)):
        step = f"{model}: loading and checking {name}"
        if name in ready:
            continue
        if reason is not None:
            refused[name] = ("skipped", reason)
            course.drop(step)
            continue
        if course.limited and len(ready) > 1 and course.remaining() < 0.5 * at_start:
            refused[name] = LATE  # keep the rest of the time for measuring
            course.leave_out(f"{model}: {name}", step)
            continue
        if (short := _too_large(name, assets, options.device)) is not None:
            refused[name] = ("skipped", short)
            continue
        if not course.begin("engine", step, LOAD_SECONDS, told=f"{model}: {name}"):
            refused[name] = LATE
            continue
        try:
            if peers.engine_class(name).prepare is not peers.Engine.prepare:
                with options.worker(name) as converter:
                    converter.load(assets, options.device, prepare=True)
            worker = stack.enter_context(options.worker(name))
            worker.load(assets, options.device)
            verdicts[name] = judge(
                output(worker, model, assets), truth, precision_of(name, options.device)[0]
            )
            ready[name] = worker
            worker.pause()
        except WorkerError as error:
            refused[name] = (options.status(error), str(error))
        finally:
            course.end()
    return ready, verdicts, refused


def _order(limited: bool) -> Callable[[tuple[str, str | None]], tuple[int, bool, bool]]:
    """The order in which engines are started: if the time is limited, the most widely used ones first."""
    first = {name: at for at, name in enumerate(QUICK)} if limited else {}
    return lambda found: (first.get(found[0], len(QUICK)), found[0] in LAST, found[0] == LAST[-1])


def _too_large(name: str, assets: Assets, device: str) -> str | None:
    """Why an engine does not fit into memory with those that are loaded; None if it does, or this is
    unknown."""
    found = doctor.memory()
    known = [found[name] for name in ("available_bytes", "limit_bytes")]
    free = min((size for size in known if size is not None), default=None)
    if device != "cpu" or free is None:
        return None
    kind = peers.engine_class(name)
    weights = sum(file.stat().st_size for file in assets.folder.glob("*.safetensors"))  # float32
    needed = weights / 4 * kind.bytes_a_weight * kind.copies
    if needed <= free:
        return None
    return (
        f"needs about {needed / 1e9:.1f} GB of memory in addition to the others; {free / 1e9:.1f} GB are free"
    )


def precision_of(name: str, device: str) -> tuple[str, float]:
    """Precision and bytes of an engine's weights: float32 on a CPU becomes float16 on a GPU."""
    kind = peers.engine_class(name)
    return (
        ("fp16", 2.0)
        if device == "cuda" and kind.precision == "fp32"
        else (kind.precision, kind.bytes_a_weight)
    )


def _cell(workload: Workload, name: str, options: Options) -> dict[str, Any]:
    return {
        "level": "end to end",
        "model": workload.model,
        "workload": f"{workload.model} {workload.name}",
        "peer": name,
        "ours": name.startswith("minilm"),
        "precision": precision_of(name, options.device)[0],
        "dtype": "float32" if options.device == "cpu" else "float16",
        "device": options.device,
        "threads": options.threads,
        "unit": workload.unit,
        "units_per_call": workload.units,
    }


def _run(
    workload: Workload,
    ready: dict[str, Worker],
    verdicts: dict[str, check.Verdict],
    refused: dict[str, tuple[str, str]],
    limits: Limits,
    options: Options,
) -> Iterator[dict[str, Any]]:
    cells = {name: _cell(workload, name, options) for name in (*ready, *refused)}
    for name, (status, reason) in refused.items():
        cells[name] |= {"status": status, "reason": reason}
    blocks: dict[str, harness.Block] = {}
    request = {"kind": workload.kind, **workload.request}
    for name, worker in ready.items():
        verdict = verdicts[name]
        cells[name] |= {"check": verdict.to_dict(), "note": worker.note}
        if not verdict.ok:
            cells[name] |= {"status": "wrong", "reason": verdict.detail}
            continue
        if workload.kind == "texts" and not getattr(peers.engine_class(name), "mixed", True):
            cells[name] |= {"status": "skipped", "reason": worker.note}
            continue
        try:
            # Engines that compile do it here, and engines that cannot run fail here.
            trial = {**request, "texts": request["texts"][:64]} if "texts" in request else request
            worker.ask("block", workload=trial, calls=1)
        except WorkerError as error:
            cells[name] |= {
                "status": options.status(error),
                "reason": str(error),
            }
            continue
        finally:
            worker.pause()
        blocks[name] = _block(worker, request)
        cells[name]["status"] = "ok"
    load = machine.Load()
    samples = harness.measure(blocks, options.settings) if blocks else {}
    noted = load.stop()
    for name, taken in samples.items():
        precision, weight = precision_of(name, options.device)
        cost = workload.cost(weight)
        dtype = _arithmetic(precision, options.device)
        floor, binding = limits.floor(cost, dtype, options.threads)
        cells[name] |= {
            "samples": taken.seconds,
            "calls": taken.calls,
            "bytes": cost.bytes,
            "written": cost.written,
            "operations": cost.operations,
            "arithmetic": dtype,
            "floor_seconds": floor,
            "binding": binding,
            "load": noted,
        }
    yield from cells.values()


def _arithmetic(precision: str, device: str) -> str:
    """The dtype whose peak is the limit: on a CPU float16 weights are computed in float32, 8- and 4-bit ones
    in int8."""
    if device == "cuda":
        return {"fp32": "float16", "fp16": "float16", "bf16": "bfloat16"}.get(precision, "int8")
    return {"int8": "int8", "q4": "int8", "bf16": "bfloat16"}.get(precision, "float32")


def _block(worker: Worker, request: dict[str, Any]) -> harness.Block:
    def block(calls: int) -> float:
        try:
            return float(worker.ask("block", workload=request, calls=calls))
        finally:
            worker.pause()

    return block


def _cold_starts(
    model: str, assets: Assets, names: Sequence[str], options: Options
) -> Iterator[dict[str, Any]]:
    """Time from process start to the first result, for the engines in turn, and the peak memory until
    then."""
    workload = Workload(model, "cold start", "cold", "s", {}, 1)
    cells = {
        name: _cell(workload, name, options) | {"status": "ok", "samples": [], "calls": 1} for name in names
    }
    repeats = 2 if machine.tiny() else options.cold_repeats
    for done in range(repeats + 1):  # the first one fills the system's file cache
        for name in names:
            if cells[name]["status"] != "ok":
                continue
            try:
                begin = time.perf_counter()
                with options.worker(name) as worker:
                    worker.load(assets, options.device)
                    if model in shapes.ENCODERS:
                        worker.ask("embed", texts=["The first sentence after the start."])
                    else:
                        worker.ask("tokens", prompts=[check_prompt(model, assets.folder)[:16]], new=1)
                    seconds = time.perf_counter() - begin
                    peak = worker.ask("peak")
            except WorkerError as error:
                cells[name] |= {"status": options.status(error), "reason": str(error), "samples": []}
                continue
            if done:
                cells[name]["samples"].append(seconds)
                cells[name]["peak_bytes"] = max(peak, cells[name].get("peak_bytes", 0))
    yield from cells.values()
