"""How well a lens reads, beside controls."""
