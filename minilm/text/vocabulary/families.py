"""Table of the tokenizer families: default special tokens, model inputs and templates.

A family is identified by the name of its transformers class (`tokenizer_class` in tokenizer_config.json) or
by the `model_type` of config.json. It defines the special tokens if no file does, the inputs that the model
takes, and the special tokens around a text (its *frame*):

    bert          [CLS] A [SEP]      [CLS] A [SEP] B [SEP], the second text with token type 1; also ALBERT,
                                     over sentencepiece
    roberta       <s> A </s>         <s> A </s> </s> B </s>; also MPNet, over WordPiece
    xlm-roberta   the same, over sentencepiece
    bos-eos       A, with <s> before and </s> after it as `add_bos_token` and `add_eos_token` say (T5: </s>)
    marian        A </s>             A B </s>
    mbart         A </s> language    A B </s> language
    mbart-50      language A </s>    language A B </s>
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import TokenizerError, backend_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Family:
    """`adds_bos`, `adds_eos`: the defaults of `add_bos_token`, `add_eos_token` for vocabulary files without
    them. `mask_takes_space`: "a <mask>" is the tokens "a", "<mask>", without one for the space.
    `languages`: codes of languages after the pieces of a sentencepiece model, each a token.
    `sentinels`: tokens <extra_id_0>, ... after the pieces of a sentencepiece model, if no setting `extra_ids`
    says how many."""

    name: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    padding_side: str = "right"
    frame: Literal["bert", "roberta", "xlm-roberta", "bos-eos", "marian", "mbart", "mbart-50"] = "bos-eos"
    adds_bos: bool = False
    adds_eos: bool = False
    sentinels: int = 0
    languages: tuple[str, ...] = ()
    mask_takes_space: bool = False


_BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_MBART = (
    *("ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN"),
    *("hi_IN", "it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP"),
    *("nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN"),
)
_MBART_50 = (
    *("af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH"),
    *("mk_MK", "ml_IN", "mn_MN", "mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE"),
    *("ta_IN", "te_IN", "th_TH", "tl_XX", "uk_UA", "ur_PK", "xh_ZA", "gl_ES", "sl_SI"),
)
_ALBERT_TOKENS = {
    **_BERT_TOKENS,
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
_WITH_TYPES = ("input_ids", "token_type_ids", "attention_mask")
_END = "<|endoftext|>"

GENERIC = Family("PreTrainedTokenizerFast")
FAMILIES = {
    family.name: family
    for family in (
        Family("BertTokenizer", _BERT_TOKENS, input_names=_WITH_TYPES, frame="bert"),
        Family("ElectraTokenizer", _BERT_TOKENS, input_names=_WITH_TYPES, frame="bert"),
        Family("DistilBertTokenizer", _BERT_TOKENS, frame="bert"),
        Family(
            "DebertaV2Tokenizer",
            {**_BERT_TOKENS, "bos_token": "[CLS]", "eos_token": "[SEP]"},
            input_names=_WITH_TYPES,
            frame="bert",
        ),
        Family(
            "MPNetTokenizer",
            {**_ROBERTA_TOKENS, "unk_token": "[UNK]"},
            frame="roberta",
            mask_takes_space=True,
        ),
        # ALBERT was trained with token types; transformers 5 leaves them out, 4 has them.
        Family("AlbertTokenizer", _ALBERT_TOKENS, input_names=_WITH_TYPES, frame="bert"),
        # In fairseq, which these models come from, and in transformers 4, <mask> includes the space before
        # it, and fill-mask depends on it; transformers 5 does not do so if there is only vocab.json.
        Family("RobertaTokenizer", _ROBERTA_TOKENS, frame="roberta", mask_takes_space=True),
        Family("BartTokenizer", _ROBERTA_TOKENS, frame="roberta", mask_takes_space=True),
        Family("XLMRobertaTokenizer", _ROBERTA_TOKENS, frame="xlm-roberta", mask_takes_space=True),
        Family("CamembertTokenizer", _ROBERTA_TOKENS, frame="xlm-roberta", mask_takes_space=True),
        Family("T5Tokenizer", _T5_TOKENS, adds_eos=True, sentinels=100),
        Family("MT5Tokenizer", _T5_TOKENS, adds_eos=True, sentinels=100),
        Family("MarianTokenizer", _T5_TOKENS, frame="marian"),
        Family("MBartTokenizer", _ROBERTA_TOKENS, frame="mbart", mask_takes_space=True, languages=_MBART),
        Family(
            "MBart50Tokenizer",
            {name: token for name, token in _ROBERTA_TOKENS.items() if name != "bos_token"},
            frame="mbart-50",
            mask_takes_space=True,
            languages=(*_MBART, *_MBART_50),
        ),
        Family("GPT2Tokenizer", {"unk_token": _END, "bos_token": _END, "eos_token": _END}),
        Family("Qwen2Tokenizer", {"unk_token": _END, "eos_token": _END, "pad_token": _END}),
        # add_bos_token is True by default, as in all sentencepiece-based Llamas; transformers 5 documents
        # that too, but has False.
        Family(
            "LlamaTokenizer",
            {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
            padding_side="left",
            adds_bos=True,
        ),
    )
}
# Not llama and mistral: their checkpoints mostly name a class, and the others are not LlamaTokenizers.
_OF_MODEL_TYPE = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "nomic_bert": "BertTokenizer",
    "electra": "ElectraTokenizer",
    "mpnet": "MPNetTokenizer",
    "albert": "AlbertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "bart": "BartTokenizer",
    "mbart": "MBartTokenizer",
    "marian": "MarianTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "umt5": "T5Tokenizer",
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}


def family_of(class_name: str | None, model_type: str | None) -> Family:
    """The family of a transformers class (with or without "Fast") or, if that is unknown, of a model type."""
    name = (class_name or "").removesuffix("Fast")
    if name in FAMILIES:
        return FAMILIES[name]
    if class_name is None and model_type in _OF_MODEL_TYPE:
        return FAMILIES[_OF_MODEL_TYPE[model_type]]
    return GENERIC


def set_frame(backend: Backend, frame: str, settings: Mapping[str, Any]) -> None:
    """Make `backend` add the special tokens of `frame` around texts. They must be in `settings` and in the
    vocabulary."""
    from tokenizers import processors

    def token(name: str) -> tuple[str, int]:
        text = settings.get(name)
        index = backend.token_to_id(text) if text is not None else None
        if text is None or index is None:
            raise TokenizerError(f"the tokenizer needs a {name}, but {text!r} is not in its vocabulary")
        return text, index

    with backend_errors(f"special tokens of {frame}"):
        if frame == "bert":
            cls, sep = token("cls_token"), token("sep_token")
            backend.post_processor = processors.TemplateProcessing(
                single=[f"{cls[0]}:0", "$A:0", f"{sep[0]}:0"],
                pair=[f"{cls[0]}:0", "$A:0", f"{sep[0]}:0", "$B:1", f"{sep[0]}:1"],
                special_tokens=[cls, sep],
            )
        elif frame == "roberta":
            backend.post_processor = processors.RobertaProcessing(
                token("sep_token"),
                token("cls_token"),
                trim_offsets=bool(settings.get("trim_offsets", True)),
                add_prefix_space=bool(settings.get("add_prefix_space", False)),
            )
        elif frame == "xlm-roberta":
            bos, eos = token("bos_token"), token("eos_token")
            backend.post_processor = processors.TemplateProcessing(
                single=[bos[0], "$A", eos[0]],
                pair=[bos[0], "$A", eos[0], eos[0], "$B", eos[0]],
                special_tokens=[bos, eos],
            )
        elif frame in ("marian", "mbart", "mbart-50"):
            end, language = [token("eos_token")], [] if frame == "marian" else [token("language")]
            before, after = (language, end) if frame == "mbart-50" else ([], end + language)
            backend.post_processor = processors.TemplateProcessing(
                single=[*(text for text, _ in before), "$A", *(text for text, _ in after)],
                pair=[*(text for text, _ in before), "$A", "$B", *(text for text, _ in after)],
                special_tokens=[*before, *after],
            )
        else:
            before = [token("bos_token")] if settings.get("add_bos_token") else []
            after = [token("eos_token")] if settings.get("add_eos_token") else []
            framed = [
                [
                    *(f"{text}:{n}" for text, _ in before),
                    f"${text_name}:{n}",
                    *(f"{text}:{n}" for text, _ in after),
                ]
                for n, text_name in enumerate("AB")
            ]
            backend.post_processor = processors.TemplateProcessing(
                single=framed[0],
                pair=framed[0] + framed[1],
                special_tokens=list(dict([*before, *after]).items()),
            )


def adds(backend: Backend, token: str | None, at: int) -> bool:
    """Whether `backend` adds `token` before (`at` = 0) or after (`at` = -1) a text."""
    index = backend.token_to_id(token) if token is not None else None
    if index is None:
        return False
    plain, framed = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return len(framed) > len(plain) and framed[at] == index
