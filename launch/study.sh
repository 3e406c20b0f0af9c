#!/usr/bin/env bash
# Which way from a dense model to experts is best, and what do constraints cost? Meant for 2 hours on 2 CPU cores; what
# is done already is not done again. --smoke: all of it on a small scale, in less than 15 minutes; --seeds N; --out FOLDER.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime
exec "$PYTHON" -P -m benchmarks.study "$@"
