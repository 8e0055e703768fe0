"""`SentenceEncoder`: sentence embeddings; same API as sentence_transformers.SentenceTransformer.

    model = SentenceEncoder("all-MiniLM-L6-v2")
    embeddings = model.encode(["A man eats.", "Someone has lunch."])      # float32 [2, 384]
    model.similarity(embeddings, embeddings)                              # [2, 2]

A model is a Transformer and the modules that modules.json lists after it (`minilm.sentence.modules`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .._version import __version__
from ..files import saving
from ..graphs import no_tracer_warnings
from .batching import Tokens, by_length, check_batch_size, chunks, in_order, progress_bar, run
from .files import default_device, load
from .modules import Features, Module, run_modules, write_json
from .names import answering_to
from .similarity import PRECISIONS, SIMILARITIES, Precision, quantize_embeddings
from .transformer import Transformer

logger = logging.getLogger(__name__)

Output = Literal["sentence_embedding", "token_embeddings"]

_SLAB = 256
"""Number of batches that are tokenised and sorted by length together; limits the memory for token ids."""


def _order(values: Sequence[Any]) -> Sequence[str]:
    """The order of positional options of `encode`: since sentence-transformers 3, or before prompts."""
    last = ("convert_to_numpy", "convert_to_tensor", "device", "normalize_embeddings")
    if isinstance(values[0], int):
        return ("batch_size", "show_progress_bar", "output_value", *last)
    first = ("prompt_name", "prompt", "batch_size", "show_progress_bar", "output_value", "precision")
    return (*first, *last, "truncate_dim")


class SentenceEncoder(nn.Module):
    """Encodes texts as vectors.

    Args:
        model_name_or_path: a folder, one of the bundled models, or a name on the hub (without an owner: of
            the owner sentence-transformers). A model without modules.json gets mean pooling (a causal
            language model: last-token pooling), which is logged.
        modules: instead of a name, a `Transformer` and the modules after it.
        device: None: the GPU if there is one.
        dtype: of the weights; None: the checkpoint's.
        weights: quantises them, as "int8" or "q8" (see `AutoModel.from_pretrained`); dtype then applies to
            the rest.
        prompts: name -> text to add before the texts; other prompts of the model are kept.
        default_prompt_name: the prompt for calls that do not name one.
        similarity_fn_name: cosine, dot, euclidean or manhattan; None: the model's own, or cosine.
        truncate_dim: keep only this many dimensions.
        options: `revision`, `cache_folder`, `token`, `local_files_only` for the hub; `model_kwargs` and
            `config_kwargs` for AutoModel.from_pretrained, `processor_kwargs` for
            AutoTokenizer.from_pretrained.

    Raises HubError, FileError, ConfigError or WeightError for a model that cannot be read.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        modules: Sequence[nn.Module] | None = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        weights: str | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        stored: dict[str, Any] = {}
        if (model_name_or_path is None) == (modules is None):
            raise ValueError("give exactly one of model_name_or_path and modules")
        if device is None:
            device = default_device()
        if weights is not None:
            options["model_kwargs"] = {"weights": weights, **(options.get("model_kwargs") or {})}
        if model_name_or_path is not None:
            modules, stored = load(model_name_or_path, device, dtype, options)
        elif options:
            raise TypeError(f"{', '.join(options)}: only for a model that is loaded by name")
        assert modules is not None
        if not modules or not isinstance(modules[0], Transformer):
            raise ValueError("the first module must be a Transformer")
        rest = [module for module in modules[1:] if isinstance(module, Module)]
        if len(rest) < len(modules) - 1:
            raise ValueError("the modules after the Transformer must be of minilm.sentence.modules")
        self.transformer = modules[0]
        self.heads = nn.ModuleList(rest).to(modules[0].model.dtype)
        self.to(device)
        known = {**(stored.get("prompts") or {}), **(prompts or {})}
        self.prompts: dict[str, str] = {"query": "", "document": "", **known}
        self.default_prompt_name: str | None = default_prompt_name or stored.get("default_prompt_name")
        if self.default_prompt_name is not None:
            self._prompt(None, self.default_prompt_name)
        self.similarity_fn_name = similarity_fn_name or stored.get("similarity_fn_name") or "cosine"
        self.truncate_dim: int | None = truncate_dim or stored.get("truncate_dim")
        self.eval()

    # Encoding
    @answering_to(also={"inputs": "sentences"}, order=_order)
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int = 32,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        show_progress_bar: bool | None = None,
        output_value: Output | None = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | int | torch.device | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
    ) -> Any:
        """The embeddings of texts: a numpy array [N, D], or [D] for a single text.

        Args:
            batch_size: maximum number of texts per forward pass; it does not change the result.
            prompt, prompt_name: a text to add before each text, or the name of one in `prompts`.
            show_progress_bar: None: show one if the logger `minilm` is at INFO or below.
            output_value: "token_embeddings" returns a list of tensors [tokens, C], None a list of dicts with
                both.
            precision: int8, uint8, binary or ubinary, see `minilm.sentence.similarity.quantize_embeddings`.
            convert_to_numpy, convert_to_tensor: False, True gives a tensor; False, False a list of tensors.
            device: moves the model there first.
            normalize_embeddings: True scales every vector to length 1; None: only if the model's modules do.
            truncate_dim: keep only this many dimensions; applied before scaling.

        Texts longer than `max_seq_length` are cut, with a warning that counts them. Raises TypeError for
        inputs that are not texts.
        """
        check_batch_size(batch_size)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, and is {precision!r}")
        if output_value not in ("sentence_embedding", "token_embeddings", None):
            raise ValueError(
                f"output_value must be sentence_embedding, token_embeddings or None, and is {output_value!r}"
            )
        if output_value != "sentence_embedding" and precision != "float32":
            raise ValueError(f"precision {precision!r} is only for output_value='sentence_embedding'")
        texts, single = _texts(sentences)
        if device is not None:
            self.to(device)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        truncate_dim = truncate_dim or self.truncate_dim
        runs = self._runs(texts, batch_size, self._prompt(prompt, prompt_name), show_progress_bar)
        with torch.inference_mode():
            if output_value != "sentence_embedding":
                items = _unpack(runs, len(texts), output_value, truncate_dim)
                return items[0] if single else items
            found: Tensor | None = None
            for indices, _, features in runs:
                rows = features.get("sentence_embedding")[:, :truncate_dim]
                rows = normalize(rows, dim=-1) if normalize_embeddings else rows
                if found is None:
                    there = "cpu" if convert_to_numpy and not convert_to_tensor else rows.device
                    found = torch.empty(len(texts), rows.shape[1], dtype=rows.dtype, device=there)
                found[torch.tensor(indices, device=found.device)] = rows.to(found.device)
        if found is None:
            found = torch.empty(0, self.get_embedding_dimension(), dtype=self.dtype)[:, :truncate_dim]
        if precision != "float32":
            found = torch.from_numpy(quantize_embeddings(found, precision))
        if not convert_to_tensor and convert_to_numpy:
            array = (found.float() if found.dtype == torch.bfloat16 else found).cpu().numpy()
            return array[0] if single else array
        if single:
            return found[0]
        return found if convert_to_tensor else list(found)

    @answering_to(also={"inputs": "sentences"}, order=_order)
    def encode_query(self, sentences: str | Iterable[str], batch_size: int = 32, **options: Any) -> Any:
        """`encode` with the prompt `query`, unless another is given."""
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = "query"
        return self.encode(sentences, batch_size, **options)

    @answering_to(also={"inputs": "sentences"}, order=_order)
    def encode_document(self, sentences: str | Iterable[str], batch_size: int = 32, **options: Any) -> Any:
        """`encode` with the prompt `document`, unless another is given."""
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = "document"
        return self.encode(sentences, batch_size, **options)

    def forward(self, input: dict[str, Any]) -> dict[str, Any]:
        """For training: takes the result of `tokenize`, returns it with `token_embeddings` [B, S, C] and
        `sentence_embedding` [B, D] added."""
        ids = input["input_ids"]
        model = self.transformer.model
        with no_tracer_warnings():
            batch = model.pack(ids, input.get("attention_mask"), input.get("token_type_ids"))
            skip = int(input.get("prompt_length", 0))
            features = run_modules(self._modules_after(), Features(model.body(batch), batch.packed, skip))
            tokens = features.packed.pad(features.tokens)
        return {**input, "token_embeddings": tokens, "sentence_embedding": features.sentence}

    def _modules_after(self) -> list[Module]:
        return [module for module in self.heads if isinstance(module, Module)]

    def _runs(
        self, texts: list[str], batch_size: int, prompt: str, progress: bool
    ) -> Iterator[tuple[list[int], list[Tokens], Features]]:
        """(indices, tokens, features) of each batch."""
        modules = self._modules_after()
        skips = bool(prompt) and any(not getattr(module, "include_prompt", True) for module in modules)
        cut = 0
        with progress_bar(-(-len(texts) // batch_size), progress) as bar:
            for start, slab in enumerate(chunks(texts, _SLAB * batch_size)):
                prompted = [prompt + text for text in slab]
                tokens, too_long = self.transformer.tokenise(prompted)
                skip = self.transformer.prompt_lengths(prompted, prompt) if skips else [0] * len(slab)
                cut += too_long
                for batch in by_length([len(t) for t in tokens], batch_size):
                    chosen = [tokens[i] for i in batch]
                    hidden, ran = run(self.transformer.model, chosen)
                    lengths = [skip[i] for i in batch]
                    features = run_modules(modules, Features(hidden, ran.packed, lengths if skips else 0))
                    yield [start * _SLAB * batch_size + i for i in batch], chosen, features
                    bar.update()
        if cut:
            message = f"{cut} of {len(texts)} texts have more than {self.max_seq_length} tokens, and were cut"
            warnings.warn(message, stacklevel=4)

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            return prompt
        name = name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"there is no prompt {name!r}; the model has {', '.join(self.prompts)}")
        return self.prompts[name] or ""

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts -> the model's inputs `input_ids`, `attention_mask` (and `token_type_ids`), [B, S]."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )
        return dict(batch)

    preprocess = tokenize

    # Similarity
    @property
    def similarity_fn_name(self) -> str:
        """cosine, dot, euclidean or manhattan. Can be set."""
        return self._similarity

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: str | None) -> None:
        name = getattr(name, "value", name) or "cosine"
        if name not in SIMILARITIES:
            raise ValueError(f"similarity_fn_name must be one of {', '.join(SIMILARITIES)}, and is {name!r}")
        self._similarity = name

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Similarity of every pair of rows; arrays or tensors [N, D], [M, D] -> [N, M]."""
        return SIMILARITIES[self._similarity][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Similarity of row i with row i, [N]."""
        return SIMILARITIES[self._similarity][1](embeddings1, embeddings2)

    # Properties and saving
    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Can be set."""
        return self.transformer.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.transformer.tokenizer = tokenizer

    @property
    def max_seq_length(self) -> int:
        """Maximum tokens of a text, including special tokens; the rest is cut. Can be set."""
        return self.transformer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.transformer.max_seq_length = value

    def get_max_seq_length(self) -> int:
        """`max_seq_length`."""
        return self.max_seq_length

    def get_embedding_dimension(self) -> int:
        """D, the size of the embeddings."""
        size = self.transformer.get_embedding_dimension()
        for module in self._modules_after():
            size = module.dimension(size)
        return min(size, self.truncate_dim or size)

    get_sentence_embedding_dimension = get_embedding_dimension

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.transformer.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.transformer.model.dtype

    def __len__(self) -> int:
        return 1 + len(self.heads)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.transformer, *self.heads])

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that sentence-transformers and minilm load."""
        places = {f"{i}_{module.kind}": module for i, module in enumerate(self._modules_after(), start=1)}
        listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for index, (place, module) in enumerate(places.items(), start=1):
            kind = f"sentence_transformers.models.{module.kind}"
            listed.append({"idx": index, "name": str(index), "path": place, "type": kind})
        config: dict[str, Any] = {
            "__version__": {"minilm": __version__, "pytorch": torch.__version__},
            "model_type": "SentenceTransformer",
            "prompts": self.prompts,
            "default_prompt_name": self.default_prompt_name,
            "similarity_fn_name": self.similarity_fn_name,
        }
        truncated = {} if self.truncate_dim is None else {"truncate_dim": self.truncate_dim}
        with saving(path) as folder:
            self.transformer.save(folder)
            for place, module in places.items():
                module.save(folder / place)
            write_json(folder / "modules.json", listed)
            write_json(folder / "config_sentence_transformers.json", {**config, **truncated})

    save = save_pretrained


SentenceTransformer = SentenceEncoder


def _texts(sentences: Any) -> tuple[list[str], bool]:
    """The texts as a list, and whether there was a single one."""
    single = isinstance(sentences, str)
    texts = [sentences] if single else list(in_order(sentences, "expected a text or a list of texts, got"))
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"expected texts, but number {index} is {type(text).__name__}: {text!r:.60}")
    return texts, single


def _unpack(
    runs: Iterator[tuple[list[int], list[Tokens], Features]],
    count: int,
    output: str | None,
    truncate_dim: int | None,
) -> list[Any]:
    """The results of `encode` per text for `output_value` other than sentence embeddings."""
    items: list[Any] = [None] * count
    for indices, tokens, features in runs:
        rows = torch.split(features.tokens, features.packed.lengths)
        for row, (index, embeddings) in enumerate(zip(indices, rows, strict=True)):
            if output == "token_embeddings":
                items[index] = embeddings
                continue
            ids = torch.tensor(tokens[row].ids, dtype=torch.int64)
            items[index] = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_embeddings": embeddings,
                "sentence_embedding": features.get("sentence_embedding")[row, :truncate_dim],
            }
    return items
