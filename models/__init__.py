"""A Hugging Face checkpoint becomes a traceable module and its weights."""
