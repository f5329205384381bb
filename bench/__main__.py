import importlib
import os
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for memory alone

NAMES = (
    "breadth", "compare", "curves", "data", "defences", "faults", "fuzz", "imports", "instructions", "kernels",
    "ledger", "limits", "linear", "losses", "matrix", "oracle", "photos", "seeds", "servers", "steps", "students",
    "tree", "tune", "wheels",
)  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        raise SystemExit(f"usage: python -m bench NAME [options], NAME one of {', '.join(NAMES)}")
    raise SystemExit(importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:]))
