# Sourced by the scripts beside it, and by those of ../eval.
#   launch SCRIPT DIM LAYERS FLAGS...
# Starts a stage with $N processes (default: 1), one a GPU. It starts from the weights that are
# named after DIM, or from $LOAD_FROM, and reads videos by the usual tower, or by $VISION_PATH.
# Weights know their own shape: LAYERS is for --from_scratch alone. Flags added behind win:
#   N=4 bash scripts/train/train_sft_512_8.sh \
#       --data_path dataset/questions.jsonl --images_path dataset/videos
#   bash scripts/train/train_sft_512_8.sh \
#       --data_path … --use_feature --features_path dataset/features
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)

launch() {
    local script=$1 flags=(--dim "$2" --warmup_iters 100 --save_interval 500) run=("$python")
    [[ " $* " != *" --from_scratch "* ]] || flags+=(--n_layers "$3")
    shift 3
    [ "${N:-1}" = 1 ] || run+=(scripts/train/torchrun.py --standalone --nproc_per_node "$N")
    [ -z "${LOAD_FROM:-}" ] || flags+=(--load_from "$LOAD_FROM")
    [ -z "${VISION_PATH:-}" ] || flags+=(--vision_path "$VISION_PATH")
    exec "${run[@]}" "$script" "${flags[@]}" "$@"
}
