"""Minibatches: which examples each step sees."""

import random


def rows(count: int, size: int, steps: int, seed: int = 0) -> list[list[int]]:
    """Draw batches of examples without replacement, in a new random order for each pass through the data.

    What is left at the end of a pass begins the next batch, so that all examples come equally often; none comes twice
    in a batch unless `size` is greater than `count`.

    Args:
        count: n, how many examples there are.
        size: examples in a batch.
        steps: how many batches.
        seed: the same one gives the same batches.

    Returns:
        `steps` lists of `size` numbers in 0 .. n-1.

    Raises:
        ValueError: an argument is smaller than 1.

    Example:
        >>> [sorted(batch) for batch in rows(count=4, size=4, steps=2)]
        [[0, 1, 2, 3], [0, 1, 2, 3]]
        >>> sorted(sum(rows(count=5, size=3, steps=5), []))
        [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    """
    for name, value in {"count": count, "size": size, "steps": steps}.items():
        if value < 1:
            raise ValueError(f"minibatches with {name}={value} were asked for; at least 1 was needed")
    rng, left, batches = random.Random(seed), list[int](), list[list[int]]()
    for _ in range(steps):
        while len(left) < size:
            # Those that are in the batch already come last in the new pass.
            left += sorted(rng.sample(range(count), count), key=set(left).__contains__)
        batches.append(left[:size])
        left = left[size:]
    return batches
