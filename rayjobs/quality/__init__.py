"""What can be said of a finished picture: pixels, near-duplicates, scores, safety."""
