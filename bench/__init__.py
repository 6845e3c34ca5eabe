"""The benchmark; README.md says how to run it."""
