"""Running something under the meters: one call, one cell in a process of its own, one outer loop, a user's own loop."""
