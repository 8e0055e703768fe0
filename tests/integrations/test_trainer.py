"""transformers' Trainer trains, evaluates, saves and resumes models of minilm, with the same results as
transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from strategies import small
from tiny_models import TEXTS, save_decoder, save_model
from torch.utils.data import Dataset

import minilm
from minilm.integrations.trainer import trainer_class
from minilm.weights import CONFIG_KEY

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.torch")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
Trainer = trainer_class()
pytestmark = pytest.mark.slow


class Rows(Dataset[dict[str, Any]]):
    """Texts of mixed lengths with labels, which the collator pads."""

    def __init__(self, count: int, kind: str) -> None:
        draw = torch.Generator().manual_seed(count)
        self.rows = []
        for _ in range(count):
            ids = torch.randint(5, 20, (int(torch.randint(3, 9, (), generator=draw)),), generator=draw)
            labels: Any = ids.tolist() if kind == "tokens" else int(ids.sum() % 2)
            self.rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], list):
        labels = [row + [-100] * (width - len(row)) for row in labels]
    return {**batch, "labels": torch.tensor(labels)}


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=3,
        max_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def curve(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


KINDS = {
    "bert": ("AutoModelForSequenceClassification", "labels"),
    "llama": ("AutoModelForCausalLM", "tokens"),
}


@pytest.fixture(params=KINDS)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    """A checkpoint to begin with, the class to load it, and the kind of labels."""
    name, kind = KINDS[request.param]
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    config = small(request.param) | (still if request.param == "bert" else {})
    torch.manual_seed(0)
    model = getattr(minilm, name).from_config(minilm.PretrainedConfig.from_dict(config))
    model.save_pretrained(tmp_path / "start")
    return tmp_path / "start", name, kind


def trained(cls: Any, library: Any, start: tuple[Path, str, str], folder: Path, **options: Any) -> Any:
    checkpoint, name, kind = start
    resume = options.pop("resume_from_checkpoint", None)
    trainer = cls(
        model=getattr(library, name).from_pretrained(checkpoint),
        # With several batches a step transformers adds up the losses of a BERT, which it means to average.
        args=arguments(folder, gradient_accumulation_steps=2 if kind == "tokens" else 1, **options),
        train_dataset=Rows(40, kind),
        eval_dataset=Rows(11, kind),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("cls", [transformers.Trainer, Trainer], ids=["theirs", "ours"])
def test_the_curve_is_that_of_transformers(cls: Any, start: tuple[Path, str, str], tmp_path: Path) -> None:
    theirs = trained(transformers.Trainer, transformers, start, tmp_path / "theirs")
    ours = trained(cls, minilm, start, tmp_path / "ours")
    assert len(curve(ours)) == 6
    assert curve(ours) == pytest.approx(curve(theirs), abs=2e-4)
    assert len(set(curve(ours))) > 3
    mine, expected = ours.evaluate(), theirs.evaluate()
    assert mine["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-4)


@pytest.mark.parametrize("cls", [transformers.Trainer, Trainer], ids=["theirs", "ours"])
def test_training_that_goes_on_from_a_checkpoint(
    cls: Any, start: tuple[Path, str, str], tmp_path: Path
) -> None:
    whole = trained(cls, minilm, start, tmp_path / "whole")
    resumed = trained(
        cls,
        minilm,
        start,
        tmp_path / "resumed",
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"),
    )
    assert curve(resumed) == pytest.approx(curve(whole), abs=1e-6)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_what_is_saved_loads_in_both_libraries(start: tuple[Path, str, str], tmp_path: Path) -> None:
    trainer = trained(Trainer, minilm, start, tmp_path / "run", gradient_checkpointing=True)
    trainer.save_model(str(tmp_path / "last"))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model.eval()(ids).logits
    for folder in (tmp_path / "last", tmp_path / "run" / "checkpoint-6"):
        for library in (minilm, transformers):
            model = getattr(library, start[1]).from_pretrained(folder)
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_checkpoints_of_transformers_own_trainer(start: tuple[Path, str, str], tmp_path: Path) -> None:
    """They have no config.json, and carry the configuration beside the weights."""
    trainer = trained(transformers.Trainer, minilm, start, tmp_path / "run")
    trainer.save_model(str(tmp_path / "last"))
    assert CONFIG_KEY not in trainer.model.state_dict()
    ids = torch.tensor([[5, 6, 7, 8]])
    cls = getattr(minilm, start[1])
    for folder in (tmp_path / "run" / "checkpoint-6", tmp_path / "last"):
        assert not (folder / "config.json").exists()
        model = cls.from_pretrained(folder)
        assert torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)
        assert type(model) is type(trainer.model)
        found = minilm.AutoConfig.from_pretrained(folder)
        assert found.architectures == [type(model).__name__]
        model.save_pretrained(tmp_path / "again")
        theirs = getattr(transformers, start[1]).from_pretrained(tmp_path / "again")
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        given = cls.from_pretrained(folder, config=trainer.model.config)
        assert torch.equal(given(ids).logits, model(ids).logits)
        state = safetensors.torch.load_file(folder / "model.safetensors")
        assert not any(cls.from_config(found).load_state_dict(state))


def test_checkpoints_without_a_configuration(start: tuple[Path, str, str], tmp_path: Path) -> None:
    """A state that somebody saved alone, and one whose configuration is damaged."""
    model = getattr(minilm, start[1]).from_pretrained(start[0])
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    with pytest.raises(minilm.ConfigError, match=r"no config\.json.*from_pretrained\(\.\.\., config="):
        getattr(minilm, start[1]).from_pretrained(tmp_path)
    for damaged, message in (
        (torch.ones(3), "must be the bytes of a config.json, and is F32"),
        (torch.tensor(list(b"{no"), dtype=torch.uint8), "model.safetensors: not JSON"),
        (torch.tensor(list(b"[3]"), dtype=torch.uint8), r"must hold a JSON object, and holds \[3\]"),
    ):
        safetensors.torch.save_file({**model.state_dict(), CONFIG_KEY: damaged}, file)
        with pytest.raises(minilm.ConfigError, match=message):
            minilm.AutoConfig.from_pretrained(tmp_path)


def test_metrics_predictions_and_the_best_model(start: tuple[Path, str, str], tmp_path: Path) -> None:
    """As with transformers: what compute_metrics sees, predict returns, and which checkpoint is kept."""
    found: list[Any] = []
    for library in (minilm, transformers):
        seen = []

        def metrics(prediction: Any, seen: list[Any] = seen) -> dict[str, float]:
            seen.append(prediction)
            logits, labels = prediction.predictions, prediction.label_ids
            real = logits[labels != -100] if logits.ndim == 3 else logits  # at padding it is zero here
            return {"mean": float(real.mean()), "labels": float(labels.sum())}

        trainer = transformers.Trainer(
            model=getattr(library, start[1]).from_pretrained(start[0]),
            args=arguments(
                tmp_path / library.__name__,
                eval_strategy="steps",
                eval_steps=3,
                load_best_model_at_end=True,
                metric_for_best_model="mean",
            ),
            train_dataset=Rows(40, start[2]),
            eval_dataset=Rows(11, start[2]),
            data_collator=collate,
            compute_metrics=metrics,
        )
        trainer.train()
        best = str(trainer.state.best_model_checkpoint).rpartition("/")[2]
        result = trainer.predict(Rows(5, start[2]))
        found.append((best, trainer.evaluate(), result.predictions, result.label_ids, result.metrics))
        assert len(seen) == 4
    ours, theirs = found
    assert ours[0] == theirs[0]
    for name in ("eval_loss", "eval_mean", "eval_labels"):
        assert ours[1][name] == pytest.approx(theirs[1][name], abs=5e-4)
    real = theirs[3] != -100 if start[2] == "tokens" else slice(None)
    mine, expected = (torch.tensor(logits[real]) for logits in (ours[2], theirs[2]))
    torch.testing.assert_close(mine, expected, atol=5e-4, rtol=1e-3)
    assert (ours[3] == theirs[3]).all()
    assert ours[4].keys() == theirs[4].keys()


def test_accelerate_prepares_and_saves(start: tuple[Path, str, str], tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = getattr(minilm, start[1]).from_pretrained(start[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(Rows(6, start[2]), batch_size=3, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "saved",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    again = getattr(minilm, start[1]).from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(ids).logits, accelerator.unwrap_model(model).eval()(ids).logits)


@pytest.mark.parametrize("resume", [False, True])
def test_adapters(start: tuple[Path, str, str], resume: bool, tmp_path: Path) -> None:
    """transformers' Trainer writes the adapter alone, loads the best one, and goes on from a checkpoint."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    folder, name, kind = start
    task = "SEQ_CLS" if kind == "labels" else "CAUSAL_LM"
    config = peft.LoraConfig(task_type=task, r=2, lora_dropout=0.0)
    theirs = peft.get_peft_model(getattr(transformers, name).from_pretrained(folder), config)
    theirs.save_pretrained(tmp_path / "adapter")
    curves, last = [], []
    for library in (minilm, transformers):
        base = getattr(library, name).from_pretrained(folder)
        run = tmp_path / library.__name__
        trainer = transformers.Trainer(
            model=peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True),
            args=arguments(run, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True),
            train_dataset=Rows(24, kind),
            eval_dataset=Rows(7, kind),
            data_collator=collate,
        )
        if resume:
            trainer.args.max_steps = 3
            trainer.train()
            trainer.args.max_steps = 6
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        curves.append(curve(trainer))
        assert (run / "checkpoint-6" / "adapter_model.safetensors").is_file()
        assert not (run / "checkpoint-6" / "model.safetensors").exists()
        last.append(trainer.model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits)
    assert curves[0] == pytest.approx(curves[1], abs=5e-4)
    torch.testing.assert_close(last[0], last[1], atol=5e-3, rtol=1e-3)


# What TrainingArguments ask for, with transformers' Trainer and tokenizers of both libraries


PROBABILITIES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
STILL = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"neftune_noise_alpha": 40.0},
    "smoothing": {"label_smoothing_factor": 0.1},
    "by length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", ASKED)
def test_the_tokenizer_pads_for_the_trainer(asked: str, tmp_path: Path) -> None:
    """`processing_class` alone, without a collator, as with transformers' tokenizers."""
    folder = save_model(tmp_path / "start", "bert", "ForSequenceClassification", num_labels=2)
    curves = []
    for library in (minilm, transformers):
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
        rows = [{**tokenizer(text, truncation=True), "labels": i % 2} for i, text in enumerate(TEXTS * 4)]
        trainer = transformers.Trainer(
            model=library.AutoModelForSequenceClassification.from_pretrained(folder, **STILL),
            args=arguments(tmp_path / library.__name__, **ASKED[asked]),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        table = trainer.model.get_input_embeddings()
        assert not table._forward_hooks
        assert not hasattr(table, "neftune_noise_alpha")
        curves.append(curve(trainer))
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], abs=2e-4, rel=1e-4)


def test_special_tokens_are_compared_with_the_tokenizers(tmp_path: Path) -> None:
    """A model that was made of a configuration learns from the Trainer what its tokenizer ends texts with."""
    folder = save_decoder(tmp_path / "start", "gpt2")
    configs = []
    for library in (minilm, transformers):
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
        config = library.AutoConfig.from_pretrained(folder)
        config.eos_token_id, config.pad_token_id = 9, None
        model = library.AutoModelForCausalLM.from_config(config)
        rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
        transformers.Trainer(
            model=model, args=arguments(tmp_path / "x"), train_dataset=rows, processing_class=tokenizer
        ).train()
        made = model.generation_config
        configs.append((config.eos_token_id, config.pad_token_id, made.eos_token_id, made.pad_token_id))
    assert configs[0] == configs[1]
    assert configs[0][0] == 0


def test_mixed_precision(start: tuple[Path, str, str], tmp_path: Path) -> None:
    """bf16=True: accelerate makes the output anew, in float32."""
    curves = [
        curve(trained(transformers.Trainer, library, start, tmp_path / library.__name__, bf16=True))
        for library in (minilm, transformers)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=0.03)


def test_an_unfused_model_with_one_matrix_for_tokens_and_scores(tmp_path: Path) -> None:
    """safetensors refuses two names of one tensor; the checkpoint has the table's."""
    config = minilm.PretrainedConfig.from_dict(small("llama") | {"tie_word_embeddings": True})
    torch.manual_seed(0)
    model = minilm.AutoModelForCausalLM.from_config(config).unfuse()
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path), train_dataset=Rows(12, "tokens"), data_collator=collate
    )
    trainer.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.eval()(ids).logits
    again = minilm.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)
    first = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(torch.tensor(curve(trainer))[-3:], first[-3:], atol=1e-5, rtol=1e-5)


def test_the_loss_of_gpt2_is_the_mean_over_what_is_predicted(tmp_path: Path) -> None:
    """transformers' Trainer divides that of its own GPT-2 by all labels, also the first of each row."""
    config = minilm.PretrainedConfig.from_dict(small("gpt2") | dict.fromkeys(PROBABILITIES, 0.0))
    torch.manual_seed(0)
    model = minilm.AutoModelForCausalLM.from_config(config)
    rows = [{"input_ids": [5, 6, 7, 8 + i], "labels": [5, 6, 7, 8 + i]} for i in range(3)]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    expected = model(**batch).loss.item()
    trainer = transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=rows)
    trainer.train()
    assert curve(trainer)[0] == pytest.approx(expected, rel=1e-5)
