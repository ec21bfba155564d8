"""Rows of the batch: what each is, and how a request becomes one."""
