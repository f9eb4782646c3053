"""The kernels axis: who implements paged attention and block moves."""
