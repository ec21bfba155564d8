"""Pages and cards that show a data set."""
