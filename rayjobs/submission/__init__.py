"""A job sent to a Ray cluster from outside: what it brings, its name, its end.

A thin layer over Ray's Jobs SDK. `ray job submit -- python -m rayjobs ...` stays as good; this
packs less, runs no job twice, and hands on the exit code.
"""
