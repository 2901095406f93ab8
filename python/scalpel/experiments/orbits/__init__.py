"""Whether iterated blocks and greedy decoding end in one anchor."""
