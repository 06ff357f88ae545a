#!/usr/bin/env bash
# Stage 1: summary and projector are trained on captions; the language model is frozen.
# out/lm_768.pth → out/pretrain_videolm_768.pth; how to start it: launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch train_pretrain.py 768 16 --epochs 1 --batch_size 16 --accumulation_steps 2 "$@"
