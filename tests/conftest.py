"""One thread: beside other work on a machine, two are slower, in float64 by far.

And a cache of their own, so that no test writes to the user's.
"""

import atexit
import os
import shutil
import tempfile

import torch

torch.set_num_threads(1)
os.environ["EDGEREG_CACHE"] = tempfile.mkdtemp(prefix="edgereg-tests-")
atexit.register(shutil.rmtree, os.environ["EDGEREG_CACHE"])
