#!/usr/bin/env bash
# Stage 1: summary and projector are trained on captions; the language model is frozen.
#   N=4 bash scripts/train/train_pretrain_768_16.sh \
#       --data_path dataset/captions.jsonl --images_path dataset/videos
#   bash scripts/train/train_pretrain_768_16.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/lm_768.pth → out/pretrain_videolm_768.pth.
# Flags added behind win.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_pretrain.py 768 16 --epochs 1 --batch_size 16 --accumulation_steps 2 "$@"
