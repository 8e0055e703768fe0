"""Methods that other libraries call on a model: class names, state dicts under transformers' names, options
of saving, gradient checkpointing, losses of accumulated batches."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizer_folders
import torch
from fused_models import SIZES, model_of
from pairs import class_of, heads_of, pair, randomise
from strategies import small

import minilm
from minilm.config import ConfigError
from minilm.model import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from minilm.substitutes import CLASSES

PAIRS = [(family, head) for family in SIZES for head in heads_of(family)]
IDS = [f"{family}-{head}" for family, head in PAIRS]


def inputs(rows: int = 2, columns: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 20, (rows, columns), generator=torch.Generator().manual_seed(seed))


# Class names


@pytest.mark.parametrize(("family", "head"), PAIRS, ids=IDS)
def test_a_model_is_of_its_familys_class(family: str, head: Any) -> None:
    with pair(small(family), head) as p:
        named = class_of(minilm, family, head)
        assert type(p.model) is named
        assert type(p.model).__name__ == type(p.reference).__name__
        general = next(c for c in named.__mro__ if c.__name__.startswith("AutoModel"))
        again = general.from_pretrained(p.folder)
        assert type(again) is named
        assert isinstance(again, general)
        assert type(general.from_config(again.config)) is named
        assert type(copy.deepcopy(again)) is named
        assert type(pickle.loads(pickle.dumps(again))) is named
        assert type(again.base_model).__name__ == type(p.reference.base_model).__name__


def test_another_familys_checkpoint_is_an_error() -> None:
    with pair(small("llama"), "causal-lm") as p:
        for name in ("BertModel", "BertForMaskedLM", "MistralForCausalLM", "GPT2LMHeadModel"):
            with pytest.raises(
                ConfigError, match=f"{name} is a .* model, and the configuration is of a llama"
            ):
                getattr(minilm, name).from_pretrained(p.folder)
        with pytest.raises(ConfigError, match="BertModel is a bert model"):
            minilm.BertModel(p.model.config)  # type: ignore[attr-defined]
        assert type(minilm.LlamaModel.from_pretrained(p.folder)).__name__ == "LlamaModel"  # type: ignore[attr-defined]


def test_classes_of_ones_own_stay_what_they_are() -> None:
    class Mine(AutoModelForMaskedLM):
        pass

    model = Mine.from_config(minilm.PretrainedConfig.from_dict(small("bert")))
    assert type(model) is Mine


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_name_that_is_missing_says_what_to_use(name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(minilm, name)
    assert CLASSES[name] in str(caught.value)
    assert f"has no attribute {name!r}; " in str(caught.value)


def test_options_that_are_missing_say_what_to_use(tmp_path: Path) -> None:
    model_of("bert").save_pretrained(tmp_path)
    for option, way in (("load_in_8bit", "weights='int8'"), ("subfolder", "the path of the folder")):
        with pytest.raises(TypeError, match=f"from_pretrained got {option}, .*; {option}: .*{way}"):
            AutoModel.from_pretrained(tmp_path, **{option: True})


def test_a_text_is_not_what_a_model_reads() -> None:
    with pytest.raises(ValueError, match=r"is str; tokenize the text first: model\(\*\*tokenizer"):
        model_of("bert")("hello")


def test_scripting_is_refused_at_once() -> None:
    for module in (model_of("bert"), torch.nn.Sequential(model_of("llama"))):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script cannot compile a model of minilm.*jit\.trace"
        ):
            torch.jit.script(module)


# State dicts


@pytest.mark.parametrize(("family", "head"), PAIRS, ids=IDS)
def test_state_dicts_go_both_ways(family: str, head: Any) -> None:
    with pair(small(family), head) as p:
        theirs = p.reference.state_dict()
        model = type(p.model).from_config(p.model.config).eval()
        places = [parameter.data_ptr() for parameter in model.parameters()]
        result = model.load_state_dict(theirs)
        assert result.missing_keys == []
        assert [parameter.data_ptr() for parameter in model.parameters()] == places, "an optimiser holds them"
        for (name, mine), (_, expected) in zip(
            model.named_parameters(), p.model.named_parameters(), strict=True
        ):
            assert torch.equal(mine, expected), name

        randomise(model, 5)
        other = copy.deepcopy(p.reference)
        missing, unexpected = other.load_state_dict(model.checkpoint_state_dict(), strict=False)
        assert unexpected == []
        assert set(missing) <= {n for n, _ in other.named_buffers()} | set(other._tied_weights_keys or {})
        field = "last_hidden_state" if head == "base" else None
        with torch.no_grad():
            mine, expected = model(inputs()), other.eval()(inputs())
        pick = field or next(iter(k for k in mine if "logits" in k))
        torch.testing.assert_close(mine[pick], expected[pick], atol=1e-4, rtol=1e-4)


def test_a_base_models_state_dict_fills_the_body_of_a_model_with_a_head() -> None:
    with pair(small("bert"), "base") as p:
        model = minilm.AutoModelForTokenClassification.from_config(p.model.config)
        missing, unexpected = model.load_state_dict(p.reference.state_dict(), strict=False)
        assert all(name.startswith("classifier.") for name in missing)
        assert all(name.startswith("pooler.") for name in unexpected)
        for name, parameter in p.model.body.named_parameters():
            assert torch.equal(parameter, model.body.get_parameter(name))


def test_a_state_dict_that_does_not_fit_changes_nothing() -> None:
    with pair(small("bert"), "masked-lm") as p:
        before = copy.deepcopy(p.model.state_dict())
        state = p.reference.state_dict()
        lost = {k: v for k, v in state.items() if not k.endswith("layer.0.output.dense.weight")}
        short = state | {"bert.embeddings.word_embeddings.weight": torch.zeros(3, 4)}
        for changed, options, message in (
            (lost, {}, "output.dense.weight is missing"),
            (state | {"bert.nonsense": torch.zeros(1)}, {}, "bert.nonsense is unexpected"),
            (short, {"strict": False}, r"word_embeddings.weight is \[3, 4\], and \[\d+, \d+\] here"),
            (state, {"assign": True}, "assign=True"),
        ):
            with pytest.raises(RuntimeError, match=message):
                p.model.load_state_dict(changed, **options)
        for name, value in p.model.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_its_own_state_dict_is_loaded_as_ever() -> None:
    model, other = model_of("llama"), model_of("llama")
    randomise(other, 9)
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"body.norm.weight": torch.zeros(40)})


def test_a_file_of_its_own_state_dict_loads_with_the_configuration(tmp_path: Path) -> None:
    """As transformers' Trainer writes it."""
    from safetensors.torch import save_file

    model = model_of("bert")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path, config=model.config)
    with torch.no_grad():
        assert torch.equal(again(inputs()).logits, model(inputs()).logits)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


# Saving


def test_save_options_of_others(tmp_path: Path) -> None:
    model = model_of("bert")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(
        tmp_path / "yes", is_main_process=True, save_function=torch.save, state_dict=model.state_dict(),
        safe_serialization=True, push_to_hub=False,
    )  # fmt: skip
    assert (tmp_path / "yes" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="does not support safe_serialization=False"):
        model.save_pretrained(tmp_path / "bad", safe_serialization=False)
    with pytest.raises(TypeError, match="no argument 'nonsense'"):
        model.save_pretrained(tmp_path / "bad", nonsense=1)
    assert not (tmp_path / "bad").exists()


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, name: str, **options: Any) -> Any:
            calls.append((name, options))
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
            again = AutoModel.from_pretrained(folder_path)
            calls.append((repo_id, type(again).__name__, options))
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert model_of("bert").push_to_hub("tiny", private=True, token="secret", commit_message="new") == "done"
    assert calls == [
        "secret",
        ("tiny", {"private": True, "exist_ok": True}),
        ("me/tiny", "BertModel", {"commit_message": "new"}),
    ]


def test_push_to_hub_of_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    tokenizer = minilm.AutoTokenizer.from_pretrained(tokenizer_folders.wordpiece())
    sent: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, name: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> None:
            sent.append((repo_id, minilm.AutoTokenizer.from_pretrained(folder_path)("a b")["input_ids"]))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    tokenizer.push_to_hub("words")
    assert sent == [("me/words", tokenizer("a b")["input_ids"])]


def test_models_are_made_where_parameters_are_made_now() -> None:
    """Also without memory, and by what replaces how modules register parameters, as accelerate does."""
    config = model_of("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert AutoModelForCausalLM.from_config(config).device.type == "cpu"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    again = AutoModelForCausalLM.from_config(config, device="cpu")
    assert torch.equal(model.body.layers[0].mlp.down.weight, again.body.layers[0].mlp.down.weight)


# Outputs


def test_outputs_are_made_anew_of_their_fields() -> None:
    """As accelerate, DataParallel and tree maps make them: the class is called with a dict or with pairs."""
    output = model_of("bert")(inputs(), labels=inputs())
    for given in (dict(output), ((name, value) for name, value in output.items())):
        made = type(output)(given)
        assert list(made) == ["loss", "logits"]
        assert made.loss is output.loss
        assert made[1] is output.logits
    assert type(output)({"logits": 3}).loss is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'scores'"):
        type(output)({"scores": 3})


@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores(normalize: bool) -> None:
    with pair(small("llama"), "causal-lm") as p:
        options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
        ours, theirs = (m.generate(inputs(), do_sample=False, **options) for m in (p.model, p.reference))
        found, expected = (
            m.compute_transition_scores(o.sequences, o.scores, normalize_logits=normalize)
            for m, o in ((p.model, ours), (p.reference, theirs))
        )
        assert found.shape == (2, 4)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, **options}
        ours, theirs = (m.generate(inputs(), do_sample=False, **beams) for m in (p.model, p.reference))
        found, expected = (
            m.compute_transition_scores(o.sequences, o.scores, o.beam_indices, normalize_logits=normalize)
            for m, o in ((p.model, ours), (p.reference, theirs))
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        if not normalize:
            torch.testing.assert_close(found.sum(1), theirs.sequences_scores, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match=r"beam_indices must be.*\[3, 4\]"):
            p.model.compute_transition_scores(ours.sequences, ours.scores, torch.zeros(3, 4))


# Training


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = model_of(family).requires_grad_(True).train()
    ids = inputs(columns=9)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        gradients()
    usual = sum(kept)
    kept.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        again = gradients()
    assert sum(kept) < usual
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)
    assert "past_key_values" not in model(ids)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="and got use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "masked-lm"),
        ("bert", "token-classification"),
        ("bert", "sequence-classification"),
        ("llama", "causal-lm"),
        ("gpt2", "causal-lm"),
    ],
)
def test_a_loss_per_item_of_all_batches(family: str, head: Any) -> None:
    with pair(small(family), head) as p:
        ids = inputs(3, 7)
        labels = inputs(3, 7, seed=1) % 2
        labels[0, 2:4] = -100
        if head == "sequence-classification":
            labels = labels[:, 0].clamp(min=0)
        for items in (5, torch.tensor(11)):
            ours = p.model(ids, labels=labels, num_items_in_batch=items).loss
            if family == "bert":  # whose losses transformers averages whatever it is told
                counted = int((labels != -100).sum())
                theirs = p.reference(ids, labels=labels).loss * counted / items
            else:
                theirs = p.reference(ids, labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(ours, p.model(ids, labels=labels).loss)


def test_embeddings_by_the_names_of_others() -> None:
    tied = model_of("llama", tie_word_embeddings=True)
    untied = model_of("llama", tie_word_embeddings=False)
    assert tied.get_output_embeddings() is None
    assert untied.get_output_embeddings() is untied.head.decoder
    assert untied.get_input_embeddings() is untied.body.embeddings.tokens
    tied.tie_weights()
    assert tied.can_generate()
    assert isinstance(tied, AutoModelForCausalLM)
    assert not model_of("bert").can_generate()


def test_configurations_by_name(tmp_path: Path) -> None:
    """``BertConfig.from_pretrained``, as ``AutoConfig``'s; another family's is refused."""
    config = minilm.BertConfig(hidden_size=12, num_attention_heads=3, num_labels=3)
    config.save_pretrained(tmp_path)
    for cls in (minilm.BertConfig, minilm.PretrainedConfig, type(config)):
        assert cls.from_pretrained(tmp_path) == config
        assert cls.from_pretrained(tmp_path, hidden_size=24).hidden_size == 24
    with pytest.raises(ConfigError, match=r"LlamaConfig is for llama, and .* is a bert"):
        minilm.LlamaConfig.from_pretrained(tmp_path)
