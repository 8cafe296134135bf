"""The cell store: typed records, files that are there whole or not at all, and the window that MLflow is on it."""
