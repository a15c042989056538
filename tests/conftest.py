"""One thread: the tests are many small problems, for which two threads on a busy machine are slower than one."""

import torch

torch.set_num_threads(1)
