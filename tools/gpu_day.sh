#!/usr/bin/env bash
# What to do with a GPU that is lent for 15 minutes: most valuable first, a piece at a time.
#
#     OUT=out [DATA=data TEACHER=resnet56.pth] [MINUTES=9] bash tools/gpu_day.sh [KEY VALUE ...]
#     TINY=1 OUT=out bash tools/gpu_day.sh            # a rehearsal on a CPU, on digits
#
# Each call ends after MINUTES; the next one goes on. Without DATA, a folder with
# cifar-100-binary/, tests and speed are all there is. Runs and checkpoints are kept in WORK; OUT
# receives small files to take along: what all pieces said, packed studies, and the state of the
# teacher that is trained. A piece that failed is not tried again: OUT/log.txt says why. KEY VALUE
# pairs, as SOLVER.TF32 True or the best SOLVER.STACK, hold for the studies.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for what is to be taken along}"
WORK=${WORK:-output/gpu_day} ends=$((${MINUTES:-9} * 60))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export MDISTILLER_EXT_CACHE=$WORK/tables
mkdir -p "$WORK/ended" "$OUT"

piece() { # NAME MOST COMMAND...: what goes on in the next call, or, within MOST seconds, at once
    local name=$1 most=$2 left=$((ends - SECONDS)) status
    shift 2
    [ "${TINY:-}" ] && most=0
    [ -e "$WORK/ended/$name" ] && return
    [ "$left" -lt $((most > 15 ? most : 15)) ] && return
    [ "$most" -gt 0 ] && left=$most
    echo "== $name: $left s" | tee -a "$OUT/log.txt"
    timeout -s TERM -k 20 "$left" "$@" >>"$OUT/log.txt" 2>&1
    status=$?
    # 124: the time was up; a run or study saved itself and goes on in the next call.
    [ "$status" -eq 124 ] && [ "$most" -eq 0 ] || echo "$status" >"$WORK/ended/$name"
    echo "$name: status $status"
}

study() { # NAME STUDY KEY VALUE...: its runs, which are taken along
    local name=$1 place=$WORK/$1/$2 archive=$OUT/$1.tar.xz
    piece "$name" 0 python3 tools/compare.py run "studies/$2.yaml" --output "$WORK/$1" "${many[@]}" \
        "${@:3}"
    [ -d "$place" ] || return 0
    python3 tools/pack.py pack "$place" "$archive" --unfinished --overwrite
    # In parts that may be sent; `cat` puts them together.
    if [ "$(stat -c %s "$archive")" -gt 16000000 ]; then
        split -b 15M "$archive" "$archive." && rm "$archive"
    fi
}

# Each form is compiled beside the others first; the times are then taken one after the other, with
# what was compiled from PyTorch's cache.
forms() {
    local runs form
    for runs in "$@"; do
        for form in "${rungs[@]}"; do
            python3 tools/bench.py --at-once --runs "$runs" --forms "$form" --rounds 1 --steps 16 \
                "${bench[@]}" >/dev/null 2>&1 &
        done
        wait
        for form in "${rungs[@]}"; do
            python3 tools/bench.py --at-once --runs "$runs" --forms "$form" "${bench[@]}"
        done
    done
}

if [ "${TINY:-}" ]; then
    on=(--device cpu) first=digits second=digits from=digits/teacher_resnet20 rungs=(grouped)
    one=digits/dkd_lp few=(SOLVER.EPOCHS 2)
    many=("${on[@]}" --together 4 --part 1/8) short=(SOLVER.EPOCHS 2) data=() given=()
    bench=("${on[@]}" --eager --rounds 1 --steps 1 --teacher resnet8) other=() at_once=2
else
    on=(--device cuda) first=controls_gpu second=paper_table1 from=cifar100/teacher_resnet110
    one=cifar100/dkd_lp few=(SOLVER.EPOCHS 4 SOLVER.LR_DECAY_STAGES "[3]" SOLVER.TF32 True)
    few+=(SOLVER.SEED 100 DISTILLER.TEACHER resnet56 DISTILLER.TEACHER_TABLE_TF32 True)
    many=("${on[@]}" --together "${TOGETHER:-32}" LOG.EVAL_EVERY 10) short=()
    data=(DATASET.ROOT "${DATA:-}")
    given=(DISTILLER.TEACHER_CKPT "${TEACHER:-}") rungs=(grouped dense64 dense128)
    bench=("${on[@]}" --rounds 5 --steps 320 --teacher resnet8 --bf16) other=(--tf32) at_once=16
fi
export -f forms
piece tests 100 python3 -m pytest -v -p no:benchmark -n "$((($(nproc) + 1) / 2))" tests/test_gpu.py
if [ "${TINY:-}${DATA:-}" ]; then
    study table56 "$first" "${data[@]}" "${given[@]}" "${short[@]}" "$@"
    for name in cold warm; do # the same views twice: the second time the table has them
        piece "$name" 60 python3 tools/train.py --cfg "configs/$one.yaml" "${on[@]}" "${data[@]}" \
            "${given[@]}" "${few[@]}" LOG.PREFIX "$WORK" EXPERIMENT.PROJECT one \
            EXPERIMENT.NAME "$name"
    done
fi
piece forms 100 bash -c "$(declare -p rungs bench); forms $at_once"
if [ "${other[*]:-}" ]; then
    bench=("${on[@]}" --rounds 5 --steps 320 --teacher resnet8 "${other[@]}")
    piece forms_tf32 100 bash -c "$(declare -p rungs bench); forms $at_once"
fi
if [ "${TINY:-}${DATA:-}" ]; then
    piece teacher 0 python3 tools/train.py --cfg "configs/$from.yaml" --resume "${on[@]}" \
        "${data[@]}" "${short[@]}" LOG.PREFIX "$WORK" LOG.EVAL_EVERY 10 SOLVER.COMPILE True \
        EXPERIMENT.PROJECT teacher EXPERIMENT.NAME teacher
    trained=$WORK/teacher/teacher/
    if [ "$(cat "$WORK/ended/teacher" 2>/dev/null)" = 0 ]; then
        cp "$trained"{record.json,student_last} "$OUT"
        study table110 "$second" "${data[@]}" DISTILLER.TEACHER_CKPT "${trained}student_last" \
            "${short[@]}" "$@"
    elif [ -e "${trained}latest" ]; then
        cp "${trained}latest" "$OUT/teacher_latest"
    fi
fi
ls -l "$OUT"
