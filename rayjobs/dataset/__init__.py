"""What a data set is: records, their files, the manifest and the lock. Both jobs stand on it."""
