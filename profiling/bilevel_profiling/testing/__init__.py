"""The profiler in other people's tests: memory contracts, as a pytest plugin."""
