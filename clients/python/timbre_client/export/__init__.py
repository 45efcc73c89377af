"""Write adapters of methods whose papers left no public file format, as a Timbre server reads them.

One function a method, one module a family. Each takes a folder and, for each adapted layer, its arrays
(anything that numpy reads), and writes ``adapter_config.json`` and ``adapter_model.safetensors``.
``adapters_store/FORMAT.md`` in the server's repository says what the fields mean. Needs the extra
``timbre-client[export]``: numpy and safetensors, and never torch.
"""
