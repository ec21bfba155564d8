"""A pipeline's modules: loaded from its files, and called sooner than torch does by itself."""
