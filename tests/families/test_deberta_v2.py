"""DeBERTa v2 and v3 in every way in which they are used, against transformers.

(Drawn configurations are among the slow tests of models.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from close import assert_close
from native_runs import require_extension
from pairs import class_of, fields, heads_of, pair, randomise
from safetensors.torch import load_file, save_file
from strategies import small
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

import minilm
from minilm.config import ConfigError, DistanceConfig
from minilm.distances import disentangled
from minilm.families import PretrainedConfig, family_of

OWN = {
    "share_att_key": False,
    "position_biased_input": True,
    "type_vocab_size": 2,
    "position_buckets": -1,
    "max_relative_positions": 4,
    "norm_rel_ebd": "none",
    "pooler_hidden_act": "relu",
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "conv_groups": 3,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "v3": {},
    "own": OWN,
    "c2p": {"pos_att_type": ["c2p"], "share_att_key": False},
    "p2c": {"pos_att_type": ["p2c"]},
    "plain": {"relative_attention": False, "norm_rel_ebd": "none"},
}


def inputs(hole: bool = True) -> dict[str, Tensor]:
    """Rows of 21, 17, 3, 3 and 1 tokens; one is masked in the middle of the second."""
    ids = torch.randint(3, 41, (5, 21), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(21) < torch.tensor([[21], [17], [3], [3], [1]])).long()
    mask[1, 4] -= int(hole)
    return {"input_ids": ids * mask, "attention_mask": mask}


def real(x: Tensor) -> Tensor:
    mask = inputs()["attention_mask"].bool()
    return x[mask] if x.shape[:2] == mask.shape else x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [pytest.param("base", marks=pytest.mark.slow), "masked-lm"])
def test_results_are_those_of_transformers(head: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States, maps and logits; with little memory for the bias too; saved, transformers reads the same."""
    show = {"output_hidden_states": True, "output_attentions": True}
    with pair(small("deberta-v2", **KINDS[kind]), head, 3) as p, torch.no_grad():
        theirs = p.reference(**inputs(), **show)
        shown, ours = p.model(**inputs(), **show), p.model(**inputs())
        (name,) = fields(head, theirs)
        assert_close(real(ours[name]), real(theirs[name]), atol=1e-4)
        for a, b in zip(shown.hidden_states, theirs.hidden_states, strict=True):
            assert_close(real(a), real(b), atol=1e-4)
        seen = minilm.attention_probs(p.model, **inputs(), layer=1)
        mask = inputs()["attention_mask"].bool()
        for layer, b in enumerate(theirs.attentions):
            for row, there in enumerate(mask):
                expected = b[row][:, there][:, :, there]
                assert_close(shown.attentions[layer][row][:, there][:, :, there], expected, atol=1e-5)
                if layer == 1:
                    assert_close(seen[row], expected, atol=1e-5)
        (some,) = minilm.attention_probs(p.model, inputs()["input_ids"][:1], layer=1, head=2, rows=-1)
        assert_close(some, theirs.attentions[1][0, 2, -1], atol=1e-5)
        for budget in (1, 150, 700):
            monkeypatch.setattr(disentangled, "BUDGET", budget)
            assert_close(real(p.model(**inputs())[name]), real(theirs[name]), atol=1e-4)
        p.model.save_pretrained(p.folder / "again")
        again = type(p.reference).from_pretrained(p.folder / "again", attn_implementation="eager")
        assert_close(real(again(**inputs())[name]), real(theirs[name]), atol=1e-5)


@pytest.mark.parametrize(
    "head", [head for head in heads_of("deberta-v2") if head not in ("base", "masked-lm")]
)
def test_heads(head: Any) -> None:
    for kind in ("v3", "own"):
        with pair(small("deberta-v2", **KINDS[kind]), head, 4, num_labels=2) as p, torch.no_grad():
            ours, theirs = p.model(**inputs()), p.reference(**inputs())
            for name in fields(head, theirs):
                assert_close(real(ours[name]), real(theirs[name]), atol=1e-4)
                assert float(real(theirs[name]).std()) > 0.05


@pytest.mark.parametrize(("most", "buckets"), [(512, 256), (20, 8), (9, 4), (100, 7), (7, -1)])
def test_buckets_are_those_of_transformers(most: int, buckets: int) -> None:
    """Bit for bit, beyond the table too."""
    x = torch.empty(1, 700, 1)
    span = buckets if buckets > 0 else most
    expected = (build_relative_position(x, x, buckets, most)[0] + span).clamp(0, 2 * span - 1)
    config = DistanceConfig(span, most if buckets > 0 else None)
    place = torch.arange(700)
    assert torch.equal(disentangled.rows_of(place[:, None] - place, config), expected)


def test_the_new_head() -> None:
    """`legacy` false has other names for the same function, there and back."""
    with pair(small("deberta-v2", legacy=False), "masked-lm", 5) as p, torch.no_grad():
        expected = real(p.reference(**inputs()).logits)
        assert_close(real(p.model(**inputs()).logits), expected, atol=1e-4)
        p.model.save_pretrained(p.folder / "again")
        stored = load_file(p.folder / "again" / "model.safetensors")
        assert {n for n in stored if not n.startswith("deberta.")} == {
            f"lm_predictions.lm_head.{name}"
            for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias", "bias")
        }
        randomise(p.reference, 6)  # transformers' from_pretrained cannot load such a model
        assert not p.reference.load_state_dict(stored, strict=False).unexpected_keys
        assert_close(real(p.reference(**inputs()).logits), expected, atol=1e-5)


def test_microsofts_files(tmp_path: Path) -> None:
    """v3 has `lm_predictions` and a head of the generator's, and its config.json does not say so."""
    with pair(small("deberta-v2", legacy=False), "masked-lm", 5) as p, torch.no_grad():
        expected = real(p.reference(**inputs()).logits)
        tensors = load_file(p.folder / "model.safetensors")
        tensors["mask_predictions.classifier.weight"] = torch.ones(1, 12)
        tensors["deberta.embeddings.position_embeddings.weight"] = torch.ones(33, 12)
        config = json.loads((p.folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    del config["legacy"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = minilm.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model) is minilm.DebertaV2ForMaskedLM
    with torch.no_grad():
        assert_close(real(model(**inputs()).logits), expected, atol=1e-4)
    skipped = model.load_report.skipped
    assert skipped["deberta.embeddings.position_embeddings.weight"] == "position_biased_input is false"
    assert "mask_predictions.classifier.weight" in skipped


@pytest.mark.parametrize("kind", ["v3", "own"])
def test_names_and_adapters(kind: str) -> None:
    """Unfused, modules have transformers' names and compute the same; tables grow."""
    with pair(small("deberta-v2", **KINDS[kind]), "masked-lm", 5) as p, torch.no_grad():
        expected = real(p.reference(**inputs()).logits)
        theirs = {n for n, m in p.reference.named_modules() if isinstance(m, torch.nn.Linear)}
        p.model.unfuse()
        assert theirs <= {name for name, _ in p.model.named_modules()}
        assert_close(real(p.model(**inputs()).logits), expected, atol=1e-4)
        p.model.fuse()
        p.model.resize_token_embeddings(50)
        assert_close(real(p.model(**inputs()).logits)[:, :41], expected, atol=1e-4)


def test_other_dtypes_of_weights() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with pair(small("deberta-v2", **sizes), "masked-lm", 9) as p, torch.no_grad():
        exact = real(p.reference(**inputs()).logits)
        usual = float((real(p.reference.to(torch.bfloat16)(**inputs()).logits).float() - exact).abs().mean())
        cls = class_of(minilm, "deberta-v2", "masked-lm")
        ours = real(cls.from_pretrained(p.folder, dtype=torch.bfloat16)(**inputs()).logits).float()
        assert float((ours - exact).abs().mean()) < 1.5 * usual + 1e-3
        for kind in ("q8_0", "int8"):
            found = real(cls.from_pretrained(p.folder, weights=kind)(**inputs()).logits)
            assert float((found - exact).abs().mean()) < 0.05 * float(exact.abs().mean()) + 0.02, kind


def test_training_and_what_ran() -> None:
    """Gradients with checkpointing are those without; a bias never runs natively without itself."""
    require_extension()
    with pair(small("deberta-v2", hidden_dropout_prob=0.0, **KINDS["v3"]), "masked-lm", 2) as p:
        minilm.explain(reset=True)
        with torch.no_grad():
            p.model(**inputs())
        told = minilm.explain()
        assert "not native: the extension has no scores by distances" in str(told)
        assert "native" not in told.backends("attention")
        gradients = []
        p.model.config.attention_probs_dropout_prob = 0.0
        p.model.eval()
        for again in (False, True):
            p.model.zero_grad()
            if again:
                p.model.gradient_checkpointing_enable()
                p.model.train()
                for module in p.model.modules():
                    module.training = module is p.model.body or module is p.model
            p.model(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            gradients.append({name: q.grad.clone() for name, q in p.model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert_close(gradients[1][name], gradient, atol=1e-6)
        assert float(gradients[0]["body.distances.table.weight"].abs().max()) > 0
    with pair(small("deberta-v2", **KINDS["plain"]), "base", 2) as p, torch.no_grad():
        minilm.explain(reset=True)
        p.model(**inputs())
        assert minilm.explain().backends("blocks") == {"native"}


def test_long_texts_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bias holds more than about BUDGET numbers, or one row of one head."""
    sizes = []
    found = disentangled.Scores._bias

    def noted(*arguments: Any) -> Tensor:
        sizes.append(found(*arguments).numel())
        return found(*arguments)

    monkeypatch.setattr(disentangled.Scores, "_bias", noted)
    monkeypatch.setattr(disentangled, "BUDGET", 2000)
    with pair(small("deberta-v2"), "base", 2) as p, torch.no_grad():
        p.model(torch.randint(3, 41, (2, 300)))
    assert len(sizes) > 100
    assert max(sizes) <= 2000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type must be made of c2p and p2c"),
        ({"embedding_size": 8}, "embedding_size 8 is not supported"),
        ({"pooler_hidden_size": 8}, "pooler_hidden_size 8 is not supported"),
        ({"pooler_hidden_act": "x"}, "pooler_hidden_act 'x' is not supported"),
        ({"position_buckets": 2}, "position_buckets must be 0 or at least 4"),
        ({"position_buckets": 40}, "they are 40 and 20"),
        ({"conv_kernel_size": 2}, "a convolution needs an odd conv_kernel_size"),
        ({"conv_kernel_size": 3, "conv_groups": 5}, "conv_groups that divide hidden_size 12"),
        ({"relative_attention": False}, "norm_rel_ebd is for relative_attention, which is off"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        family_of("deberta-v2").config(PretrainedConfig.from_dict(small("deberta-v2", **options)))
