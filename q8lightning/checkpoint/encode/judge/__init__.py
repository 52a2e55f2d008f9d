"""Judge what codecs lose, and store better what would lose too much."""
