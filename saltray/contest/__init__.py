"""The contest's own terms: run-length codes, its metric, its files."""
