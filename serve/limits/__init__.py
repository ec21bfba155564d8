"""What a key may have: requests at once and images of a minute, over all ingress replicas."""
