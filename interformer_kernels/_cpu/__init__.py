"""Adapters of the native module, one for each op: they allocate outputs with torch and hand views to `_C`."""
