"""Models in GGUF files, the format of llama.cpp."""

from .model import gguf_in, plain_model, stored_as, tokenizer

__all__ = ["gguf_in", "plain_model", "stored_as", "tokenizer"]
