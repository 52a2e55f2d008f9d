"""The specification of all codecs: codebooks, and the reference in plain torch."""
