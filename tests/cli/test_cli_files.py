"""`tokenize`, `inspect`, `convert` and `doctor` as commands; the functions that they call have separate
tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cli_runs import Terminal, failure, process, records, run
from tiny_models import TEXTS, save_model

import minilm
from minilm import doctor
from minilm.conversion.summary import summarise


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "roberta", "ForMaskedLM")


def test_tokenize(model: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    found = records("tokenize", "--model", model, *TEXTS)
    for record, text in zip(found, TEXTS, strict=True):
        expected = theirs(text, return_offsets_mapping=True, verbose=False)
        assert record["text"] == text
        assert record["ids"] == expected["input_ids"]
        assert record["tokens"] == theirs.convert_ids_to_tokens(expected["input_ids"])
        assert record["offsets"] == [list(span) for span in expected["offset_mapping"]]
    (bare,) = records("tokenize", "--model", model, "--no-special", TEXTS[0])
    assert bare["ids"] == found[0]["ids"][1:-1]
    (paired,) = records("tokenize", "--model", model, "--pair", "anna", TEXTS[0])
    assert paired["ids"] == theirs(TEXTS[0], "anna")["input_ids"]
    assert paired["sequence_ids"] == theirs(TEXTS[0], "anna").sequence_ids()


def test_tokens_as_a_table() -> None:
    terminal = Terminal("tokenize", "Ünïcode tokens", "--pair", "x\ty")
    assert terminal.finish() == 0
    rows = [line.split() for line in terminal.shown.splitlines()]
    assert ["1", "27260", "0-7", "unicode", "Ünïcode"] in rows
    assert ["0", "101", "[CLS]"] in rows
    assert "8 tokens" in terminal.shown


def test_tokenize_needs_no_torch(model: Path) -> None:
    code = "import sys; from minilm.cli import main; sys.argv = ['minilm', *sys.argv[1:]]\ntry: main()\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "tokenize", "--model", str(model), "tea"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"])
def test_inspect_as_json(name: str) -> None:
    found = json.loads(run("inspect", name, "--json").stdout)
    summary = summarise(name)
    assert found["parameters"] == summary.count == sum(p["count"] for p in found["parameter_table"])
    assert found["config"]["hidden_size"] == found["understood_as"]["hidden_size"]
    assert len(found["weight_map"]) == len(summary.weights)
    assert found == json.loads(json.dumps(summary.to_dict()))


def test_inspect_for_people(model: Path) -> None:
    shown = run("inspect", model).stdout
    summary = summarise(model)
    assert f"{summary.count:,}" in shown
    assert "roberta encoder, loaded by minilm.AutoModelForMaskedLM" in shown
    assert re.search(r"position_offset +2 *$", shown, re.M)
    assert re.search(r"body\.layers\.\{i\}\.attention\.qkv\.weight +\[72, 24\] x 2", shown)
    assert "KV cache" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert run("inspect", "--model", model).stdout == shown
    assert "two models were named" in failure("inspect", model, "--model", model)


def test_inspect_of_a_file_is_that_of_its_folder(model: Path, tmp_path: Path) -> None:
    whole, file = (
        json.loads(run("inspect", path, "--json").stdout) for path in (model, model / "model.safetensors")
    )
    differ = {key for key in whole if whole[key] != file[key]}
    assert differ <= {"name", "path"}
    again = minilm.AutoModelForMaskedLM.from_pretrained(model / "model.safetensors")
    expected = minilm.AutoModelForMaskedLM.from_pretrained(model)
    assert all(map(torch.equal, again.parameters(), expected.parameters()))
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((model / "model.safetensors").read_bytes())
    assert "has no config.json" in failure("inspect", alone)


def test_inspect_shows_where_weights_go(model: Path) -> None:
    shown = run("inspect", model, "--weights").stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    at = lines.index("fuse 2/3 x 2 roberta.encoder.layer.{i}.attention.self.key.weight")
    assert lines[at + 1] == "body.layers.{i}.attention.qkv.weight"


def test_inspect_of_a_decoder() -> None:
    shown = " ".join(run("inspect", "SmolLM2-135M-Instruct").stdout.split())
    assert "a token: 46,080 B in float32, 23,040 B in bfloat16" in shown
    assert "chat template yes" in shown
    assert "[960, 576] x 30, 16.6 M, 12.3 %, Q4_1" in shown
    assert "in memory 96.6 MB as stored (minilm chat; elsewhere --weights gguf)" in shown
    assert "538 MB in float32 (other commands and from_pretrained)" in shown


def test_convert(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", model, out, "--dtype", "float16")
    count = summarise(model).count
    assert result.stdout.startswith(f"{out}: RobertaForMaskedLM, ")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out)
    assert (theirs.num_parameters(), str(theirs.dtype)) == (count, "torch.float16")
    before = (out / "config.json").read_bytes()
    assert "not empty" in failure("convert", model, out)
    assert (out / "config.json").read_bytes() == before
    run("convert", model, out, "--force")
    assert str(minilm.AutoModelForMaskedLM.from_pretrained(out).dtype) == "torch.float32"


def test_convert_tells_of_a_missing_tokenizer(tmp_path: Path, model: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    result = run("convert", bare, tmp_path / "out")
    assert result.stderr == f"warning: {bare} has no tokenizer, so {tmp_path / 'out'} has none\n"


def test_doctor_as_json() -> None:
    finished = process("doctor", "--json")
    assert finished.returncode == 0
    found, here = json.loads(finished.stdout), doctor.examine()
    assert found.keys() == here.keys()
    for key in ("minilm", "python", "packages", "models", "extension", "gpus"):
        assert found[key] == here[key]
    # Why Triton does not run depends on whether this process has imported it.
    told = [[{k: v for k, v in row.items() if k != "refused"} for row in x["ops"]] for x in (found, here)]
    assert told[0] == told[1]
    assert all(row["refused"] for row in found["ops"])


def test_doctor_for_people() -> None:
    shown = run("doctor").stdout
    for word in ("Machine", "Packages", "Ops on cpu", "extension", "all-MiniLM-L6-v2"):
        assert word in shown
    here = doctor.examine()
    for row in here["ops"]:
        if row["dtype"] == "float32":
            assert re.search(rf"^{row['op']}[ \w,]* +{row['backend']} ", shown, re.M), row
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_problem_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package-of-ours", "")
    result = run("doctor", status=1)
    assert "problem: no-such-package-of-ours is not installed" in result.stdout
    assert json.loads(run("doctor", "--json", status=1).stdout)["problems"]
