"""The small model that ships, and how it was made."""
