"""The subcommands of ``kbt-rl`` that are studies of their own."""
