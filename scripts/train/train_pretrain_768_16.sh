#!/usr/bin/env bash
# Stage 1: summary and projector learn from captions; the language model is frozen.
#   N=4 bash scripts/train/train_pretrain_768_16.sh \
#       --data_path dataset/captions.jsonl --images_path dataset/videos
#   bash scripts/train/train_pretrain_768_16.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/lm_768.pth → out/pretrain_videolm_768.pth.
# Flags added behind win over those here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "${N:-1}" train_pretrain.py \
    --dim 768 --n_layers 16 --n_heads 8 --n_kv_heads 2 \
    --load_from "${LOAD_FROM:-out/lm_768.pth}" \
    --vision_path "${VISION_PATH:-model/vision_model/clip-vit-base-patch32}" \
    --freeze_llm 2 --epochs 1 \
    --batch_size 16 --accumulation_steps 2 --warmup_iters 100 --save_interval 500 "$@"
