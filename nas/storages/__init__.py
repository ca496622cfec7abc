"""Where a study keeps its records and files."""
