"""Commands of ``kbt-rl``, one file each."""
