"""Answer a question from documents with LangChain (retrieval-augmented generation). Takes 10 seconds.

Needs langchain-core (pip install langchain-core).
"""

import argparse

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from minilm.integrations.langchain import ChatMinilm, MinilmEmbeddings

DOCUMENTS = [
    "The museum is open from ten to six, and closed on Mondays.",
    "Tickets cost twelve euros; children under seven enter free of charge.",
    "The cafe on the second floor serves soup, cake and coffee.",
    "Bags must be left in the lockers beside the entrance.",
]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="On which day is the museum closed?")
parser.add_argument("--encoder", default="all-MiniLM-L6-v2")
parser.add_argument("--model", default="SmolLM2-135M-Instruct")
arguments = parser.parse_args()

store = InMemoryVectorStore.from_texts(DOCUMENTS, MinilmEmbeddings(arguments.encoder))
retriever = store.as_retriever(search_kwargs={"k": 1})
prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
chat = ChatMinilm(model=arguments.model, temperature=0, max_tokens=40)


def joined(documents: list) -> str:
    """The documents as one text."""
    return "\n".join(document.page_content for document in documents)


chain = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt | chat | StrOutputParser()
print(f"{arguments.question}\nfound:    {joined(retriever.invoke(arguments.question))!r}\nanswered: ", end="")
for piece in chain.stream(arguments.question):
    print(piece, end="", flush=True)
print()
