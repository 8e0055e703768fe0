"""Triton kernels of minilm, installed as `minilm.kernels`.

One file a kernel: its jit functions and their launcher. This package imports torch and triton, nothing of
minilm, and uses relative imports only. `import minilm` does not import it: the dispatch table does, when an
op is first asked for its Triton implementation.
"""

if (
    __name__ == "kernels"
):  # the name of another package on PyPI, which transformers imports where it finds one
    raise ImportError(
        "this folder is the package minilm.kernels; install minilm (pip install -e .) to import it"
    )
