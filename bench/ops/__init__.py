"""The ops of the bench: `table.py` names a module for each, `spec.py` says what a module declares."""
