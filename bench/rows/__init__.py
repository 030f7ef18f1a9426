"""Calls whose cost is reading rows and starting them, against the machine's rates for the same memory and threads."""
