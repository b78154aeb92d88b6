"""What is submitted: `python -m jobs import ...`."""
