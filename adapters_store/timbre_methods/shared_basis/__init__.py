"""Adapters that are a few numbers between random matrices, which all of them share."""
