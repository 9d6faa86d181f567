"""What produces the figures: one trial as a pure function, many trials in processes, plots and tables from files."""
