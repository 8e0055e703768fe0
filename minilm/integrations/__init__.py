"""minilm's kernels inside other people's libraries. Nothing here is imported by minilm itself."""
