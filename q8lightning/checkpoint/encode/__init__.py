"""From a checkpoint to an encoded one: what to encode, how, and what that loses."""
