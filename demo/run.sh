#!/usr/bin/env bash
# The whole job on a tiny random GPT-J, with the real commands. Everything lands in demo-output/.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=demo-output
if [ -e "$OUT" ] && [ ! -e "$OUT/.made-by-demo" ]; then
    echo "error: $OUT exists and is not the demo's, so it is left alone" >&2
    exit 2
fi
rm -rf "$OUT"
mkdir "$OUT"
touch "$OUT/.made-by-demo"
cd "$OUT"

title() { printf '\n\033[1m── %s\033[0m\n' "$*"; }
run() {
    printf '\033[36m$'
    printf ' %q' "$@"
    printf '\033[0m\n'
    "$@"
}
# Expect an exit code other than 0.
run_expecting() {
    local expected=$1 code=0
    shift
    run "$@" || code=$?
    printf '(exit code %s)\n' "$code"
    [ "$code" = "$expected" ]
}

title "1. A random GPT-J as Hugging Face stores it, with the true tokenizer"
run gptj new --preset tiny --out gpt-j-tiny

title "2. Its weights under the reference's names, in a TensorFlow checkpoint"
run gptj convert gpt-j-tiny --to tf

title "3. The proof; and a copy with one square projection left untransposed"
run gptj verify --tolerance 1e-4 --report report.html
run python ../demo/damage.py converted damaged gptj_decoder/2/attn/k_proj/k_proj/kernel
run_expecting 3 gptj verify damaged --against gpt-j-tiny

title "4. Real text: the Python standard library's sources and docstrings"
LIBRARY=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mkdir -p text/train text/held-out
cp -r "$LIBRARY"/*.py "$LIBRARY"/asyncio "$LIBRARY"/json text/train/
mv text/train/f*.py text/held-out/
run gptj data text text/train --glob '*.py' --tokenizer gpt-j-tiny --max-sequence-length 128 --out data
run gptj data text text/held-out --tokenizer gpt-j-tiny --max-sequence-length 128 --out held-out

title "5. Training: stopped in the middle, and resumed from its checkpoint"
SETTINGS=(
    --set train_input.max_sequence_length=128 --set train_input.batch_size=8
    --set train_input.shuffle_buffer=20000
    --set eval_input.max_sequence_length=128 --set eval_input.batch_size=8
    --set eval_input.data_dir=held-out
    --set optimizer.learning_rate=0.002 --set runconfig.log_step_count_steps=20
)
run gptj eval "${SETTINGS[@]}"
printf '\033[36m$ gptj train --init-from converted/ … --max-steps 300\033[0m\n'
gptj train --init-from converted/ "${SETTINGS[@]}" --max-steps 300 &
TRAINING=$!
# Once it has logged a few times, ask it to stop, as Ctrl-C would.
until [ "$(cat model_dir/metrics.jsonl 2>/dev/null | wc -l)" -ge 4 ]; do
    kill -0 $TRAINING
    sleep 0.2
done
printf '\033[36m$ kill -TERM %s\033[0m\n' $TRAINING
kill -TERM $TRAINING
code=0
wait $TRAINING || code=$?
printf '(exit code %s)\n' "$code"
[ "$code" = 143 ]
run gptj train --max-steps 300
run gptj runs model_dir --html runs.html

title "6. What it has learnt, and the way back to Hugging Face"
run gptj eval
run gptj convert model_dir --to hf
run gptj generate --prompt "def __init__(self" --max-new-tokens 24
run python ../demo/agree.py converted-hf model_dir "def __init__(self" 24

title "Done in ${SECONDS} s. Everything is in $OUT/; to look at: report.html and runs.html there"
