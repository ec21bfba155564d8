"""A network's modules, called sooner than torch does by itself; the same results."""
