"""Which replica a call goes to, and how many replicas there are."""
