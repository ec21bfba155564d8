"""Measures of a finished picture: pixels, near-duplicates, scores, safety."""
