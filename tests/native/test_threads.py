"""How many threads a whole pass has, and that more than there are CPUs come to an end, with the same
results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fused_models import batch, model_of
from native_runs import require_extension, with_threads

from minilm import ops
from minilm.ops.backends import native


@pytest.fixture(autouse=True)
def _limit_of_before() -> Iterator[None]:
    require_extension()
    yield
    native.limit_threads(native.cpu_limit())


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


NEW = {"proc/self/cgroup": "0::/app/worker\n"}
OLD = {"proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/app\n1:name=systemd:/\n"}


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        (NEW, None),
        (NEW | {"sys/fs/cgroup/app/worker/cpu.max": "max 100000\n"}, None),
        (NEW | {"sys/fs/cgroup/app/worker/cpu.max": "200000 100000\n"}, 2),
        (NEW | {"sys/fs/cgroup/app/worker/cpu.max": "150000 100000\n"}, 2),
        (NEW | {"sys/fs/cgroup/app/worker/cpu.max": "1000 100000\n"}, 1),
        (
            NEW
            | {
                "sys/fs/cgroup/app/worker/cpu.max": "800000 100000",
                "sys/fs/cgroup/app/cpu.max": "300000 100000",
            },
            3,
        ),
        (NEW | {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (NEW | {"sys/fs/cgroup/app/worker/cpu.max": "nonsense"}, None),
        (
            OLD
            | {
                "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            OLD
            | {
                "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_the_quota_of_the_control_group_counts(
    files: dict[str, str], cpus: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert native.cpu_limit(machine(tmp_path, files)) == (cpus or 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert native.cpu_limit(machine(tmp_path, files)) == 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert native.cpu_limit(machine(tmp_path, files)) == cpus


@pytest.mark.parametrize(("variable", "expected"), [(None, [2, 6, 4]), ("4", [4, 6, 4])])
def test_a_number_of_threads_that_somebody_chose_is_kept(variable: str | None, expected: list[int]) -> None:
    program = """
import json, torch
torch.set_num_threads(4)
from minilm.ops.backends import native
native.limit_threads(2)
found = [native.team_threads()]
torch.set_num_threads(6)
found.append(native.team_threads())
torch.set_num_threads(4)
native.limit_threads(None)
print(json.dumps([*found, native.team_threads()]))
"""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    environment |= {} if variable is None else {"OMP_NUM_THREADS": variable}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_many_more_threads_than_cpus_come_to_an_end() -> None:
    """They sleep at the ends of phases, and all of them wake."""
    model = model_of("llama")

    def run() -> torch.Tensor:
        with torch.no_grad(), ops.backend("native"):
            hidden: torch.Tensor = model.run_packed(*batch([3, 1, 40]))
        return hidden

    first, *others = with_threads(run, (1, 3, 16, 16, 16))
    assert all(torch.equal(first, other) for other in others)
