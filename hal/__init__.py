"""What hardware can do: devices, kernels and the contract they honour. Imports nothing of ours."""
