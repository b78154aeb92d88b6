"""The HTTP endpoint and the command line."""
