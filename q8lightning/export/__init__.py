"""What a trained model is shipped as: one module a target format."""
