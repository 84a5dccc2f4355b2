"""Runnable experiments: `python -m experiments.<name> --config=configs/<file>.py`."""
