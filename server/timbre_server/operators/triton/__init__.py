"""Operators in Triton for a GPU. `catalogue` is the list, and every other file one operator."""
