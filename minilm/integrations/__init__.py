"""minilm's kernels inside other libraries; nothing of minilm imports this folder."""
