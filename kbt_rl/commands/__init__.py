"""Subcommands of ``kbt-rl``, one a file."""
