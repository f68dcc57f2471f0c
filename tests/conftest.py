import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the programs have it: threads that wait leave the cores to others
os.environ.setdefault("OMP_NUM_THREADS", "2")  # so that all programs that tests start add up in the same order

import torch  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
