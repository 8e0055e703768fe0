"""Reads sentencepiece model files (tokenizer.model, spiece.model, sentencepiece.bpe.model).

Such a file is one protocol-buffer message, `ModelProto` of sentencepiece_model.proto
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto): the pieces with their
scores and kinds, how the model was trained, and how text is normalised. Only a dozen of its fields matter, so
this file parses them directly; `build.py` turns them into a `tokenizers` pipeline, which unlike the
sentencepiece library supports offsets, pairs and truncation."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...files import read_bytes
from .errors import TokenizerError
from .limits import check_charsmap

_MAX_BYTES = 256 << 20


class Algorithm(enum.IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class Kind(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # <s>, </s>: never matched in text
    USER_DEFINED = 4  # matched in text before anything else
    UNUSED = 5
    BYTE = 6  # <0x00> ... <0xFF>


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """A piece's id is its index in `pieces`; an id of -1 means that the model has no such piece. `charsmap`
    is the compiled table of character replacements; may be empty."""

    file: Path
    pieces: tuple[Piece, ...]
    algorithm: Algorithm = Algorithm.UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def piece(self, index: int) -> str | None:
        return self.pieces[index].text if 0 <= index < len(self.pieces) else None


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in `path`; raises TokenizerError if it is not one, is damaged, or needs an unsupported
    feature."""
    data = read_bytes(path, limit=_MAX_BYTES, error=TokenizerError)
    try:
        model = _parse(path, data)
    except (ValueError, struct.error) as problem:
        if isinstance(problem, TokenizerError):
            raise
        hint = " (it looks like a tiktoken file; tokenizer.json is needed)" if _is_tiktoken(data) else ""
        raise TokenizerError(f"{path}: not a sentencepiece model: {problem}{hint}") from problem
    check_charsmap(model.charsmap, str(path))
    if not model.pieces:
        raise TokenizerError(f"{path}: a sentencepiece model without pieces")
    if model.piece(model.unk_id) is None:
        raise TokenizerError(f"{path}: unk_id is {model.unk_id}, but there are {len(model.pieces)} pieces")
    return model


def _parse(path: Path, data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    options: dict[int, int] = {}
    whitespace: dict[int, int] = {}
    charsmap = b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            options.update((n, v) for n, v in _fields(_as_bytes(value)) if isinstance(v, int))
        elif number == 3:
            for inner, setting in _fields(_as_bytes(value)):
                if isinstance(setting, int):
                    whitespace[inner] = setting
                elif inner == 2:
                    charsmap = setting
        elif number == 5 and any(inner == 2 and setting for inner, setting in _fields(_as_bytes(value))):
            raise TokenizerError(
                f"{path}: denormalizer_spec (characters replaced on decoding) is not supported"
            )
    if options.get(24, 0):
        raise TokenizerError(f"{path}: treat_whitespace_as_suffix is not supported")
    if not whitespace.get(5, 1):
        raise TokenizerError(f"{path}: escape_whitespaces = false is not supported")
    return SentencePieceModel(
        file=path,
        pieces=tuple(pieces),
        algorithm=Algorithm(options.get(3, Algorithm.UNIGRAM)),
        byte_fallback=bool(options.get(35, 0)),
        unk_id=_int32(options.get(40, 0)),
        bos_id=_int32(options.get(41, 1)),
        eos_id=_int32(options.get(42, 2)),
        pad_id=_int32(options.get(43, -1)),
        charsmap=charsmap,
        add_dummy_prefix=bool(whitespace.get(3, 1)),
        remove_extra_whitespaces=bool(whitespace.get(4, 1)),
    )


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, Kind.NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _as_bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _as_bytes(value))
        elif number == 3 and isinstance(value, int):
            kind = Kind(value)
    if score != score:
        raise ValueError(f"the score of piece {text!r} is not a number")
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value, an int for a varint, the raw bytes for anything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire == 5:
            length = 4
        elif wire == 1:
            length = 8
        else:
            raise ValueError(f"field {number} has wire type {wire} at byte {at}")
        if number == 0 or length > end - at:
            raise ValueError(f"field {number} of {length} bytes where {end - at} are left")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"the number at byte {at} runs past the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _int32(value: int) -> int:
    """Negative numbers are stored as 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text or a message was expected")
    return value


def _is_tiktoken(data: bytes) -> bool:
    """tiktoken files are lines of `base64 rank`."""
    first, _, _ = data.partition(b"\n")
    word, _, rank = first.partition(b" ")
    return bool(word) and rank.strip().isdigit()
