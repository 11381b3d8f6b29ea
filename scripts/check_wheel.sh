#!/usr/bin/env bash
# Builds the wheel and uses it from another folder, as a user would: no checkout on the path, no editable
# install. Dependencies are borrowed from the environment of the interpreter given as the only argument.
set -euo pipefail
python=$(realpath -s "$1")
repository=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/dist" "$repository"
"$python" -m venv --without-pip "$work/venv"
dependencies=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps --no-index "$work"/dist/*.whl
# A path line, unlike a second site-packages, does not run the editable install's import hook.
echo "$dependencies" > "$site/dependencies.pth"

cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import maskpro_kernels, maskpro_learner, maskpro_serve, torch
from maskpro_kernels import NMPattern, nm_linear, pack, unpack
from maskpro_learner.chat_quiz import read_questions
from maskpro_serve.models import DEFAULT_MASK, DEFAULT_RECOVERY
from maskpro_serve.plugin import register

for package in (maskpro_kernels, maskpro_learner, maskpro_serve):
    assert "/venv/" in package.__file__, package.__file__
weight = pack(torch.randn(8, 32), NMPattern.parse("2:4"))
x = torch.randn(3, 32)
torch.testing.assert_close(nm_linear(x, weight), x @ unpack(weight).T)
assert DEFAULT_MASK.is_file() and DEFAULT_RECOVERY.is_file()
assert len(read_questions()) == 40
register()
print("wheel: imports, kernel, mask and plugin work from", __import__("os").getcwd())
PYTHON
for command in maskpro-serve maskpro-pack maskpro-learn maskpro-recover maskpro-eval; do
  "$work/venv/bin/$command" --help > /dev/null
done
