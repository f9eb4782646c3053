"""A traced module becomes a program: passes, segments, executables."""
