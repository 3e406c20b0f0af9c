#!/usr/bin/env bash
# Condense a model with experts: launch/condense.sh MODEL OUT LAYERS EXPERTS CORPUS [RANKS]
#
# LAYERS of its layers become dense ones of their shared experts and EXPERTS others, chosen on CORPUS, a .jsonl or .txt
# file or a folder of them, by RANKS ranks of this machine. OUT gets weights.json, experts.json, layers.json, the engine
# checkpoint `checkpoint`, and `hf` for transformers; what is there already is not searched for again.
#
# Light fine-tuning is a further step: `condense apply --keep-scales` with these files, whose weights of experts stay apart
# from the matrices, then `ep-engine train` with launch/configs/cd_moe_lm.toml and cd_moe_sft.toml, which say how.
set -euo pipefail
if [[ $# -lt 5 || $# -gt 6 || ! $3 =~ ^[0-9]+$ || ! $4 =~ ^[0-9]+$ || ! ${6:-1} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 MODEL OUT LAYERS EXPERTS CORPUS [RANKS]" >&2
  exit 2
fi
model=$(realpath -m -- "$1") out=$(realpath -m -- "$2") corpus=$(realpath -m -- "$5") layers=$3 experts=$4 ranks=${6:-1}
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh" runtime

tool() { "$PYTHON" -P -m checkpoint_tools "$@"; }
condense() {
  if [[ $ranks == 1 ]]; then
    tool condense "$@"
  else
    GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} "$PYTHON" -P "$ROOT/launch/torchrun.py" --standalone \
      --nproc-per-node "$ranks" -m checkpoint_tools condense "$@"
  fi
}
cd "$ROOT" # where `python -m checkpoint_tools` is found
tool condense apply "$model" "$out/checkpoint" --layers "$layers" --experts "$experts" --dry-run --overwrite
mkdir -p "$out"
kept=()
if [[ $experts -gt 0 ]]; then
  [[ -e $out/weights.json ]] || condense weights "$model" --corpus "$corpus" --out "$out/weights.json"
  kept=(--experts "$experts" --weights "$out/weights.json")
  [[ -e $out/experts.json ]] ||
    condense experts "$model" --corpus "$corpus" "${kept[@]}" --out "$out/experts.json" --resume
  kept+=(--lists "$out/experts.json")
fi
[[ -e $out/layers.json ]] ||
  condense layers "$model" --corpus "$corpus" --layers "$layers" "${kept[@]}" --out "$out/layers.json" --resume
tool condense apply "$model" "$out/checkpoint" --layers "$layers" "${kept[@]}" --order "$out/layers.json" --overwrite
tool export "$out/checkpoint" "$out/hf" --overwrite
