"""Operators: each applies one kind of algebra to a batch of rows that use different adapters.

They know parts (`timbre_methods.program`) and the row table, and neither file formats, methods' names,
requests nor models. `contract` is the interface, `catalogue` the list, and every other file one operator.
"""
