"""One engine in a separate process: ``python -m minilm.benchmarks.worker ENGINE``. Requests and answers are
JSON, one per line.

Requests: {"do": "load" | "prepare" | "embed" | "tokens" | "block" | "peak", ...}; answers {"ok": ...} or
{"error": ..., "kind": ...}. The output of libraries goes to standard error. No heavy package is imported
here: with ``--cold``, the process loads, runs once and exits, and its whole duration is timed."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def end_with_parent() -> None:
    """Let the system end this process when its parent ends; a stopped process would not notice that."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def main(arguments: list[str]) -> None:
    """Serve one engine on standard input and output until the input ends."""
    end_with_parent()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not break the protocol
    from .peers import Engine, engine_class
    from .peers.base import Assets, Unavailable

    engine: Engine | None = None

    def answer(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] in ("load", "prepare"):
                files = request["assets"]
                folders = {k: Path(v) if v and k != "model" else v for k, v in files.items()}
                engine = engine_class(arguments[0])(Assets(**folders), request["threads"], request["device"])
                begin = time.perf_counter()
                engine.load() if request["do"] == "load" else engine.prepare()
                answer({"ok": time.perf_counter() - begin, "note": engine.note()})
                continue
            assert engine is not None
            answer({"ok": handle(engine, request)})
        except Unavailable as error:
            answer({"error": str(error), "kind": "unavailable"})
        except Exception as error:  # handed to the parent, which shows it
            import traceback

            traceback.print_exc(file=sys.stderr)
            first = (str(error).strip() or repr(error)).splitlines()[0][:300]
            answer({"error": f"{type(error).__name__}: {first}", "kind": "failed"})


def handle(engine: Any, request: dict[str, Any]) -> Any:
    """Carry out a request with a loaded engine."""
    do = request["do"]
    if do == "embed":
        found = (
            engine.embed_texts(request["texts"]) if "texts" in request else engine.embed_ids(request["ids"])
        )
        return [[float(v) for v in row] for row in found]
    if do == "tokens":
        return [list(map(int, row)) for row in engine.generate(request["prompts"], request["new"])]
    if do == "block":
        return block(engine, request["workload"], request["calls"])
    if do == "peak":
        return peak_bytes()
    raise ValueError(f"unknown request {do!r}")


def peak_bytes() -> int:
    """Peak memory of this process. Not from getrusage, whose value a child inherits from its parent."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def block(engine: Any, workload: dict[str, Any], calls: int) -> float:
    """Seconds for `calls` calls of the workload; the batches are rotated."""
    kind = workload["kind"]
    if kind == "prefill":
        return sum(
            engine.prefill_seconds(workload["prompts"][i % len(workload["prompts"])]) for i in range(calls)
        )
    if kind == "decode":
        return sum(engine.decode_seconds(workload["prompts"], workload["new"]) for _ in range(calls))
    begin = time.perf_counter()
    for i in range(calls):
        if kind == "texts":
            engine.embed_texts(workload["texts"])
        else:
            engine.embed_ids(workload["batches"][i % len(workload["batches"])])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(sys.argv[1:])
