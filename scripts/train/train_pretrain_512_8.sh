#!/usr/bin/env bash
# Stage 1: summary and projector learn from captions; the language model is frozen.
#   N=4 bash scripts/train/train_pretrain_512_8.sh \
#       --data_path dataset/captions.jsonl --images_path dataset/videos
#   bash scripts/train/train_pretrain_512_8.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/lm_512.pth → out/pretrain_videolm_512.pth.
# Flags added behind win over those here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "${N:-1}" train_pretrain.py \
    --dim 512 --n_layers 8 --n_heads 8 --n_kv_heads 2 \
    --load_from "${LOAD_FROM:-out/lm_512.pth}" \
    --vision_path "${VISION_PATH:-model/vision_model/clip-vit-base-patch32}" \
    --freeze_llm 2 --epochs 1 \
    --batch_size 32 --accumulation_steps 1 --warmup_iters 100 --save_interval 500 "$@"
