"""An unfused model has modules with transformers' names and computes the same; fused again, it equals the
original."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from close import assert_close
from pairs import class_of, heads_of, randomise
from torch import Tensor, nn

import minilm
from minilm.weights import UNFUSED

SIZES = {"vocab_size": 61, "num_hidden_layers": 2, "intermediate_size": 40, "max_position_embeddings": 64}
ENCODER = {**SIZES, "hidden_size": 24, "num_attention_heads": 3, "pad_token_id": 0}
DECODER = {**SIZES, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "mpnet": {**ENCODER, "pad_token_id": 1},
    "electra": {**ENCODER, "embedding_size": 10},
    "albert": {**ENCODER, "embedding_size": 10},
    "modernbert": {
        **ENCODER,
        "num_hidden_layers": 3,
        "local_attention": 4,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "nomic_bert": ENCODER,
    "deberta-v2": {
        **ENCODER,
        "relative_attention": True,
        "max_relative_positions": 9,
        "pos_att_type": "c2p|p2c",
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
    },
    "distilbert": {"vocab_size": 61, "dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40},
    "gpt2": {"vocab_size": 61, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64, "pad_token_id": 0},
    "llama": {**DECODER, "tie_word_embeddings": True},
    "qwen3": {**DECODER, "tie_word_embeddings": False, "head_dim": 6},
    "phi3": {**DECODER, "bos_token_id": 1, "eos_token_id": 2},
}
CASES = [(family, head) for family in CONFIGS for head in heads_of(family)]
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def pair(family: str, head: Any, **options: Any) -> tuple[Any, Any]:
    """A random model of transformers, and one of minilm with its weights."""
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **options})
    theirs = class_of(transformers, family, head)(config).eval()
    randomise(theirs, 0)
    ours = class_of(minilm, family, head)(minilm.PretrainedConfig.from_dict(config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


def layers(model: nn.Module) -> set[str]:
    """Names of modules that have parameters of their own, but for those that hold transformers' second name
    of an output bias."""
    owners = ((name, m._parameters.values()) for name, m in model.named_modules())
    found = {name for name, parameters in owners if any(p is not None for p in parameters)}
    return found - {"cls.predictions", "lm_head", "predictions"}


@pytest.mark.parametrize(("family", "head"), CASES)
def test_names_and_results_are_those_of_transformers(family: str, head: Any) -> None:
    theirs, ours = pair(family, head)
    before = {name: tensor.clone() for name, tensor in ours.checkpoint_state_dict().items()}
    names = list(ours.state_dict())
    with torch.no_grad():
        expected, first = theirs(IDS)[0], ours(IDS)[0]
        assert ours.unfuse() is ours
        assert ours.is_unfused
        assert layers(ours) == layers(theirs)
        for name, module in ours.named_modules():
            own = ours.get_submodule(name)  # as PEFT finds it
            assert own is module or own.weight is module.weight, name
        assert_close(ours(IDS)[0], expected, atol=2e-4)
        stored = ours.checkpoint_state_dict()
        assert ours.fuse() is ours
        assert not ours.is_unfused
        assert list(ours.state_dict()) == names
        assert torch.equal(ours(IDS)[0], first)
    for found in (stored, ours.checkpoint_state_dict()):
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)


@pytest.mark.parametrize(("family", "head"), [("bert", "sequence-classification"), ("llama", "causal-lm")])
def test_what_is_written_into_the_parts_stays(family: str, head: Any, tmp_path: Path) -> None:
    """In the fused model, in a saved one, and where `.to` has made other tensors of them."""
    theirs, ours = pair(family, head)
    own = dict(ours.unfuse().named_parameters())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
            own[name].copy_(parameter)
        expected = theirs(IDS).logits
        ours.save_pretrained(tmp_path)
        assert ours.is_unfused
        assert own.keys() == dict(ours.named_parameters()).keys()
        again = class_of(transformers, family, head).from_pretrained(tmp_path)
        assert_close(again(IDS).logits, expected, atol=2e-4)
        ours.double().float()
        assert_close(ours(IDS).logits, expected, atol=2e-4)
        minilm.explain(reset=True)
        assert_close(ours.fuse()(IDS).logits, expected, atol=2e-4)


def test_the_native_passes_see_it() -> None:
    _, ours = pair("llama", "causal-lm")
    with torch.no_grad():
        before = ours(IDS).logits
        for module in ours.unfuse().modules():
            if isinstance(module, nn.Linear) and module.weight.shape[0] == 24:
                module.weight.mul_(1.5)
        assert not torch.allclose(ours(IDS).logits, before, atol=1e-2)
        minilm.explain(reset=True)
        written = ours.generate(IDS, max_new_tokens=4, do_sample=False)
        assert minilm.explain().backends("blocks") <= {"torch", "reference"}
        ours.fuse()
        assert torch.equal(ours.generate(IDS, max_new_tokens=4, do_sample=False), written)


def test_gradients_reach_the_parts() -> None:
    theirs, ours = pair("llama", "causal-lm")
    ours.unfuse()
    for model in (theirs, ours):
        model.train()(IDS, labels=IDS).loss.backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        found, expected = own[name].grad, parameter.grad
        assert found is not None
        assert expected is not None
        assert_close(found, expected, atol=2e-5 * max(1.0, float(expected.abs().max())), what=name)


def test_training_mode_reaches_the_parts() -> None:
    """Dropout is drawn after train() and not after eval()."""
    _, ours = pair("bert", "sequence-classification", hidden_dropout_prob=0.4)
    ours.unfuse()
    for training, module in ((True, ours.train()), (False, ours.eval())):
        module.train(training)
        with torch.no_grad():
            assert torch.equal(ours(IDS).logits, ours(IDS).logits) is not training
    assert not ours.train().fuse().eval().body.layers[0].training


class Doubled(nn.Module):
    """What an adapter does: something around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.layer(x)
        return y


@pytest.mark.parametrize(
    ("family", "head", "place"),
    [
        ("bert", "base", "pooler.dense"),
        ("bert", "masked-lm", "cls.predictions.transform.dense"),
        ("bert", "masked-lm", "cls.predictions.decoder"),
        ("bert", "sequence-classification", "bert.encoder.layer.1.intermediate.dense"),
        ("bert", "sequence-classification", "bert.pooler.dense"),
        ("bert", "sequence-classification", "bert.embeddings.LayerNorm"),
        ("bert", "sequence-classification", "bert.encoder.layer.0.output.LayerNorm"),
        ("bert", "sequence-classification", "bert.embeddings.token_type_embeddings"),
        ("roberta", "sequence-classification", "classifier.dense"),
        ("distilbert", "sequence-classification", "pre_classifier"),
        ("gpt2", "causal-lm", "transformer.h.1.mlp.c_fc"),
        ("gpt2", "causal-lm", "lm_head"),
        ("llama", "causal-lm", "model.layers.1.self_attn.k_proj"),
        ("llama", "causal-lm", "model.layers.1.mlp.gate_proj"),
        ("llama", "causal-lm", "model.embed_tokens"),
        ("qwen3", "causal-lm", "model.layers.0.self_attn.q_norm"),
    ],
)
def test_what_is_put_in_the_place_of_a_layer_counts(family: str, head: Any, place: str) -> None:
    """Activations, norms and tied matrices are around it as in transformers; `fuse` does not lose it."""
    theirs, ours = pair(family, head)
    ours.unfuse()
    for model in (theirs, ours):
        layer = model.get_submodule(place)
        around = Doubled(layer)
        around.weight = layer.weight
        model.set_submodule(place, around)
    with torch.no_grad():
        for a, b in zip(ours(IDS).to_tuple(), theirs(IDS).to_tuple()[:2], strict=False):
            if isinstance(a, Tensor):
                assert_close(a, b, atol=5e-4)
    with pytest.raises(ValueError, match=f"{place} is a Doubled of"):
        ours.fuse()
    with pytest.raises(ValueError, match="is a Doubled"):
        ours.save_pretrained("nowhere")
    assert ours.is_unfused


def test_copies_stand_alone() -> None:
    _, ours = pair("llama", "causal-lm")
    other = copy.deepcopy(ours.unfuse())
    with torch.no_grad():
        expected = ours(IDS).logits
        for parameter in ours.parameters():
            parameter.zero_()
        assert torch.equal(other(IDS).logits, expected)
        assert_close(other.fuse()(IDS).logits, expected, atol=1e-4)


def test_an_output_matrix_that_has_become_another_is_untied() -> None:
    _, ours = pair("llama", "causal-lm")
    ours.unfuse()
    with torch.no_grad():
        matrix = ours.get_submodule("lm_head")
        matrix.weight = nn.Parameter(matrix.weight * 3)
        ours.set_submodule("lm_head", matrix)
        expected = ours(IDS).logits
        ours.fuse()
        assert ours.config.tie_word_embeddings is False
        assert_close(ours(IDS).logits, expected, atol=1e-4)


def test_the_base_model_and_the_tables_are_found() -> None:
    theirs, ours = pair("bert", "sequence-classification")
    ours.unfuse()
    with torch.no_grad():
        expected = theirs.bert(IDS)
        for base in (ours.bert, ours.base_model):
            assert_close(base(IDS).last_hidden_state, expected.last_hidden_state, atol=2e-4)
            assert_close(base(IDS).pooler_output, expected.pooler_output, atol=2e-4)
    assert ours.base_model.device == ours.device == torch.device("cpu")
    assert ours.get_input_embeddings() is ours.bert.embeddings.word_embeddings
    _, decoder = pair("llama", "causal-lm")
    assert decoder.unfuse().get_output_embeddings() is decoder.lm_head
    with pytest.raises(RuntimeError, match="cannot be called: call the model"):
        ours.bert.encoder(IDS)


@pytest.mark.parametrize(("family", "head"), [("bert", "masked-lm"), ("gpt2", "causal-lm")])
def test_numbers_of_parameters(family: str, head: Any) -> None:
    theirs, ours = pair(family, head)
    expected = [(False, False, theirs.num_parameters()), (False, True, ours.num_parameters(False, True))]
    theirs.requires_grad_(False)
    ours.unfuse().requires_grad_(False)
    ours.get_submodule("cls.predictions.transform.dense" if family == "bert" else "lm_head").requires_grad_()
    rows = 24 * 24 + 24 if family == "bert" else 61 * 24
    for trainable, without, count in (*expected, (True, False, rows)):
        assert ours.num_parameters(trainable, without) == count


def test_refusals() -> None:
    _, ours = pair("bert", "sequence-classification")
    ours.unfuse()
    with pytest.raises(ValueError, match="call resize_token_embeddings before get_peft_model"):
        ours.resize_token_embeddings(70)
    ours.fuse().resize_token_embeddings(70)
    assert UNFUSED not in ours.__dict__


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    _, ours = pair("llama", "causal-lm", hidden_size=64, intermediate_size=64)
    ours.save_pretrained(tmp_path)
    quantised = minilm.AutoModelForCausalLM.from_pretrained(tmp_path, weights="q8_0")
    with pytest.raises(ValueError, match=r"quantised model .* load it without weights="):
        quantised.unfuse()
