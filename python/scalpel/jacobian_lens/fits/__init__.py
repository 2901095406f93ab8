"""What a fit is made of: the prompts, the model, the sums, and the processes that share them."""
