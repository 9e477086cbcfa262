#!/usr/bin/env bash
# All GPU measurements on one NVIDIA GPU, within 8 minutes after the install. Usage, from anywhere:
#
#   launch/bench/gpu.sh FILE [arguments of `python -m launch.bench.gpu`]
#
# FILE gets the figures as JSON. The Python that $PYTHON names (default python3) is used as it is if it has jax on a GPU and all
# else that is needed; otherwise a virtual environment is made from it in $VENV (default .venv-gpu, kept for the next time).
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: gpu.sh FILE [--small] [--parts PART ...]: FILE is where the figures go" >&2
  exit 2
fi
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
venv=${VENV:-.venv-gpu}

has_all() {
  "$1" -c "
import flax, numba, numpy, optax, pyarrow, rich, jax
assert jax.default_backend() == 'gpu', jax.default_backend()
print('jax', jax.__version__, 'on', jax.devices()[0].device_kind)"
}

if ! has_all "$python"; then
  echo "gpu.sh: $python will not do, see above; using $venv" >&2
  "$python" -m venv "$venv"
  python=$venv/bin/python
  "$python" -m pip install --quiet 'jax[cuda13]==0.11.*' flax optax numpy numba pyarrow rich
  has_all "$python" || { echo "gpu.sh: jax sees no GPU, or a package is missing; see above" >&2; exit 1; }
fi

# Tables are made and freed between parts; the CPU is the other side of the comparison.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_PLATFORMS=cuda,cpu
# gpu.py stops each part at its own limit, all of them after 470 s; this is for what cannot be stopped from inside.
exec timeout --kill-after=10 480 "$python" -m launch.bench.gpu --out "$out" "$@"
