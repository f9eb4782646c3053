"""Request and response types of the wire."""
