#!/bin/sh
# Build the wheels of torchpi and torchpi-client, install them into an empty environment, and run the embedded policy.
#
#   scripts/smoke_wheels.sh PYTHON [OPTIONS OF pip install]
#
# for example `scripts/smoke_wheels.sh python3.13 --extra-index-url https://download.pytorch.org/whl/cpu`, which uses the
# CPU build of PyTorch. All files are removed at the end.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
bin="$work/venv/bin"
"$bin/pip" wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" "$root" "$root/client"
for wheel in "$work"/torchpi-*.whl "$work"/torchpi_client-*.whl; do
	"$bin/pip" install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "$@" "$wheel"
done
"$bin/pip" install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" "$@" "$(ls "$work"/torchpi-*.whl)[serve]"
cd "$work"
"$bin/torchpi" --version
"$bin/python" - <<'CODE'
import numpy as np
import torchpi

policy = torchpi.load_policy("demo")
np.savez("observation.npz", **torchpi.robots.flatten(policy.example_observation()))
actions = policy.infer(policy.example_observation())["actions"]
assert actions.shape == (16, 4) and np.isfinite(actions).all()
CODE
"$bin/torchpi" infer demo --inputs observation.npz --out actions.npz
"$bin/torchpi" trace demo >trace.txt
"$bin/python" -c 'import torchpi_client, torchpi.serving.server; print("ok")'
