#!/usr/bin/env bash
# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in each instruction set that
# runs here:
#
#   tests/sanitize.sh                                       # all of them
#   tests/sanitize.sh tests/ops/test_fuzz.py -k attention   # pytest's arguments
#
# A copy of the checkout in build/sanitize is built, so that the checkout's own kernels stay; a second run
# compiles what has changed. Python is not built with ASan, so its library is loaded first, and libstdc++ with
# it, whose exceptions it watches; leaks are Python's own.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/sanitize
rm -rf build/sanitize/{csrc,gpt2fast,tests}
cp -rp CMakeLists.txt LICENSE README.md csrc gpt2fast pyproject.toml setup.py tests build/sanitize
cd build/sanitize

GPT2FAST_SANITIZE=address,undefined GPT2FAST_TEST_WIDE=1 GPT2FAST_REQUIRE=cpu GPT2FAST_SKIP=cuda \
  python -m pip install -q --no-deps --upgrade --target installed .
cp installed/gpt2fast/_*.so installed/gpt2fast/_build_info.json gpt2fast

if [ $# -eq 0 ]; then set -- tests/ops tests/test_decoding.py; fi
compiler=${CXX:-c++}
export LD_PRELOAD="$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# What torch.compile and opcheck do, and the kernels of GPUs, is nothing that these builds check.
exec python -m pytest -q -p no:cacheprovider -k "not (triton or cuda or compiles or opcheck)" "$@"
