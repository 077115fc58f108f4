import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # also for the processes that tests start
torch.set_num_threads(1)
