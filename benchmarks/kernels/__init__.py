"""Speed and resources of the kernels."""
