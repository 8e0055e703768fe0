"""The implementations of the ops beside the reference, by backend."""
