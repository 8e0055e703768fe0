"""minilm's models used through LlamaIndex, compared with direct calls of the same models."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_decoders import decoder
from tiny_models import save_model

from minilm import LLM, CrossEncoder, SamplingParams, SentenceEncoder
from minilm.integrations import llama_index

pytestmark = pytest.mark.slow

core: Any = pytest.importorskip("llama_index.core")
llms: Any = pytest.importorskip("llama_index.core.llms")
schema: Any = pytest.importorskip("llama_index.core.schema")

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 14}
PROMPT = "The cat sat on"
DICTS = [
    {"role": "system", "content": "The cat sat"},
    {"role": "user", "content": "on the mat"},
    {"role": "assistant", "content": "Stop!"},
    {"role": "user", "content": "what is this?"},
]
TURNS = [llms.ChatMessage(role=turn["role"], content=turn["content"]) for turn in DICTS]


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return decoder(request.param).folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu")


def said(expected: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """What answers say beside the text."""
    read, written = len(expected.prompt_token_ids), len(expected.outputs[0].token_ids)
    counts = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {"finish_reason": expected.outputs[0].finish_reason}, counts


def test_complete(llm: LLM) -> None:
    model = llama_index.MinilmLLM(model=llm, **GREEDY)
    [expected] = llm.generate([PROMPT], SamplingParams(**GREEDY), use_tqdm=False)
    text = expected.outputs[0].text
    found = model.complete(PROMPT)
    assert found.text == text != ""
    assert (found.raw, found.additional_kwargs) == said(expected)
    assert asyncio.run(model.acomplete(PROMPT)).text == text
    pieces = list(model.stream_complete(PROMPT))
    assert len(pieces) > 3
    assert "".join(piece.delta for piece in pieces) == pieces[-1].text == text
    assert [piece.text for piece in pieces[:2]] == [pieces[0].delta, pieces[0].delta + pieces[1].delta]
    assert (pieces[-1].raw, pieces[-1].additional_kwargs) == said(expected)
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    assert model.complete(PROMPT, stop=[middle]).text == text[: text.index(middle)]
    [short] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert model.complete(PROMPT, max_tokens=3).text == short.outputs[0].text


def test_prompts_are_formatted_once(llm: LLM) -> None:
    def frame(prompt: str) -> str:
        return f"User: {prompt}"

    model = llama_index.MinilmLLM(model=llm, completion_to_prompt=frame, **GREEDY)
    expected, plain = llm.generate([frame(PROMPT), PROMPT], SamplingParams(**GREEDY), use_tqdm=False)
    assert expected.outputs[0].text != plain.outputs[0].text
    for found in (model.complete(PROMPT), list(model.stream_complete(PROMPT))[-1]):
        assert found.text == expected.outputs[0].text
    for found in (
        model.complete(PROMPT, formatted=True),
        list(model.stream_complete(PROMPT, formatted=True))[-1],
    ):
        assert found.text == plain.outputs[0].text


def test_chat(llm: LLM) -> None:
    model = llama_index.MinilmLLM(model=llm, **GREEDY)
    [expected] = llm.chat(DICTS, SamplingParams(**GREEDY), use_tqdm=False)
    text = expected.outputs[0].text
    found = model.chat(TURNS)
    assert (found.message.role.value, found.message.content) == ("assistant", text)
    assert (found.raw, found.additional_kwargs) == said(expected)
    pieces = list(model.stream_chat(TURNS))
    assert "".join(piece.delta for piece in pieces) == pieces[-1].message.content == text
    assert (pieces[-1].raw, pieces[-1].additional_kwargs) == said(expected)

    async def asynchronous() -> tuple[list[Any], list[str]]:
        answers = await asyncio.gather(*(model.achat(TURNS) for _ in range(4)))
        return answers, [piece.delta async for piece in await model.astream_chat(TURNS)]

    answers, deltas = asyncio.run(asynchronous())
    assert [answer.message.content for answer in answers] == [text] * 4
    assert "".join(deltas) == text
    drawn = llama_index.MinilmLLM(model=llm, temperature=1.4, top_k=7, seed=5, max_tokens=9)
    params = SamplingParams(temperature=1.4, top_k=7, seed=6, max_tokens=9)
    [expected] = llm.chat(DICTS, params, use_tqdm=False)
    assert drawn.chat(TURNS, seed=6).message.content == expected.outputs[0].text
    stream = model.stream_chat(TURNS)
    assert next(stream).delta
    stream.close()
    assert not llm._engine.running


def test_metadata(folder: Path, llm: LLM) -> None:
    model = llama_index.MinilmLLM(model=str(folder), **GREEDY)
    assert model.metadata.model_name == str(folder)
    assert model.metadata.context_window == llm.max_model_len == 160
    assert model.metadata.num_output == 14
    assert model.metadata.is_chat_model
    assert llama_index.MinilmLLM(model=llm, max_tokens=None).metadata.num_output == 160
    assert llama_index.MinilmLLM(model=llm).metadata.model_name == str(folder)


def test_copies_pickles_and_dicts(folder: Path) -> None:
    model = llama_index.MinilmLLM(model=str(folder), model_kwargs={"device": "cpu"}, **GREEDY)
    expected = model.complete(PROMPT).text
    assert copy.deepcopy(model)._llm is model._llm
    for again in (pickle.loads(pickle.dumps(model)), llama_index.MinilmLLM.from_dict(model.to_dict())):
        assert type(again) is llama_index.MinilmLLM
        assert again.complete(PROMPT).text == expected
    with pytest.raises(
        TypeError, match="a loaded LLM cannot be pickled: create MinilmLLM with the model's name"
    ):
        pickle.dumps(llama_index.MinilmLLM(model=model._llm))


def test_refuses(llm: LLM) -> None:
    model = llama_index.MinilmLLM(model=llm, **GREEDY)
    with pytest.raises(TypeError, match="MinilmLLM has no option top_q"):
        model.complete("a", top_q=1)
    with pytest.raises(TypeError, match="MinilmLLM has no option tools"):
        model.complete("a", tools=[])
    with pytest.raises(ValueError, match="temprature\n  Extra inputs are not permitted"):
        llama_index.MinilmLLM(model=llm, temprature=0)
    picture = llms.ChatMessage(role="user", blocks=[llms.ImageBlock(image=b"aaaa")])
    with pytest.raises(TypeError, match="minilm reads text only, and a user message holds ImageBlock"):
        model.chat([picture])
    with pytest.raises(TypeError, match="expected a name or CrossEncoder, got LLM"):
        llama_index.MinilmRerank(model=llm)
    with pytest.raises(AttributeError, match="has no attribute 'MinilmEmbeddings'"):
        llama_index.MinilmEmbeddings  # noqa: B018


# Sentence models

TEXTS = ["Water your pots well.", "Rust is a language.", "The orchestra played.", "Plants need some sun."]


def test_embeddings() -> None:
    encoder = SentenceEncoder(
        "all-MiniLM-L6-v2", device="cpu", prompts={"query": "find: ", "document": "text: "}
    )
    model = llama_index.MinilmEmbedding(model=encoder)
    documents, query = encoder.encode_document(TEXTS), encoder.encode("find: a plant")
    np.testing.assert_allclose(model.get_text_embedding_batch(TEXTS), documents, atol=1e-6)
    np.testing.assert_allclose(model.get_text_embedding(TEXTS[2]), documents[2], atol=1e-6)
    np.testing.assert_allclose(model.get_query_embedding("a plant"), query, atol=1e-6)
    np.testing.assert_allclose(asyncio.run(model.aget_text_embedding_batch(TEXTS)), documents, atol=1e-6)
    np.testing.assert_allclose(asyncio.run(model.aget_query_embedding("a plant")), query, atol=1e-6)
    short = llama_index.MinilmEmbedding(model=encoder, encode_kwargs={"truncate_dim": 12})
    np.testing.assert_allclose(short.get_query_embedding("a plant"), query[:12], atol=1e-6)
    named = llama_index.MinilmEmbedding(model="all-MiniLM-L6-v2", model_kwargs={"device": "cpu"})
    assert named.model_name == "all-MiniLM-L6-v2"
    plain = named.get_text_embedding("a plant")
    for again in (pickle.loads(pickle.dumps(named)), llama_index.MinilmEmbedding.from_dict(named.to_dict())):
        np.testing.assert_allclose(again.get_text_embedding("a plant"), plain, atol=1e-6)


def test_an_index_with_a_query_engine(tmp_path: Path) -> None:
    """Retrieval, ranking and an answer, all by minilm."""
    made = decoder("llama", max_position_embeddings=900)  # the question comes in some 300 tokens of frame
    model = llama_index.MinilmLLM(model=LLM(made.folder, device="cpu"), **GREEDY)
    embed_model = llama_index.MinilmEmbedding(model="all-MiniLM-L6-v2", model_kwargs={"device": "cpu"})
    save_model(tmp_path, "bert", "ForSequenceClassification", positions=80, num_labels=1)
    cross = CrossEncoder(tmp_path, device="cpu")
    documents = [core.Document(text=text) for text in TEXTS]
    index = core.VectorStoreIndex.from_documents(documents, embed_model=embed_model)
    [found] = index.as_retriever(similarity_top_k=1).retrieve("programming")
    assert found.node.get_content() == TEXTS[1]
    rerank = llama_index.MinilmRerank(model=cross, top_n=2)
    engine = index.as_query_engine(llm=model, similarity_top_k=4, node_postprocessors=[rerank])
    answer = engine.query("programming")
    ranked = cross.rank(
        "programming",
        [node.node.get_content() for node in index.as_retriever(similarity_top_k=4).retrieve("programming")],
    )
    assert [node.score for node in answer.source_nodes] == pytest.approx([hit["score"] for hit in ranked[:2]])
    assert str(answer)


def test_rerank(tmp_path: Path) -> None:
    save_model(tmp_path, "bert", "ForSequenceClassification", positions=80, num_labels=1)
    cross = CrossEncoder(tmp_path, device="cpu")
    nodes = [
        schema.NodeWithScore(node=schema.TextNode(text=text, metadata={}), score=number / 4)
        for number, text in enumerate(TEXTS)
    ]
    ranked = cross.rank("which?", TEXTS)
    for model in (cross, str(tmp_path)):
        rerank = llama_index.MinilmRerank(model=model, top_n=3, keep_retrieval_score=True)
        found = rerank.postprocess_nodes(nodes, query_str="which?")
        assert [node.node.get_content() for node in found] == [TEXTS[hit["corpus_id"]] for hit in ranked[:3]]
        assert [node.score for node in found] == pytest.approx([hit["score"] for hit in ranked[:3]], abs=1e-6)
        assert [node.node.metadata["retrieval_score"] for node in found] == [
            hit["corpus_id"] / 4 for hit in ranked[:3]
        ]
    assert [node.score for node in nodes] == [0, 0.25, 0.5, 0.75]  # as they were
    assert all(not node.node.metadata for node in nodes)
    assert rerank.postprocess_nodes([], query_str="which?") == []
    again = pickle.loads(pickle.dumps(rerank))
    assert again.postprocess_nodes(nodes, query_str="which?")[0].score == pytest.approx(
        ranked[0]["score"], abs=1e-6
    )
    with pytest.raises(ValueError, match="there is no query to rank the nodes by"):
        rerank.postprocess_nodes(nodes)
    with pytest.raises(ValueError, match="top_n"):
        llama_index.MinilmRerank(model=cross, top_n=0)
