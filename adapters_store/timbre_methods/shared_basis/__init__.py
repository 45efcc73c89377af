"""Adapters that are a few numbers between matrices that many share: random ones, or the weight's own."""
