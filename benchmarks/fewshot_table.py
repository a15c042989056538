"""Few-shot accuracy, memory, time and oracle calls of every method of meta-learning, side by side.

    python benchmarks/fewshot_table.py                        # 2 processes, under half an hour on two cores
    python benchmarks/fewshot_table.py --config gpu           # one process on a GPU, a net and batches of its size
    python benchmarks/fewshot_table.py --only MAML FOMAML --shots 1
    python benchmarks/fewshot_table.py --table                # only write the table of what is there

Glyphs (characters drawn from fonts, unseen ones at test), 5-way 1-shot and 5-shot, the 4-conv net. Every method makes
the same number of outer steps on the same tasks in the same order, with the step sizes of `METHODS`, each chosen from
three on validation tasks by `--tune`. A cell (method x shot) is a process of its own that leaves a checkpoint every few
steps and one line in results/fewshot_table.<config>.jsonl at its end: stopped anywhere, the same command goes on.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.problems import fewshot
from bilevel.problems.conv4 import conv4

HERE = pathlib.Path(__file__).resolve().parent
WAY, QUERY, SEED = 5, 15, 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run."""

    width: int
    tasks: int
    steps: int
    test_tasks: int
    chunk: int | None
    device: str
    processes: int


CONFIGS = {
    "cpu": Config(width=32, tasks=4, steps=120, test_tasks=600, chunk=1, device="cpu", processes=2),
    "gpu": Config(width=64, tasks=16, steps=3000, test_tasks=1000, chunk=None, device="cuda", processes=1),
    "small": Config(width=4, tasks=2, steps=3, test_tasks=4, chunk=1, device="cpu", processes=1),
}
