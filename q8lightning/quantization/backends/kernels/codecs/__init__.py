"""What each codec means for a tile of blocks in registers, and its kernels for one tensor: one file for each kind."""
