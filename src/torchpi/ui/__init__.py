"""Pages, plots, tables, numbers and progress bars, each in one style."""
