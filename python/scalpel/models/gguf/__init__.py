"""Models in GGUF files, the format of llama.cpp."""

from ..gguf_files import gguf_in
from .model import conventions, plain_model, stored_as, tokenizer

__all__ = ["conventions", "gguf_in", "plain_model", "stored_as", "tokenizer"]
