"""Models and adapters as files with a note beside them, the same for all three programs."""
