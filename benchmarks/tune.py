"""Times configurations beside the rules' on this GPU, at GPT-2's shapes: `python -m benchmarks.tune`.

What it writes can be shipped as gpt2fast/ops/tuned/<GPU>.json. A later run adds to an earlier one.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    parser.add_argument("--write", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU")
    os.environ["GPT2FAST_AUTOTUNE"] = "1"
    os.environ.setdefault("GPT2FAST_CACHE_DIR", tempfile.mkdtemp())

    from benchmarks import triton_cases
    from gpt2fast.ops.triton_common import cache_path

    triton_cases.device = torch.device("cuda")
    for name, case in triton_cases.CASES.items():
        if name.startswith(options.case):
            case()
            torch.cuda.synchronize()
            print(name, flush=True)
    found = cache_path(torch.cuda.current_device())
    if not found.exists():
        print("nothing was tuned: every configuration was known")
        return 0
    print(found.read_text())
    if options.write:
        options.write.write_text(found.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
