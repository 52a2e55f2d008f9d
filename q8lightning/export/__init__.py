"""Write trained models in the formats in which they are deployed, one module for each."""
