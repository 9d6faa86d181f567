"""Subcommands of ``kbt-rl``, one module each."""
