#!/usr/bin/env bash
# Everything on one GPU: `benchmarks/gpu/run.sh --help`. PYTHON is the one to run it with; else .venv's, or after
# `. SITE/env.sh` (unpack.sh) the one that was named there.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && [ -z "${PYTHONPATH:-}" ] && echo .venv/bin/python || echo python3)}
exec "$python" benchmarks/gpu/run.py "$@"
