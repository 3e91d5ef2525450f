#!/usr/bin/env bash
# Everything that must be seen on a card, in about ten minutes and in order of worth:
#
#     bash tests/bench/gpu.sh [DATA]                           DATA: a folder with Beauty's two files
#     DEVICE=cpu SIZES=tiny QUICK=1 bash tests/bench/gpu.sh    does it run? minutes, without a card
#
# SIZES: of bench_llm.py, separated by commas. OUT: a folder for what the steps write. LIMIT: seconds
# that a step may take. A step that fails is told and the others go on; the exit status is 1 then.
set -uo pipefail
data=${1:+$(realpath "$1")}
root=$(cd "$(dirname "$0")/../.." && pwd)
device=${DEVICE:-cuda}
sizes=${SIZES:-Qwen3-0.6B,Qwen3-1.7B,Qwen3-8B}
quick=${QUICK:-}
limit=${LIMIT:-600}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
cd "$out" || exit 1
export HF_HUB_OFFLINE=1
failed=()

step() {  # name, command ...
  local name=$1 start=$SECONDS
  shift
  printf '\n[%4d s] == %s\n' "$start" "$name"
  if timeout "$limit" "$@"; then
    printf '[%4d s] ok: %s (%d s)\n' "$SECONDS" "$name" $((SECONDS - start))
  else
    printf '[%4d s] FAILED: %s (%d s)\n' "$SECONDS" "$name" $((SECONDS - start))
    failed+=("$name")
  fi
}

step "the device" python - "$device" << 'PY'
import sys

import torch

print("torch", torch.__version__, "CUDA", torch.version.cuda)
if sys.argv[1] != "cpu":
    print(torch.cuda.get_device_properties(sys.argv[1]))
PY

step "quick demo" python "$root/curec.py" --dataset demo --quick --device "$device" --out quick \
  --overwrite ${quick:+--tiny-steps 20 --align-steps 2 --arms content,curec}

step "tests of devices and memory" python -m pytest -q -p no:cacheprovider \
  "$root/tests/test_device.py" "$root/tests/test_memory.py"

short=${quick:+--prompt 24 --answer 8 --rows 8}
for size in ${sizes//,/ }; do
  # shellcheck disable=SC2086
  step "shapes of $size" python "$root/tests/bench/bench_llm.py" shapes --sizes "$size" \
    --device "$device" --json "shapes-$size.json" $short
done

recommender=(python - "$root" "$device" "${quick:+3}")
if [ -n "$data" ]; then
  recommender+=(beauty "$data")
else
  recommender+=(demo .)
fi
step "arm id of ${recommender[-2]}, one seed" "${recommender[@]}" << 'PY'
import sys
import time

root, device, epochs, name, folder = sys.argv[1:]
sys.path.insert(0, root)

import numpy as np

import data
import recommender

shop = data.load(name, folder)
config = recommender.TrainConfig(epochs=int(epochs or 60), device=device)
start = time.perf_counter()
model, found = recommender.train(shop, config=config)
seconds = (time.perf_counter() - start) / found["epochs"]
known = [np.append(seq, item) for seq, item in zip(shop.train, shop.valid, strict=True)]
rank = recommender.ranks(recommender.scorer(model), known, shop.test)
ndcg = recommender.metrics(rank)["ndcg@10"].mean()
print(f"{found['epochs']} epochs, {seconds:.2f} s an epoch, test NDCG@10 {ndcg:.4f}")
PY

step "demo in full" python "$root/curec.py" --dataset demo --device "$device" --out demo \
  --overwrite ${quick:+--quick --arms popularity,id}

printf '\n[%4d s] all done; files are in %s\n' "$SECONDS" "$out"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
