#!/usr/bin/env bash
# Stage 1: summary and projector are trained on captions; the language model is frozen.
#   N=4 bash scripts/train/train_pretrain_512_8.sh \
#       --data_path dataset/captions.jsonl --images_path dataset/videos
#   bash scripts/train/train_pretrain_512_8.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/lm_512.pth → out/pretrain_videolm_512.pth.
# Flags added behind win.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_pretrain.py 512 8 --epochs 1 --batch_size 32 "$@"
