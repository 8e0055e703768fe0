"""PEFT's adapters in a model of minilm: modules, results and files are the same as with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from close import assert_close
from pairs import class_of, pair, randomise
from strategies import small
from torch import Tensor

import minilm

peft = pytest.importorskip("peft", reason="PEFT is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

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
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    },
    "nomic_bert": ENCODER,
    "deberta-v2": {
        **ENCODER,
        "relative_attention": True,
        "max_relative_positions": 9,
        "pos_att_type": "c2p|p2c",
        "norm_rel_ebd": "layer_norm",
    },
    "distilbert": {"vocab_size": 61, "dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40},
    "gpt2": {"vocab_size": 61, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64, "pad_token_id": 0},
    "llama": {**DECODER, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 60},
    "mistral": {**DECODER, "tie_word_embeddings": False},
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 6},
    "phi3": {**DECODER, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
    "phi": {**DECODER, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2},
    "gemma2": {
        **DECODER,
        "head_dim": 6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_logit_softcapping": None,  # PyTorch's attention, which transformers uses, has none
    },
    "olmo2": {**DECODER, "bos_token_id": 1, "eos_token_id": 2},
}
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: list[tuple[str, str, str | None, Any, dict[str, Any]]] = [
    ("bert", "sequence-classification", "SEQ_CLS", ["query", "value"], {}),
    ("bert", "sequence-classification", "SEQ_CLS", None, {}),
    ("bert", "sequence-classification", "SEQ_CLS", "all-linear", {"use_dora": True}),
    (*("bert", "sequence-classification", "SEQ_CLS"), ["key", "dense"], {"modules_to_save": ["classifier"]}),
    ("bert", "token-classification", "TOKEN_CLS", ["query", "dense"], {"bias": "all"}),
    ("bert", "question-answering", "QUESTION_ANS", None, {}),
    ("bert", "masked-lm", None, "all-linear", {}),
    ("bert", "masked-lm", None, ["query", "decoder"], {}),
    ("bert", "base", "FEATURE_EXTRACTION", ["query", "value"], {}),
    ("bert", "base", None, ["word_embeddings", "token_type_embeddings", "query"], {}),
    ("roberta", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    (
        *("distilbert", "sequence-classification", "SEQ_CLS"),
        ["q_lin"],
        {"modules_to_save": ["pre_classifier"]},
    ),
    ("mpnet", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    ("mpnet", "base", None, ["q", "o"], {}),
    ("electra", "token-classification", "TOKEN_CLS", ["query", "embeddings_project"], {}),
    ("electra", "pre-training", None, "all-linear", {}),
    ("albert", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    ("albert", "base", None, ["query", "pooler"], {}),
    ("modernbert", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    ("modernbert", "masked-lm", None, ["Wqkv", "Wo"], {}),
    ("nomic_bert", "token-classification", "TOKEN_CLS", ["q_proj", "gate_proj"], {}),
    ("nomic_bert", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    ("deberta-v2", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    ("deberta-v2", "base", None, ["query_proj", "pos_key_proj"], {}),
    ("gpt2", "causal-lm", "CAUSAL_LM", None, {}),
    ("gpt2", "causal-lm", "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    ("gpt2", "causal-lm", "CAUSAL_LM", "all-linear", {}),
    ("llama", "causal-lm", "CAUSAL_LM", None, {}),
    ("llama", "causal-lm", "CAUSAL_LM", "all-linear", {}),
    ("llama", "causal-lm", "CAUSAL_LM", [*PROJECTIONS, "lm_head"], {}),
    ("llama", "causal-lm", "CAUSAL_LM", r".*\.self_attn\.(q|v)_proj", {"rank_pattern": {"q_proj": 3}}),
    ("llama", "causal-lm", "CAUSAL_LM", ["q_proj"], {"layers_to_transform": [1]}),
    ("llama", "causal-lm", "CAUSAL_LM", ["q_proj"], {"trainable_token_indices": [3, 5]}),
    ("llama", "sequence-classification", "SEQ_CLS", "all-linear", {}),
    ("mistral", "causal-lm", "CAUSAL_LM", ["q_proj"], {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("qwen2", "causal-lm", "CAUSAL_LM", PROJECTIONS, {}),
    ("qwen3", "causal-lm", "CAUSAL_LM", None, {}),
    ("phi3", "causal-lm", "CAUSAL_LM", "all-linear", {}),
    ("phi3", "causal-lm", "CAUSAL_LM", ["qkv_proj", "gate_up_proj"], {}),
    ("gpt_neox", "causal-lm", "CAUSAL_LM", ["query_key_value", "dense"], {}),
    ("phi", "causal-lm", "CAUSAL_LM", ["q_proj", "dense", "fc1"], {}),
    ("gemma2", "causal-lm", "CAUSAL_LM", "all-linear", {}),
    ("olmo2", "causal-lm", "CAUSAL_LM", PROJECTIONS, {}),
]


def saved(family: str, head: Any, folder: Path, **options: Any) -> Path:
    """A random model, as transformers saves it."""
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **options})
    model = class_of(transformers, family, head)(config)
    randomise(model, 0)
    model.save_pretrained(folder)
    return folder


def shaken(model: Any, seed: int) -> Any:
    """Random numbers in all that an adapter trains, so that it has an effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens", "ia3_")):
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return model.eval()


def first(model: Any) -> Tensor:
    """Logits, or the last hidden states."""
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS)[0]
    return result


def backends(model: Any) -> set[str]:
    """What ran the blocks."""
    minilm.explain(reset=True)
    first(model)
    return minilm.explain().backends("blocks")


def near(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())) + 1e-5)


@pytest.mark.parametrize(("family", "head", "task", "targets", "options"), CASES)
def test_an_adapter_is_one_of_transformers(
    family: str, head: Any, task: str | None, targets: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """Written here and read there, and the other way round; switched off, merged, saved."""
    folder = saved(family, head, tmp_path / "base")

    def load(library: Any) -> Any:
        return class_of(library, family, head).from_pretrained(folder)

    def config() -> Any:
        return peft.LoraConfig(task_type=task, target_modules=targets, r=2, **options)

    model, plain = load(minilm), first(load(transformers))
    ours = shaken(peft.get_peft_model(model, config()), 1)
    theirs = shaken(peft.get_peft_model(load(transformers), config()), 2)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    adapted = first(ours)
    assert (adapted - plain).abs().max() > 1e-2
    names = []
    for name, adapter in (("ours", ours), ("theirs", theirs)):
        adapter.save_pretrained(tmp_path / name)
        names.append(sorted(safetensors_torch.load_file(tmp_path / name / "adapter_model.safetensors")))
    assert names[0] == names[1]
    there = peft.PeftModel.from_pretrained(load(transformers), tmp_path / "ours").eval()
    here = peft.PeftModel.from_pretrained(load(minilm), tmp_path / "theirs").eval()
    near(adapted, first(there))
    near(first(here), first(theirs))
    with ours.disable_adapter():
        near(first(ours), plain)
    near(first(ours), adapted)
    assert ours.merge_and_unload() is model
    expected = first(there.merge_and_unload())  # of tied matrices not what they were before
    assert not model.is_unfused
    assert not hasattr(model, "peft_config")
    near(first(model), expected)
    assert backends(model) == backends(load(minilm))
    model.save_pretrained(tmp_path / "merged")
    near(first(class_of(transformers, family, head).from_pretrained(tmp_path / "merged")), expected)


def lora(family: str, head: Any, folder: Path, library: Any = minilm, **options: Any) -> Any:
    model = class_of(library, family, head).from_pretrained(folder)
    given = {"target_modules": "all-linear", "r": 2, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**given))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation(family: str, tmp_path: Path) -> None:
    """The adapter writes, with the cache and a padded batch; after it, the model alone does again."""
    folder = saved(family, "causal-lm", tmp_path / "base")
    adapter = shaken(lora(family, "causal-lm", folder, transformers, task_type="CAUSAL_LM"), 1)
    adapter.save_pretrained(tmp_path / "adapter")
    texts = []
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    for library in (minilm, transformers):
        base = class_of(library, family, "causal-lm").from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        found = [model.generate(input_ids=IDS, **options)]
        with model.disable_adapter():
            found.append(model.generate(input_ids=IDS, **options))
        found.append(model.merge_and_unload().generate(IDS, **options))
        texts.append(found)
    for ours, theirs in zip(*texts, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(texts[0][0], texts[0][1])


@pytest.mark.parametrize(
    ("family", "head", "task"),
    [("bert", "sequence-classification", "SEQ_CLS"), ("llama", "causal-lm", "CAUSAL_LM")],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family: str, head: Any, task: str, checkpointing: bool, tmp_path: Path) -> None:
    """The same losses as transformers' model, step by step, and only the adapter changes."""
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    folder = saved(family, head, tmp_path / "base", **(still if family == "bert" else {}))
    shaken(lora(family, head, folder, transformers, task_type=task), 1).save_pretrained(tmp_path / "start")
    labels = IDS if head == "causal-lm" else torch.tensor([0, 1, 0])
    curves = []
    for library in (minilm, transformers):
        base = class_of(library, family, head).from_pretrained(folder)
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(6):
            loss = model(input_ids=IDS, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        curves.append(losses)
        assert losses[-1] < losses[0]
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert curves[0] == pytest.approx(curves[1], rel=2e-3, abs=1e-4)


def test_several_adapters(tmp_path: Path) -> None:
    folder = saved("llama", "causal-lm", tmp_path / "base")
    results: list[list[Tensor]] = []
    for name in ("one", "two"):
        adapter = shaken(lora("llama", "causal-lm", folder, transformers), len(name) * 7 + ord(name[0]))
        adapter.save_pretrained(tmp_path / name)
    for library in (minilm, transformers):
        base = class_of(library, "llama", "causal-lm").from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one").eval()
        model.load_adapter(tmp_path / "two", adapter_name="two")
        found = [first(model)]
        model.set_adapter("two")
        found.append(first(model))
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="linear")
        model.set_adapter("both")
        found.append(first(model))
        model.delete_adapter("both")
        model.set_adapter("one")
        found += [first(model), first(model.unload())]
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        near(ours, theirs)
    assert not torch.allclose(results[0][0], results[0][1], atol=1e-2)


def test_an_adapter_after_another(tmp_path: Path) -> None:
    """unload() gives the model back, and it takes a new adapter."""
    folder = saved("bert", "sequence-classification", tmp_path / "base")
    model = class_of(minilm, "bert", "sequence-classification").from_pretrained(folder)
    plain = first(model)
    for seed in (1, 2):
        adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
        assert not torch.allclose(first(shaken(adapter, seed)), plain, atol=1e-3)
        assert torch.equal(first(adapter.unload()), plain)
        assert not model.is_unfused


def test_without_memory_for_the_adapter(tmp_path: Path) -> None:
    """low_cpu_mem_usage makes adapters on the meta device, and must not take the model there."""
    folder = saved("llama", "causal-lm", tmp_path / "base")
    expected = shaken(lora("llama", "causal-lm", folder, transformers), 1)
    expected.save_pretrained(tmp_path / "adapter")
    base = class_of(minilm, "llama", "causal-lm").from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=True).eval()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    near(first(model), first(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Adapters are in float32, as in transformers, and the model is what it was."""
    folder = saved("llama", "causal-lm", tmp_path / "base")
    outs = []
    shaken(lora("llama", "causal-lm", folder, transformers), 1).save_pretrained(tmp_path / "adapter")
    for library in (minilm, transformers):
        base = class_of(library, "llama", "causal-lm").from_pretrained(folder, dtype=dtype)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
        outs.append(first(model).float())
        assert base.dtype == dtype
    scale = float(outs[1].abs().max())
    assert_close(outs[0], outs[1], atol=0.05 * scale)


def test_ia3_and_trained_norms(tmp_path: Path) -> None:
    folder = saved("bert", "sequence-classification", tmp_path / "base")
    configs = (
        lambda: peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
        lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    )
    for number, config in enumerate(configs):
        outs = []
        for library in (transformers, minilm):
            base = class_of(library, "bert", "sequence-classification").from_pretrained(folder)
            if library is transformers:
                model = peft.get_peft_model(base, config())
                draw = torch.Generator().manual_seed(number)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
                model.save_pretrained(tmp_path / str(number))
            else:
                model = peft.PeftModel.from_pretrained(base, tmp_path / str(number))
            outs += [first(model.eval()), first(model.merge_and_unload())]
        near(outs[2], outs[0])
        near(outs[3], outs[1])
        assert (outs[0] - outs[1]).abs().max() < 1e-3


def test_prompt_tuning(tmp_path: Path) -> None:
    """Trained prompts go through inputs_embeds: forward is transformers', and generate is refused."""
    folder = saved("llama", "causal-lm", tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = peft.get_peft_model(class_of(transformers, "llama", "causal-lm").from_pretrained(folder), config)
    theirs.save_pretrained(tmp_path / "prompt")
    base = class_of(minilm, "llama", "causal-lm").from_pretrained(folder)
    ours = peft.PeftModel.from_pretrained(base, tmp_path / "prompt").eval()
    near(first(ours), first(theirs.eval()))
    with pytest.raises(ValueError, match="does not call prepare_inputs_for_generation"):
        ours.generate(input_ids=IDS, max_new_tokens=3)
    assert base.generate(IDS, max_new_tokens=3).shape == (3, 10)


def test_prefix_tuning_is_refused(tmp_path: Path) -> None:
    folder = saved("llama", "causal-lm", tmp_path / "base")
    base = class_of(minilm, "llama", "causal-lm").from_pretrained(folder)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="must be the KVCache of an earlier call, and is DynamicCache"):
        first(peft.get_peft_model(base, config).eval())


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    folder = saved("llama", "causal-lm", tmp_path / "base", hidden_size=64, intermediate_size=64)
    model = minilm.AutoModelForCausalLM.from_pretrained(folder, weights="q8_0")
    with pytest.raises(ValueError, match=r"quantised model .* load it without weights="):
        peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig())
    plain = minilm.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prepared = peft.prepare_model_for_kbit_training(plain)
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in prepared.parameters())


def test_names_that_no_module_has(tmp_path: Path) -> None:
    """The error is PEFT's, and names of modules here are no names."""
    folder = saved("bert", "sequence-classification", tmp_path / "base")
    model = class_of(minilm, "bert", "sequence-classification").from_pretrained(folder)
    with pytest.raises(ValueError, match="qkv"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    assert len(adapter.targeted_module_names) == 2


def test_others_do_not_unfuse() -> None:
    """To look for adapters changes nothing, unless it is PEFT that is about to put some in."""
    model = minilm.AutoModel.from_config(minilm.BertConfig(**ENCODER))
    assert not hasattr(model, "peft_config")
    assert not model.is_unfused


def test_pipelines_take_an_adapted_model(tmp_path: Path) -> None:
    from tiny_models import save_decoder

    folder = save_decoder(tmp_path / "base", "llama")
    tokenizer = minilm.AutoTokenizer.from_pretrained(folder)
    model = minilm.AutoModelForCausalLM.from_pretrained(folder)
    adapted = shaken(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2)), 1)
    options = {"max_new_tokens": 6, "do_sample": False}
    results = [
        minilm.pipeline("text-generation", model=str(folder))("John Smith", **options),
        minilm.pipeline("text-generation", model=adapted, tokenizer=tokenizer)("John Smith", **options),
        minilm.pipeline("text-generation", model=adapted.merge_and_unload())("John Smith", **options),
    ]
    assert results[1] == results[2] != results[0]
    prompts = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="a pipeline would not use them"):
        minilm.pipeline("text-generation", model=prompts, tokenizer=tokenizer)


def test_sentences_of_an_adapted_encoder(tmp_path: Path) -> None:
    from tiny_models import TEXTS, save_model

    encoder = minilm.SentenceEncoder(str(save_model(tmp_path / "base", "bert")))
    inner = encoder.transformer.model
    plain = torch.tensor(encoder.encode(TEXTS))
    adapted = shaken(peft.get_peft_model(inner, peft.LoraConfig(target_modules=["query", "dense"], r=2)), 1)
    with_adapter = torch.tensor(encoder.encode(TEXTS))
    assert not torch.allclose(with_adapter, plain, atol=1e-3)
    adapted.merge_and_unload()
    near(torch.tensor(encoder.encode(TEXTS)), with_adapter)


def test_the_folder_of_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = saved("bert", "sequence-classification", tmp_path / "base")
    lora("bert", "sequence-classification", folder).save_pretrained(tmp_path / "adapter")
    with pytest.raises(minilm.ConfigError, match=r"holds an adapter of PEFT and no model.*peft\.PeftModel"):
        minilm.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is a Linear of peft"):
        lora("bert", "sequence-classification", folder).base_model.model.save_pretrained(tmp_path / "no")
    auto = peft.AutoPeftModel
    found = auto.from_pretrained(tmp_path / "adapter", import_allowlist=["minilm"])
    assert type(found.get_base_model()) is minilm.BertForSequenceClassification


@pytest.mark.parametrize("kind", ["modernbert", "deberta-v2", "nomic_bert"])
def test_newer_encoders(kind: str) -> None:
    """Adapters of all linear layers, also of ModernBERT's `head.dense`: transformers computes the same with
    them, and merged they stay."""
    options = {"conv_kernel_size": 3, "share_att_key": False} if kind == "deberta-v2" else {}
    ids = torch.randint(3, 41, (3, 11), generator=torch.Generator().manual_seed(0))
    with pair(small(kind, **options), "sequence-classification", 3) as p, torch.no_grad():
        before = p.model(ids).logits
        settings = peft.LoraConfig(
            task_type="SEQ_CLS", target_modules="all-linear", r=2, init_lora_weights=False
        )
        adapted = peft.get_peft_model(p.model, settings)
        adapted.save_pretrained(str(p.folder / "adapter"))
        theirs = peft.PeftModel.from_pretrained(p.reference, str(p.folder / "adapter")).eval()
        expected = theirs(input_ids=ids).logits
        assert_close(adapted.eval()(input_ids=ids).logits, expected, atol=1e-4)
        assert float((expected - before).abs().max()) > 1e-2
        assert_close(adapted.merge_and_unload().fuse()(input_ids=ids).logits, expected, atol=1e-4)
