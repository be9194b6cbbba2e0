"""What holds for every test: Hypothesis does not time its examples, since machines are busy.

And Triton is interpreted: what its own functions become is decided when it is first imported, by
whichever test comes first. On a machine with a GPU nothing is interpreted, and the tests of the
kernels are left to ``tools/gpu_check``.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("understudy", deadline=None)
settings.load_profile("understudy")
