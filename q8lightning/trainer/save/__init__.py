"""What every save of a Trainer passes, and who hears of it."""
