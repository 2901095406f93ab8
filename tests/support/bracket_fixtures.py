"""A small tokenizer and small source files, so that tests of the bracket task need no shipped model."""

from functools import lru_cache
from itertools import islice

import numpy as np

from scalpel.models.tokenizer import Tokenizer
from scalpel.tasks.corpus import Sources, documents
from scalpel.training.tokenizer import train_tokenizer

SOURCES = Sources(
    heads=("x = ", "rows = ", "self.args = ", "return ", "expected_values = "),
    runs=(("a", "b", "c"), ("'x'", "'y'"), ("None",), ("1", "2", "3", "4"), ("sys.path", "os.name")),
)


@lru_cache(maxsize=1)
def small_tokenizer() -> Tokenizer:
    texts = (d.text for d in islice(documents(SOURCES, np.random.default_rng(5)), 2000))
    return Tokenizer(train_tokenizer(texts, 400))
