"""Levels L4 and L5 of the conformance suite, and `halyard conformance diff`: whole models, whole engines."""
