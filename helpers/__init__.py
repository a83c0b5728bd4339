"""How to measure, keep and draw. Never a technique."""

import os
import warnings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log lines
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings(
    "ignore", message="IProgress not found"
)  # a widget that outputs do not hold anyway
