"""Other models in an engine, which draw over what its own has made."""
