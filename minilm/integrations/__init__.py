"""Adapters for other libraries (transformers, LangChain, LlamaIndex); the rest of minilm does not import
them."""
