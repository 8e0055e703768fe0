"""Triton kernels of minilm, installed as `minilm.kernels`.

One file a kernel: its jit functions and their launcher. This package imports torch and triton, nothing of
minilm, and uses relative imports only. `import minilm` does not import it: the dispatch table does, when an
op is first asked for its Triton implementation.

Another package on PyPI is called `kernels`, and transformers looks for it. An interpreter started in the
repository's root finds this folder instead; it has no version, so transformers does not take it for that one.
"""
