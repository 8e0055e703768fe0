"""The parent's side of `worker`: starts engines, calls them in turn, and stops all others meanwhile.

A worker whose turn it is not is stopped (SIGSTOP), so that no engine's spinning thread pool slows another."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .peers.base import Assets


class WorkerError(RuntimeError):
    """An engine's process failed or answered with an error; `kind` is "unavailable", "failed", or "slow" if
    it did not answer in time."""

    def __init__(self, message: str, kind: str = "failed") -> None:
        super().__init__(message)
        self.kind = kind


def environment(threads: int) -> dict[str, str]:
    """The child's environment: the number of threads for all libraries, no network, no log messages."""
    count = str(threads)
    fixed = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
    }
    return {**os.environ, **fixed}


class Worker:
    """One engine in one process. A context manager; leaving it ends the process."""

    def __init__(self, engine: str, threads: int, timeout: float = 900.0) -> None:
        self.engine, self.threads, self.timeout = engine, threads, timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minilm.benchmarks.worker", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(threads),
            cwd=tempfile.gettempdir(),
        )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, do: str, **fields: Any) -> Any:
        """Send a request and wait for its answer. Raises WorkerError."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self.proceed()
        try:
            process.stdin.write((json.dumps({"do": do, **fields}) + "\n").encode())
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._died()) from None
        if not self._selector.select(self.timeout):
            process.kill()
            raise WorkerError(f"no answer to {do!r} within {self.timeout:.0f} s", "slow")
        line = process.stdout.readline()
        if not line:
            raise WorkerError(self._died())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["kind"])
        self.note = answer.get("note", getattr(self, "note", ""))
        return answer["ok"]

    def load(self, assets: Assets, device: str = "cpu", *, prepare: bool = False) -> float:
        """Load the model (or only convert it); returns the seconds it took."""
        files = {k: str(v) if isinstance(v, Path) else v for k, v in vars(assets).items()}
        what = "prepare" if prepare else "load"
        return float(self.ask(what, assets=files, threads=self.threads, device=device))

    def pause(self) -> None:
        """Stop the process."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGSTOP)

    def proceed(self) -> None:
        """Continue the process."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)

    def _died(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = next(
            (line.strip() for line in reversed(lines) if line.strip()), "no output on standard error"
        )
        name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"the process ended with {name}: {reason[:300]}"

    def close(self) -> None:
        """End the process."""
        self.proceed()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has already ended
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._selector.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
