"""What every codec means: codebooks and the reference, in words of arithmetic."""
