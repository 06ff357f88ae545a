#!/usr/bin/env bash
# Stage 2: summary, projector and language model learn from questions and answers.
#   N=4 bash scripts/train/train_sft_512_8.sh \
#       --data_path dataset/questions.jsonl --images_path dataset/videos
#   bash scripts/train/train_sft_512_8.sh \
#       --data_path … --use_feature --features_path dataset/features
# N processes, one a GPU: out/pretrain_videolm_512.pth → out/sft_videolm_512.pth.
# Flags added behind win over those here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "${N:-1}" train_sft.py \
    --dim 512 --n_layers 8 --n_heads 8 --n_kv_heads 2 \
    --load_from "${LOAD_FROM:-out/pretrain_videolm_512.pth}" \
    --vision_path "${VISION_PATH:-model/vision_model/clip-vit-base-patch32}" \
    --freeze_llm 0 --epochs 2 \
    --batch_size 32 --accumulation_steps 1 --warmup_iters 100 --save_interval 500 "$@"
