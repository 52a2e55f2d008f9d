"""The codecs for checkpoints, one file for each kind, and the codec for QAT."""
