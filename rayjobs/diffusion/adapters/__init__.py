"""Adapters beside a model: read from any tool's file, and applied row by row."""
