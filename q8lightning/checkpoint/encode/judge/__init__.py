"""Whether a codec holds a tensor well enough, and what is stored if it does not."""
