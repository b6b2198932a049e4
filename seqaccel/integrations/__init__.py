"""seqaccel inside other packages: :mod:`~seqaccel.integrations.lightning`, :mod:`~seqaccel.integrations.keras`.

Each module imports its package, and nothing else here does.
"""
