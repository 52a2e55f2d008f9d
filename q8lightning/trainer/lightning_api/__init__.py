"""What Lightning's classes, strategies and models are, and what is private in them."""
