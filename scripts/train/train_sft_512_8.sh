#!/usr/bin/env bash
# Stage 2: summary, projector and language model are trained on questions and answers.
# out/pretrain_videolm_512.pth → out/sft_videolm_512.pth; how to start it: launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_sft.py 512 8 --epochs 2 --batch_size 32 "$@"
