"""The UNet call for many rows at once."""
