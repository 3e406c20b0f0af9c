#!/usr/bin/env bash
# The tests of model families, and of condensed models of two, with transformers 4, whose folders people have; arguments
# are passed on to pytest.
# It lies beside the pinned one, in .transformers4, and comes first on PYTHONPATH.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" dev
cd "$ROOT"

old=$ROOT/.transformers4
wanted=$(sha256sum requirements-transformers4.txt)
if [[ $(cat "$old/.pins" 2>/dev/null) != "$wanted" ]]; then
  rm -rf "$old"
  step "installing transformers 4" "$PYTHON" -m pip --disable-pip-version-check --no-input install \
    --target "$old" --requirement requirements-transformers4.txt
  echo "$wanted" >"$old/.pins"
fi
export PYTHONPATH="$old:$PYTHONPATH"
condensed=tests/test_condense_apply.py::test_a_condensed_checkpoint_computes_what_the_plain_model_does
exec "$PYTHON" -m pytest \
  tests/test_families.py tests/test_hf_modeling.py tests/test_llama_moe_family.py tests/test_convert.py \
  "${condensed}[1-2-folded-deepseek]" "${condensed}[1-2-kept-qwen]" "$@"
