"""Trained policies of others: which layer decides, what it sees, and what its outputs mean for the environment."""
