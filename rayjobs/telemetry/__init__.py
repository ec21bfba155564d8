"""What jobs tell Prometheus: names and meanings, and the pipe, which is Ray's own.

Each node's agent exports what its processes count, with `ray_` before a name, `_total` behind a
counter's, and the worker and the node as labels. The meters know nothing of what is counted.
"""
