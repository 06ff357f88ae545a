#!/usr/bin/env bash
# Stage 2: summary, projector and language model are trained on questions and answers.
#   N=4 bash scripts/train/train_sft_768_16.sh \
#       --data_path dataset/questions.jsonl --images_path dataset/videos
#   bash scripts/train/train_sft_768_16.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/pretrain_videolm_768.pth → out/sft_videolm_768.pth.
# Flags added behind win.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_sft.py 768 16 --epochs 2 --batch_size 16 --accumulation_steps 2 "$@"
