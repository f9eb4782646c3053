"""Vectorised C++ kernels for the CPU, built where they run."""
