#!/bin/sh
# Test lerobot_policy_torchpi with LeRobot itself: lerobot-train, lerobot-eval (gym-pusht) and lerobot-rollout.
#
#   scripts/test_lerobot_plugin.sh PYTHON [OPTIONS OF pip install]
#
# PYTHON is 3.12 or newer. `--extra-index-url https://download.pytorch.org/whl/cpu` uses the CPU build of PyTorch; with
# PyPI's build the environment takes 6 GB. VENV=FOLDER keeps and reuses it; otherwise all files are removed at the end.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${VENV:-$work/venv}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# LeRobot first, because it determines the versions, then the tested packages.
"$venv/bin/pip" install --quiet --disable-pip-version-check "$@" 'lerobot[training,hardware,pusht]>=0.6.1,<0.7' pytest
"$venv/bin/pip" install --quiet --disable-pip-version-check "$@" --editable "$root/client" --editable "$root[data,serve]"
"$venv/bin/pip" install --quiet --disable-pip-version-check "$@" --editable "$root/integrations/lerobot[local]"
# Use no network and open no window.
cd "$root/integrations/lerobot"
HF_HOME="$work/huggingface" HF_HUB_OFFLINE=1 SDL_VIDEODRIVER=dummy OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest
