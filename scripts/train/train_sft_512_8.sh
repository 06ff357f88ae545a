#!/usr/bin/env bash
# Stage 2: summary, projector and language model are trained on questions and answers.
#   N=4 bash scripts/train/train_sft_512_8.sh \
#       --data_path dataset/questions.jsonl --images_path dataset/videos
#   bash scripts/train/train_sft_512_8.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/pretrain_videolm_512.pth → out/sft_videolm_512.pth.
# Flags added behind win.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_sft.py 512 8 --epochs 2 --batch_size 32 "$@"
