"""The parts of a run: what it keeps, what runs on each device, the review of its losses, and its report."""
