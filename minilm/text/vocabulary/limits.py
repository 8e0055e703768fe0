"""Limits for a tokenizer.json, which bound the time and memory of loading and using it.

The `tokenizers` library builds and runs whatever such a file contains. Its regular expressions abort a match
after ten million steps, but not a text after many such matches; a chain of replacements can grow a text
exponentially; a template can repeat a token millions of times, with ids that have no embedding.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import TokenizerError, backend_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_DEPTH = 16  # of steps in sequences
MAX_STEPS = 200
MAX_PATTERN = 20_000  # characters
MAX_REPEATS = 100_000  # product of all {n,m} in a pattern; the library expands them
MAX_GROWTH = 256  # output characters per input character, through all steps of a kind
MAX_TEMPLATE = 1000  # tokens around a text
MAX_WORD = 1000  # characters; WordPiece takes quadratic time
MAX_ID = 1 << 24
MAX_REPLACEMENT = 1000  # bytes per character in a table of sentencepiece

_PROBE_SECONDS = 0.05  # for at most 400 characters; a usual pattern takes a thousandth
_PROBE_SIZES = (16, 24, 36, 54, 81, 121, 182, 273, 400)
_PROBES = (
    "a",
    "A",
    "1",
    " ",
    "\n",
    "\t",
    ".",
    "_",
    "é",
    "日",
    "\u0301",
    "ʰ",
    "🚨",
    "ab",
    "aA",
    "a1",
    "a ",
    " \n",
)
_UNKNOWN = re.compile(r"\\[1-9]|\\[kg]<|\(\?[~(]|\(\?<?[a-zA-Z_]\w*>.*\\g")
_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}


def check(data: Mapping[str, Any], source: str, known: tuple[str, ...] = ()) -> None:
    """Raise TokenizerError if `data` exceeds the limits, before the library reads it. `known` patterns are
    not tried."""
    for name, inside in _STEPS.items():
        steps = list(_flat(data.get(name), inside, f"{source}: {name}"))
        if len(steps) > MAX_STEPS:
            raise TokenizerError(f"{source}: {name} has {len(steps)} steps, at most {MAX_STEPS} are allowed")
        growth = 1.0
        composed = False
        for step in steps:
            where = f"{source}: {name}: {step.get('type')}"
            growth *= _growth(step, where, known)
            if step.get("type") in ("NFKC", "NFKD", "Precompiled", "Nmt"):
                growth *= 18 if composed else 1  # the longest: U+FDFA
                composed = True
            if growth > MAX_GROWTH:
                raise TokenizerError(
                    f"{where}: the steps up to here turn one character into up to {growth:.0f}, at most "
                    f"{MAX_GROWTH} are allowed"
                )
            if name == "post_processor":
                _check_template(step, where)
    model = data.get("model")
    if isinstance(model, Mapping):
        longest = model.get("max_input_chars_per_word")
        if isinstance(longest, int) and longest > MAX_WORD:
            raise TokenizerError(
                f"{source}: max_input_chars_per_word is {longest}, at most {MAX_WORD} is allowed"
            )
        vocab = model.get("vocab")
        if isinstance(vocab, Mapping):
            for token, index in vocab.items():
                if isinstance(index, int) and index >= MAX_ID:  # the library reports other errors
                    raise TokenizerError(
                        f"{source}: the id of {token!r:.60} is {index!r:.60}, expected one below {MAX_ID}"
                    )


def check_ids(backend: Backend, data: Mapping[str, Any], source: str) -> None:
    """Raise TokenizerError if ids in `data` (of added tokens, and of tokens around a text) differ from the
    vocabulary's."""
    for token in data.get("added_tokens") or []:
        index, text = token.get("id"), token.get("content")
        found = backend.token_to_id(text)
        if found != index:
            raise TokenizerError(
                f"{source}: the added token {text!r:.60} has id {index!r:.60}, but the vocabulary gives it "
                f"{found}"
            )
    for step in _flat(data.get("post_processor"), "processors", source):
        special = step.get("special_tokens")
        pairs = [step.get(key) for key in ("sep", "cls")]
        ids = [pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2]
        if isinstance(special, Mapping):
            ids += [index for token in special.values() for index in token.get("ids", [])]
        for index in ids:
            if backend.id_to_token(index) is None:
                raise TokenizerError(
                    f"{source}: post_processor: {step.get('type')} adds the id {index} to a text, which no "
                    "token has"
                )


def check_charsmap(table: bytes, source: str) -> None:
    """Raise TokenizerError for a table of sentencepiece that replaces one character by a long text."""
    size = int.from_bytes(table[:4], "little")
    longest = max(map(len, table[4 + size :].split(b"\0")), default=0)
    if longest > MAX_REPLACEMENT:
        raise TokenizerError(
            f"{source}: the table of replaced characters has a text of {longest} bytes for one, at most "
            f"{MAX_REPLACEMENT} are allowed"
        )


def check_pattern(pattern: str, where: str) -> None:
    """Raise TokenizerError for a regular expression that is too large, or takes far more than linear time on
    runs of characters, such as `(a+)+b` or `a*a*a*a*b`."""
    if len(pattern) > MAX_PATTERN:
        raise TokenizerError(
            f"{where}: a pattern of {len(pattern)} characters, at most {MAX_PATTERN} are allowed"
        )
    repeats = 1
    for low, high in re.findall(r"\{(\d*)(?:,(\d*))?\}", pattern):
        repeats *= max(1, *(int(number[:9]) for number in (low, high) if number), 1)
        if repeats > MAX_REPEATS:
            raise TokenizerError(
                f"{where}: the repetitions in {pattern!r:.60} multiply to more than {MAX_REPEATS}"
            )
    if _UNKNOWN.search(pattern.replace("\\\\", "")):
        raise TokenizerError(f"{where}: {pattern!r:.60} refers to its own groups, which is not supported")
    from tokenizers import Regex, pre_tokenizers

    with backend_errors(f"{where}: the pattern {pattern!r:.60}"):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = "".join(dict.fromkeys(re.sub(r"\\.|\[[^\]]*\]|[^\w\s]", "", pattern)))[:20]
        words = dict.fromkeys(re.findall(r"\w{2,4}", pattern)[:20])
        # The library skips a match if a required character is missing, so the probe ends with all of them.
        last = "".join(dict.fromkeys(pattern + "01aA .!\0"))[:200]
        slow = TokenizerError(
            f"{where}: the pattern {pattern!r:.60} takes far too long on repeated characters"
        )
        total = 0.0
        for unit in dict.fromkeys([*_PROBES, *letters, *words]):
            for start, end in (
                ("", "\x01"),
                ("", "\x01" + last),
                ("", "\n" + last),
                (letters, "\x01" + last),
            ):
                for size in _PROBE_SIZES:
                    begin = time.thread_time()
                    try:
                        split.pre_tokenize_str(start + unit * (size // len(unit)) + end)
                    except BaseException as problem:  # a PanicException: ten million steps for one match
                        if "retry-limit" in str(problem):
                            raise slow from None
                        raise
                    seconds = time.thread_time() - begin
                    total += seconds
                    if seconds > _PROBE_SECONDS or total > 20 * _PROBE_SECONDS:
                        raise slow


def _flat(step: Any, inside: str, where: str, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """A step of the pipeline, or the steps of a sequence."""
    if depth > MAX_DEPTH:
        raise TokenizerError(f"{where}: sequences within sequences, more than {MAX_DEPTH} deep")
    if isinstance(step, Mapping):
        inner = step.get(inside)
        if isinstance(inner, list):
            for item in inner:
                yield from _flat(item, inside, where, depth + 1)
        else:
            yield step


def _growth(step: Mapping[str, Any], where: str, known: tuple[str, ...]) -> float:
    """Maximum number of characters into which a step turns one character."""
    kind, content, growth = step.get("type"), step.get("content"), 1.0
    if kind == "ByteLevel":
        growth = 4.0  # a character has up to four bytes
    if kind == "Precompiled" and isinstance(step.get("precompiled_charsmap"), str):
        try:
            check_charsmap(base64.b64decode(step["precompiled_charsmap"]), where)
        except ValueError as problem:
            if isinstance(problem, TokenizerError):
                raise
            raise TokenizerError(f"{where}: precompiled_charsmap is damaged: {problem}") from problem
    if kind == "Prepend" and len(str(step.get("prepend"))) > MAX_GROWTH:
        raise TokenizerError(f"{where}: adds more than {MAX_GROWTH} characters before a text")
    pattern = step.get("pattern")
    if isinstance(pattern, Mapping):
        regex, plain = pattern.get("Regex"), pattern.get("String")
        if isinstance(regex, str) and regex not in known:
            check_pattern(regex, where)
        if kind == "Replace" and isinstance(content, str):
            if isinstance(plain, str) and plain:
                growth = len(content) / len(plain)
            else:
                growth = len(content) + (1.0 if _may_be_empty(regex) else 0.0)
    return max(1.0, growth)


def _may_be_empty(pattern: Any) -> bool:
    from tokenizers import Regex, normalizers

    try:
        return bool(normalizers.Replace(Regex(str(pattern)), "x").normalize_str("\x01") not in ("\x01", "x"))
    except Exception:  # damaged: the next step reports it
        return True


def _check_template(step: Mapping[str, Any], where: str) -> None:
    special = step.get("special_tokens")
    sizes = {}
    if isinstance(special, Mapping):
        for name, token in special.items():
            ids = token.get("ids") if isinstance(token, Mapping) else None
            sizes[name] = len(ids) if isinstance(ids, list) else 1
    for kind in ("single", "pair"):
        pieces = step.get(kind)
        count = 0
        for piece in pieces if isinstance(pieces, list) else ():
            inner = piece.get("SpecialToken") or piece.get("Sequence") if isinstance(piece, Mapping) else None
            if isinstance(inner, Mapping):
                count += sizes.get(str(inner.get("id")), 1) if "SpecialToken" in piece else 1
                if isinstance(inner.get("type_id"), int) and inner["type_id"] >= 1 << 16:
                    raise TokenizerError(f"{where}: the token type {inner['type_id']} is too large")
        if count > MAX_TEMPLATE:
            raise TokenizerError(
                f"{where}: adds {count} tokens to a text, at most {MAX_TEMPLATE} are allowed"
            )
