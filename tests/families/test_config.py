"""Configurations: transformers' names and defaults, what is refused and by which name, and that nothing else
gets through."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pairs import class_of
from strategies import DECODERS, ENCODERS, FAMILIES, Config, configs, examples, small

import minilm
from minilm import AutoConfig, ConfigError, ModelConfig, PretrainedConfig
from minilm.config import RopeConfig
from minilm.families import families, family_of

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert")


def spec(config: Config) -> ModelConfig:
    """What minilm makes of a config.json."""
    hf = PretrainedConfig.from_dict(config)
    return family_of(hf.model_type).config(hf)


def spec_of_file(folder: Path) -> ModelConfig:
    """What minilm makes of the config.json in a folder."""
    hf = AutoConfig.from_pretrained(folder)
    return family_of(hf.model_type).config(hf)


# --- the bag of options ---


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_transformers(family: str) -> None:
    """Where transformers fills a default in from other options, the meaning is compared below, in
    `test_spec_is_the_same`."""
    ours, theirs = PretrainedConfig(model_type=family), transformers.AutoConfig.for_model(family)
    derived = {"num_key_value_heads", "head_dim", "layer_types", "rope_parameters", "sliding_window"}
    derived |= {"no_rope_layers", "pooler_hidden_size"}
    for key in theirs.to_dict():
        if key in derived or key.startswith("_") or key not in ours:
            continue
        assert getattr(ours, key) == getattr(theirs, key), key
    for name, own in theirs.attribute_map.items():
        assert getattr(ours, name) == getattr(ours, own) == getattr(theirs, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_of_transformers_is_known(family: str) -> None:
    """A config.json that transformers has written gives no warning about unknown keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PretrainedConfig.from_dict(transformers.AutoConfig.for_model(family).to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_is_the_same(family: str) -> None:
    """The meaning of a configuration does not change on the way through transformers, which spells all of it
    out."""

    @examples(40)
    @given(configs(family))
    def check(config: Config) -> None:
        through = transformers.AutoConfig.for_model(**json.loads(json.dumps(config))).to_dict()
        assert spec(through) == spec(config)
        again = PretrainedConfig.from_dict(PretrainedConfig.from_dict(config).to_dict())
        assert again == PretrainedConfig.from_dict(config)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_attributes(family: str) -> None:
    """Read and written under the standard name and the family's own, as in the programs that people have."""
    config = PretrainedConfig(model_type=family)
    theirs = transformers.AutoConfig.for_model(family)
    for c in (config, theirs):
        c.hidden_size = 24
        c.num_hidden_layers = 5
        c.output_hidden_states = True
    own = {name: theirs.attribute_map.get(name, name) for name in ("hidden_size", "num_hidden_layers")}
    for name, key in own.items():
        assert getattr(config, name) == getattr(config, key) == getattr(theirs, key)
        assert config.to_dict()[key] == theirs.to_dict()[key]
    assert config.output_hidden_states is True
    assert "hidden_size" in config
    assert "nothing" not in config
    with pytest.raises(AttributeError, match=f"{family}.*'nothing'"):
        _ = config.nothing
    assert getattr(config, "nothing", 3) == 3
    assert not hasattr(config, "__wrapped__")


def test_labels() -> None:
    config = PretrainedConfig(model_type="bert")
    assert (config.num_labels, config.id2label, config.label2id) == (
        2,
        {0: "LABEL_0", 1: "LABEL_1"},
        {"LABEL_0": 0, "LABEL_1": 1},
    )
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.id2label = {"0": "no", "1": "yes"}
    assert (config.num_labels, config.id2label) == (2, {0: "no", 1: "yes"})
    config.num_labels = 2  # says nothing new
    assert config.id2label == {0: "no", 1: "yes"}
    named = PretrainedConfig(
        model_type="bert", num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )
    assert named.id2label == {0: "a", 1: "b"}
    assert json.loads(named.to_json_string())["id2label"] == {"0": "a", "1": "b"}
    for wrong in (0, -1, "2", 2.0):
        with pytest.raises(ConfigError, match="num_labels"):
            config.num_labels = wrong
    with pytest.raises(ConfigError, match="id2label"):
        config.id2label = {"zero": "a"}
    with pytest.raises(ConfigError, match="id2label"):
        config.id2label = ["a"]
    with pytest.raises(ConfigError, match="label2id"):
        config.label2id = ["a"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 4},
        {"id2label": {"0": "x", "1": "y", "2": "z"}},
        {"num_labels": 3, "id2label": {"0": "x", "1": "y", "2": "z"}},
        {"id2label": {"0": "x"}, "label2id": {"x": 0}},
        {},
    ],
)
def test_labels_of_a_file_are_transformers(options: Config) -> None:
    config = small("bert", **options)
    theirs = transformers.AutoConfig.for_model(**config)
    ours = PretrainedConfig.from_dict(config)
    assert ours.num_labels == theirs.num_labels
    assert ours.id2label == theirs.id2label


def test_dtype_has_one_name_and_one_form() -> None:
    import torch

    for value in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        for name in ("dtype", "torch_dtype"):
            assert PretrainedConfig.from_dict(small("llama", **{name: value})).dtype == "bfloat16"


def test_copies_are_apart() -> None:
    config = PretrainedConfig(model_type="llama", rope_scaling={"type": "linear", "factor": 2.0})
    other = copy.deepcopy(config)
    assert other == config
    other.rope_scaling["factor"] = 4.0
    other.num_labels = 7
    assert config.rope_scaling["factor"] == 2.0
    assert config.num_labels == 2
    assert other != config
    assert PretrainedConfig(model_type="llama").rope_scaling is None


def test_file_round_trip(tmp_path: Path) -> None:
    config = PretrainedConfig(model_type="gpt2", n_layer=2, n_embd=12, n_head=3, num_labels=3)
    config.save_pretrained(tmp_path / "new" / "folder")
    file = tmp_path / "new" / "folder" / "config.json"
    assert AutoConfig.from_pretrained(file.parent) == config
    assert [f.name for f in file.parent.iterdir()] == ["config.json"]
    theirs = transformers.AutoConfig.from_pretrained(file.parent)
    assert (theirs.model_type, theirs.n_layer, theirs.num_labels) == ("gpt2", 2, 3)
    text = file.read_bytes()
    AutoConfig.from_pretrained(file.parent).save_pretrained(file.parent)
    assert file.read_bytes() == text


def test_unknown_keys_are_announced_once_and_kept() -> None:
    with pytest.warns(UserWarning, match="bert.*alpha, zeta") as caught:
        config = PretrainedConfig.from_dict(small("bert", zeta=1, alpha="x", empty=None, off=False))
    assert len(caught) == 1
    assert config.zeta == 1


def test_class_aliases_know_their_family() -> None:
    config = minilm.BertConfig(hidden_size=24, num_attention_heads=3)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("bert", 24, 30522)
    assert minilm.GPT2Config(n_layer=3).num_hidden_layers == 3
    assert AutoConfig.for_model("llama", hidden_size=64).hidden_size == 64
    assert isinstance(config, PretrainedConfig)


# --- what is refused ---

REFUSED: list[tuple[str, Config, str]] = [
    *[(family, {"quantization_config": {"bits": 4}}, "quantization_config") for family in FAMILIES],
    *[(family, {"add_cross_attention": True}, "add_cross_attention") for family in FAMILIES],
    *[(family, {"is_decoder": True}, "is_decoder") for family in ENCODERS],
    *[(family, {"position_embedding_type": "relative_key"}, "relative_key") for family in BERT_LIKE],
    *[
        (family, {"position_embedding_type": "relative_key_query"}, "position_embedding_type")
        for family in BERT_LIKE
    ],
    *[
        (family, {"hidden_act": "prelu"}, "prelu")
        for family in (*BERT_LIKE, "llama", "mistral", "qwen2", "qwen3")
    ],
    ("distilbert", {"activation": "xielu"}, "xielu"),
    ("gpt2", {"activation_function": "laplace"}, "laplace"),
    *[
        (family, {"partial_rotary_factor": 0.5}, "partial_rotary_factor")
        for family in ("llama", "mistral", "qwen2", "qwen3")
    ],
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor=0.25",
    ),
    ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "'longrope'"),
    ("qwen3", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "two"}}, "'two'"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "low_freq_factor 4",
    ),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
    ("qwen2", {"layer_types": ["full_attention"]}, "1 attention windows for 2 layers"),
    ("mistral", {"sliding_window": 0}, "window"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("bert", {"hidden_size": 10}, "hidden_size 10 .*num_attention_heads.* 3"),
    ("gpt2", {"n_head": 5}, "12.*5"),
    ("distilbert", {"n_heads": 7}, "12.*7"),
    ("llama", {"num_key_value_heads": 2}, "3 query heads.*2 key/value"),
    ("llama", {"head_dim": 3}, "even head size.* 3"),
    ("bert", {"vocab_size": 0}, "vocab_size"),
    ("bert", {"intermediate_size": -3}, "intermediate_size.*-3"),
    ("bert", {"num_hidden_layers": -1}, "-1"),
    ("bert", {"hidden_size": "12"}, "hidden_size.*'12'"),
    ("bert", {"hidden_size": None}, "hidden_size"),
    ("bert", {"layer_norm_eps": "tiny"}, "norm_eps.*'tiny'"),
    ("bert", {"hidden_act": None}, "activation.*None"),
    ("gpt2", {"scale_attn_weights": "no", "scale_attn_by_inverse_layer_idx": "no"}, "'no'"),
    ("roberta", {"pad_token_id": None}, "pad_token_id"),
    ("roberta", {"pad_token_id": 40}, "41.*33"),
    ("llama", {"max_position_embeddings": "long"}, "long"),
    ("bert", {"num_hidden_layers": 10**9}, "1000000000"),
    ("llama", {"vocab_size": 2**40}, str(2**40)),
    ("llama", {"hidden_size": 3 * 2**40}, str(3 * 2**40)),
]


@pytest.mark.parametrize(("family", "options", "message"), REFUSED, ids=lambda x: str(x)[:50])
def test_what_is_not_supported_is_named(family: str, options: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(small(family, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_refusal_names_the_file(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small(family, quantization_config={"bits": 4})))
    head = "causal-lm" if family in DECODERS else "masked-lm"
    with pytest.raises(ConfigError, match="quantization_config"):
        class_of(minilm, family, head).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ("null", "expected a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "mamba"}', "'mamba' is not supported; supported are bert, "),
        ('{"model_type": 3}', "model_type"),
        ('{"model_type": ["bert"]}', "model_type"),
        ('{"model_type": "bert", "id2label": 3}', "id2label"),
        ('{"model_type": "bert", "num_labels": "many"}', "num_labels"),
        ('{"model_type": "bert", "num_labels": 1e99}', "num_labels"),
        ('{"model_type": "llama", "rope_scaling": 3}', "rope_scaling"),
        ('{"model_type": "llama", "rope_scaling": {"type": ["linear"]}}', "rope_type"),
        ('{"model_type": "qwen2", "layer_types": 3}', "layer_types"),
        ("\ufeff{", "not JSON"),
        ("[" * 100_000, "nested|not JSON"),
    ],
)
def test_file_that_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    """One error of one kind, which names the file."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        spec_of_file(tmp_path)
    if "rope" not in text and "layer_types" not in text:
        assert str(tmp_path) in str(error.value)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["default", "yarn", "relu"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "rope_type", "factor", "rope_theta", "a"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_option_is_taken_or_refused(family: str) -> None:
    """No other exception, and what is taken describes a network that can be built (on no device, here)."""
    import torch

    names = sorted({*family_of(family).defaults, "id2label", "num_labels", "dtype", "use_cache"})
    head = "causal-lm" if family in DECODERS else "masked-lm"

    @examples(60)
    @given(configs(family), st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    def check(config: Config, changes: Config) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                hf = PretrainedConfig.from_dict({**config, **changes})
                with torch.device("meta"):
                    class_of(minilm, family, head)(hf)
            except ConfigError:
                return

    check()


# --- rope, in all spellings ---

SPELLINGS: list[tuple[Config, RopeConfig]] = [
    ({}, RopeConfig(max_positions=64, original_max_positions=64)),
    (
        {"rope_theta": 500000.0, "rope_scaling": None},
        RopeConfig(5e5, max_positions=64, original_max_positions=64),
    ),
    (
        {"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 2}},
        RopeConfig(7.0, "linear", 2.0, max_positions=64, original_max_positions=64),
    ),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 9.0}, "rope_theta": 3.0},
        RopeConfig(9.0, "dynamic", 2.0, max_positions=64, original_max_positions=64),
    ),
    (
        {  # Llama 3.1
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_type": "llama3",
            },
        },
        RopeConfig(5e5, "llama3", 8.0, 64, 16, 1.0, 4.0),
    ),
    (
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 0.5,
            }
        },
        RopeConfig(1e4, "yarn", 4.0, 64, 16, attention_factor=0.5),
    ),
    (
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": None},
            "original_max_position_embeddings": 32,
        },
        RopeConfig(1e4, "yarn", 2.0, 64, 32, attention_factor=0.1 * 0.6931471805599453 + 1),
    ),
]


@pytest.mark.parametrize(("options", "expected"), SPELLINGS)
def test_rope_spellings(options: Config, expected: RopeConfig) -> None:
    assert spec(small("llama", **options)).rope == expected


def test_windows() -> None:
    assert spec(small("mistral", sliding_window=5)).windows == (5, 5)
    assert spec(small("mistral", sliding_window=None)).windows == (None, None)
    assert spec(small("mistral")).windows == (4096, 4096)
    assert spec(small("qwen2", sliding_window=5)).windows == (None, None)
    assert spec(small("qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1)).windows == (
        None,
        5,
    )
    kinds = ["sliding_attention", "full_attention"]
    assert spec(small("qwen3", sliding_window=5, use_sliding_window=True, layer_types=kinds)).windows == (
        5,
        None,
    )


# --- the table of families ---


def test_every_family_says_all_there_is_to_say() -> None:
    """Class names exist in transformers, rules are there for each head, options have defaults there."""
    assert {f.model_type for f in families()} >= set(FAMILIES)
    for family in families():
        assert family.translate.__doc__
        for head in ("base", *family.heads):
            name = family.class_name(head)
            assert hasattr(transformers, name), name
            assert getattr(minilm, name) is not None
            targets = [rule.target for rule in family.rules(head) if rule.target and not rule.older]
            assert len(set(targets)) == len(targets), f"{name} fills a parameter by two rules"


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'mamba'.*bert.*qwen3"):
        family_of("mamba")
    with pytest.raises(AttributeError):
        _ = minilm.MambaModel
