"""Operators in Triton for a GPU. `catalogue` is the list; each file holds one operator, a subclass of its
PyTorch twin, whose meaning it keeps and whose `bind` it replaces. What a kernel does not do, its twin does.

Kernels read the parts where they lie, through tables of addresses: a bind copies no factor. They sum in
float32, in an order that is fixed by the table, without atomics: equal steps give equal bits. Bound tables
are on the device before the first step, and a step makes nothing but outputs and scratch, and asks the device
for nothing: it may be captured in a graph.
"""
