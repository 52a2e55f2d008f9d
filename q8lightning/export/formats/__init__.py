"""The formats in which models are deployed, one module for each."""
