#!/usr/bin/env bash
# Stage 2: summary, projector and language model are trained on questions and answers.
# out/pretrain_videolm_768.pth → out/sft_videolm_768.pth; how to start it: launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_sft.py 768 16 --epochs 2 --batch_size 16 --accumulation_steps 2 "$@"
