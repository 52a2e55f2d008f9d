"""Draw a checkpoint on one page for the browser."""
