"""ModernBERT in every way in which it is used, against transformers.

(Drawn configurations are among the slow tests of models.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from close import assert_close
from native_runs import require_extension
from pairs import class_of, fields, heads_of, pair
from strategies import small
from torch import Tensor

import minilm
from minilm.config import ConfigError
from minilm.families import PretrainedConfig, family_of
from minilm.ops.quantized import dequantise

WITH_BIASES = {
    **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
    "decoder_bias": False,
    "classifier_pooling": "mean",
    "classifier_activation": "relu",
    "tie_word_embeddings": False,
    "global_rope_theta": 300.0,
    "local_rope_theta": 20.0,
    "local_attention": 6,
}


def inputs() -> dict[str, Tensor]:
    """Rows of 11, 7 and 2 tokens."""
    ids = torch.randint(3, 41, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(11) < torch.tensor([[11], [7], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def real(x: Tensor) -> Tensor:
    mask = inputs()["attention_mask"].bool()
    return x[mask] if x.shape[:2] == mask.shape else x


@pytest.mark.parametrize("head", heads_of("modernbert"))
@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow, id="usual"), pytest.param(WITH_BIASES, id="biases")]
)
def test_results_are_those_of_transformers(head: Any, options: dict[str, Any]) -> None:
    """Of the heads, each layer's states and maps; saved, transformers reads the same again."""
    show = {"output_hidden_states": True, "output_attentions": True}
    with pair(small("modernbert", **options), head, 3) as p, torch.no_grad():
        theirs = p.reference(**inputs(), **show)
        shown, ours = p.model(**inputs(), **show), p.model(**inputs())
        for name in fields(head, theirs):
            assert_close(real(ours[name]), real(theirs[name]), atol=1e-4)
            assert float(real(theirs[name]).std()) > 0.1
        for a, b in zip(shown.hidden_states, theirs.hidden_states, strict=True):
            assert_close(real(a), real(b), atol=1e-4)
        for a, b in zip(shown.attentions, theirs.attentions, strict=True):
            assert_close(a[0], b[0], atol=1e-5)
        (seen, _, _) = minilm.attention_probs(p.model, **inputs(), layer=1)
        assert_close(seen, theirs.attentions[1][0], atol=1e-5)
        assert not seen[:, 0, 4:].any()  # in a window of 2 or 3 to each side
        p.model.save_pretrained(p.folder / "again")
        again = type(p.reference).from_pretrained(p.folder / "again", attn_implementation="eager")
        for name in fields(head, theirs):
            assert_close(real(again(**inputs())[name]), real(theirs[name]), atol=1e-5)


def test_names_and_adapters() -> None:
    """Auto classes find the family; unfused, modules have transformers' names; tables grow."""
    with pair(small("modernbert"), "masked-lm", 5) as p, torch.no_grad():
        model = minilm.AutoModelForMaskedLM.from_pretrained(p.folder)
        assert type(model) is minilm.ModernBertForMaskedLM
        expected = real(p.reference(**inputs()).logits)
        theirs = {n for n, m in p.reference.named_modules() if isinstance(m, torch.nn.Linear)}
        model.unfuse()
        assert theirs <= {name for name, _ in model.named_modules()}
        assert_close(real(model(**inputs()).logits), expected, atol=1e-4)
        model.fuse()
        model.resize_token_embeddings(50)
        assert_close(real(model(**inputs()).logits)[:, :41], expected, atol=1e-4)


def test_other_dtypes_of_weights() -> None:
    """bfloat16 is as near to float32 as transformers' is; quantised weights count as what they stand for."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with pair(small("modernbert", **sizes), "masked-lm", 9) as p, torch.no_grad():
        exact = real(p.reference(**inputs()).logits)
        usual = float((real(p.reference.to(torch.bfloat16)(**inputs()).logits).float() - exact).abs().mean())
        cls = class_of(minilm, "modernbert", "masked-lm")
        ours = real(cls.from_pretrained(p.folder, dtype=torch.bfloat16)(**inputs()).logits).float()
        assert float((ours - exact).abs().mean()) < 1.5 * usual + 1e-3
        for kind in ("q8_0", "int8"):
            model = cls.from_pretrained(p.folder, weights=kind)
            found = real(model(**inputs()).logits)
            assert float((found - exact).abs().mean()) < 0.05 * float(exact.abs().mean()) + 0.02, kind
        with minilm.backend("reference"):
            found = real(model(**inputs()).logits)
            for name, module in list(p.model.named_modules()):
                layer = model.get_submodule(name)
                if hasattr(layer, "quantized"):
                    module.weight.copy_(dequantise(layer.quantized, torch.float32))
            assert_close(found, real(p.model(**inputs()).logits), atol=1e-4)


def test_training() -> None:
    """Without gradients the blocks run natively; gradients with checkpointing are those without."""
    require_extension()
    with pair(small("modernbert"), "masked-lm", 2) as p:
        minilm.explain(reset=True)
        with torch.no_grad():
            p.model(**inputs())
        assert minilm.explain().backends("blocks") == {"native"}
        gradients = []
        for again in (False, True):
            p.model.zero_grad()
            if again:
                p.model.gradient_checkpointing_enable()
            p.model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            gradients.append({name: q.grad.clone() for name, q in p.model.named_parameters()})
        for name, gradient in gradients[0].items():
            assert_close(gradients[1][name], gradient, atol=1e-6)


def test_published_config(tmp_path: Path) -> None:
    """The spelling of answerdotai's files gives no warning, and what transformers makes of it."""
    published = {
        "model_type": "modernbert",
        "architectures": ["ModernBertForMaskedLM"],
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "gradient_checkpointing": False,
        "layer_norm_eps": 1e-05,
        "position_embedding_type": "absolute",
        "reference_compile": True,
        "sparse_prediction": False,
        "torch_dtype": "float32",
    }
    ours = PretrainedConfig.from_dict(published)
    theirs = transformers.ModernBertConfig(**published).to_dict()
    first, second = (family_of("modernbert").config(c) for c in (ours, PretrainedConfig.from_dict(theirs)))
    assert first == second
    assert first.windows == tuple(None if i % 3 == 0 else 65 for i in range(22))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classifier_pooling": "max"}, "classifier_pooling must be cls or mean, and is 'max'"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be at least 1, and is 0"),
        ({"local_attention": -2}, "local_attention must be at least 0, and is -2"),
        ({"sparse_prediction": True}, "sparse_prediction=True is not supported"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention are not supported"),
        ({"norm_eps": -1.0}, "norm_eps must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        family_of("modernbert").config(PretrainedConfig.from_dict(small("modernbert", **options)))
