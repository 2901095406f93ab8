"""A byte-level BPE tokenizer in which what closes a list is a single token, so that one token tells the depth."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..tasks.brackets import START

CLOSERS = ("]\n", "]]\n", "]]]\n")
WHOLE = ("],", *CLOSERS)

# Pieces are words, numbers of up to two digits, ", ", line breaks with their indent, runs of blanks, and single signs.
# Opening brackets are never merged, so each "[" is one token and evidence can be counted.
_PIECES = r", |\n *| +|[A-Za-z_]+|[0-9]{1,2}|[^\sA-Za-z_0-9]|\s"
# The same, but a blank before a word belongs to the word, for text that doesn't consist of lists.
PROSE_PIECES = r", |\n *| ?[A-Za-z_]+| +|[0-9]{1,2}|[^\sA-Za-z_0-9]|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int, pieces: str = _PIECES) -> Tokenizer:
    """Learn a ``tokenizers.Tokenizer`` of at most ``vocab_size`` tokens from ``texts``; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(WHOLE),
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in WHOLE])
    return tokenizer
