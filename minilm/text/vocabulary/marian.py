"""The vocabulary of Marian's tokenizers: source.spm and target.spm split texts, vocab.json has the ids.

The ids are not those of the sentencepiece models, each of which has pieces that the other lacks. So a text
becomes pieces first, and a pipeline that looks up whole words makes them ids. A run of characters that a
model does not know is a piece too, which vocab.json may have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import has_file, read_bytes
from .build import SPACE, plain_sentencepiece, read_vocab_json
from .errors import TokenizerError, backend_errors
from .sentencepiece import Kind, SentencePieceModel, read_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

FILES = ("source.spm", "target.spm", "vocab.json")
_CODE = re.compile(r">>([A-Za-z][A-Za-z0-9_+-]*)<<")
_MOST = 256 << 20


class Splitter:
    """A sentencepiece model that splits texts into pieces."""

    def __init__(self, model: SentencePieceModel) -> None:
        # With a space at its end, a piece is never found, for the pipeline writes spaces as "▁".
        hidden = (Kind.CONTROL, Kind.UNKNOWN)
        pieces = [
            replace(piece, text=f"{piece.text} ", kind=Kind.UNUSED) if piece.kind in hidden else piece
            for piece in model.pieces
        ]
        self.backend = plain_sentencepiece(replace(model, pieces=tuple(pieces)))
        self.normalizer, self.backend.normalizer = self.backend.normalizer, None
        self.unknown = model.unk_id

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The pieces of each text; characters that the model does not know are pieces as they are."""
        with backend_errors("encoding"):
            normal = [self.normalizer.normalize_str(text) for text in texts]
            found = self.backend.encode_batch(normal, add_special_tokens=False)
        return [
            [
                text[start:end] if index == self.unknown else token
                for index, token, (start, end) in zip(row.ids, row.tokens, row.offsets, strict=True)
            ]
            for text, row in zip(normal, found, strict=True)
        ]


@dataclass(frozen=True)
class Marian:
    """What a Marian tokenizer has beside its pipeline."""

    source: Splitter
    target: Splitter
    languages: tuple[str, ...]
    """The codes in the vocabulary, such as >>fr<<."""
    files: Mapping[str, bytes]

    def code(self, text: str) -> str:
        """The code at the beginning of a text, "" without one. Raises TokenizerError for one that the model
        does not have."""
        found = _CODE.match(text)
        if found is not None and found.group() not in self.languages:
            raise TokenizerError(
                f"the text {text!r:.60} begins with {found.group()}, and the model has only the languages "
                f"{', '.join(self.languages) or '(none)'}"
            )
        return found.group() if found else ""


def read_marian(folder: Path, settings: Mapping[str, Any]) -> tuple[Backend, Marian]:
    """The pipeline of ids, and the rest. Raises TokenizerError for a damaged or missing file, and for
    separate vocabularies."""
    from tokenizers import Tokenizer, decoders, models

    for name in FILES:
        if not has_file(folder / name, error=TokenizerError):
            raise TokenizerError(f"{folder}: a Marian tokenizer needs {', '.join(FILES)}, and has no {name}")
    if settings.get("separate_vocabs"):
        raise TokenizerError(f"{folder}: separate_vocabs=True is not supported, only one vocab.json for both")
    if settings.get("sp_model_kwargs"):
        raise TokenizerError(
            f"{folder}: sp_model_kwargs={settings['sp_model_kwargs']!r:.60} is not supported"
        )
    vocab = read_vocab_json(folder / "vocab.json")
    special = []
    for name, default in (("unk_token", "<unk>"), ("eos_token", "</s>"), ("pad_token", "<pad>")):
        token = settings.get(name, default)
        token = token["content"] if isinstance(token, dict) else str(token)
        special.append(token)
        if token not in vocab and name != "pad_token":
            raise TokenizerError(f"{folder / 'vocab.json'}: has no {token!r}, the {name}")
    with backend_errors(str(folder / "vocab.json")):
        backend = Tokenizer(models.WordLevel(vocab, unk_token=special[0]))
        between = [decoders.Replace(token, f"{token} ") for token in special]
        once = [decoders.Replace(f"{token}  ", f"{token} ") for token in special]
        steps = [*between, decoders.Replace(SPACE, " "), decoders.Fuse(), *once]
        backend.decoder = decoders.Sequence(steps)
    source, target = (Splitter(read_sentencepiece(folder / name)) for name in FILES[:2])
    files = {name: read_bytes(folder / name, limit=_MOST, error=TokenizerError) for name in FILES}
    return backend, Marian(source, target, tuple(filter(_CODE.fullmatch, vocab)), files)
