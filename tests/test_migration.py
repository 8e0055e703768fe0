"""Changing the import is the whole migration: the usual programs, run with transformers and with minilm, say
the same.

Each example is a program as people write it after reading transformers' documentation, with the library as a
parameter in place of the import. What it returns is compared, number by number.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_pieces
import tiny_seq2seq
import torch
import torch.nn.functional as F
import transformers
from pairs import randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader

import minilm
from minilm.files.hub import DEFAULT_ENCODER, resolve

SENTENCES = ["This is an example sentence", "Each sentence is converted", "naïve café, größer: 東京 😀"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "A model reads tokens, one after the other, and says which comes next. ",
    "Yesterday all my troubles seemed so far away; today they are here. ",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Models = dict[str, str]
Example = Callable[[Any, Models], Any]


def save_bert(folder: Path, cls: str, seed: int, **options: Any) -> str:
    """A small random BERT with MiniLM's tokenizer."""
    config = transformers.BertConfig(
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=36,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    model = getattr(transformers, cls)(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(resolve(DEFAULT_ENCODER)) / name, folder)
    return str(folder)


def save_decoder(folder: Path, seed: int, model: Any) -> str:
    """A small random decoder with a byte-level tokenizer of its own and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    randomise(model, seed)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Checkpoints for the examples: MiniLM itself, and small random ones."""
    top = tmp_path_factory.mktemp("models")
    tags = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
    gpt2 = transformers.GPT2Config(
        vocab_size=400,
        n_embd=24,
        n_head=3,
        n_layer=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    llama = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=40,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    feelings = {0: "NEGATIVE", 1: "POSITIVE"}
    return {
        "marian": str(tiny_seq2seq.with_tokenizer("marian", tiny_pieces.marian(top / "marian"))),
        "t5": str(tiny_seq2seq.with_tokenizer("t5", tiny_pieces.t5(top / "t5"))),
        "encoder": str(resolve(DEFAULT_ENCODER)),
        "mlm": save_bert(top / "mlm", "BertForMaskedLM", 1),
        "classifier": save_bert(top / "classifier", "BertForSequenceClassification", 2, id2label=feelings),
        "tagger": save_bert(top / "tagger", "BertForTokenClassification", 3, id2label=tags),
        "answerer": save_bert(top / "answerer", "BertForQuestionAnswering", 4),
        "pretrained": save_bert(top / "pretrained", "BertForPreTraining", 5),
        "gpt2": save_decoder(top / "gpt2", 6, transformers.GPT2LMHeadModel(gpt2)),
        "llama": save_decoder(top / "llama", 7, transformers.LlamaForCausalLM(llama)),
    }


# --- encoders ---


def sentence_embeddings(lib: Any, folders: Models) -> Any:
    """The model card of all-MiniLM-L6-v2, without sentence-transformers."""

    def mean_pooling(model_output: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        token_embeddings = model_output[0]
        expanded = attention_mask.unsqueeze(-1).expand(token_embeddings.size()).float()
        return torch.sum(token_embeddings * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)

    tokenizer = lib.AutoTokenizer.from_pretrained(folders["encoder"])
    model = lib.AutoModel.from_pretrained(folders["encoder"])
    encoded_input = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        model_output = model(**encoded_input)
    return F.normalize(mean_pooling(model_output, encoded_input["attention_mask"]), p=2, dim=1)


def hidden_states_and_attentions(lib: Any, folders: Models) -> Any:
    tokenizer = lib.BertTokenizer.from_pretrained(folders["encoder"])
    model = lib.BertModel.from_pretrained(
        folders["encoder"], attn_implementation="eager", output_attentions=True
    )
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, output_hidden_states=True)
    assert outputs.last_hidden_state is outputs[0]
    return [
        outputs.last_hidden_state,
        outputs.pooler_output,
        list(outputs.hidden_states),
        list(outputs.attentions),
        [list(x.shape) for x in outputs.attentions],
        sorted(set(outputs.keys()) - {"cross_attentions"}),
    ]


def fill_in_the_mask(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["mlm"])
    model = lib.AutoModelForMaskedLM.from_pretrained(folders["mlm"])
    inputs = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    mask_token_index = (inputs.input_ids == tokenizer.mask_token_id)[0].nonzero(as_tuple=True)[0]
    predicted_token_id = logits[0, mask_token_index].argmax(axis=-1)
    labels = tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    labels = torch.where(inputs.input_ids == tokenizer.mask_token_id, labels, -100)
    loss = model(**inputs, labels=labels).loss
    top = torch.topk(logits[0, mask_token_index], 5, dim=1)
    return [tokenizer.decode(predicted_token_id), loss, top.indices, top.values]


def is_it_positive(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["classifier"])
    model = lib.BertForSequenceClassification.from_pretrained(folders["classifier"])
    inputs = tokenizer(["I love this.", "I hate this, and that as well."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted = [model.config.id2label[i] for i in logits.argmax(dim=-1).tolist()]
    num_labels = len(model.config.id2label)
    loss = model(**inputs, labels=torch.tensor([1, 0])).loss
    probabilities = torch.nn.functional.softmax(logits, dim=-1)
    return [logits, predicted, num_labels, model.num_labels, round(loss.item(), 3), probabilities.tolist()]


def several_classes_at_once(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["classifier"])
    model = lib.AutoModelForSequenceClassification.from_pretrained(
        folders["classifier"], problem_type="multi_label_classification"
    )
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]
    labels = torch.sum(torch.nn.functional.one_hot(predicted[None, :].clone(), num_classes=2), dim=1).to(
        torch.float
    )
    return [predicted, model(**inputs, labels=labels).loss]


def who_and_where(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["tagger"])
    model = lib.AutoModelForTokenClassification.from_pretrained(folders["tagger"])
    text = "HuggingFace is a company based in Paris and New York"
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted = logits.argmax(-1)
    classes = [model.config.id2label[t.item()] for t in predicted[0]]
    words = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    return [list(zip(words, classes, strict=True)), model(**inputs, labels=predicted).loss]


def answer_a_question(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["answerer"])
    model = lib.AutoModelForQuestionAnswering.from_pretrained(folders["answerer"])
    question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
    inputs = tokenizer(question, text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    start, end = int(outputs.start_logits.argmax()), int(outputs.end_logits.argmax())
    answer = tokenizer.decode(
        inputs.input_ids[0, min(start, end) : max(start, end) + 1], skip_special_tokens=True
    )
    outputs = model(**inputs, start_positions=torch.tensor([11]), end_positions=torch.tensor([13]))
    return [answer, start, end, outputs.loss, inputs["token_type_ids"]]


def next_sentence(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["pretrained"])
    model = lib.BertForNextSentencePrediction.from_pretrained(folders["pretrained"])
    encoding = tokenizer("In Italy, pizza is cut.", "The sky is blue due to light.", return_tensors="pt")
    outputs = model(**encoding, labels=torch.LongTensor([1]))
    both = lib.AutoModelForPreTraining.from_pretrained(folders["pretrained"])(**encoding)
    return [outputs.logits, outputs.loss, both.prediction_logits, both.seq_relationship_logits]


# --- decoders ---


def write_on(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["gpt2"])
    model = lib.AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    inputs = tokenizer("The quick brown", return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return [outputs, tokenizer.batch_decode(outputs, skip_special_tokens=True)]


def write_on_in_batches(lib: Any, folders: Models) -> Any:
    """Prompts of different lengths, padded on the left, as decoders want it."""
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["llama"], padding_side="left")
    model = lib.LlamaForCausalLM.from_pretrained(folders["llama"], dtype="auto")
    model_inputs = tokenizer(
        ["A list of colors: red, blue", "Portugal is"], return_tensors="pt", padding=True
    ).to(model.device)
    generated = model.generate(**model_inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.3)
    again = model.generate(**model_inputs, max_length=30, do_sample=False, no_repeat_ngram_size=2)
    return [
        model_inputs["attention_mask"],
        generated,
        tokenizer.batch_decode(again, skip_special_tokens=True),
    ]


def chat(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["llama"])
    model = lib.AutoModelForCausalLM.from_pretrained(folders["llama"])
    messages = [
        {"role": "system", "content": "You are a friendly chatbot."},
        {"role": "user", "content": "How many dogs jump over a fox?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    outputs = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    reply = tokenizer.decode(outputs[0][inputs["input_ids"].shape[-1] :])
    return [text, inputs["input_ids"], reply]


def token_by_token(lib: Any, folders: Models) -> Any:
    """A decoding loop written by hand, with the cache passed on."""
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["llama"])
    model = lib.AutoModelForCausalLM.from_pretrained(folders["llama"])
    input_ids = tokenizer("Yesterday all my", return_tensors="pt").input_ids
    past_key_values, written, scores = None, [], []
    with torch.no_grad():
        for _ in range(8):
            outputs = model(input_ids, past_key_values=past_key_values, use_cache=True)
            past_key_values = outputs.past_key_values
            input_ids = outputs.logits[:, -1:].argmax(dim=-1)
            written.append(input_ids.item())
            scores.append(outputs.logits[:, -1].max())
    return [written, scores, past_key_values.get_seq_length()]


def perplexity(lib: Any, folders: Models) -> Any:
    """The documentation's sliding window over a long text."""
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["gpt2"])
    model = lib.GPT2LMHeadModel.from_pretrained(folders["gpt2"])
    encodings = tokenizer("\n\n".join(CORPUS * 4), return_tensors="pt")
    max_length, stride, seq_len = model.config.n_positions, 24, encodings.input_ids.size(1)
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        input_ids = encodings.input_ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, : -(end_loc - prev_end_loc)] = -100
        with torch.no_grad():
            neg_log_likelihood = model(input_ids, labels=target_ids).loss
        num_loss_tokens = int((target_ids != -100).sum()) - target_ids.size(0)
        nll_sum += float(neg_log_likelihood) * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return [n_tokens, math.exp(nll_sum / n_tokens)]


def stream(lib: Any, folders: Models) -> Any:
    from threading import Thread

    tokenizer = lib.AutoTokenizer.from_pretrained(folders["gpt2"])
    model = lib.AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    inputs = tokenizer(["A model reads"], return_tensors="pt")
    streamer = lib.TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(
        target=model.generate,
        kwargs={**inputs, "streamer": streamer, "max_new_tokens": 12, "do_sample": False},
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


# --- training ---


def batches(tokenizer: Any) -> DataLoader[Any]:
    """Four labelled texts, two at a time."""
    texts = ["I love this.", "I hate this.", "What a fine day it is today!", "Nothing works, nothing at all."]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    rows = [
        {**{key: value[i] for key, value in encoded.items()}, "labels": torch.tensor(1 - i % 2)}
        for i in range(4)
    ]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def fine_tune(lib: Any, folders: Models) -> Any:
    """The training loop of the documentation, without the progress bar."""
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["classifier"])
    model = lib.AutoModelForSequenceClassification.from_pretrained(folders["classifier"], num_labels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    model.train()
    losses = []
    for _ in range(6):
        for batch in batches(tokenizer):
            outputs = model(**{k: v.to(model.device) for k, v in batch.items()})
            loss = outputs.loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    correct = 0
    for batch in batches(tokenizer):
        with torch.no_grad():
            predictions = torch.argmax(model(**batch).logits, dim=-1)
        correct += int((predictions == batch["labels"]).sum())
    assert losses[-1] < losses[0]
    return [[round(loss, 3) for loss in losses], correct]


def fine_tune_a_decoder(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["llama"])
    model = lib.AutoModelForCausalLM.from_pretrained(folders["llama"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = tokenizer(CORPUS, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 3))
    return losses


def freeze(lib: Any, folders: Models) -> Any:
    model = lib.AutoModelForSequenceClassification.from_pretrained(folders["classifier"])
    for param in model.bert.parameters():
        param.requires_grad = False
    inputs = {"input_ids": torch.tensor([[101, 7592, 102]])}
    return [
        model.base_model(**inputs).pooler_output,
        model.bert(**inputs).last_hidden_state,
        lib.AutoModelForCausalLM.from_pretrained(folders["gpt2"]).transformer(torch.tensor([[7, 8]]))[0],
        lib.AutoModelForCausalLM.from_pretrained(folders["llama"]).model(torch.tensor([[7, 8]]))[0],
        model.num_parameters(),
        model.num_parameters(only_trainable=True),
        sum(p.numel() for p in model.parameters()),
    ]


# --- configurations, files, tokenizers ---


def configurations(lib: Any, folders: Models) -> Any:
    config = lib.AutoConfig.from_pretrained(folders["tagger"], output_attentions=True)
    config.hidden_dropout_prob = 0.2
    fresh = lib.BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    model = lib.BertModel(fresh)
    other = lib.AutoModelForCausalLM.from_config(
        lib.GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=50)
    )
    return [
        (config.hidden_size, config.num_labels, config.id2label, config.model_type),
        (config.output_attentions, config.hidden_dropout_prob, config.vocab_size, config.architectures),
        (model.config.num_hidden_layers, model.num_parameters(), model.training),
        (
            other.num_parameters(),
            other.config.hidden_size,
            other.config.n_positions,
            other.config.eos_token_id,
        ),
        config.to_dict()["hidden_size"],
    ]


def save_and_load(lib: Any, folders: Models) -> Any:
    folder = Path(folders["tagger"]).parent / f"saved-{lib.__name__}"
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["tagger"])
    model = lib.AutoModelForTokenClassification.from_pretrained(folders["tagger"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inputs = lib.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    again = lib.AutoModelForTokenClassification.from_pretrained(folder)
    other = transformers if lib is minilm else minilm
    theirs = other.AutoModelForTokenClassification.from_pretrained(folder)
    mask = inputs["attention_mask"].bool()
    return [m(**inputs).logits[mask] for m in (again, theirs)]


def half_precision(lib: Any, folders: Models) -> Any:
    model = lib.AutoModel.from_pretrained(folders["encoder"], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model = model.to(torch.float32).to("cpu")
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    return model(torch.tensor([[101, 7592, 102]])).last_hidden_state


def input_vectors(lib: Any, folders: Models) -> Any:
    model = lib.AutoModelForMaskedLM.from_pretrained(folders["mlm"])
    ids = torch.tensor([[101, 7592, 103, 102]])
    vectors = model.get_input_embeddings()(ids)
    model.resize_token_embeddings(30530)
    return [
        model(inputs_embeds=vectors).logits[..., :30522],
        model.get_input_embeddings().weight.shape[0],
        model.config.vocab_size,
    ]


def tokens(lib: Any, folders: Models) -> Any:
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["encoder"])
    pair = tokenizer(
        ["How old are you?"],
        ["I'm 6 years old"],
        truncation="only_second",
        max_length=12,
        padding="max_length",
    )
    return [
        tokenizer.tokenize("Using a Transformer network is simple"),
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize("a network")),
        tokenizer.decode([7993, 170, 13809, 23763]),
        tokenizer("Don't you love 🤗 Transformers?")["input_ids"],
        dict(pair),
        (
            tokenizer.cls_token,
            tokenizer.sep_token_id,
            tokenizer.pad_token,
            tokenizer.vocab_size,
            len(tokenizer),
        ),
        tokenizer.batch_decode([[101, 7592, 102], [101, 2088, 102]], skip_special_tokens=True),
        tokenizer("two words", return_offsets_mapping=True)["offset_mapping"],
        tokenizer("two words").word_ids(),
    ]


def ready_made(lib: Any, folders: Models) -> Any:
    """Pipelines."""
    classify = lib.pipeline("text-classification", model=folders["classifier"])
    fill = lib.pipeline("fill-mask", model=folders["mlm"])
    write = lib.pipeline("text-generation", model=folders["gpt2"])
    features = lib.pipeline("feature-extraction", model=folders["encoder"])
    return [
        classify(["I love this.", "I hate this."]),
        [{k: v for k, v in found.items() if k != "sequence"} for found in fill("A [MASK] jumps.", top_k=3)],
        write("The quick brown", max_new_tokens=8, do_sample=False),
        features("a text")[0],
    ]


def translate(lib: Any, folders: Models) -> Any:
    """Chapter 7 of the course: sources and targets, a collator, the loss, and translations by beams."""
    tokenizer = lib.AutoTokenizer.from_pretrained(folders["marian"])
    model = lib.AutoModelForSeq2SeqLM.from_pretrained(folders["marian"]).eval()
    sources, targets = ["the cat sat on a mat.", "dogs ran far away"], ["le chat est assis", "les chiens"]
    made = tokenizer(sources, text_target=targets, max_length=12, truncation=True)
    rows = [{key: value[row] for key, value in made.items()} for row in range(2)]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model, return_tensors="pt")
    batch = collator(rows)
    loss = model(**batch).loss.item()
    written = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=3, max_length=9
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return dict(batch), loss, written, texts, type(model).__name__, type(tokenizer).__name__


def summarise(lib: Any, folders: Models) -> Any:
    """T5 with a prefix, a few new tokens and one step of training."""
    tokenizer = lib.T5Tokenizer.from_pretrained(folders["t5"])
    model = lib.T5ForConditionalGeneration.from_pretrained(folders["t5"]).eval()
    inputs = tokenizer("the cat: dogs ran over hills", return_tensors="pt", max_length=9, truncation=True)
    written = model.generate(**inputs, max_new_tokens=7, min_new_tokens=2, num_beams=2, length_penalty=2.0)
    labels = tokenizer(text_target="dogs ran", return_tensors="pt").input_ids
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return inputs["input_ids"], written, tokenizer.decode(written[0], skip_special_tokens=True), losses


EXAMPLES: Sequence[Example] = (
    *(
        sentence_embeddings,
        hidden_states_and_attentions,
        fill_in_the_mask,
        is_it_positive,
        several_classes_at_once,
    ),
    *(
        who_and_where,
        answer_a_question,
        next_sentence,
        write_on,
        write_on_in_batches,
        chat,
        token_by_token,
        perplexity,
    ),
    *(
        stream,
        fine_tune,
        fine_tune_a_decoder,
        freeze,
        configurations,
        save_and_load,
        half_precision,
        input_vectors,
        tokens,
    ),
    *(ready_made, translate, summarise),
)


def assert_same(ours: Any, theirs: Any, where: str = "result") -> None:
    """Numbers within 1e-4, all else equal; tensors, lists and dicts by their parts."""
    if isinstance(theirs, torch.Tensor):
        ours, theirs = ours.tolist(), theirs.tolist()
    if isinstance(theirs, float):
        assert isinstance(ours, float), f"{where}: {ours!r} is no {theirs!r}"
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{place}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_only_the_import_changes(example: Example, folders: Models) -> None:
    theirs = example(transformers, folders)
    assert_same(example(minilm, folders), theirs)


def test_names_that_programs_import_are_there() -> None:
    """Every class of the supported families that this test's families and heads have in transformers."""
    from minilm.families import families

    for family in families():
        for head in ("base", *family.heads):
            name = family.class_name(head)
            assert getattr(minilm, name).head_kind == head
        for what in ("Config", "Tokenizer"):
            assert getattr(minilm, f"{family.class_prefix}{what}") is not None
    for name in ("AutoModel", "AutoTokenizer", "AutoConfig", "GenerationConfig", "pipeline", "TextStreamer"):
        assert name in dir(minilm)
        assert getattr(minilm, name) is not None
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = minilm.NoSuchModel
    with pytest.raises(ImportError):
        exec("from minilm import BertForTelepathy")
