"""Damages small model files at random and loads them. There must be no crash, no hang, no excessive memory,
no unexpected kind of error, and no damaged model that loads without an error.

    python tools/fuzz.py --seconds 120            all kinds, as CI does
    python tools/fuzz.py --cases 10000 --seed 7   this many cases, with another seed
    python tools/fuzz.py --repeat gguf:0:1234     repeat one case in this process, with traceback

A case depends only on its kind, the seed and its number. Cases run in a child process, many in one; if a case
kills it, another child continues. The files of a failed case are kept (`--keep`), and the command to repeat
it is printed. The exit status is 1 if a case failed.

If bytes of weights were changed, the model is loaded, but its values are not checked: safetensors and GGUF
have no checksums, so a reader cannot notice. Other damage (headers, tables, lengths, files that were cut,
spliced or exchanged) must give an error, or exactly the tensors of the undamaged file. Exceptions are changes
that leave a valid file: a type exchanged for another of the same size (F16 and BF16), exchanged names or
offsets of tensors of equal shape, and a missing head, which gives a warning.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import minilm
from minilm.files import open_checkpoint
from minilm.sentence import SentenceEncoder

SECONDS_A_CASE = 20.0
MEMORY = 1 << 30  # limit of bytes of address space, in addition to a new child's
GROWTH = 300 << 20  # limit of bytes by which one case may raise the peak resident memory
RENEWED = 300  # maximum number of cases per child
EXPECTED = (ValueError, OSError)  # of all of minilm's errors

Files = dict[str, bytes]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "tea", "red", "##s"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}"
    "{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part['text'] }}{% endfor %}"
    "{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# -- undamaged files


def read(folder: Path) -> Files:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def write(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def random_model(model_type: str, auto: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = minilm.AutoConfig.for_model(
        model_type, vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3, **options,
    )  # fmt: skip
    return auto.from_config(config).eval()


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return minilm.AutoTokenizer.from_pretrained(_saved(backend), **names)


def _saved(backend: Any) -> str:
    file = Path(tempfile.mkdtemp(prefix="fuzz-")) / "tokenizer.json"
    backend.save(str(file))
    return str(file)


def write_gguf(path: Path) -> None:
    import gguf
    import numpy as np

    model = random_model("llama", minilm.AutoModelForCausalLM, num_key_value_heads=2)
    model.save_pretrained(path.parent / "source")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 64), ("embedding_length", 32), ("block_count", 2), ("feed_forward_length", 64),
        ("attention.head_count", 4), ("attention.head_count_kv", 2), ("rope.dimension_count", 8),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"▁{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        "▁ab",
        "a",
        "b",
        "▁",
        "c",
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[1] * (len(pieces) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    assert len(pieces) == len(WORDS)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    }  # fmt: skip
    with open_checkpoint(path.parent / "source") as checkpoint:
        for name, info in checkpoint.tensors.items():
            value = torch.empty(info.shape)
            checkpoint.read_into(name, value)
            part = name.removesuffix(".weight")
            blk = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", part)
            theirs = f"blk.{blk[1]}.{names[blk[2]]}" if blk else names[part]
            array = value.numpy()
            if len(info.shape) == 2 and "ffn" in theirs:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(f"{theirs}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(path.parent / "source")


def sound_files(top: Path) -> dict[str, Files]:
    """The kinds of cases, and the files that each damages."""
    llama = random_model("llama", minilm.AutoModelForCausalLM, num_key_value_heads=2)
    llama.save_pretrained(top / "safetensors")
    llama.save_pretrained(top / "sharded", max_shard_size="16KB")
    quantised = minilm.AutoModelForCausalLM.from_pretrained(top / "safetensors", weights="q4")
    quantised.save_pretrained(top / "quantised")
    (top / "gguf").mkdir()
    write_gguf(top / "gguf" / "model.gguf")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    bert = random_model("bert", minilm.AutoModel)
    bert.save_pretrained(top / "bert")
    tokenizer.save_pretrained(top / "bert")
    SentenceEncoder(top / "bert", device="cpu").save_pretrained(top / "sentence")
    tokenizer.save_pretrained(top / "tokenizer")
    (top / "vocabulary").mkdir()
    (top / "vocabulary" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (top / "vocabulary" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    files = {name: read(top / name) for name in ("safetensors", "sharded", "quantised", "gguf", "sentence")}
    files |= {"config": files["safetensors"], "tokenizer": read(top / "tokenizer")}
    files |= {"vocabulary": read(top / "vocabulary"), "template": files["tokenizer"]}
    return files


TARGETS = {
    "safetensors": (".safetensors",),
    "sharded": (".safetensors", ".index.json"),
    "quantised": (".safetensors",),
    "gguf": (".gguf",),
    "sentence": (".json",),
    "config": ("config.json",),
    "tokenizer": (".json",),
    "vocabulary": (".txt", ".json"),
    "template": (".jinja",),
}


# -- damage


def head_of(name: str, data: bytes) -> int:
    """Bytes of a file before the data of its tensors."""
    if name.endswith(".safetensors"):
        return 8 + int(struct.unpack_from("<Q", data)[0])
    if name.endswith(".gguf"):
        from gguf import GGUFReader

        with tempfile.NamedTemporaryFile(suffix=".gguf") as stream:
            stream.write(data)
            stream.flush()
            return int(GGUFReader(stream.name).data_offset)
    return len(data)


NUMBERS = (0, 1, 2, 3, 7, 8, 9, 10, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "0.5", "1e30", "1e-30", "NaN", "Infinity",
    '""', '"x"', "[]", "{}", "[1]", '{"a": 1}', "2147483648", "9" * 400, "[" * 3000, '"' + "x" * 5000 + '"',
)  # fmt: skip
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U32",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
)


class Damage:
    """Random changes of a set of files; `values`: whether they may have changed bytes of weights."""

    def __init__(self, rng: random.Random, files: Files, heads: dict[str, int], kind: str) -> None:
        self.rng, self.heads, self.kind = rng, heads, kind
        self.files = dict(files)
        self.values = False
        self.story: list[str] = []
        endings = TARGETS[kind]
        names = [name for name in files if name.endswith(endings)]
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            name = rng.choice(names)
            steps: list[Callable[[str, bytearray], bytearray]] = [
                self.flip,
                self.cut,
                self.splice,
                self.number,
            ]
            if name.endswith((".json", ".safetensors")):
                steps += [self.json_value, self.json_value, self.json_key]
            if name.endswith((".txt", ".jinja")):
                steps += [self.words, self.words]
            step = rng.choice(steps)
            self.story.append(f"{step.__name__} {name}")
            self.files[name] = bytes(step(name, bytearray(self.files[name])))
        if kind == "sharded" and rng.random() < 0.1:
            one, other = rng.sample(names, 2)
            self.story.append(f"exchange {one} {other}")
            self.files[one], self.files[other] = self.files[other], self.files[one]

    def _place(self, name: str, data: bytearray) -> int:
        head = min(self.heads.get(name, len(data)), len(data))
        if not data:
            return 0
        if head < len(data) and self.rng.random() < 0.1:
            self.values = True
            return self.rng.randrange(head, len(data))
        return self.rng.randrange(max(head, 1))

    def flip(self, name: str, data: bytearray) -> bytearray:
        if data:
            data[self._place(name, data)] ^= 1 << self.rng.randrange(8)
        return data

    def cut(self, name: str, data: bytearray) -> bytearray:
        return data[: self.rng.choice((self._place(name, data), len(data) - self.rng.randrange(1, 70)))]

    def splice(self, name: str, data: bytearray) -> bytearray:
        """Remove, duplicate or overwrite a piece."""
        start, target = self._place(name, data), self._place(name, data)
        piece = data[start : start + self.rng.choice((1, 4, 8, 32, 200))]
        how = self.rng.randrange(3)
        if how == 0:
            return data[:start] + data[start + len(piece) :]
        if how == 1:
            return data[:target] + piece + data[target:]
        if target < self.heads.get(name, len(data)) < target + len(piece):
            self.values = True
        data[target : target + len(piece)] = piece
        return data

    def number(self, name: str, data: bytearray) -> bytearray:
        """Write another number over 4 or 8 bytes: a length, count, type or offset."""
        size, place = self.rng.choice(((4, "<I"), (8, "<Q")))
        at = self._place(name, data)
        if at + size <= len(data):
            if at < self.heads.get(name, len(data)) < at + size:
                self.values = True
            struct.pack_into(place, data, at, self.rng.choice(NUMBERS) % 256**size)
        return data

    def words(self, name: str, data: bytearray) -> bytearray:
        lines = data.split(self.rng.choice((b"\n", b" ", b"%}", b"{{")))
        self.rng.shuffle(lines)
        return bytearray(b"\n".join(lines))

    def _text(self, name: str, data: bytearray) -> tuple[str, Callable[[str], bytearray]]:
        """The JSON of a file, and a function that builds the file from changed JSON."""
        if not name.endswith(".safetensors"):
            return data.decode("utf-8", "replace"), lambda text: bytearray(text.encode("utf-8", "replace"))
        head = min(self.heads[name], len(data))

        def make(text: str) -> bytearray:
            header = text.encode("utf-8", "replace")
            return bytearray(struct.pack("<Q", len(header)) + header + data[head:])

        return data[8:head].decode("utf-8", "replace"), make

    def json_value(self, name: str, data: bytearray) -> bytearray:
        text, make = self._text(name, data)
        places = list(
            re.finditer(r'(?<=[:\[,])\s*("[^"]*"|-?[\d.]+(?:e-?\d+)?|true|false|null)(?=\s*[,\]}])', text)
        )
        if not places:
            return data
        found = self.rng.choice(places)
        value = self.rng.choice(VALUES)
        if re.fullmatch(r'"[A-Z0-9_]+"', found[1]):
            value = f'"{self.rng.choice(DTYPES)}"'
        elif found[1].isdigit() and self.rng.random() < 0.5:
            value = str(int(found[1]) + self.rng.choice((-8, -4, -1, 1, 4, 8)))
        return make(text[: found.start(1)] + value + text[found.end(1) :])

    def json_key(self, name: str, data: bytearray) -> bytearray:
        """Rename or delete a key."""
        text, make = self._text(name, data)
        keys = list(re.finditer(r'"([^"]*)"(?=\s*:)', text))
        if not keys:
            return data
        one, other = self.rng.choice(keys), self.rng.choice(keys)
        return make(text[: one.start(1)] + self.rng.choice((other[1], "x", "")) + text[one.end(1) :])


# -- loading


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    model = minilm.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 4, 7]]))
    if model.load_report.initialised:
        raise ValueError("newly initialised: announced by a warning, which counts as an error")
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def use(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """Load a case and use it briefly; returns the tensors if they are to be compared."""
    if kind in ("safetensors", "sharded", "quantised", "config"):
        return tensors_of(folder)
    if kind == "gguf":
        minilm.AutoTokenizer.from_pretrained(folder / "model.gguf")("a b ab")
        return tensors_of(folder / "model.gguf")
    if kind == "sentence":
        SentenceEncoder(folder, device="cpu").encode(["red tea"], show_progress_bar=False)
        return {}
    tokenizer = minilm.AutoTokenizer.from_pretrained(folder)
    tokenizer.decode(tokenizer("red teas <|user|>").input_ids)
    if kind == "template":
        messages = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "red"}]
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {}


def excused(sound: dict[str, torch.Tensor], found: dict[str, torch.Tensor], story: list[str]) -> bool:
    """Whether the changed file is still valid: the same numbers at exchanged places, or bytes read as another
    type of the same size."""

    def bag(tensors: dict[str, torch.Tensor]) -> Counter[tuple[Any, ...]]:
        return Counter((tuple(t.shape), t.double().sum().item()) for t in tensors.values())

    return bag(sound) == bag(found)


def judge(kind: str, damage: Damage, folder: Path, sound: dict[str, torch.Tensor]) -> str:
    """ "" if the case behaved correctly, else the problem."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(folder, damage.files)
    verdict = ""
    try:
        found = use(kind, folder)
    except EXPECTED as error:
        text = str(error)
        if not text or "\n\n\n" in text or len(text) > 8000:
            verdict = f"an error of {len(text)} characters: {text[:200]!r}"
    except MemoryError:
        verdict = "ran out of memory"
    except BaseException as error:  # any other kind of error is a finding
        verdict = f"{type(error).__name__}: {error}"
    else:
        same = found.keys() == sound.keys() and all(
            torch.equal(found[name], tensor) for name, tensor in sound.items()
        )
        compared = kind in ("safetensors", "sharded", "quantised", "gguf") and not damage.values
        if compared and not same and not excused(sound, found, damage.story):
            verdict = "loads, with values that differ from the undamaged file"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return verdict or (f"memory grew by {grown >> 20} MB" if grown > GROWTH else "")


class Fuzzer:
    """The undamaged files, and their tensors."""

    def __init__(self, top: Path) -> None:
        self.folder = top / "case"
        self.sound = sound_files(top / "sound")
        self.heads = {
            kind: {name: head_of(name, data) for name, data in files.items()}
            for kind, files in self.sound.items()
        }
        self.tensors = {}
        for kind, files in self.sound.items():
            write(self.folder, files)
            self.tensors[kind] = use(kind, self.folder)

    def damage(self, kind: str, seed: int, number: int) -> Damage:
        return Damage(random.Random(f"{kind}:{seed}:{number}"), self.sound[kind], self.heads[kind], kind)

    def run(self, kind: str, seed: int, number: int) -> str:
        return judge(kind, self.damage(kind, seed, number), self.folder, self.tensors[kind])


class Child:
    """A process that runs cases until it is ended, or a case kills it."""

    def __init__(self, fuzzer: Fuzzer) -> None:
        orders, self.send = os.pipe()
        self.receive, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.send)
            os.close(self.receive)
            _serve(fuzzer, orders, answers)
        os.close(orders)
        os.close(answers)

    def run(self, kind: str, seed: int, number: int) -> tuple[str, bool]:
        """The problem of a case, and whether the child is still running."""
        os.write(self.send, json.dumps([kind, seed, number]).encode() + b"\n")
        answer = b""
        until = time.monotonic() + SECONDS_A_CASE
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.receive], [], [], max(0, until - time.monotonic()))
            if not ready:
                self.end()
                return f"still running after {SECONDS_A_CASE:.0f} s", False
            data = os.read(self.receive, 1 << 16)
            if not data:
                _, status = os.waitpid(self.pid, 0)
                self._close()
                died = (
                    signal.Signals(os.WTERMSIG(status)).name
                    if os.WIFSIGNALED(status)
                    else f"exit {status >> 8}"
                )
                return f"the process died: {died}", False
            answer += data
        return str(json.loads(answer)), True

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._close()

    def _close(self) -> None:
        os.close(self.send)
        os.close(self.receive)


def _serve(fuzzer: Fuzzer, orders: int, answers: int) -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    with open(orders, encoding="utf-8") as stream:
        for line in stream:
            kind, seed, number = json.loads(line)
            os.write(answers, json.dumps(fuzzer.run(kind, seed, number)[:2000]).encode() + b"\n")
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=None, help="stop after this many seconds")
    parser.add_argument("--cases", type=int, default=None, help="stop after this many cases (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(TARGETS), help="some of " + ", ".join(TARGETS))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "minilm-fuzz")
    parser.add_argument("--repeat", metavar="KIND:SEED:NUMBER", help="run one case in this process")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - TARGETS.keys():
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="minilm-fuzz-") as top:
        fuzzer = Fuzzer(Path(top))
        if options.repeat:
            return repeat(fuzzer, *options.repeat.split(":"))
        return campaign(fuzzer, kinds, options)


def repeat(fuzzer: Fuzzer, kind: str, seed: str, number: str) -> int:
    damage = fuzzer.damage(kind, int(seed), int(number))
    print("\n".join(damage.story))
    write(fuzzer.folder, damage.files)
    try:
        use(kind, fuzzer.folder)
    except BaseException:
        traceback.print_exc()
    verdict = fuzzer.run(kind, int(seed), int(number))
    print(verdict or "as it should be")
    return int(bool(verdict))


def campaign(fuzzer: Fuzzer, kinds: list[str], options: argparse.Namespace) -> int:
    cases = options.cases or (2000 if options.seconds is None else sys.maxsize)
    start, done, found = time.monotonic(), Counter[str](), 0
    child = Child(fuzzer)
    number = 0
    while sum(done.values()) < cases and (
        options.seconds is None or time.monotonic() - start < options.seconds
    ):
        kind = kinds[number % len(kinds)]
        verdict, lives = child.run(kind, options.seed, number)
        done[kind] += 1
        if lives and (verdict or sum(done.values()) % RENEWED == 0):
            child.end()
            child = Child(fuzzer)
            if verdict:  # counts only if it happens in a new process too
                verdict, lives = child.run(kind, options.seed, number)
        if verdict:
            found += 1
            place = options.keep / f"{kind}-{options.seed}-{number}"
            damage = fuzzer.damage(kind, options.seed, number)
            write(place, damage.files)
            print(f"{kind}: {verdict}\n  by {'; '.join(damage.story)}\n  kept in {place}")
            print(f"  again: python tools/fuzz.py --repeat {kind}:{options.seed}:{number}", flush=True)
        if not lives:
            child = Child(fuzzer)
        number += 1
    child.end()
    per_kind = ", ".join(f"{count} {kind}" for kind, count in done.items())
    print(f"{sum(done.values())} cases in {time.monotonic() - start:.0f} s ({per_kind}): {found} to look at")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
