"""Answer a question from documents with LlamaIndex (retrieval-augmented generation). Takes 15 seconds.

Needs llama-index-core (pip install llama-index-core).
"""

import argparse

from llama_index.core import Document, PromptTemplate, VectorStoreIndex

from minilm.integrations.llama_index import MinilmEmbedding, MinilmLLM

DOCUMENTS = [
    "The night train to Vienna leaves at nine in the evening from platform four.",
    "Bicycles may be taken along for five euros, if there is room.",
    "Breakfast is served in the dining car from seven to nine.",
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="Where is breakfast served?")
parser.add_argument("--encoder", default="all-MiniLM-L6-v2")
parser.add_argument("--model", default="SmolLM2-135M-Instruct")
arguments = parser.parse_args()

index = VectorStoreIndex.from_documents(
    [Document(text=text) for text in DOCUMENTS], embed_model=MinilmEmbedding(model=arguments.encoder)
)
llm = MinilmLLM(model=arguments.model, temperature=0, max_tokens=40)
template = PromptTemplate("{context_str}\n\n{query_str}")  # a small model needs a plain question
engine = index.as_query_engine(llm=llm, similarity_top_k=1, text_qa_template=template)
answer = engine.query(arguments.question)

print(arguments.question)
for found in answer.source_nodes:
    print(f"found ({found.score:.3f}): {found.node.get_content()}")
print(f"answered: {str(answer).strip()}")
