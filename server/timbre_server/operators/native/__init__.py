"""Operators in C++ for a CPU, compiled on the machine that runs them.

`catalogue` is the list, and every other file one operator.
"""
