"""One step of `gpu_check`: run levels of the bench and leave JSON and pictures.

gpu_run.py DEVICE LEVELS MODELS TARGET SECONDS. Results are written after each workload, so that a step that
is stopped leaves its results so far."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Returns 1 if a result of minilm was wrong."""
    device, levels, models, target, seconds = arguments
    from minilm.benchmarks import machine, plots, report
    from minilm.benchmarks.course import Course
    from minilm.benchmarks.harness import Settings
    from minilm.benchmarks.results import Results
    from minilm.benchmarks.run import Plan, run

    end = time.monotonic() + float(seconds)
    settings = replace(Settings.default(), rounds=7, budget_seconds=2.0, least_rounds=3)
    plan = Plan(
        levels=levels.split(","),
        models=models.split(","),
        threads=(1,) if device == "cpu" else (4,),
        device=device,
        dtype="float32" if device == "cpu" else "float16",
        settings=settings,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        course=Course(show=lambda state: print(state.name, file=sys.stderr, flush=True)),
        limit_rounds=3,
        cold=False,
    )
    if machine.tiny():
        plan.peers = r"minilm (native|torch|reference)$|minilm$|SDPA|transformers (eager|sdpa)"
    asked = plan.only

    def keep(results: Results) -> None:
        results.write(Path(target))
        if time.monotonic() > end:
            plan.only = r"\A\Z."  # nothing more

    results = run(plan, on_cell=keep)
    results.settings["cut_short"] = plan.only != asked
    results.write(Path(target))
    report.print_tables(results)
    try:
        plots.save(results, Path(target).parent, prefix=f"{Path(target).stem}-", most=2)
    except ImportError as error:
        print(f"no pictures: {error}")
    return 1 if any(c["ours"] and c["status"] in ("wrong", "failed") for c in results.cells) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
