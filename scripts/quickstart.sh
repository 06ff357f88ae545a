#!/usr/bin/env bash
# From an empty machine to an answer about a video, on two CPU cores in about ten minutes:
#
#   bash scripts/quickstart.sh
#
# Everything lands in out/quickstart/ and report.md there says what came out. An interrupted run
# resumes where it was; a second run does nothing twice. With CLIP and your own data the stages are
# the same scripts with other paths.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" requirements.txt requirements-serve.txt

out=out/quickstart
tower=demo/tower
python=.venv/bin/python
# A language model of two million parameters is enough for this world; the named sizes are 512 x 8
# and 768 x 16.
size="--dim 128 --n_layers 4 --n_heads 4 --n_kv_heads 2 --num_frames 8"

# stage NAME "what it is for" WHAT-IT-MAKES COMMAND...
# Skipped where the same command, after the same commands before it, has made this already. What was
# interrupted is run again and resumes; what other commands made is removed first.
mkdir -p $out/stages
history=
TIMEFORMAT='{"seconds": %R, "user": %U, "system": %S}'
stage() {
    local name=$1 purpose=$2 makes=$3 stamp=$out/stages/$1
    shift 3
    history+=" && $*"
    printf '\n== %s: %s\n' "$name" "$purpose"
    if [ "$(cat "$stamp.started" 2>/dev/null)" != "$history" ]; then
        # A model's run folder and a test set's answers lie beside what the stage is known by.
        rm -rf "$makes" "${makes%.pth}" "${makes%.json}.answers.jsonl"
        printf '%s' "$history" >"$stamp.started"
    elif [ -e "$makes" ] && [ -e "$stamp.json" ]; then
        echo "done before"
        return
    fi
    rm -f "$stamp.json" # there when the stage has ended well
    { time "$@" 2>&3; } 3>&2 2>"$stamp.cost"
    mv "$stamp.cost" "$stamp.json"
}

stage data-train "render clips of moving objects, with captions and questions" $out/data/train \
    $python -m demo.world --split train --seed 0 --clips 6200 --out $out/data/train
stage data-val "held-out clips to watch training by" $out/data/val \
    $python -m demo.world --split val --seed 0 --clips 200 --out $out/data/val
stage data-test "clips of combinations that training never shows" $out/data/test \
    $python -m demo.world --split test --seed 0 --clips 620 --out $out/data/test

# One worker decodes while the tower computes.
extraction="--num_frames 8 --num_workers 1"
stage features-train "run the frozen vision tower once a clip, not once an epoch" \
    $out/features/train \
    $python extract_features.py --data_path $out/data/train/{captions,questions}.jsonl \
    --images_path $out/data/train --vision_path $tower --features_path $out/features/train \
    $extraction
stage features-val "the same for the held-out clips" $out/features/val \
    $python extract_features.py --data_path $out/data/val/{captions,questions}.jsonl \
    --images_path $out/data/val --vision_path $tower --features_path $out/features/val \
    $extraction

features="--use_feature --features_path $out/features/train --val_features_path $out/features/val"
# A second thread only waits on matrices as small as these.
train="env OMP_NUM_THREADS=1 $python"
optimizer="--optimizer muon --muon_learning_rate 0.015 --learning_rate 2e-3"
optimizer="$optimizer --schedule linear --warmup_iters 20"
stage pretrain "learn to see and to speak, from captions" $out/pretrain.pth \
    $train train_pretrain.py --out_dir $out --run_name pretrain $size $features \
    --from_scratch --freeze_llm 0 --embedding_std 0.1 \
    --data_path $out/data/train/captions.jsonl --val_path $out/data/val/captions.jsonl \
    --max_steps 60 --batch_size 32 $optimizer --eval_interval 50 --save_interval 50
stage sft "learn to answer questions" $out/sft.pth \
    $train train_sft.py --out_dir $out --run_name sft $size $features \
    --load_from $out/pretrain.pth \
    --data_path $out/data/train/questions.jsonl --val_path $out/data/val/questions.jsonl \
    --epochs 3 --max_steps 1700 --batch_size 16 $optimizer --eval_interval 200 --save_interval 200

model="--load_from $out/sft.pth --vision_path $tower"
stage eval "answer about unseen clips; then with the time order changed, and with no video" \
    $out/eval.json \
    $python eval.py $model --data_path $out/data/test/questions.jsonl \
    --images_path $out/data/test --controls --batch_size 128 --output $out/eval.json
printf '\n== report: figures, curves and test frames in one place\n'
$python -m demo.report --dir $out

printf '\n== chat: four videos, one question\n'
clips=(demo/examples/*.mp4)
$python eval.py $model --video "${clips[@]}" --question "What happens in this video?"

printf '\nThe report: %s/report.md\nAsk yourself: %s eval.py %s --video %s\n' \
    "$out" "$python" "$model" "${clips[0]}"
