#!/usr/bin/env bash
# From nothing to a trained, collaboration-constrained MoE; arguments are passed on (--out DIR).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime
exec "$PYTHON" -P -m ep_engine.cli quickstart "$@" # -P: the caller's folder may hold a tokens.py of its own
