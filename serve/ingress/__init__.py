"""The HTTP side: routes, bodies, answers. Loads no torch."""
