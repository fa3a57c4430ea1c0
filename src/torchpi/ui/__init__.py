"""Pages, plots, tables, number formats and progress bars in one style."""
