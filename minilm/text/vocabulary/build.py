"""Pipelines of the `tokenizers` library, built from the older kinds of vocabulary files.

A pipeline is normalizer -> pre-tokenizer -> model -> decoder; `families.py` adds the special tokens around a
text ([CLS] ... [SEP]). All kinds of files become such a pipeline, so offsets, pairs, truncation and batches
work the same for all.

    vocab.txt                    WordPiece                     BERT, DistilBERT, ELECTRA, MPNet
    vocab.json + merges.txt      byte-level BPE                GPT-2, RoBERTa, Qwen2
    sentencepiece models, GGUF   BPE or unigram over "▁word"   Llama 1 and 2, Mistral, XLM-RoBERTa, DeBERTa,
                                                               ALBERT
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import read_json, read_text
from .errors import TokenizerError, backend_errors
from .sentencepiece import Algorithm, Kind, Piece, SentencePieceModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPACE = "▁"

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_TEKKEN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@dataclass(frozen=True)
class Splitting:
    """How a byte-level BPE splits a text into words before it merges bytes: by `patterns`, one after another.

    `ignore_merges`: a word that is in the vocabulary becomes one token. `adds_bos`: llama.cpp's default for
    adding bos."""

    patterns: tuple[str, ...] = (_GPT2,)
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "qwen2": Splitting((_CL100K % "",), nfc=True),
    "llama-bpe": Splitting((_CL100K % "{1,3}",), ignore_merges=True, adds_bos=True),
    "tekken": Splitting((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def wordpiece(vocab_file: Path, unk_token: str, settings: Mapping[str, Any]) -> Backend:
    """BERT's WordPiece over the lines of vocab.txt, with `do_lower_case`, `strip_accents` and
    `tokenize_chinese_chars` of `settings`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = read_vocab_txt(vocab_file)
    if unk_token not in vocab:
        raise TokenizerError(f"{vocab_file}: has no {unk_token}, the token for unknown words")
    with backend_errors(str(vocab_file)):
        backend = Tokenizer(models.WordPiece(vocab, unk_token=unk_token))
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
            strip_accents=settings.get("strip_accents"),
            lowercase=bool(settings.get("do_lower_case", True)),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    splitting: Splitting,
    *,
    add_prefix_space: bool = False,
    source: str,
) -> Backend:
    """BPE over bytes: any text can be encoded, nothing is unknown. `source` is for error messages."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    with backend_errors(source):
        backend = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=merges,
                continuing_subword_prefix="",
                end_of_word_suffix="",
                fuse_unk=False,
                ignore_merges=splitting.ignore_merges,
            )
        )
        steps: list[Any] = []
        if splitting.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        plain = splitting.patterns == (_GPT2,)  # the pattern that is built into ByteLevel
        if not plain:
            steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=plain))
        backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
        if splitting.nfc:
            backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
    return backend


def llama(model: SentencePieceModel, *, legacy: bool, add_prefix_space: bool) -> Backend:
    """transformers 5's `LlamaTokenizer`: no normalizer, "▁" for spaces, one "▁" before the text (`legacy`:
    before the text after each special token too). It differs from sentencepiece only if a text starts with a
    space, which in sentencepiece still gets its own "▁"."""
    from tokenizers import pre_tokenizers

    backend = _sentencepiece_backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE,
        prepend_scheme=("always" if legacy else "first") if add_prefix_space else "never",
        split=False,
    )
    backend.decoder = _sentencepiece_decoder(strip_prefix=add_prefix_space)
    return backend


def plain_sentencepiece(model: SentencePieceModel) -> Backend:
    """The same steps as the sentencepiece library: replace characters, strip and collapse spaces if the model
    says so, add one space before the text, write spaces as "▁"."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    backend = _sentencepiece_backend(model)
    with backend_errors(str(model.file)):
        steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
        if model.remove_extra_whitespaces:
            # In this order, because " +\z" alone takes quadratic time on a run of spaces.
            steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
        if model.add_dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
        backend.normalizer = normalizers.Sequence(steps)
    if not any(SPACE in piece.text[1:] for piece in model.pieces):
        # No piece spans two words, so splitting at "▁" changes no token and separates words (word_ids).
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="never", split=True
        )
    backend.decoder = _sentencepiece_decoder(strip_prefix=model.add_dummy_prefix)
    return backend


def xlm_roberta(
    model: SentencePieceModel, *, add_prefix_space: bool, mask_token: str, languages: Sequence[str] = ()
) -> Backend:
    """XLM-RoBERTa's ids on a unigram model: fairseq put <s>, <pad>, </s>, <unk> first, so every piece after
    sentencepiece's own <unk>, <s>, </s> is shifted by one, and <mask> is last, after mBART's languages."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if model.algorithm is not Algorithm.UNIGRAM:
        raise TokenizerError(f"{model.file}: expected a unigram model, found {model.algorithm.name}")
    first = [Piece(text, 0.0, Kind.CONTROL) for text in ("<s>", "<pad>", "</s>", "<unk>")]
    last = [Piece(text, 0.0, Kind.CONTROL) for text in (*languages, mask_token)]
    pieces = [*first, *model.pieces[3:], *last]
    with backend_errors(str(model.file)):
        backend = Tokenizer(models.Unigram([(piece.text, piece.score) for piece in pieces], 3, False))
        if model.charsmap:
            backend.normalizer = normalizers.Precompiled(model.charsmap)
        scheme = "always" if add_prefix_space else "never"
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme),
            ]
        )
        backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    return backend


def deberta(model: SentencePieceModel, settings: Mapping[str, Any], mask_token: str) -> Backend:
    """DeBERTa's unigram model: the characters that the file replaces (transformers 5 leaves them as they
    are), white space as one space, NFC, and with `split_by_punct` punctuation by itself. The mask is no piece
    of the file, but the next id."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if model.algorithm is not Algorithm.UNIGRAM:
        raise TokenizerError(f"{model.file}: expected a unigram model, found {model.algorithm.name}")
    with backend_errors(str(model.file)):
        pieces = [(piece.text, piece.score) for piece in model.pieces]
        backend = Tokenizer(models.Unigram(pieces, model.unk_id, False))
        backend.add_tokens([AddedToken(mask_token, normalized=False, special=True)])
        steps: list[Any] = [normalizers.Lowercase()] if settings.get("do_lower_case") else []
        steps += [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
        spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        steps += [spaces, normalizers.NFC(), normalizers.Strip(left=False, right=True)]
        backend.normalizer = normalizers.Sequence(steps)
        scheme = "first" if settings.get("add_prefix_space") is False else "always"
        split = [pre_tokenizers.Punctuation("isolated")] if settings.get("split_by_punct") else []
        spaced = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*split, spaced])
        backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    return backend


def albert(model: SentencePieceModel, settings: Mapping[str, Any]) -> Backend:
    """ALBERT's steps on a unigram model, with `do_lower_case` and `keep_accents` of `settings`.

    A number before a comma is never one piece with it ("1,"), as in ALBERT's own code and in the published
    tokenizer.json files; transformers 5 joins them where there is only spiece.model, and starts a new word
    after each user-defined symbol, such as a bracket.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if model.algorithm is not Algorithm.UNIGRAM:
        raise TokenizerError(f"{model.file}: expected a unigram model, found {model.algorithm.name}")
    apart = [len(p.text) > 1 and p.text[-1] == "," and p.text[-2].isdigit() for p in model.pieces]
    scores = [(p.text, p.score - 100 * a) for p, a in zip(model.pieces, apart, strict=True)]
    with backend_errors(str(model.file)):
        backend = Tokenizer(models.Unigram(scores, model.unk_id, False))
        steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not settings.get("keep_accents", False):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
        if settings.get("do_lower_case", True):
            steps.append(normalizers.Lowercase())
        if model.charsmap:
            steps.append(normalizers.Precompiled(model.charsmap))
        backend.normalizer = normalizers.Sequence(steps)
        space = {"replacement": SPACE, "prepend_scheme": "always"}
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
        )
        backend.decoder = decoders.Metaspace(**space)
        special = (Kind.UNKNOWN, Kind.CONTROL)
        texts = [piece.text for piece in model.pieces if piece.kind in special]
        backend.add_tokens([AddedToken(text, normalized=False, special=True) for text in texts if text])
    return backend


def _sentencepiece_backend(model: SentencePieceModel) -> Backend:
    from tokenizers import AddedToken, Tokenizer, models

    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    if len(ids) != len(model.pieces):
        double, _ = Counter(piece.text for piece in model.pieces).most_common(1)[0]
        raise TokenizerError(f"{model.file}: the piece {double!r} appears twice")
    unk_token = model.piece(model.unk_id)
    byte_fallback = model.byte_fallback and all(f"<0x{byte:02X}>" in ids for byte in range(256))
    with backend_errors(str(model.file)):
        if model.algorithm is Algorithm.BPE:
            backend = Tokenizer(
                models.BPE(
                    vocab=ids,
                    merges=_merges(model.pieces),
                    unk_token=unk_token,
                    fuse_unk=True,
                    byte_fallback=byte_fallback,
                )
            )
        elif model.algorithm is Algorithm.UNIGRAM:
            scores = [(piece.text, piece.score) for piece in model.pieces]
            backend = Tokenizer(models.Unigram(scores, model.unk_id, byte_fallback))
        else:
            raise TokenizerError(
                f"{model.file}: a sentencepiece model of type {model.algorithm.name}, expected UNIGRAM or BPE"
            )
        special = (Kind.UNKNOWN, Kind.CONTROL)
        backend.add_tokens(
            [
                AddedToken(piece.text, normalized=False, special=piece.kind in special)
                for piece in model.pieces
                if piece.kind in (*special, Kind.USER_DEFINED) and piece.text
            ]
        )
    return backend


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The merges that give each piece, best first. sentencepiece stores none: it joins the two neighbours
    that form the piece with the highest score.

    transformers 5.17 orders them by ids instead, which is wrong for Llama and Mistral: there runs of spaces
    have low ids and the lowest scores. Ordered by scores, Mistral's five models agree with the sentencepiece
    library on every text tried; ordered by ids, half of the texts with two spaces in a row differ.
    """
    order = {
        piece.text: (-piece.score, index)
        for index, piece in enumerate(pieces)
        if piece.kind in (Kind.NORMAL, Kind.UNUSED, Kind.USER_DEFINED)
    }
    ranked: list[tuple[tuple[float, int], int, str, str]] = []
    for text, rank in order.items():
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in order and right in order:
                ranked.append((rank, at, left, right))
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _sentencepiece_decoder(*, strip_prefix: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def read_vocab_txt(path: Path) -> dict[str, int]:
    """One token per line; its id is the line number. Lines end at "\\n" only: vocabularies contain tokens
    that Python's splitlines would split."""
    vocab = {
        line.rstrip(): index
        for index, line in enumerate(read_text(path, error=TokenizerError).removesuffix("\n").split("\n"))
    }
    if not any(vocab):
        raise TokenizerError(f"{path}: expected one token per line, the file is empty")
    return vocab


def read_vocab_json(path: Path) -> dict[str, int]:
    """vocab.json: token -> id."""
    vocab = read_json(path, error=TokenizerError)
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < 1 << 31:
            raise TokenizerError(f"{path}: the id of {token!r} is {index!r}, expected a number from 0")
    return vocab


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt: two tokens per line, best first, after an optional line `#version: ...`."""
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(read_text(path, error=TokenizerError).split("\n"), 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise TokenizerError(
                f"{path}: line {number} has {len(parts)} parts, expected two tokens: {line[:60]!r}"
            )
        merges.append((parts[0], parts[1]))
    return merges
