"""Rules for a CircuitGPT's sublayers: sixteen tangents in the vector lanes of the native core."""
