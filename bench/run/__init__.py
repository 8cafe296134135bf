"""Running: cells, who runs them and where, what keeps them apart, and where a study stands."""
