"""Graph passes, one a file, named by their effect."""
