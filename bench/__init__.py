"""Speed beside peers: `python -m bench`."""
