"""Encoder-decoders: forward, loss, gradients and files, compared with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_seq2seq
import torch
import transformers
from tiny_seq2seq import BART, CASES, T5, VOCABULARY, batch, pair

import minilm
from minilm.config import ConfigError

CLOSE = {"atol": 1e-4, "rtol": 0.0}


def real(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x * mask.view(*mask.shape, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("name", CASES)
def test_all_results_as_in_transformers(name: str, tmp_path: Path) -> None:
    """Logits, hidden states of both sides, and the three kinds of maps, at every real place."""
    theirs, ours = pair(name, tmp_path)
    given = batch(left="t5" in name)
    wanted = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    expected, found = theirs(**given, **wanted), ours(**given, **wanted)
    source, target = given["attention_mask"], given["decoder_attention_mask"]
    assert type(found).__name__ == "Seq2SeqLMOutput"
    assert list(found) == [key for key in expected if key != "past_key_values"]
    torch.testing.assert_close(found.logits * target[..., None], expected.logits * target[..., None], **CLOSE)
    for key, mask in (
        ("decoder_hidden_states", target),
        ("encoder_hidden_states", source),
        ("decoder_attentions", target),
        ("cross_attentions", target),
        ("encoder_attentions", source),
    ):
        assert len(found[key]) == len(expected[key])
        for a, b in zip(found[key], expected[key], strict=True):
            rows = mask[:, None, :, None] if "attentions" in key else mask[..., None]
            torch.testing.assert_close(a * rows, b * rows, **CLOSE)


@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "mbart", "marian"])
def test_loss_and_gradients_as_in_transformers(name: str, tmp_path: Path) -> None:
    """labels are shifted to the right, -100 does not count; each gradient under the checkpoint's name."""
    theirs, ours = pair(name, tmp_path)
    given = {key: batch(left="t5" in name)[key] for key in ("input_ids", "attention_mask")}
    labels = torch.randint(3, VOCABULARY, (3, 6))
    labels[1, 3:] = -100
    expected, found = theirs(**given, labels=labels), ours(**given, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    expected.loss.backward()
    found.loss.backward()
    table = dict(ours.named_parameters())["body.embeddings.tokens.weight"]
    shared = theirs.get_input_embeddings().weight
    torch.testing.assert_close(table.grad, shared.grad, **CLOSE)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    gradients = ours.checkpoint_state_dict()
    checked = 0
    for key, parameter in theirs.named_parameters():
        if key in gradients and parameter is not shared:
            torch.testing.assert_close(gradients[key], parameter.grad, **CLOSE)
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("name", ["t5", "umt5", "marian"])
@pytest.mark.parametrize("padded", [False, True])
def test_with_a_cache_as_without(name: str, padded: bool, tmp_path: Path) -> None:
    """In steps of several tokens, with padding between them or not; and the cache survives an error."""
    _, ours = pair(name, tmp_path)
    given = batch()
    mask = given.pop("decoder_attention_mask")
    if padded:
        mask[1, :2] = 0
        given["decoder_attention_mask"] = mask
    target = given["decoder_input_ids"]
    with torch.no_grad():
        expected = ours(**given, use_cache=False).logits * (mask[..., None] if padded else 1)
        source = {key: given[key] for key in ("input_ids", "attention_mask")}
        cache, found = None, []
        for start, end in ((0, 3), (3, 4), (4, 7)):
            more = {"decoder_attention_mask": mask[:, :end]} if padded else {}
            given_now = {**source, **more} if cache is None else more
            out = ours(
                **given_now, decoder_input_ids=target[:, start:end], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            found.append(out.logits)
            with pytest.raises(ValueError, match="vocabulary"):
                ours(decoder_input_ids=target[:, :1] + VOCABULARY, past_key_values=cache)
            assert cache.get_seq_length() == end
    logits = torch.cat(found, 1) * (mask[..., None] if padded else 1)
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_rows_of_a_cache_are_reordered(tmp_path: Path) -> None:
    """Rows swapped, left out and repeated, as beam search does."""
    _, ours = pair("t5", tmp_path)
    given = batch()
    del given["decoder_attention_mask"]
    rows, more = [2, 0, 0, 1], torch.randint(3, VOCABULARY, (4, 2))
    with torch.no_grad():
        cache = ours(**given).past_key_values
        cache.reorder(rows)
        found = ours(decoder_input_ids=more, past_key_values=cache).logits
        target = torch.cat((given.pop("decoder_input_ids")[rows], more), 1)
        again = ours(**{key: x[rows] for key, x in given.items()}, decoder_input_ids=target).logits
    torch.testing.assert_close(found, again[:, -2:], **CLOSE)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("t5-gated-untied", "umt5", "bart", "mbart", "marian")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    """What is saved loads in transformers with the same logits, and is the same file when saved again."""
    theirs, ours = pair(name, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    given = batch(left=False)
    torch.testing.assert_close(again.eval()(**given).logits, theirs(**given).logits, **CLOSE)
    second = minilm.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert type(second) is type(ours)
    second.save_pretrained(tmp_path / "second")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("ours", "second"))
    assert one == two


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5", "bart", "mbart", "marian"])
def test_bodies_and_encoders(name: str, tmp_path: Path) -> None:
    """AutoModel is the body; T5EncoderModel reads a whole checkpoint and one of its own."""
    theirs, ours = pair(name, tmp_path)
    given = batch(left=False)
    prefix = CASES[name][0]
    base = minilm.AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == f"{prefix}Model"
    body = getattr(transformers, f"{prefix}Model").from_pretrained(tmp_path).eval()
    target = given["decoder_attention_mask"]
    expected = real(body(**given).last_hidden_state, target)
    torch.testing.assert_close(real(base(**given).last_hidden_state, target), expected, **CLOSE)
    torch.testing.assert_close(real(ours.base_model(**given)[0], target), expected, **CLOSE)
    source = {key: given[key] for key in ("input_ids", "attention_mask")}
    wanted = real(theirs.get_encoder()(**source).last_hidden_state, source["attention_mask"])
    found = ours.get_encoder()(**source)
    torch.testing.assert_close(real(found.last_hidden_state, source["attention_mask"]), wanted, **CLOSE)
    again = ours(
        encoder_outputs=found,
        attention_mask=source["attention_mask"],
        decoder_input_ids=given["decoder_input_ids"],
    )
    torch.testing.assert_close(
        again.logits, ours(**source, decoder_input_ids=given["decoder_input_ids"]).logits, **CLOSE
    )
    if "t5" not in name:
        return
    encoder = getattr(minilm, f"{prefix}EncoderModel").from_pretrained(tmp_path)
    getattr(transformers, f"{prefix}EncoderModel").from_pretrained(tmp_path).save_pretrained(tmp_path / "e")
    for one in (encoder, getattr(minilm, f"{prefix}EncoderModel").from_pretrained(tmp_path / "e")):
        torch.testing.assert_close(
            real(one(**source).last_hidden_state, source["attention_mask"]), wanted, **CLOSE
        )


def test_vectors_instead_of_ids(tmp_path: Path) -> None:
    theirs, ours = pair("t5", tmp_path)
    given = batch(left=False)
    vectors = {
        "inputs_embeds": torch.randn(3, 13, 24),
        "decoder_inputs_embeds": torch.randn(3, 7, 24),
        "attention_mask": given["attention_mask"],
    }
    torch.testing.assert_close(ours(**vectors).logits, theirs(**vectors).logits, **CLOSE)


@pytest.mark.parametrize("labels", [torch.tensor([2, 0, 1]), None])
def test_classifier_of_bart(labels: torch.Tensor | None, tmp_path: Path) -> None:
    """bart-large-mnli's head: the state at the last end token."""
    theirs, ours = pair("bart", tmp_path, "ForSequenceClassification", num_labels=3)
    ids, mask = batch(left=False)["input_ids"], batch(left=False)["attention_mask"]
    ids[:, 0] = 2
    ids[0, -1] = ids[1, 7] = ids[2, -1] = 2
    expected = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    found = ours(input_ids=ids, attention_mask=mask, labels=labels)
    # transformers lets the decoder see the padding of a row's end, which is after its end token
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    if labels is not None:
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    auto = minilm.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(auto).__name__ == "BartForSequenceClassification"
    with pytest.raises(ValueError, match="row 1 of input_ids has no end token 2"):
        ours(input_ids=ids.index_fill(0, torch.tensor([1]), 5))


@pytest.mark.parametrize("name", ["t5", "t5-gated-silu", "bart", "mbart", "marian"])
def test_bfloat16_is_as_exact_as_in_transformers(name: str, tmp_path: Path) -> None:
    """The mean error of the logits against float32 is at most twice that of transformers."""
    theirs, ours = pair(name, tmp_path)
    given = batch(left="t5" in name)
    seen = given["decoder_attention_mask"] > 0
    with torch.no_grad():
        exact = theirs(**given).logits[seen]
        error = (theirs.bfloat16()(**given).logits[seen].float() - exact).abs().mean()
        found = type(ours).from_pretrained(tmp_path, dtype="bfloat16")(**given).logits
    assert found.dtype == torch.bfloat16
    assert (found[seen].float() - exact).abs().mean() < 2 * error + 1e-3


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("factor", [1e3, 2e4])
@pytest.mark.parametrize("name", ["t5", "t5-gated-silu", "bart"])
def test_half_precision_has_no_nan(
    name: str, factor: float, dtype: torch.dtype, error: float, tmp_path: Path
) -> None:
    """Where the sums of T5's MLP exceed float16, too: its second matrix multiplies in float32, and the
    residual stream is float32."""
    _, ours = pair(name, tmp_path)
    sums = []
    with torch.no_grad():
        for layer in (*ours.body.encoder.layers, *ours.body.decoder.layers):
            layer.mlp.down.weight *= factor if name != "bart" else 1
            layer.mlp.register_forward_hook(lambda _, given, out: sums.append(out.abs().max().item()))
        exact = ours(**batch()).logits
        half = ours.to(dtype)(**batch()).logits
    assert name == "bart" or max(sums) > (65504 if factor > 1e3 else 1e3)
    assert half.dtype == dtype
    seen = batch()["decoder_attention_mask"] > 0
    assert (half.float() - exact)[seen].abs().mean() < error * exact[seen].abs().mean()


def test_random_weights_have_the_sizes_of_the_paper() -> None:
    """from_config: T5's initialisation, by the sizes of the matrices."""
    config = minilm.AutoConfig.for_model("t5", **{**T5, "d_model": 128, "d_kv": 32, "d_ff": 256})
    model = minilm.AutoModelForSeq2SeqLM.from_config(config)
    layer = model.body.encoder.layers[0]
    for weight, std in (
        (layer.attention.qkv.weight[:96], (128 * 32) ** -0.5),
        (layer.attention.qkv.weight[96:], 128**-0.5),
        (layer.attention.out.weight, 96**-0.5),
        (layer.mlp.down.weight, 256**-0.5),
        (model.body.embeddings.tokens.weight, 1.0),
    ):
        assert abs(weight.std().item() / std - 1) < 0.1


LONG = torch.full((2, 41), 5)
IDS = LONG[:, :4]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("t5", {"input_ids": IDS}, "give decoder_input_ids, decoder_inputs_embeds or labels"),
        ("t5", {"decoder_input_ids": IDS}, "exactly one of input_ids and inputs_embeds"),
        ("bart", {"input_ids": LONG, "labels": IDS}, "input_ids reaches position 41, .* has only 40"),
        ("bart", {"input_ids": IDS, "decoder_input_ids": LONG}, "decoder_input_ids reaches position 41"),
        ("t5", {"input_ids": IDS, "decoder_input_ids": IDS[:1]}, "decoder has 1 sequences, .* encoder 2"),
        (
            "t5",
            {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS[:1]},
            r"labels must be .* = \[2, 4\] .* is \[1, 4\]",
        ),
        (
            "t5",
            {"encoder_outputs": (torch.zeros(2, 3, 7),), "decoder_input_ids": IDS},
            r"encoder_outputs must be \[batch, tokens, 24\], and is \[2, 3, 7\]",
        ),
        ("t5", {"input_ids": IDS, "labels": IDS + 95}, "decoder_input_ids holds 100"),
        (
            "t5",
            {"input_ids": IDS, "attention_mask": IDS * torch.tensor([[1], [0]]), "labels": IDS},
            "row 1 of attention_mask is all padding",
        ),
        ("t5", {"input_ids": IDS, "labels": IDS, "past_key_values": 3}, "must be the EncoderDecoderCache"),
    ],
)
def test_bad_input_is_one_sentence(name: str, given: dict[str, Any], message: str) -> None:
    options = T5 if name == "t5" else BART
    model = minilm.AutoModelForSeq2SeqLM.from_config(minilm.AutoConfig.for_model(name, **options))
    with pytest.raises(ValueError, match=message):
        model(**given)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", {"feed_forward_proj": "twice-gelu"}, "feed_forward_proj must be"),
        ("t5", {"relative_attention_num_buckets": 0}, "relative_attention_num_buckets"),
        ("t5", {"num_decoder_layers": -1}, "num_decoder_layers"),
        ("bart", {"decoder_attention_heads": 5}, "d_model 24 is not a multiple of decoder_attention_heads"),
        ("bart", {"activation_dropout": 2.0}, "activation_dropout|inner dropout"),
        ("bart", {"init_std": []}, "init_std"),
    ],
)
def test_bad_configurations_are_named(name: str, options: dict[str, Any], message: str) -> None:
    config = minilm.AutoConfig.for_model(name, **{**(T5 if name == "t5" else BART), **options})
    with pytest.raises(ConfigError, match=message):
        minilm.AutoModelForSeq2SeqLM.from_config(config)


def test_classes_know_their_families(tmp_path: Path) -> None:
    """One family's class refuses another's; a decoder is no encoder-decoder."""
    pair("t5", tmp_path)
    with pytest.raises(ConfigError, match="BartForConditionalGeneration is a bart model"):
        minilm.BartForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="gpt2 models are not encoder-decoders"):
        minilm.AutoModelForSeq2SeqLM.from_config(minilm.AutoConfig.for_model("gpt2"))
    assert "T5ForConditionalGeneration" in dir(minilm)
    assert minilm.T5Config.from_pretrained(tmp_path).vocab_size == tiny_seq2seq.VOCABULARY


@pytest.mark.parametrize("name", ["t5-gated-untied", "bart"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_int8_is_as_exact_as_its_format(name: str, tmp_path: Path) -> None:
    """T5's scores are not divided by the square root of the head size, so that rounding errors grow in it
    more than in BART. Products of rounded matrices and vectors in float64 have an error as large."""
    _, exact = pair(name, tmp_path)
    given = batch(left="t5" in name)
    seen = given["decoder_attention_mask"] > 0
    quantised = type(exact).from_pretrained(tmp_path, weights="int8")
    with torch.no_grad():
        wanted = exact(**given).logits[seen].double()
        found = quantised(**given).logits[seen].double()

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return (x / scale).round() * scale

    count = 0
    for module in exact.body.modules():
        if isinstance(module, torch.nn.Linear):
            bias = module.bias
            weight = rounded(module.weight.detach().double())

            def forward(x: torch.Tensor, activation: str = "", w: Any = weight, b: Any = bias) -> Any:
                y = rounded(x.double()) @ w.T
                y = y if b is None else y + b.double()
                return torch.nn.functional.gelu(y).float() if activation == "gelu" else y.float()

            module.forward = forward
            count += 1
    with torch.no_grad():
        format = (exact(**given).logits[seen].double() - wanted).abs().mean()
    assert count == 26
    assert format / 3 < (found - wanted).abs().mean() < 1.5 * format


PUBLISHED: dict[str, dict[str, Any]] = {
    "marian": {
        "_num_labels": 3,
        "activation_function": "swish",
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "bad_words_ids": [[98]],
        "bos_token_id": 0,
        "classif_dropout": 0.0,
        "classifier_dropout": 0.0,
        "decoder_vocab_size": 99,
        "extra_pos_embeddings": 98,
        "max_length": 512,
        "normalize_before": False,
        "normalize_embedding": False,
        "num_beams": 4,
        "num_hidden_layers": 3,
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
    },
    "mbart": {
        "_num_labels": 3,
        "activation_function": "relu",
        "add_bias_logits": False,
        "add_final_layer_norm": True,
        "classif_dropout": 0.0,
        "early_stopping": True,
        "forced_eos_token_id": 2,
        "gradient_checkpointing": False,
        "max_length": 200,
        "normalize_before": True,
        "normalize_embedding": True,
        "num_beams": 5,
        "num_hidden_layers": 3,
        "output_past": True,
        "static_position_embeddings": False,
        "tokenizer_class": "MBart50Tokenizer",
    },
}
"""Keys of published files, with their values except for sizes."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_say_nothing_unknown(name: str, tmp_path: Path) -> None:
    sizes = CASES[name][1]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **sizes, **PUBLISHED[name]}))
    config = minilm.AutoConfig.from_pretrained(tmp_path)
    model = minilm.AutoModelForSeq2SeqLM.from_config(config)
    assert model.generation_config.num_beams == PUBLISHED[name]["num_beams"]
    assert model.generation_config.max_length == PUBLISHED[name]["max_length"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "marian",
            {"share_encoder_decoder_embeddings": False},
            "share_encoder_decoder_embeddings=False is not",
        ),
        ("marian", {"normalize_before": True}, "marian: normalize_before=True is not supported"),
        ("mbart", {"normalize_before": False}, "mbart: normalize_before=False is not supported"),
        ("mbart", {"d_model": 25}, "mbart: d_model 25 is not a multiple of encoder_attention_heads"),
    ],
)
def test_other_forms_of_bart_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    config = minilm.AutoConfig.for_model(name, **{**CASES[name][1], **options})
    with pytest.raises(ConfigError, match=message):
        minilm.AutoModelForSeq2SeqLM.from_config(config)
