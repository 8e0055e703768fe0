"""The vocabulary and the special tokens of a tokenizer; `pad_token`, `pad_token_id`, ... are attributes that
can be read and set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .vocabulary import SPECIAL_TOKENS, TokenizerError, backend_errors

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend


class _Token:
    """The attribute `bos_token`: a token or None."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Vocabulary, owner: type) -> str | None:
        return tokenizer._special.get(self.name)

    def __set__(self, tokenizer: Vocabulary, value: str | AddedToken | None) -> None:
        if value is None:
            tokenizer._special.pop(self.name, None)
            return
        text = value if isinstance(value, str) else getattr(value, "content", None)
        if not isinstance(text, str):
            raise TokenizerError(f"{self.name} = {value!r}: expected a token as a string")
        tokenizer._special[self.name] = text


class _TokenId:
    """The attribute `bos_token_id`: the id of `bos_token`, or None."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Vocabulary, owner: type) -> int | None:
        text = tokenizer._special.get(self.name)
        return None if text is None else tokenizer.token_to_id(text)

    def __set__(self, tokenizer: Vocabulary, value: int | None) -> None:
        if value is None:
            tokenizer._special.pop(self.name, None)
            return
        text = tokenizer.convert_ids_to_tokens(value)
        if not isinstance(text, str):
            raise TokenizerError(
                f"{self.name}_id = {value}: no token has this id, there are {len(tokenizer)}"
            )
        tokenizer._special[self.name] = text


class Vocabulary:
    """Tokens and their ids: base class of `Tokenizer`."""

    bos_token, bos_token_id = _Token("bos_token"), _TokenId("bos_token")
    eos_token, eos_token_id = _Token("eos_token"), _TokenId("eos_token")
    unk_token, unk_token_id = _Token("unk_token"), _TokenId("unk_token")
    sep_token, sep_token_id = _Token("sep_token"), _TokenId("sep_token")
    pad_token, pad_token_id = _Token("pad_token"), _TokenId("pad_token")
    cls_token, cls_token_id = _Token("cls_token"), _TokenId("cls_token")
    mask_token, mask_token_id = _Token("mask_token"), _TokenId("mask_token")
    pad_token_type_id = 0

    backend_tokenizer: Backend
    """The underlying `tokenizers.Tokenizer`."""
    _special: dict[str, str]
    _extra_special: list[str]

    SPECIAL_TOKENS_ATTRIBUTES = SPECIAL_TOKENS

    # -- special tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set."""
        ordered = [*SPECIAL_TOKENS, *(name for name in self._special if name not in SPECIAL_TOKENS)]
        return {name: self._special[name] for name in ordered if name in self._special}

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name."""
        return list(self._extra_special)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[str] | None) -> None:
        if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens or ()):
            raise TokenizerError(f"extra_special_tokens = {tokens!r:.60}: expected a list of strings")
        self._extra_special = list(tokens or ())

    @property
    def additional_special_tokens(self) -> list[str]:
        """transformers' older name for `extra_special_tokens`."""
        return self.extra_special_tokens

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[str] | None) -> None:
        self.extra_special_tokens = list(tokens or ())

    @property
    def additional_special_tokens_ids(self) -> list[int | None]:
        return [self._id_of(token) for token in self._extra_special]

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra_special]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens that have one."""
        found = (self._id_of(token) for token in self.all_special_tokens)
        return [index for index in found if index is not None]

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, str | AddedToken | Sequence[str | AddedToken]],
        replace_extra_special_tokens: bool = True,
    ) -> int:
        """Set special tokens ({"pad_token": "[PAD]", "extra_special_tokens": [...]}), adding those that are
        not in the vocabulary. Returns the number of new tokens; the model's embeddings must grow by that many
        rows."""
        from tokenizers import AddedToken

        new: list[str | AddedToken] = []
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                if isinstance(value, (str, AddedToken)):
                    raise TokenizerError(f"{name} = {value!r}: expected a list of tokens")
                before = [] if replace_extra_special_tokens else self._extra_special
                self._extra_special = list(
                    dict.fromkeys([*before, *(str(_content(token)) for token in value)])
                )
                new += value
            elif name in SPECIAL_TOKENS:
                setattr(self, name, value)
                new.append(value)  # type: ignore[arg-type]
            else:
                raise TokenizerError(
                    f"{name!r} is not a special token, expected one of {', '.join(SPECIAL_TOKENS)}"
                )
        return self.add_tokens(new, special_tokens=True)

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens that are never split; returns how many were not in the vocabulary before."""
        from tokenizers import AddedToken

        tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        for token in tokens:
            if not isinstance(token, (str, AddedToken)) or not _content(token):
                raise TokenizerError(f"cannot add {token!r}: expected a token as a string")
        with backend_errors("adding tokens"):
            if special_tokens:
                return self.backend_tokenizer.add_special_tokens(tokens)
            return self.backend_tokenizer.add_tokens(tokens)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token of an encoded text, 0 for the others."""
        if not already_has_special_tokens or token_ids_1 is not None:
            raise TokenizerError(
                "get_special_tokens_mask: only for one sequence with already_has_special_tokens=True; "
                "tokenizer(..., return_special_tokens_mask=True) gives the mask for a text"
            )
        special = set(self.all_special_ids)
        return [int(int(index) in special) for index in token_ids_0]

    # -- vocabulary

    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, without added tokens; len(tokenizer) counts all."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if it is not in the vocabulary."""
        return self.backend_tokenizer.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or the ids of several; unknown tokens get that of `unk_token`."""
        if isinstance(tokens, str):
            return self._id_of(tokens)
        return [self._id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token with an id, or the tokens with several; None for an id without a token."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(self._valid_id(ids))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        indices = (self._valid_id(index) for index in ids)
        return [self.backend_tokenizer.id_to_token(index) for index in indices if index not in skipped]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens."""
        tokens = list(tokens)
        with backend_errors("converting tokens to a string"):
            decoder = self.backend_tokenizer.decoder
            return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))

    def _id_of(self, token: str) -> int | None:
        if not isinstance(token, str):
            raise TokenizerError(f"expected a token as a string, got {token!r:.60}")
        index = self.token_to_id(token)
        return self.unk_token_id if index is None and token != self.unk_token else index

    def _valid_id(self, index: Any) -> int:
        """`index` as a number that the backend can look up."""
        try:
            number = index if type(index) is int else int(index.__index__())
        except (AttributeError, TypeError):
            raise TokenizerError(f"expected token ids as integers, got {index!r:.60}") from None
        if not 0 <= number < 1 << 32:
            hint = " (replace the -100 of ignored labels by pad_token_id first)" if number == -100 else ""
            raise TokenizerError(f"token id {number} is out of range, there are {len(self)} tokens{hint}")
        return number


def _content(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else str(token.content)
