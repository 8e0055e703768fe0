"""CrossEncoder over causal language models, against sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from tiny_models import CORPUS
from tokenizers import ByteLevelBPETokenizer

from minilm.files import FileError
from minilm.sentence.cross_encoder import CrossEncoder

PAIRS = [
    ("Where does Anna live?", "Anna lives in Berlin."),
    ("tea", "x"),
    ("Who lives in Paris?", "Éric drinks tea in 北京 😀"),
    ("the old city", "the river lives in the green house " * 5),
]
FLAT = """<|im_start|>system
{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% else %}Judge{% endfor %}<|im_end|>
{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>: {{ m['content'] }}
{% endfor %}<|im_end|>{{ ending | default('') }}
<|im_start|>assistant"""
STRUCTURED = FLAT.replace("m['content']", "m.content[0].text")
PLAIN = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}!"


def save(folder: Path, template: str | None = None, *, words: str = "yes no ", longest: int = 90) -> Path:
    """A random Qwen3 whose tokenizer knows `words`."""
    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [*CORPUS * 3, *[words] * 9]
    trained.train_from_iterator(texts, vocab_size=330, min_frequency=1, special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.model_max_length = longest
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=2,
        **sizes,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    model.save_pretrained(str(folder))
    return folder


def both(folder: Path, **options: Any) -> tuple[CrossEncoder, Any]:
    return (
        CrossEncoder(folder, device="cpu", **options),
        sentence_transformers.CrossEncoder(str(folder), device="cpu", **options),
    )


@pytest.mark.filterwarnings("ignore:1 of . pairs have more than:UserWarning")
@pytest.mark.parametrize("template", [None, FLAT, STRUCTURED], ids=["plain", "flat", "structured"])
def test_scores_of_a_causal_model(tmp_path: Path, template: str | None) -> None:
    """Of a folder without modules.json, and of what each library saves; a long pair keeps the template's
    end."""
    folder = save(tmp_path / "a", template)
    ours, theirs = both(folder, prompts={"judge": "Is it so? "}, default_prompt_name=None)
    raw = torch.nn.Identity()
    expected = theirs.predict(PAIRS, activation_fn=raw)
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours.predict(PAIRS, 2, activation_fn=raw), expected, atol=1e-4)
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS), atol=1e-5)
    for options in ({"prompt": "Say: "}, {"prompt_name": "judge"}):
        prompted = theirs.predict(PAIRS, activation_fn=raw, **options)
        assert np.abs(prompted - expected).max() > 1e-3
        np.testing.assert_allclose(
            ours.predict(PAIRS, activation_fn=raw, **options), prompted, atol=1e-4, err_msg=str(options)
        )
    ranked, reference = (model.rank("tea", [b for _, b in PAIRS], top_k=3) for model in (ours, theirs))
    assert [row["corpus_id"] for row in ranked] == [row["corpus_id"] for row in reference]
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    for name in ("theirs", "ours"):
        for again in both(tmp_path / name):
            np.testing.assert_allclose(again.predict(PAIRS, activation_fn=raw), expected, atol=1e-4)


def test_settings_of_the_files(tmp_path: Path) -> None:
    """Token ids, one of them alone, variables of the template, a prompt by default, an activation."""
    folder = save(tmp_path, FLAT)
    sentence_transformers.CrossEncoder(str(folder), device="cpu").save_pretrained(str(folder))
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 7}')
    file = folder / "sentence_bert_config.json"
    config = {**json.loads(file.read_text()), "processing_kwargs": {"chat_template": {"ending": " so"}}}
    file.write_text(json.dumps(config))
    stored = folder / "config_sentence_transformers.json"
    settings = json.loads(stored.read_text())
    settings |= {"prompts": {"a": "A?"}, "default_prompt_name": "a"}
    settings["activation_fn"] = "torch.nn.modules.linear.Identity"
    stored.write_text(json.dumps(settings))
    ours, theirs = both(folder)
    expected = theirs.predict(PAIRS[:3])
    np.testing.assert_allclose(ours.predict(PAIRS[:3]), expected, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    np.testing.assert_allclose(CrossEncoder(tmp_path / "again").predict(PAIRS[:3]), expected, atol=1e-4)
    file.write_text(json.dumps({**config, "modality_config": {"image": {}}}))
    with pytest.raises(FileError, match="modality_config image is not supported"):
        CrossEncoder(folder)
    file.write_text(json.dumps({**config, "transformer_task": "any-to-any"}))
    with pytest.raises(FileError, match="any-to-any"):
        CrossEncoder(folder)
    (folder / "1_LogitScore" / "config.json").write_text('{"true_token_id": 330}')
    with pytest.raises(FileError, match="true_token_id must be from 0 to 329, and is 330"):
        CrossEncoder(folder)


def test_models_that_give_no_score_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such tokens: save the model with"):
        CrossEncoder(save(tmp_path / "a", words="maybe "))
    model = CrossEncoder(save(tmp_path / "b", PLAIN))
    with pytest.raises(ValueError, match="does not show messages with the roles query and document"):
        model.predict(PAIRS)
    model.tokenizer.chat_template = FLAT
    assert model.predict(PAIRS[:2]).shape == (2,)
    with pytest.raises(ValueError, match="num_labels is 3, and a causal language model gives one score"):
        CrossEncoder(tmp_path / "b", num_labels=3)
    with pytest.raises(ValueError, match="there is no prompt 'x'; the model has none"):
        model.predict(PAIRS, prompt_name="x")


def test_the_form_for_sequence_classification(tmp_path: Path) -> None:
    """A reranker converted to one label: its row of the output matrix is that of yes less that of no."""
    folder = save(tmp_path / "a")
    judge = CrossEncoder(folder, device="cpu")
    causal = transformers.Qwen3ForCausalLM.from_pretrained(str(folder))
    config = transformers.AutoConfig.from_pretrained(str(folder), num_labels=1)
    classifier = transformers.Qwen3ForSequenceClassification(config)
    classifier.model = causal.model
    ids = transformers.AutoTokenizer.from_pretrained(str(folder)).convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        yes, no = causal.lm_head.weight[ids]
        classifier.score.weight.copy_((yes - no)[None])
    classifier.save_pretrained(str(tmp_path / "b"))
    transformers.AutoTokenizer.from_pretrained(str(folder)).save_pretrained(str(tmp_path / "b"))
    ours, theirs = both(tmp_path / "b")
    expected = theirs.predict(PAIRS[:3])
    np.testing.assert_allclose(ours.predict(PAIRS[:3]), expected, atol=1e-5)
    np.testing.assert_allclose(judge.predict(PAIRS[:3]), expected, atol=1e-5)
