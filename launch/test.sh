#!/usr/bin/env bash
# All tests; arguments are passed on to pytest, with paths as seen from the checkout.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
