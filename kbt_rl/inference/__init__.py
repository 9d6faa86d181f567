"""Closed-form Bayesian inference over the weights of a network; knows nothing of environments or agents."""
