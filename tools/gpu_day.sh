#!/usr/bin/env bash
# What to do with a GPU that is lent for half an hour: most valuable first, a piece at a time.
#
#     OUT=out [DATA=data TEACHER=resnet56.pth] [MINUTES=9] bash tools/gpu_day.sh [KEY VALUE ...]
#     TINY=1 OUT=out bash tools/gpu_day.sh            # a rehearsal on a CPU, on digits
#
# Each call ends after MINUTES; the next one goes on. Without DATA tests and speed are all there is.
# Runs and checkpoints are kept in WORK; OUT receives small files to take along: what all pieces
# said, figures, packed studies, and the state of the teacher that is trained. A piece that failed
# is not tried again: OUT/log.txt says why. KEY VALUE pairs, as SOLVER.TF32 True or the best
# SOLVER.STACK, hold for the studies.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for what is to be taken along}"
WORK=${WORK:-output/gpu_day} ends=$((${MINUTES:-9} * 60))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=32 MDISTILLER_EXT_CACHE=$WORK/tables
mkdir -p "$WORK/ended" "$OUT"

piece() { # NAME MOST COMMAND...: what goes on in the next call, or, within MOST seconds, at once
    local name=$1 most=$2 left=$((ends - SECONDS)) status
    shift 2
    [ "${TINY:-}" ] && most=0
    [ -e "$WORK/ended/$name" ] && return
    [ "$left" -lt $((most > 15 ? most : 15)) ] && return
    [ "$most" -gt 0 ] && left=$most
    echo "== $name: $left s" | tee -a "$OUT/log.txt"
    timeout -s TERM -k 20 "$left" python3 "$@" >>"$OUT/log.txt" 2>&1
    status=$?
    # 124: the time was up; a run or study saved itself and goes on in the next call.
    [ "$status" -eq 124 ] && [ "$most" -eq 0 ] || echo "$status" >"$WORK/ended/$name"
    echo "$name: status $status"
}

study() { # NAME STUDY KEY VALUE...: its runs, which are taken along
    local name=$1 place=$WORK/$1/$2 archive=$OUT/$1.tar.xz
    piece "$name" 0 tools/compare.py run "studies/$2.yaml" --output "$WORK/$1" "${many[@]}" "${@:3}"
    [ -d "$place" ] || return 0
    python3 tools/pack.py pack "$place" "$archive" --unfinished --overwrite
    # In parts that may be sent; `cat` puts them together.
    if [ "$(stat -c %s "$archive")" -gt 16000000 ]; then
        split -b 15M "$archive" "$archive." && rm "$archive"
    fi
}

tests=(tests/test_graph.py)
if [ "${TINY:-}" ]; then
    on=(--device cpu) first=digits second=digits from=digits/teacher_resnet20
    many=("${on[@]}" --together 4 --part 1/8) short=(SOLVER.EPOCHS 2) data=() given=()
    ladder=("${on[@]}" --eager --rounds 1 --steps 1 --teacher resnet8 --forms none)
    grow=("${ladder[@]}") forms=(none)
else
    tests+=(tests/test_gpu.py)
    on=(--device cuda) first=paper_table1_cpu second=paper_table1 from=cifar100/teacher_resnet110
    many=("${on[@]}" --together "${TOGETHER:-24}") short=() data=(DATASET.ROOT "${DATA:-}")
    given=(DISTILLER.TEACHER_CKPT "${TEACHER:-}")
    ladder=("${on[@]}" --rounds 5 --steps 100 --runs 16)
    grow=("${on[@]}" --rounds 3 --steps 400) forms=(none grouped vmap branches)
fi
piece tests 240 -m pytest -v -n "$((($(nproc) + 1) / 2))" "${tests[@]}"
piece ladder 200 tools/bench.py "${ladder[@]}" --json "$OUT/ladder.json"
if [ "${TINY:-}${DATA:-}" ]; then
    study table56 "$first" "${data[@]}" "${given[@]}" "${short[@]}" "$@"
fi
piece ladder_tf32 200 tools/bench.py "${ladder[@]}" --tf32 --json "$OUT/ladder_tf32.json"
for form in "${forms[@]}"; do # of 1 to 64 runs, apart and stacked
    piece "grow_$form" 150 tools/bench.py "${grow[@]}" --grow --forms "$form"
done
if [ "${TINY:-}${DATA:-}" ]; then
    piece teacher 0 tools/train.py --cfg "configs/$from.yaml" --resume "${on[@]}" "${data[@]}" \
        "${short[@]}" LOG.PREFIX "$WORK" LOG.EVAL_EVERY 10 SOLVER.AMP bf16 \
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
