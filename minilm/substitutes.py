"""Suggestions for error messages: what to use in place of names and options of transformers that minilm does
not have.

Also the options of `from_pretrained` that minilm accepts without effect."""

from __future__ import annotations

import warnings
from typing import Any

_SEQUENCE = (
    "of the encoder-decoders, T5, mT5, umT5, BART, mBART and Marian are supported: use transformers for "
    "others"
)
_IMAGES = "minilm reads text only: use transformers for images and sound"
_QUANTISED = (
    "from_pretrained(name, weights='int8'), 'q8_0' or 'q4_0' quantises while loading; `minilm quantize` "
    "saves a quantised folder"
)
_TRAINING = (
    "transformers.Trainer trains a minilm model (minilm.integrations.transformers.Trainer writes "
    "checkpoints that transformers loads too), and so does your own loop: model(**batch, "
    "labels=...).loss.backward()"
)

CLASSES = {
    "PegasusForConditionalGeneration": _SEQUENCE,
    "M2M100ForConditionalGeneration": _SEQUENCE,
    "AutoProcessor": _IMAGES,
    "AutoImageProcessor": _IMAGES,
    "AutoFeatureExtractor": _IMAGES,
    "AutoModelForImageClassification": _IMAGES,
    "AutoModelForSpeechSeq2Seq": _IMAGES,
    "BitsAndBytesConfig": _QUANTISED,
    "GPTQConfig": _QUANTISED,
    "AwqConfig": _QUANTISED,
    "Trainer": _TRAINING,
    "TrainingArguments": _TRAINING,
    "AutoModelForMultipleChoice": "AutoModelForSequenceClassification scores each choice as a pair",
    "DynamicCache": "model.new_cache(rows) makes the KV cache, and forward(use_cache=True) returns one",
    "StaticCache": "model.new_cache(rows) makes the KV cache, and forward(use_cache=True) returns one",
    "LogitsProcessorList": "generate accepts a list of functions, or transformers' list class",
    "StoppingCriteriaList": "generate accepts a list of functions, or transformers' list class",
    "get_peft_model": "peft.get_peft_model(model, config) accepts a model of minilm",
    "PeftModel": "peft.PeftModel.from_pretrained(model, name) accepts a model of minilm",
    "DataCollatorWithPadding": "transformers' collators accept a tokenizer of minilm; tokenizer.pad is one",
    "DataCollatorForLanguageModeling": "transformers' collators accept a tokenizer of minilm",
    "DataCollatorForTokenClassification": "transformers' collators accept a tokenizer of minilm",
    "set_seed": "torch.manual_seed(seed), or seed= in generate and SamplingParams",
    "models": "from sentence_transformers import models, or SentenceEncoder(name), which reads modules.json",
}
"""Class or function -> what to use instead."""

OPTIONS = {
    "load_in_8bit": "weights='int8' (or 'q8_0') quantises while loading",
    "load_in_4bit": "weights='q4_0' (or 'q4_1') quantises while loading",
    "quantization_config": "weights='int8', 'q8_0' or 'q4_0' quantises while loading",
    "max_memory": "device= names the device of the whole model",
    "offload_folder": "device= names the device of the whole model",
    "tp_plan": "device= names the device of the whole model",
    "state_dict": "from_config(config), then load_state_dict(state_dict)",
    "from_tf": "only safetensors and GGUF files are read",
    "from_flax": "only safetensors and GGUF files are read",
    "subfolder": "give the path of the folder itself",
}
"""Option of `from_pretrained` -> what to use instead."""


def instead(table: dict[str, str], names: list[str]) -> str:
    """The part of an error message "; load_in_8bit: weights='int8' ..." for those of the names that are in
    the table."""
    return "".join(f"; {name}: {table[name]}" for name in names if name in table)


WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "adapter_kwargs": (None, {}),
    "attn_implementation": (None,),
    "force_download": (None, False),
    "low_cpu_mem_usage": (None, True),
    "proxies": (None, {}),
    "resume_download": (None, False),
    "trust_remote_code": (None, False),
    "use_auth_token": (None,),
    "use_fast": (None, True),
    "use_safetensors": (None, True),
    "weights_only": (None, True),
}
"""Options of transformers' `from_pretrained` that are accepted and have no effect -> the values that need no
warning, because they ask for what minilm does anyway."""


def with_effect(options: dict[str, Any], table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The options that are not in `table`. One warning names those in it whose value asks for something that
    minilm does not do."""
    idle = [f"{k}={v!r}" for k, v in options.items() if k in table and not any(v == w for w in table[k])]
    if idle:
        verb = "has" if len(idle) == 1 else "have"
        warnings.warn(f"{', '.join(idle)} {verb} no effect in minilm", UserWarning, stacklevel=3)
    return {name: value for name, value in options.items() if name not in table}
