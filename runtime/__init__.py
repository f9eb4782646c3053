"""One scheduler, one engine: requests become steps, steps become tokens."""
