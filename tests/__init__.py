import os

import torch

if not torch.cuda.is_available():
    # Triton looks when it is imported, which torch or transformers may do before the tests of our kernels run.
    os.environ.setdefault("TRITON_INTERPRET", "1")
