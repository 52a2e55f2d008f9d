"""Resume trainings from checkpoints as files would bring them back, and compare what follows (``resume.py``)."""
