"""Plain torch in fp32, looping over blocks: the oracle for every other kernel set."""
