"""Models: CircuitGPT, the families of dense decoders that have rules, and the files that hold their weights."""
