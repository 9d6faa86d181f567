"""Rival learners: each takes a trained SB3 policy and changes its weights by one label at a time."""
