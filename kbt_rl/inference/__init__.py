"""The mathematics of the method: moments, smoother, structures, output rules and the head. Depends on torch only."""
