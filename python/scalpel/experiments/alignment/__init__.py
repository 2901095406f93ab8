"""Whether the generators lie along the gradient's leading components."""
