"""Codes of second moments that use their near separability over rows and columns (``separable.py``)."""
