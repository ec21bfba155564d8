"""Calls of the UNet that a row can do without: of guidance, and of the deep blocks."""
