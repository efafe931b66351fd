"""Without a GPU, Triton's kernels run in its interpreter: it decides that where it is imported.

Import this before whatever may import Triton, as much of torch and transformers does. What tests
start does not see the variable.
"""

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon  # noqa: F401

        import pdtrim.kv.kernels.checksum
        import pdtrim.kv.kernels.entropy
        import pdtrim.kv.kernels.fp8
        import pdtrim.kv.kernels.integer
        import pdtrim.kv.kernels.lossless
        import pdtrim.kv.kernels.raw  # noqa: F401
