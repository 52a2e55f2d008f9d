"""A checkpoint drawn on one page for the browser."""
