"""Many cells beside each other: what is to be done, doing it, continuing it, the folder it fills, and what changed."""
