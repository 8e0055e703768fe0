"""SentenceEncoder against sentence-transformers: the real MiniLM, and random models with every module."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tiny_models import TEXTS, save_decoder, save_model
from tiny_sentence import build

from minilm import AutoModel
from minilm.files.hub import resolve
from minilm.model.batch import pack
from minilm.sentence.encoder import SentenceEncoder
from minilm.sentence.modules import MODES, Features
from minilm.sentence.modules import Dense as OurDense
from minilm.sentence.modules import Normalize as OurNormalize
from minilm.sentence.modules import Pooling as OurPooling
from minilm.sentence.similarity import SIMILARITIES, quantize_embeddings, semantic_search
from minilm.sentence.transformer import Transformer

ATOL = 1e-5

LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 40
SENTENCES = [
    "hello world",
    "",
    LONG,
    "Ümläute, 北京 und 😀\u200d👩",
    "a",
    " \n\t ",
    "x" * 300,
    "It's 5 o'clock [SEP] [MASK].",
]


def quiet(model: Any, *args: Any, **options: Any) -> Any:
    """`encode` of a model whose warnings about cut texts are not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.encode(*args, **options)


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder("all-MiniLM-L6-v2", device="cpu")


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(str(resolve("all-MiniLM-L6-v2")), device="cpu")


# The real model


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_minilm_agrees(minilm: SentenceEncoder, reference: SentenceTransformer, batch_size: int) -> None:
    expected = reference.encode(SENTENCES)
    found = quiet(minilm, SENTENCES, batch_size=batch_size)
    assert found.dtype == np.float32
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)


@settings(max_examples=15)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_minilm_agrees_on_any_text(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    model, reference = _drawn_pair()
    np.testing.assert_allclose(quiet(model, texts), reference.encode(texts), atol=ATOL, rtol=0)


def _drawn_pair(cache: list[Any] = []) -> Any:  # noqa: B006 - hypothesis takes no module fixtures
    if not cache:
        cache += [
            SentenceEncoder("all-MiniLM-L6-v2", device="cpu"),
            SentenceTransformer(str(resolve("all-MiniLM-L6-v2")), device="cpu"),
        ]
    return cache


def test_length_is_that_of_the_model_not_of_its_tokenizer_file(minilm: SentenceEncoder) -> None:
    assert minilm.max_seq_length == 256
    with pytest.warns(UserWarning, match=r"1 of 2 texts have more than 256 tokens"):
        tokens = minilm.encode(["short", LONG], output_value="token_embeddings")
    assert [len(t) for t in tokens] == [3, 256]


def test_a_single_text_gives_a_vector(minilm: SentenceEncoder) -> None:
    one, several = minilm.encode("hello world"), minilm.encode(["hello world", "and another one"])
    assert one.shape == (384,)
    np.testing.assert_allclose(one, several[0], atol=1e-6)
    assert minilm.get_sentence_embedding_dimension() == minilm.get_embedding_dimension() == 384


def test_kinds_of_result(minilm: SentenceEncoder) -> None:
    texts = ["one", "two words", "and three of them"]
    array = minilm.encode(texts)
    tensor = minilm.encode(texts, convert_to_tensor=True)
    rows = minilm.encode(texts, convert_to_numpy=False)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert isinstance(rows, list)
    assert torch.equal(tensor, torch.stack(rows))
    assert torch.equal(tensor, torch.from_numpy(array))
    assert minilm.encode("one", convert_to_tensor=True).shape == (384,)
    np.testing.assert_array_equal(minilm.encode(np.array(texts)), array)
    np.testing.assert_array_equal(minilm.encode(text for text in texts), array)


def test_nothing_gives_nothing_of_the_right_shape(minilm: SentenceEncoder) -> None:
    assert minilm.encode([]).shape == (0, 384)
    assert minilm.encode([], convert_to_tensor=True, truncate_dim=12).shape == (0, 12)
    assert minilm.encode([], precision="ubinary").shape == (0, 48)
    assert minilm.encode([], convert_to_numpy=False) == []
    assert minilm.encode([], output_value=None) == []


def test_token_embeddings_and_everything(minilm: SentenceEncoder, reference: SentenceTransformer) -> None:
    texts = ["a longer text comes first", "short", "Ünder 北京"]
    for ours, theirs in zip(
        minilm.encode(texts, output_value="token_embeddings"),
        reference.encode(texts, output_value="token_embeddings"),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    for our, their in zip(
        minilm.encode(texts, output_value=None), reference.encode(texts, output_value=None), strict=True
    ):
        count = int(their["attention_mask"].sum())
        assert our["input_ids"].tolist() == their["input_ids"][:count].tolist()
        torch.testing.assert_close(
            our["token_embeddings"], their["token_embeddings"][:count], atol=ATOL, rtol=0
        )
        torch.testing.assert_close(our["sentence_embedding"], their["sentence_embedding"], atol=ATOL, rtol=0)
    assert set(minilm.encode("one", output_value=None)) >= {"sentence_embedding", "token_embeddings"}


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_similarities(minilm: SentenceEncoder, reference: SentenceTransformer, name: str) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    reference.similarity_fn_name = minilm.similarity_fn_name = name
    torch.testing.assert_close(minilm.similarity(a, b[:3]), reference.similarity(a, b[:3]))
    torch.testing.assert_close(minilm.similarity_pairwise(a, b), reference.similarity_pairwise(a, b))
    torch.testing.assert_close(minilm.similarity(a[0], list(torch.tensor(b))), reference.similarity(a[0], b))
    half = torch.tensor(a).half()
    torch.testing.assert_close(minilm.similarity(half, half), reference.similarity(half, half))
    reference.similarity_fn_name = minilm.similarity_fn_name = "cosine"


def test_semantic_search_ranks() -> None:
    corpus = np.eye(4, dtype=np.float32)
    hits = semantic_search(corpus[[2]] * 3 + corpus[[1]], corpus, top_k=2)
    assert [hit["corpus_id"] for hit in hits[0]] == [2, 1]
    assert hits[0][0]["score"] == pytest.approx(3 / 10**0.5)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precision(minilm: SentenceEncoder, reference: SentenceTransformer, precision: Any) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings as expected

    embeddings = np.random.default_rng(1).normal(size=(6, 21)).astype(np.float32)
    embeddings[:, 3] = 0.25  # a dimension without a range
    found = quantize_embeddings(embeddings, precision)
    np.testing.assert_array_equal(found, expected(embeddings, precision))
    assert found.dtype == expected(embeddings, precision).dtype
    ranges = np.stack((embeddings.min(0) - 1, embeddings.max(0)))
    np.testing.assert_array_equal(
        quantize_embeddings(torch.tensor(embeddings), precision, ranges),
        expected(embeddings, precision, ranges),
    )
    texts = ["one", "two words", "and three of them"]
    ours = minilm.encode(texts, precision=precision)
    theirs = reference.encode(texts, precision=precision)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if precision in ("int8", "uint8"):  # a value at the border of two steps may fall to either side
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    else:
        assert (ours == theirs).mean() > 0.99


def test_truncation_of_dimensions(minilm: SentenceEncoder, reference: SentenceTransformer) -> None:
    texts = ["one", "two words"]
    for options in (
        {"truncate_dim": 10},
        {"truncate_dim": 10, "normalize_embeddings": True},
        {"normalize_embeddings": True},
    ):
        np.testing.assert_allclose(
            minilm.encode(texts, **options), reference.encode(texts, **options), atol=ATOL
        )
    short = SentenceEncoder("all-MiniLM-L6-v2", device="cpu", truncate_dim=5)
    assert short.encode(texts).shape == (2, 5)
    assert short.get_embedding_dimension() == 5


def test_half_precision_is_near(minilm: SentenceEncoder) -> None:
    half = SentenceEncoder("all-MiniLM-L6-v2", device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    found = half.encode(["hello world", "a text"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, minilm.encode(["hello world", "a text"]), atol=0.02)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (3, "expected a text or a list of texts, got int"),
        (["a", 3], "number 1 is int: 3"),
        (["a", None], "number 1 is NoneType"),
        ([("a", "b")], "number 0 is tuple"),
        ({"text": "a"}, "got dict"),
        (b"a", "got bytes"),
    ],
)
def test_what_is_no_text_is_refused(minilm: SentenceEncoder, bad: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        minilm.encode(bad)


def test_bad_options(minilm: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer, and is 0"):
        minilm.encode(["a"], batch_size=0)
    with pytest.raises(ValueError, match="precision must be one of"):
        minilm.encode(["a"], precision="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one embedding alone"):
        minilm.encode("a", precision="int8")
    with pytest.raises(ValueError, match="output_value must be"):
        minilm.encode("a", output_value="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prompt 'question'; the model has query, document"):
        minilm.encode("a", prompt_name="question")
    with pytest.raises(ValueError, match="cosine, dot, euclidean, manhattan, and is 'angle'"):
        minilm.similarity_fn_name = "angle"
    with pytest.raises(ValueError, match="at least 1 and at most 512, and is 513"):
        minilm.max_seq_length = 513
    with pytest.raises(TypeError, match="there is no option modle_kwargs"):
        SentenceEncoder("all-MiniLM-L6-v2", modle_kwargs={})
    with pytest.raises(ValueError, match="exactly one of"):
        SentenceEncoder()


# Random models, saved by sentence-transformers


ORDERS = [(mode,) for mode in MODES] + [MODES, ("mean", "cls"), ("lasttoken", "max", "weightedmean")]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra"])
@pytest.mark.parametrize("modes", ORDERS, ids="+".join)
def test_pooling(tmp_path: Path, family: str, modes: tuple[Any, ...]) -> None:
    reference = build(tmp_path, Pooling(24, modes), family=family)
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    expected = reference.encode(TEXTS, batch_size=2)
    assert expected.std() > 0.1
    np.testing.assert_allclose(quiet(model, TEXTS, batch_size=3), expected, atol=ATOL, rtol=0)
    assert model.get_embedding_dimension() == 24 * len(modes)


@pytest.mark.parametrize("modes", ORDERS, ids="+".join)
def test_pooling_without_the_prompt(tmp_path: Path, modes: tuple[Any, ...]) -> None:
    prompts = {"query": "the old city of: ", "document": "tea "}
    reference = build(
        tmp_path, Pooling(24, modes, include_prompt=False), prompts=prompts, default_prompt_name="query"
    )
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    plain = quiet(model, TEXTS, prompt="")
    for options in ({}, {"prompt_name": "document"}, {"prompt": "Where is "}, {"prompt": ""}):
        found = quiet(model, [*TEXTS, ""], **options)
        np.testing.assert_allclose(found, reference.encode([*TEXTS, ""], **options), atol=ATOL, rtol=0)
        assert (np.abs(found[:-1] - plain).max() < 1e-3) == (options == {"prompt": ""})
    for ours, theirs in (
        (model.encode_query, reference.encode_query),
        (model.encode_document, reference.encode_document),
    ):
        np.testing.assert_allclose(ours("anna"), theirs("anna"), atol=ATOL, rtol=0)


@pytest.mark.parametrize("prompt", ["query: ", "query:", "q", "\n", "Anna  "])
@pytest.mark.parametrize("mode", ["mean", "max", "cls", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_a_prompt_that_ends_within_a_token(tmp_path: Path, prompt: str, mode: str) -> None:
    """Its last space is part of the text's first token, which counts; in other texts it is not.
    Expected is what pooling gives for the kept tokens alone."""
    folder = save_decoder(tmp_path / "model", "gpt2", chat=False)
    pooling = OurPooling(24, mode, include_prompt=False)
    encoder = SentenceEncoder(modules=[Transformer(AutoModel.from_pretrained(folder)), pooling], device="cpu")
    texts = ["tea", " tea", "green tea", "Anna lives", "\n", "é", ""]
    found = quiet(encoder, texts, prompt=prompt)
    tokenizer = encoder.tokenizer
    for text, vector in zip(texts, found, strict=True):
        [hidden] = quiet(encoder, [text], prompt=prompt, output_value="token_embeddings")
        ends_at = [end for _, end in tokenizer(prompt + text, return_offsets_mapping=True)["offset_mapping"]]
        kept = [place for place, end in enumerate(ends_at) if end > len(prompt)]
        rows = torch.as_tensor(hidden)[kept].double()
        weights = torch.tensor(kept, dtype=torch.float64)[:, None] + 1
        expected = torch.zeros(24, dtype=torch.float64)
        if kept:
            expected = {
                "mean": rows.mean(0),
                "max": rows.max(0).values,
                "cls": rows[0],
                "lasttoken": rows[-1],
                "weightedmean": (rows * weights).sum(0) / weights.sum(),
                "mean_sqrt_len_tokens": rows.sum(0) / len(kept) ** 0.5,
            }[mode]
        np.testing.assert_allclose(vector, expected.numpy(), atol=ATOL, rtol=1e-4, err_msg=repr(text))


def test_a_text_without_tokens_pools_to_zeros() -> None:
    hidden = torch.randn(5, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    for modes in ORDERS:
        packed = pack(3, 4, mask, torch.device("cpu"))
        pooled = OurPooling(4, modes)(Features(hidden, packed)).get("sentence_embedding")
        assert (pooled[1] == 0).all()
        assert (pooled[[0, 2]] != 0).all()
        nothing = pack(2, 0, None, torch.device("cpu"))
        assert (OurPooling(4, modes)(Features(hidden[:0], nothing)).get("sentence_embedding") == 0).all()


DENSE: dict[str, Any] = {
    "tanh": lambda: Dense(24, 9),
    "gelu": lambda: Dense(24, 9, activation_function=torch.nn.GELU()),
    "identity": lambda: Dense(24, 9, bias=False, activation_function=None),
    "relu-residual": lambda: Dense(24, 24, activation_function=torch.nn.ReLU(), use_residual=True),
    "projected-residual": lambda: Dense(24, 9, activation_function=torch.nn.Sigmoid(), use_residual=True),
}


@pytest.mark.parametrize("dense", DENSE)
def test_dense_and_normalize(tmp_path: Path, dense: str) -> None:
    reference = build(
        tmp_path, Pooling(24), DENSE[dense], Normalize(), similarity_fn_name="manhattan", truncate_dim=7
    )
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(quiet(model, TEXTS), reference.encode(TEXTS), atol=ATOL, rtol=0)
    assert model.get_embedding_dimension() == reference.get_embedding_dimension() == 7
    assert model.similarity_fn_name == "manhattan"


def test_modules_on_token_embeddings_and_layer_norm(tmp_path: Path) -> None:
    tokens = {"module_input_name": "token_embeddings"}
    reference = build(
        tmp_path,
        lambda: Dense(24, 6, **tokens),
        lambda: Normalize(**tokens),
        Pooling(6, ("max", "mean")),
        LayerNorm(12),
    )
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(quiet(model, TEXTS), reference.encode(TEXTS), atol=ATOL, rtol=0)
    assert model.get_embedding_dimension() == 12
    found, expected = (m.encode("anna", output_value="token_embeddings") for m in (model, reference))
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_lower_casing_of_the_older_files(tmp_path: Path) -> None:
    build(tmp_path, Pooling(24), family="roberta")
    file = tmp_path / "model" / "sentence_bert_config.json"
    file.write_text(json.dumps({"max_seq_length": 30, "do_lower_case": True}))
    texts = ["JOHN Smith LIVES in Paris <mask>", "ÉRIC ΟΔΟΣ"]
    reference = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    assert model.max_seq_length == reference.max_seq_length == 30
    np.testing.assert_allclose(model.encode(texts), reference.encode(texts), atol=ATOL, rtol=0)
    plain = [texts[0].lower(), texts[1]]
    np.testing.assert_allclose(model.encode(plain)[0], model.encode(texts)[0], atol=1e-6)


def test_without_modules_json_tokens_are_averaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path / "plain", "bert")
    model = SentenceEncoder(folder, device="cpu")
    assert "has no modules.json: using mean pooling" in caplog.text
    reference = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(quiet(model, TEXTS), reference.encode(TEXTS), atol=ATOL, rtol=0)


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "mean"), ("llama", "lasttoken")])
def test_decoders_without_modules_json(
    tmp_path: Path, family: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_decoder(tmp_path, family, chat=False)
    model = SentenceEncoder(folder, device="cpu")
    assert f"using {mode} pooling" in caplog.text
    reference = SentenceTransformer(str(folder), device="cpu")
    expected = reference.encode(TEXTS)
    assert model.max_seq_length == reference.max_seq_length == 96
    np.testing.assert_allclose(quiet(model, TEXTS), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    empty = quiet(model, ["", *TEXTS, ""])  # no special tokens: a text without any token
    assert (empty[[0, -1]] == 0).all()
    np.testing.assert_allclose(empty[1:-1], quiet(model, TEXTS), atol=1e-5)
    assert (model.encode(["", ""]) == 0).all()


def test_saving(tmp_path: Path) -> None:
    modules = (
        Pooling(24, ("mean", "cls")),
        lambda: Dense(48, 9, activation_function=torch.nn.GELU()),
        Normalize(),
    )
    build(
        tmp_path, *modules, prompts={"query": "tea "}, default_prompt_name="query", similarity_fn_name="dot"
    )
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    model.max_seq_length = 33
    model.save_pretrained(tmp_path / "saved")
    expected = quiet(model, TEXTS)
    for again in (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
        SentenceEncoder(tmp_path / "saved", device="cpu"),
    ):
        np.testing.assert_allclose(quiet(again, TEXTS), expected, atol=ATOL, rtol=0)
        assert (again.max_seq_length, again.similarity_fn_name) == (33, "dot")
        assert (again.prompts["query"], again.default_prompt_name) == ("tea ", "query")
    with_pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert with_pooler <= set(file.keys())


def test_built_of_modules(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "backbone", "bert")
    torch.manual_seed(0)
    first = Transformer(str(folder), max_seq_length=20)
    dense = OurDense(first.get_word_embedding_dimension(), 5, activation_function=torch.nn.ReLU())
    model = SentenceEncoder(modules=[first, OurPooling(24, "cls"), dense, OurNormalize()], device="cpu")
    model.save_pretrained(tmp_path / "saved")
    reference = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(quiet(model, TEXTS), reference.encode(TEXTS), atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="first module must be a Transformer"):
        SentenceEncoder(modules=[OurPooling(24)])


def test_trains(tmp_path: Path) -> None:
    """`forward` on what `tokenize` gives, with gradients; padding changes nothing."""
    build(tmp_path, Pooling(24, MODES), lambda: Dense(24 * len(MODES), 4))
    model = SentenceEncoder(tmp_path / "model", device="cpu")
    model.max_seq_length = 64
    batch = model.tokenize(TEXTS)
    assert int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
    out = model(batch)
    np.testing.assert_allclose(out["sentence_embedding"].detach().numpy(), quiet(model, TEXTS), atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = (model(batch)["sentence_embedding"] - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@settings(max_examples=10)
@given(order=st.permutations(range(len(TEXTS))), batch_size=st.integers(1, 6))
def test_batches_do_not_matter(order: list[int], batch_size: int) -> None:
    model, _ = _drawn_pair()
    texts = [*TEXTS[:3], "short", "also this one is a text"]
    expected = np.stack([model.encode(text) for text in texts])
    found = model.encode([texts[i] for i in order], batch_size=batch_size)
    np.testing.assert_allclose(found, expected[order], atol=1e-6, rtol=0)
