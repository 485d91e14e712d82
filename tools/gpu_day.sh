#!/usr/bin/env bash
# What to do with a GPU that is lent for half an hour: most valuable first, a piece at a time.
#
#     OUT=out DATA=data TEACHER=resnet56.pth MINUTES=9 bash tools/gpu_day.sh [KEY VALUE ...]
#     TINY=1 OUT=out bash tools/gpu_day.sh            # a rehearsal on a CPU, on digits
#
# Each call goes on where the last one was stopped, and ends after MINUTES. Runs and checkpoints are
# kept in WORK; OUT receives small files to take along: figures, each piece's log, packed studies, and
# the state of the teacher that is trained. A piece that failed is not tried again: its log says why.
# KEY VALUE pairs, as SOLVER.TF32 True or the best SOLVER.STACK, hold for the studies.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for what is to be taken along}"
WORK=${WORK:-output/gpu_day} TINY=${TINY:-} TOGETHER=${TOGETHER:-24} ends=$((${MINUTES:-9} * 60))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=32 MDISTILLER_EXT_CACHE=$WORK/tables
mkdir -p "$WORK/ended" "$OUT"

piece() { # NAME COMMAND...
    local name=$1 left=$((ends - SECONDS)) status
    shift
    [ -e "$WORK/ended/$name" ] && return
    [ "$left" -lt 15 ] && return
    echo "$name: $left s left"
    timeout -s TERM -k 20 "$left" "$@" >>"$OUT/$name.log" 2>&1
    status=$?
    # 124: the time was up; the run or study saved itself and goes on in the next call.
    [ "$status" -eq 124 ] || echo "$status" >"$WORK/ended/$name"
    echo "$name: status $status"
}

study() { # NAME FILE KEY VALUE...: its runs, then its report; its records are taken along
    local name=$1 file=$2
    shift 2
    piece "$name" python tools/compare.py run "$file" --output "$WORK" "${device[@]}" "$@"
    [ ! -d "$WORK/$name" ] ||
        python tools/pack.py pack "$WORK/$name" "$OUT/$name.tar.xz" --unfinished --overwrite
}

if [ "$TINY" ]; then
    device=(--device cpu --together 4)
    piece tests python -m pytest -q tests/test_graph.py
    piece ladder python tools/bench.py --device cpu --eager --rounds 1 --steps 1 --teacher resnet8
    study digits studies/digits.yaml SOLVER.EPOCHS 2 "$@"
else
    device=(--device cuda --together "$TOGETHER")
    data=(DATASET.ROOT "$DATA")
    piece tests python -m pytest -q tests/test_gpu.py tests/test_graph.py
    piece ladder python tools/bench.py --root "$DATA" --device cuda --rounds 5 --steps 100 --runs 16 \
        --json "$OUT/ladder.json"
    study paper_table1_cpu studies/paper_table1_cpu.yaml "${data[@]}" \
        DISTILLER.TEACHER_CKPT "$TEACHER" "$@"
    for form in none grouped vmap branches; do # of 1 to 64 runs, apart and stacked
        piece "grow_$form" python tools/bench.py --root "$DATA" --device cuda --rounds 3 --steps 400 \
            --grow --forms "$form"
    done
    piece teacher python tools/train.py --cfg configs/cifar100/teacher_resnet110.yaml --resume \
        --device cuda "${data[@]}" LOG.PREFIX "$WORK" EXPERIMENT.NAME resnet110 SOLVER.AMP bf16
    for file in latest record.json student_last; do
        cp "$WORK/cifar100_teachers/resnet110/$file" "$OUT/resnet110_$file" 2>/dev/null
    done
    if [ -e "$WORK/ended/teacher" ]; then
        study paper_table1 studies/paper_table1.yaml "${data[@]}" \
            DISTILLER.TEACHER_CKPT "$WORK/cifar100_teachers/resnet110/student_last" "$@"
    fi
fi
ls -l "$OUT"
