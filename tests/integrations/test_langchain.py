"""minilm's models used through LangChain, compared with direct calls of the same models."""

from __future__ import annotations

import asyncio
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_decoders import decoder
from tiny_models import save_model

from minilm import LLM, CrossEncoder, SamplingParams, SentenceEncoder
from minilm.integrations import langchain

pytestmark = pytest.mark.slow

callbacks: Any = pytest.importorskip("langchain_core.callbacks")
documents_of: Any = pytest.importorskip("langchain_core.documents")
language_models: Any = pytest.importorskip("langchain_core.language_models")
messages_of: Any = pytest.importorskip("langchain_core.messages")
parsers: Any = pytest.importorskip("langchain_core.output_parsers")
prompts_of: Any = pytest.importorskip("langchain_core.prompts")
stores: Any = pytest.importorskip("langchain_core.vectorstores")
AIMessage, HumanMessage, SystemMessage = (
    getattr(messages_of, kind) for kind in ("AIMessage", "HumanMessage", "SystemMessage")
)

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 14}
TURNS = [
    SystemMessage("The cat sat"),
    HumanMessage("on the mat"),
    AIMessage("Stop!"),
    HumanMessage("what is this?"),
]
DICTS = [
    {"role": "system", "content": "The cat sat"},
    {"role": "user", "content": "on the mat"},
    {"role": "assistant", "content": "Stop!"},
    {"role": "user", "content": "what is this?"},
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi3"])
def folder(request: pytest.FixtureRequest) -> Path:
    return decoder(request.param).folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu")


def answer(llm: LLM, **options: Any) -> Any:
    return llm.chat(DICTS, SamplingParams(**{**GREEDY, **options}), use_tqdm=False)[0]


def test_chat(llm: LLM) -> None:
    chat = langchain.ChatMinilm(model=llm, **GREEDY)
    assert isinstance(chat, language_models.BaseChatModel)
    expected = answer(llm)
    found = chat.invoke(TURNS)
    text = expected.outputs[0]
    read, written = len(expected.prompt_token_ids), len(text.token_ids)
    assert found.content == text.text != ""
    assert found.usage_metadata == {
        "input_tokens": read,
        "output_tokens": written,
        "total_tokens": read + written,
    }
    assert found.response_metadata["finish_reason"] == text.finish_reason
    assert chat.invoke("what is this?").content == chat.invoke([("human", "what is this?")]).content
    blocks = [HumanMessage([{"type": "text", "text": "what is"}, {"type": "text", "text": "this?"}])]
    assert chat.invoke(blocks).content == chat.invoke("what is\nthis?").content


def test_stream_is_the_same_text(llm: LLM) -> None:
    chat = langchain.ChatMinilm(model=llm, **GREEDY)
    chunks = list(chat.stream(TURNS))
    assert len(chunks) > 3
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    found = chat.invoke(TURNS)
    assert (whole.content, whole.usage_metadata) == (found.content, found.usage_metadata)
    assert whole.response_metadata == found.response_metadata
    stream = chat.stream(TURNS)
    assert next(stream).content
    stream.close()  # gives up: nothing of it is left in the engine
    assert chat.invoke(TURNS).content == found.content
    assert not llm._engine.running
    assert not llm._engine.waiting


def test_stop(llm: LLM) -> None:
    text = answer(llm).outputs[0].text
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    expected = text[: text.index(middle)]
    chat = langchain.ChatMinilm(model=llm, **GREEDY)
    assert chat.invoke(TURNS, stop=[middle]).content == expected
    assert chat.bind(stop=[middle]).invoke(TURNS).content == expected
    assert chat.bind(stop=[middle]).invoke(TURNS).response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.content for chunk in chat.bind(stop=[middle]).stream(TURNS)) == expected
    stopping = langchain.ChatMinilm(model=llm, stop=middle, **GREEDY)
    assert stopping.invoke(TURNS).content == expected
    assert stopping.invoke(TURNS, stop=["\x00"]).content == text  # the call's take their place


def test_options_reach_the_sampler(llm: LLM) -> None:
    chat = langchain.ChatMinilm(
        model=llm, temperature=1.5, top_k=9, seed=11, max_tokens=9, repetition_penalty=1.3
    )
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "max_tokens": 9, "repetition_penalty": 1.3}
    assert chat.invoke(TURNS).content == answer(llm, seed=11, **options).outputs[0].text
    assert chat.invoke(TURNS, seed=12).content == answer(llm, seed=12, **options).outputs[0].text
    assert (
        chat.bind(temperature=0).invoke(TURNS).content
        == answer(llm, **{**options, "temperature": 0}).outputs[0].text
    )
    unlimited = langchain.ChatMinilm(model=llm, temperature=0, max_tokens=None)
    assert unlimited.invoke(TURNS).content == answer(llm, max_tokens=None).outputs[0].text
    several = chat.generate([TURNS], n=2).generations[0]
    texts = answer(llm, seed=11, n=2, **options).outputs
    assert [one.text for one in several] == [text.text for text in texts]
    template = "{{ messages[-1]['content'] }}{{ mood }}"
    found = chat.invoke(TURNS, chat_template=template, chat_template_kwargs={"mood": "!"}, temperature=0)
    params = SamplingParams(**{**options, "temperature": 0, "seed": 11})
    expected = llm.chat(
        DICTS, params, use_tqdm=False, chat_template=template, chat_template_kwargs={"mood": "!"}
    )
    assert found.content == expected[0].outputs[0].text


def test_many_at_once_from_threads_and_loops(llm: LLM) -> None:
    chat = langchain.ChatMinilm(model=llm, **GREEDY)
    questions = [f"The cat {number}" for number in range(7)]
    expected = [chat.invoke(question).content for question in questions]
    assert len(set(expected)) > 3
    assert [message.content for message in chat.batch(questions)] == expected

    async def asynchronous() -> tuple[list[Any], list[str]]:
        messages = await asyncio.gather(*(chat.ainvoke(question) for question in questions))
        texts = []
        for question in questions:
            texts.append("".join([chunk.content async for chunk in chat.astream(question)]))
        return messages, texts

    messages, streamed = asyncio.run(asynchronous())
    assert [message.content for message in messages] == streamed == expected


def test_in_a_chain_with_callbacks(llm: LLM) -> None:
    class Seen(callbacks.BaseCallbackHandler):  # type: ignore[misc]
        tokens: list[str] = []  # noqa: RUF012 - of this one handler

        def on_llm_new_token(self, token: str, **options: Any) -> None:
            self.tokens.append(token)

    chat = langchain.ChatMinilm(model=llm, **GREEDY)
    chain = (
        prompts_of.ChatPromptTemplate.from_messages([("system", "The cat sat"), ("human", "{what}")])
        | chat
        | parsers.StrOutputParser()
    )
    found = chain.invoke({"what": "on the mat"})
    assert found == chat.invoke([("system", "The cat sat"), ("human", "on the mat")]).content
    assert (
        "".join(chain.stream({"what": "on the mat"}, {"callbacks": [Seen()]}))
        == "".join(Seen.tokens)
        == found
    )


def test_texts_go_on(llm: LLM) -> None:
    model = langchain.MinilmLLM(model=llm, **GREEDY)
    prompts = ["The cat sat", "In the year 1984", "User: what"]
    answers = llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
    expected = [found.outputs[0].text for found in answers]
    assert model.batch(prompts) == expected
    assert model.invoke(prompts[1]) == expected[1]
    assert "".join(model.stream(prompts[2])) == expected[2]
    assert asyncio.run(model.ainvoke(prompts[0])) == expected[0]
    result = model.generate(prompts)
    written = sum(len(found.outputs[0].token_ids) for found in answers)
    assert result.llm_output["token_usage"]["output_tokens"] == written
    middle = expected[0][4:6]
    assert model.invoke(prompts[0], stop=[middle]) == expected[0][: expected[0].index(middle)]
    assert model.get_num_tokens("The cat") == len(
        llm.tokenizer("The cat", add_special_tokens=False)["input_ids"]
    )


def test_copies_and_pickles(folder: Path) -> None:
    chat = langchain.ChatMinilm(model=str(folder), model_kwargs={"device": "cpu"}, **GREEDY)
    expected = chat.invoke(TURNS).content
    assert copy.deepcopy(chat).invoke(TURNS).content == expected
    assert copy.deepcopy(chat)._llm is chat._llm
    again = pickle.loads(pickle.dumps(chat))
    assert type(again) is langchain.ChatMinilm
    assert again.invoke(TURNS).content == expected
    with pytest.raises(
        TypeError, match="a loaded LLM cannot be pickled: create MinilmLLM with the model's name"
    ):
        pickle.dumps(langchain.MinilmLLM(model=chat._llm))


def test_refuses(llm: LLM) -> None:
    chat = langchain.ChatMinilm(model=llm, **GREEDY)
    with pytest.raises(TypeError, match=r"ChatMinilm has no option top_q; its options are n, .*tools"):
        chat.invoke("a", top_q=1)
    with pytest.raises(TypeError, match="MinilmLLM has no option tools"):
        langchain.MinilmLLM(model=llm).invoke("a", tools=[])
    with pytest.raises(ValueError, match="temperature must be 0 or above, and is -1"):
        chat.invoke("a", temperature=-1)
    with pytest.raises(ValueError, match="temprature\n  Extra inputs are not permitted"):
        langchain.ChatMinilm(model=llm, temprature=0)
    with pytest.raises(ValueError, match="weights: only for loading, so give the model's name"):
        langchain.ChatMinilm(model=llm, model_kwargs={"weights": "int8"})
    with pytest.raises(TypeError, match="expected a name or SentenceEncoder, got LLM"):
        langchain.MinilmEmbeddings(llm)
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])
    with pytest.raises(TypeError, match="minilm reads text only, and a user message holds image_url"):
        chat.invoke([picture])
    with pytest.raises(AttributeError, match="has no attribute 'ChatMiniLM'"):
        langchain.ChatMiniLM  # noqa: B018


# Sentence models

TEXTS = ["Water your pots well.", "Rust is a language.", "The orchestra played.", "Plants need some sun."]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(
        "all-MiniLM-L6-v2", device="cpu", prompts={"query": "find: ", "document": "text: "}
    )


def test_embeddings(encoder: SentenceEncoder) -> None:
    embeddings = langchain.MinilmEmbeddings(encoder)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), encoder.encode_document(TEXTS), atol=1e-6)
    query = embeddings.embed_query("a plant")
    np.testing.assert_allclose(query, encoder.encode("find: a plant"), atol=1e-6)
    assert isinstance(query[0], float)
    assert embeddings.embed_documents([]) == []
    found = asyncio.run(embeddings.aembed_documents(TEXTS))
    np.testing.assert_allclose(found, embeddings.embed_documents(TEXTS), atol=1e-6)
    np.testing.assert_allclose(asyncio.run(embeddings.aembed_query("a plant")), query, atol=1e-6)
    short = langchain.MinilmEmbeddings(
        encoder, encode_kwargs={"truncate_dim": 20, "prompt": ""}, query_encode_kwargs={"truncate_dim": 9}
    )
    np.testing.assert_allclose(short.embed_documents(TEXTS), encoder.encode(TEXTS)[:, :20], atol=1e-6)
    np.testing.assert_allclose(short.embed_query("a plant"), query[:9], atol=1e-6)


def test_embeddings_from_threads(encoder: SentenceEncoder) -> None:
    embeddings = langchain.MinilmEmbeddings(encoder)
    lists = [[f"{text} {number} " * (1 + number % 5) for text in TEXTS] for number in range(24)]
    expected = [embeddings.embed_documents(texts) for texts in lists]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(embeddings.embed_documents, lists), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_embeddings_by_name() -> None:
    """As langchain_huggingface's are made."""
    options: dict[str, Any] = {
        "model_kwargs": {"device": "cpu"},
        "encode_kwargs": {"normalize_embeddings": True},
    }
    embeddings = langchain.MinilmEmbeddings(model_name="all-MiniLM-L6-v2", **options)
    expected = embeddings.embed_query("a plant")
    assert np.linalg.norm(expected) == pytest.approx(1)
    again = pickle.loads(pickle.dumps(embeddings))
    assert type(again) is langchain.MinilmEmbeddings
    np.testing.assert_allclose(again.embed_query("a plant"), expected, atol=1e-6)
    with pytest.raises(ValueError, match="model and model_name are the same argument"):
        langchain.MinilmEmbeddings()
    with pytest.raises(
        ValueError, match="output_value is not supported, since embeddings are returned as lists"
    ):
        langchain.MinilmEmbeddings(embeddings.model, encode_kwargs={"output_value": None})


def test_a_store_and_a_reranker(encoder: SentenceEncoder, tmp_path: Path) -> None:
    store = stores.InMemoryVectorStore.from_texts(TEXTS, langchain.MinilmEmbeddings(encoder))
    [found] = store.similarity_search("programming", k=1)
    assert found.page_content == TEXTS[1]
    save_model(tmp_path, "bert", "ForSequenceClassification", positions=80, num_labels=1)
    cross = CrossEncoder(tmp_path, device="cpu")
    documents = [
        documents_of.Document(text, metadata={"number": number}) for number, text in enumerate(TEXTS)
    ]
    ranked = cross.rank("which?", TEXTS)
    for top_n in (1, 3, None, 9):
        reranker = langchain.MinilmReranker(model=cross, top_n=top_n)
        hits = reranker.compress_documents(documents, "which?")
        assert [hit.metadata["number"] for hit in hits] == [hit["corpus_id"] for hit in ranked][:top_n]
        scores = [hit.metadata["relevance_score"] for hit in hits]
        assert scores == pytest.approx([hit["score"] for hit in ranked][:top_n], abs=1e-6)
    assert all("relevance_score" not in document.metadata for document in documents)
    assert reranker.compress_documents([], "which?") == []
    by_name = langchain.MinilmReranker(model=str(tmp_path), model_kwargs={"device": "cpu"})
    assert len(asyncio.run(by_name.acompress_documents(documents, "which?"))) == 3
    with pytest.raises(ValueError, match="top_n"):
        langchain.MinilmReranker(model=cross, top_n=0)
    again = pickle.loads(pickle.dumps(by_name))
    assert type(again) is langchain.MinilmReranker
    assert again.compress_documents(documents, "which?") == by_name.compress_documents(documents, "which?")
    pairs = [("which?", text) for text in TEXTS]
    assert langchain.MinilmCrossEncoder(cross).score(pairs) == pytest.approx(cross.predict(pairs).tolist())
