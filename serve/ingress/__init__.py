"""The HTTP side: routes, request bodies, responses. Loads no torch."""
