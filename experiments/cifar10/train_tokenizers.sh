#!/bin/sh
# The encoder, then the VQGAN that looks through it. Every step goes on where it was interrupted.
#   THREADS=2 DATA=data/cifar10 OUT=runs/study sh experiments/cifar10/train_tokenizers.sh
set -eu
DATA=${DATA:-data/cifar10}
OUT=${OUT:-runs/study}
OMP_NUM_THREADS=${THREADS:-2}
export OMP_NUM_THREADS
PATH="$PWD/.venv/bin:$PATH"

digit train encoder --preset cifar10-encoder --data "$DATA" --out "$OUT/encoder" --resume
digit train vqgan --preset cifar10-vqgan --data "$DATA" --out "$OUT/vqgan" --resume \
  --set objective.perceptual=encoder --set objective.perceptual_encoder="$OUT/encoder/model"
