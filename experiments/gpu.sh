#!/usr/bin/env bash
# The headline of the CIFAR-10 study in half an hour of one GPU: `experiments/gpu.sh STAGE`, one stage after another.
#
#   pack      (before, on any machine)  20,000 + 2,000 images of data/cifar10 into $OUT/input.tar.xz, about 50 MB
#   1         encoder, 40 passes                                                  about 8 min on an H100 [estimated]
#   2         the same under noise and blur; VQGAN of 64 x [1, 2, 4] channels     about 9 min [estimated]
#   3         codebooks, cached tokens, the two priors                            about 8 min [estimated]
#   4         AR decoder, both models, 5,000 images of each                       about 8 min [estimated]
#   collect   images, VQGAN, curves and records into $OUT/results.tar.xz, at most 64 MB
#   score     (after, on any machine)   FID and KID of both against the training images; needs Inception weights
#   plan      print the steps of each stage
#
# Besides, what is only known on a GPU, by gpu.py: calls of at most SECONDS_A_STAGE that write $OUT/CALL.json. DRY_RUN=1
# does it on the CPU with tiny models.
#
#   tests     all tests marked gpu: counts, names, durations
#   sampling  images/s of the paper's base and large, prior + AR decoder + VQGAN, at 256 px in bf16
#   training  MFU of the paper's models in bf16
#
# A stage stops itself after 9.5 minutes with a checkpoint; the same command goes on from there, and a finished step is
# not done again. Settings: profile "short" of cifar10/study.py. The minutes are estimates from floating-point
# operations, for it has not run on a GPU yet; the profile's commands have run on a CPU, two optimizer steps each.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python}
SECONDS_A_STAGE=${SECONDS_A_STAGE:-570}
STAGES=(
  "encoder-plain"
  "encoder vqgan"
  "codebook-plain assemble-tokenizers-plain tokens-plain codebook-1024 assemble-tokenizers-1024 tokens-1024 vq-prior-s0 prior-s0"
  "ar assemble-vq-s0 assemble-semantic-s0"
)

pack() {
  mkdir -p "$OUT"
  "$PYTHON" - "$OUT/data" <<'PY'
import sys
from digit.data.dataset import open_dataset
from digit.data.dataset import write_dataset

with write_dataset(sys.argv[1], "cifar10-part", open_dataset("data/cifar10").classes, "A part of CIFAR-10", "") as writer:
    for split, count in (("train", 20_000), ("test", 2_000)):
        images = open_dataset("data/cifar10", split)
        step = len(images) / count
        for i in (int(step * number) for number in range(count)):
            label = int(images.labels[i])
            writer.add(split, images.source.key(i), images.source.read(i), "png", (32, 32), label)
PY
  tar -C "$OUT" -cJf "$OUT/input.tar.xz" data
  fits "$OUT/input.tar.xz"
}

fits() {
  local bytes
  bytes=$(stat -c %s "$1")
  echo "$1: $((bytes / 1000000)) MB"
  [ "$bytes" -le 64000000 ] || { echo "more than 64 MB"; exit 1; }
}

within() {
  timeout --signal=TERM "$SECONDS_A_STAGE" "$@" || {
    echo "Not finished (exit code $?); the same stage goes on from its checkpoint." >&2
    exit 75
  }
}

train() {
  [ -d "$OUT/data" ] || tar -C "$OUT" -xJf "$OUT/input.tar.xz"
  # the reference is not needed before `score`; a file in its place keeps its step out of the plan
  mkdir -p "$OUT/study" && touch "$OUT/study/no-reference"
  # shellcheck disable=SC2086
  within "$PYTHON" experiments/cifar10/study.py $1 --profile short --out "$OUT/study" --data "$OUT/data" \
    --reference "$OUT/study/no-reference"
}

case "${1:-}" in
  pack) pack ;;
  1 | 2 | 3) train "${STAGES[$1 - 1]}" ;;
  4)
    train "${STAGES[3]}"
    for model in semantic-s0 vq-s0; do
      within "$PYTHON" -m digit generate "$OUT/study/models/$model" --num 5000 --batch-size 500 --out "$OUT/study/images-$model"
    done
    ;;
  collect)
    "$PYTHON" -m digit assemble --vqgan "$OUT/study/vqgan" --dtype fp16 --name vqgan --out "$OUT/study/vqgan-fp16"
    tar -C "$OUT/study" -cJf "$OUT/results.tar.xz" images-semantic-s0 images-vq-s0 vqgan-fp16 records \
      $(cd "$OUT/study" && ls -d ./*/metrics.jsonl ./*/config.yaml ./*/curves.png)
    fits "$OUT/results.tar.xz"
    ;;
  score)
    [ -d "$OUT/study/images-vq-s0" ] || { mkdir -p "$OUT/study" && tar -C "$OUT/study" -xJf "$OUT/results.tar.xz"; }
    for model in semantic-s0 vq-s0; do
      "$PYTHON" -m digit evaluate fidelity "$OUT/study/images-$model" --reference data/cifar10 --reference-split train --kid \
        --out "$OUT/study/results/fidelity-$model.json"
    done
    ;;
  tests | sampling | training)
    # an interrupt lets pytest and torch clean up
    timeout --signal=INT --kill-after=15 "$SECONDS_A_STAGE" "$PYTHON" experiments/gpu.py "$1" "$OUT/$1.json" \
      --seconds "$SECONDS_A_STAGE" ${DRY_RUN:+--dry-run}
    ;;
  plan) printf '%s\n' "${STAGES[@]}" ;;
  *)
    sed -n '2,24s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
