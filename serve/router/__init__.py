"""Routing of requests to engine replicas, and their number."""
