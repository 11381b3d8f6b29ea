#!/usr/bin/env bash
# Runs the kernels' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer.
#   scripts/sanitize.sh PYTHON      of an environment that is set up
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# A build folder of its own: CMake would remember the sanitizers for the next build of the checkout.
"$python" -m pip install --quiet --no-deps --no-build-isolation --target "$folder" . \
  --config-settings=build-dir="$folder/build" --config-settings=cmake.define.MASKPRO_SANITIZE=address,undefined
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# -S leaves out .pth files, and with them the checkout's editable install. Python's own leaks are not ours.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH="$folder:$site" \
  "$python" -S -m pytest -p no:cacheprovider tests/kernels/test_packing.py tests/kernels/test_nm_linear.py \
  tests/kernels/test_bounds.py tests/kernels/test_rounded_activations.py \
  tests/kernels/test_policy_step.py --deselect tests/kernels/test_nm_linear.py::test_is_one_node_under_torch_compile
