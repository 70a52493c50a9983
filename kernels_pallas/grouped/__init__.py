"""One matrix for each group of rows."""
