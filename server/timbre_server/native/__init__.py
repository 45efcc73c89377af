"""The kernels in C++ (``source``) and the library that they are compiled to.

Operators (`operators.native`) call it, and what the engine puts in the places of the base's own modules
(`engine.native_attention`, `engine.fused_norm` and others), and know nothing of each other; it knows none.
"""
