"""The noise of the labels where it is not simply known; ``registry`` has the models by name."""
