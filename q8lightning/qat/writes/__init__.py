"""Follow writes to engaged weights inside a step to the masters, or refuse them with the weight's name."""
