"""What can be known before money is spent: of a configuration, a cluster file or a manifest.

`files`: which of them a file is; `job`: a configuration; `model`: its model's files; `footprint`
and `memory`: what its workers take; `launcher` and `kuberay`: the clusters; `nodes`: what their
machines hold; `schema`: mistakes against a JSON schema; `report`: what was found.
"""
