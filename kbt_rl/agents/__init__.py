"""Stable-Baselines3 policies and algorithms: the expert, the adapting agent and its baseline."""
