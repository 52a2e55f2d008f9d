"""Export trained models: one function over the formats in which they are deployed."""
