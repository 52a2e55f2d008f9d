"""What the tests share: models, what is promised, what is true, and ways to watch, hold up and kill a save."""
