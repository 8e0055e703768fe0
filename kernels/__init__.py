"""The Triton kernels, imported as `minilm.kernels`.

Performance layer: skip on first reading. One file per kernel: its jit functions and their launcher. This
package imports torch and triton, nothing from minilm, and uses relative imports only. `import minilm` does
not import it: the dispatch table does, when the Triton implementation of an op is first considered.

PyPI has another package called `kernels`, which transformers looks for. A Python process started in the
repository's root finds this folder instead; it has no version, so transformers does not take it for that
package.
"""
