"""The decision transformer and the context window it reads. Knows nothing of inference, environments or SB3."""
