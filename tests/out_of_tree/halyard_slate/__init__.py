"""A device and a kernel set that Halyard's tree knows nothing about."""
