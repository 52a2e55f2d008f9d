"""Codebooks, codecs and operators: how a tensor becomes codes and back."""
