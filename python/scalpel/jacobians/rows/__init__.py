"""Rules for a dense decoder's sublayers: tangents stacked as rows of the same matrix products."""
