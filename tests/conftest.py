"""One thread: beside other work on a machine, two are slower, in float64 by far."""

import torch

torch.set_num_threads(1)
