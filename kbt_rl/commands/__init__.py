"""Subcommands of ``kbt-rl``, one file each."""
