#!/usr/bin/env bash
# Asks the 768-wide, 16-layer model: about each file of dataset/eval_videos/, or what the flags say.
#   bash scripts/eval/eval_768_16.sh --video a.mp4 --question "What happens?"
#   bash scripts/eval/eval_768_16.sh --data_path dataset/test.jsonl --images_path dataset/videos --controls
source "$(dirname "${BASH_SOURCE[0]}")/../train/launch.sh"
exec "$python" eval.py --model_mode 1 --dim 768 --n_layers 16 \
    --load_from "${LOAD_FROM:-out/sft_videolm_768.pth}" \
    --vision_path "${VISION_PATH:-model/vision_model/clip-vit-base-patch32}" "$@"
