"""What is done with a finished data set: verify, filter, export."""
