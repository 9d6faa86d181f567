"""How the covariance of the weights is stored."""
