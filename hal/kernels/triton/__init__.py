"""Paged attention and block moves in Triton: one source for NVIDIA and AMD GPUs."""
