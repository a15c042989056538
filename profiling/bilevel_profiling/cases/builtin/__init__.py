"""The built-in cases: each module here is what a user's case file may be."""
