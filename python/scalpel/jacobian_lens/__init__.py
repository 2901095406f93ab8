"""The Jacobian lens: for each layer, the mean Jacobian of a model's last residual stream with respect to it."""
