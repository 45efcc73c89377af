"""The kernels in C++ (``source``) and the library that they are compiled to.

Operators (`operators.native`) and attention (`engine.native_attention`) call it and know nothing of each
other; it knows neither.
"""
