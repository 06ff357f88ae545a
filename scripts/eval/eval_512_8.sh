#!/usr/bin/env bash
# Asks the 512-wide, 8-layer model: about each file of dataset/eval_videos/, or what the flags say.
#   bash scripts/eval/eval_512_8.sh --video a.mp4 --question "What happens?"
#   bash scripts/eval/eval_512_8.sh --data_path dataset/test.jsonl --images_path dataset/videos --controls
source "$(dirname "${BASH_SOURCE[0]}")/../train/launch.sh"
exec "$python" eval.py --model_mode 1 --dim 512 --n_layers 8 \
    --load_from "${LOAD_FROM:-out/sft_videolm_512.pth}" \
    --vision_path "${VISION_PATH:-model/vision_model/clip-vit-base-patch32}" "$@"
